#!/usr/bin/env bash
# A Docker engine of its own for `make ci`, on a Debian machine that has none running.
#
#   deploy/engine.sh run COMMAND...   start it, run the command with DOCKER_HOST set, remove it
#   deploy/engine.sh up | down        the two halves, for work by hand
#   deploy/engine.sh enter COMMAND... run a command in the engine's network
#
# Who has Docker needs none of this. The engine lives in network, mount and process namespaces of
# its own and reaches the outside through slirp4netns: it cannot touch the host's firewall, bridges
# or forwarding, and whatever happens, ending its first process ends every container.
#
# Registries may be out of reach where this runs, so the images that the project is built from are
# replaced by stand-ins of the same name, made from Debian packages. Needs root and the packages
# that deploy/ci.sh installs.
set -euo pipefail

PYTHON_IMAGE=python:3.12-slim-bookworm
REDIS_IMAGE=redis:7.2-bookworm
SUITE=bookworm
MIRROR=${VSWAP_ENGINE_MIRROR:-http://deb.debian.org/debian}
PACKAGES=ca-certificates,python3,python3-venv,redis-server

HOME_DIR=${VSWAP_ENGINE_DIR:-/var/tmp/vswap-engine}
RUN=$HOME_DIR/run
# This host may reach its package index only through a certificate of its own.
BUNDLE=${PIP_CERT:-${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}}
KEY=$({ echo "$SUITE $PACKAGES"; cat "$BUNDLE" 2>/dev/null || true; } | sha256sum)
BASE=$HOME_DIR/cache/$SUITE-${KEY:0:12}.tar
CGROUP=vswap-engine
export DOCKER_HOST=unix://$RUN/docker.sock

say() { echo "engine: $*" >&2; }
die() { say "$*"; exit 1; }

alive() { [[ -s $1 ]] && kill -0 "$(<"$1")" 2>/dev/null; }

up() {
    [[ $EUID == 0 ]] || die "needs root"
    local tool
    for tool in dockerd docker slirp4netns debootstrap iptables unshare nsenter; do
        command -v "$tool" >/dev/null || die "$tool is missing (deploy/ci.sh installs it)"
    done
    [[ -c /dev/net/tun ]] || die "/dev/net/tun is missing"
    if alive "$RUN/init.pid" && docker info >/dev/null 2>&1; then
        say "runs already at $DOCKER_HOST"
        return
    fi
    down
    mkdir -p "$RUN"
    base
    # The first process of the namespaces only waits; dockerd is its child.
    DATA=$RUN setsid unshare --net --mount --pid --fork --kill-child --mount-proc \
        bash -c '
            ip link set lo up
            until [[ -e $DATA/network ]]; do sleep 0.05; done
            dockerd --data-root "$DATA/data" --exec-root "$DATA/exec" -p "$DATA/dockerd.pid" \
                -H "unix://$DATA/docker.sock" --dns 10.0.2.3 --cgroup-parent '"$CGROUP"' \
                --log-level warn &
            trap "kill %1; wait; exit" TERM
            wait' >"$RUN/dockerd.log" 2>&1 </dev/null &
    local outer=$! inner=
    for _ in {1..100}; do
        inner=$(pgrep -P "$outer" | head -n 1) && [[ -n $inner ]] && break
        sleep 0.05
    done
    [[ -n $inner ]] || die "the namespaces cannot be made: $(tail -n 1 "$RUN/dockerd.log")"
    echo "$outer" >"$RUN/unshare.pid"
    echo "$inner" >"$RUN/init.pid"
    setsid slirp4netns --configure --mtu=65520 --disable-host-loopback "$inner" tap0 \
        >"$RUN/slirp.log" 2>&1 </dev/null &
    echo $! >"$RUN/slirp.pid"
    disown -a
    for _ in {1..100}; do
        nsenter -t "$inner" -n ip route show default 2>/dev/null | grep -q . && break
        sleep 0.05
    done
    touch "$RUN/network"
    for _ in {1..300}; do
        docker info >/dev/null 2>&1 && break
        alive "$RUN/init.pid" || break
        sleep 0.1
    done
    docker info >/dev/null 2>&1 || die "dockerd does not start: $(tail -n 3 "$RUN/dockerd.log")"
    images
    say "runs at $DOCKER_HOST"
}

# A Debian tree with Python and Redis, kept between runs: it takes a minute to make.
base() {
    [[ -s $BASE ]] && return
    say "building a base image from Debian packages"
    rm -rf "$HOME_DIR/cache"
    mkdir -p "$HOME_DIR/cache"
    local tree
    tree=$(mktemp -d "$HOME_DIR/tree.XXXXXX")
    debootstrap --variant=minbase --include="$PACKAGES" "$SUITE" "$tree" "$MIRROR" \
        >"$RUN/debootstrap.log" 2>&1 || {
        tail -n 5 "$RUN/debootstrap.log" >&2
        rm -rf --one-file-system "$tree"
        die "debootstrap failed"
    }
    # What the images of those names have: `python` on PATH. (Debian's redis makes the user.)
    ln -s /usr/bin/python3 "$tree/usr/local/bin/python"
    if [[ -f $BUNDLE ]]; then
        cp "$BUNDLE" "$tree/etc/ssl/certs/ca-certificates.crt"
        printf '[global]\ncert = /etc/ssl/certs/ca-certificates.crt\n' >"$tree/etc/pip.conf"
    fi
    rm -rf "$tree"/var/cache/apt/archives/*.deb "$tree"/var/lib/apt/lists/*
    tar -C "$tree" -cf "$BASE.new" . && mv "$BASE.new" "$BASE"
    rm -rf --one-file-system "$tree"
}

images() {
    docker image inspect "$PYTHON_IMAGE" >/dev/null 2>&1 ||
        docker import -c 'CMD ["python3"]' "$BASE" "$PYTHON_IMAGE" >/dev/null
    docker image inspect "$REDIS_IMAGE" >/dev/null 2>&1 || docker tag "$PYTHON_IMAGE" "$REDIS_IMAGE"
}

down() {
    local file
    if alive "$RUN/init.pid"; then
        # The ask first, so that containers stop as they should; then the namespaces' end.
        kill -TERM "$(<"$RUN/init.pid")" 2>/dev/null || true
        for _ in {1..200}; do alive "$RUN/init.pid" || break; sleep 0.1; done
    fi
    for file in init unshare slirp; do
        alive "$RUN/$file.pid" && kill -KILL "$(<"$RUN/$file.pid")" 2>/dev/null || true
    done
    for _ in {1..50}; do alive "$RUN/init.pid" || break; sleep 0.1; done
    find /sys/fs/cgroup -depth -type d -path "*/$CGROUP*" -exec rmdir {} + 2>/dev/null || true
    rm -rf --one-file-system "$RUN" "$HOME_DIR"/tree.??????
}

run() {
    trap down EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    up
    "$@"
}

enter() { nsenter -t "$(<"$RUN/init.pid")" -n "$@"; }

case ${1:-} in
    up) up ;;
    down) down ;;
    run | enter) "$@" ;;
    *) sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
