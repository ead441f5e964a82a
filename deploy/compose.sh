#!/usr/bin/env bash
# docker compose, whichever of its two versions is here, on the project's file.
#
#   deploy/compose.sh up | load | down     what `make up`, `make load` and `make down` run
#   deploy/compose.sh ARGUMENTS...         anything else goes to compose: ps, logs, exec, ...
set -euo pipefail
cd "$(dirname "$0")"

PROJECT=${COMPOSE_PROJECT_NAME:-vswap}
UP_S=${VSWAP_UP_S:-120}

if docker compose version >/dev/null 2>&1; then
    compose=(docker compose)
elif command -v docker-compose >/dev/null; then
    compose=(docker-compose)
    # Its own builder: the one of the docker command needs a plugin that may not be there.
    export COMPOSE_DOCKER_CLI_BUILD=0 DOCKER_BUILDKIT=0
else
    echo "neither 'docker compose' nor 'docker-compose' is installed" >&2
    exit 2
fi
compose+=(--project-name "$PROJECT" --file compose.yaml)

# Version 1 has no `up --wait`: ask the containers themselves.
wait_healthy() {
    local until=$((SECONDS + UP_S)) states
    while :; do
        states=$("${compose[@]}" ps -q | xargs -r docker inspect --format \
            '{{index .Config.Labels "com.docker.compose.service"}} {{if .State.Running}}{{.State.Health.Status}}{{else}}{{.State.Status}}{{end}}')
        grep -qv ' healthy$' <<<"$states" || break
        if ((SECONDS >= until)); then
            echo "not healthy after $UP_S s:" >&2
            grep -v ' healthy$' <<<"$states" >&2
            "${compose[@]}" logs --tail 20 $(grep -v ' healthy$' <<<"$states" | cut -d' ' -f1) >&2
            exit 1
        fi
        sleep 0.5
    done
}

case ${1:-} in
    up)
        "${compose[@]}" up --build --detach
        wait_healthy
        cat <<TEXT
The cluster is up. Some commands to go on:
  deploy/compose.sh exec coordinator vswap status
  make load
  deploy/compose.sh exec coordinator vswap drain redis-a
  make down
TEXT
        ;;
    load) exec "${compose[@]}" run --rm -T load </dev/null ;;
    down) exec "${compose[@]}" --profile load down --volumes --remove-orphans ;;
    *) exec "${compose[@]}" "$@" ;;
esac
