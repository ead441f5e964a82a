#!/usr/bin/env bash
# Live tests that need root and Debian packages but no Docker: live.sh TESTFILE...
#
# Installs what they use. What a machine cannot do fails, loudly; whoever wants to go without says so
# with VSWAP_CI_LIVE=no.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=deploy/packages.sh
source deploy/packages.sh

fail() {
    printf '\n*** live tests: %s\n*** None of %s ran. VSWAP_CI_LIVE=no leaves them out.\n' \
        "$1" "${FILES[*]}" >&2
    exit 1
}

FILES=("$@")
if [[ ${VSWAP_CI_LIVE:-yes} == no ]]; then
    printf '\n*** live tests left out: VSWAP_CI_LIVE=no (%s)\n' "${FILES[*]}" >&2
    exit 0
fi
[[ $EUID == 0 ]] || fail "they need root"
command -v apt-get >/dev/null || fail "this is no Debian to install packages on"
packages=(libnbd-bin fuse3 util-linux gcc libc6-dev procps)
case "${FILES[*]}" in *conformance* | *bench*) packages+=(nbdkit fio qemu-utils e2fsprogs) ;; esac
case "${FILES[*]}" in *partitions*) packages+=(iproute2 iptables) ;; esac
case "${FILES[*]}" in *guest*) packages+=(qemu-system-x86 busybox-static cpio kmod) ;; esac
install "${packages[@]}" || fail "apt-get cannot install ${packages[*]}"
exec .venv/bin/pytest -m live "${FILES[@]}"
