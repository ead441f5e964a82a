#!/usr/bin/env bash
# The part of `make ci` that needs root, Debian packages or a Docker engine: tests marked `live`.
#
# First those without Docker (deploy/live.sh), then the compose cluster.
#
# On a machine with a running Docker it uses that one. Elsewhere it installs an engine from Debian
# and runs it apart from the host (deploy/engine.sh). What it cannot do fails, loudly; whoever wants
# to go without says so with VSWAP_CI_LIVE=no.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=deploy/packages.sh
source deploy/packages.sh

COMMAND=(.venv/bin/pytest -m live tests/live/test_compose.py "$@")

fail() {
    printf '\n*** live tests: %s\n*** Nothing of them ran. VSWAP_CI_LIVE=no leaves them out.\n' "$*" >&2
    exit 1
}

have_compose() { docker compose version >/dev/null 2>&1 || command -v docker-compose >/dev/null; }
have_docker() { docker info >/dev/null 2>&1 && have_compose; }

if [[ ${VSWAP_CI_LIVE:-yes} == no ]]; then
    printf '\n*** live tests left out: VSWAP_CI_LIVE=no\n' >&2
    exit 0
fi
without_docker=()
for file in tests/live/test_*.py; do
    [[ $file == */test_compose.py ]] || without_docker+=("$file")
done
deploy/live.sh "${without_docker[@]}"
if have_docker; then
    exec "${COMMAND[@]}"
fi
[[ $EUID == 0 ]] || fail "no Docker runs here, and starting one needs root"
command -v apt-get >/dev/null || fail "no Docker runs here, and this is no Debian to install it on"
install docker.io iptables debootstrap slirp4netns procps util-linux ||
    fail "apt-get cannot install what the engine needs"
docker compose version >/dev/null 2>&1 || install docker-compose || fail "no docker-compose"
# Where there is a service manager, installing it has started it.
if have_docker; then
    exec "${COMMAND[@]}"
fi
exec deploy/engine.sh run "${COMMAND[@]}"
