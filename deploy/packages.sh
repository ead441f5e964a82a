# To be sourced: `install PACKAGE...` by apt-get, but only what is missing, and with another try,
# since mirrors are sometimes busy.
install() {
    local package missing=()
    for package; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q ' installed$' ||
            missing+=("$package")
    done
    ((${#missing[@]})) || return 0
    echo "installing ${missing[*]}" >&2
    export DEBIAN_FRONTEND=noninteractive
    # A third party's broken repository is no reason to stop: what counts is the install.
    apt-get -qq update || echo "apt-get update had errors; going on" >&2
    apt-get -qq install --yes --no-install-recommends "${missing[@]}" >/dev/null ||
        { sleep 5; apt-get -qq install --yes --no-install-recommends "${missing[@]}" >/dev/null; }
}
