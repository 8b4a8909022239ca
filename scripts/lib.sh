# Shared by the scripts in this folder; to be sourced.
# shellcheck shell=bash

# The oldest Rust that builds the workspace; Cargo.toml has it too.
rust_min=1.88

# What the RDMA transport is built with (crate ibverbs-sys).
# shellcheck disable=SC2034
rdma_build_packages=(cmake make g++ pkg-config libclang-dev libnl-3-dev libnl-route-3-dev libibverbs-dev)

say() { printf '\033[1m==>\033[0m %s\n' "$*" >&2; }
die() { printf '%s: %s\n' "${0##*/}" "$*" >&2; exit 1; }

need_root() {
    [ "$(id -u)" = 0 ] || die "needs root: processes are stopped, read and restored; run it with sudo"
    [ "$(uname -m)" = x86_64 ] || die "needs an x86-64 machine, this is $(uname -m)"
}

# apt_install PACKAGE...: installs what is missing; fails when that can't be done.
apt_install() {
    local package missing=()
    for package in "$@"; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' ||
            missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    command -v apt-get >/dev/null || { echo "no apt-get to install ${missing[*]}" >&2; return 1; }
    say "installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null 2>&1 ||
        { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null; }
}

# Packages one by one: what can't be had is named, and the tests that need it skip themselves.
apt_install_optional() {
    local package
    for package in "$@"; do
        apt_install "$package" || echo "not installed: $package; tests that need it are skipped" >&2
    done
}

rust_is_new_enough() {
    local version
    version=$(rustc --version 2>/dev/null | awk '{print $2}') && [ -n "$version" ] &&
        command -v cargo >/dev/null &&
        [ "$(printf '%s\n' "$rust_min" "${version%%-*}" | sort -V | head -n 1)" = "$rust_min" ]
}

# A cargo that is new enough: the one in place, else by rustup where that is installed or packaged.
need_rust() {
    [ -f "${CARGO_HOME:-$HOME/.cargo}/env" ] && . "${CARGO_HOME:-$HOME/.cargo}/env"
    rust_is_new_enough && return
    if command -v rustup >/dev/null || apt_install rustup 2>/dev/null; then
        say "installing Rust (at least $rust_min)"
        rustup toolchain install stable --profile minimal --component rustfmt --component clippy
        rustup default stable
        PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
    fi
    hash -r
    rust_is_new_enough || die "no Rust $rust_min or newer; install it with rustup and try again"
}
