#!/bin/sh
# Makes sure that this machine has what pfvol needs from the operating system. Looks first and installs only what is missing:
# with apt-get as root or through sudo, otherwise it says what to install and fails. When all is there it changes nothing and
# needs no network.
#
# usage: system.sh build|demo|hosts|test        what the machine is wanted for
set -eu

purpose=${1:-build}
python=${PYTHON:-python3}
PATH=$PATH:/usr/sbin:/sbin
packages=

missing() { # PACKAGE...: they are needed
    packages="$packages $*"
}

has() { command -v "$1" >/dev/null 2>&1; }

has gcc && has g++ || missing build-essential
has pkg-config || missing pkg-config
if ! has pkg-config || ! pkg-config --exists fuse3; then missing libfuse3-dev; fi
has fusermount3 || missing fuse3
if has "$python"; then
    "$python" -c 'import ensurepip, venv' 2>/dev/null || missing python3-venv
    "$python" -c 'import pathlib, sys, sysconfig; sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())' ||
        missing python3-dev
else
    missing python3 python3-venv python3-dev
fi
case $purpose in
demo) has fio || missing fio ;;
hosts)
    has fio || missing fio
    has ip || missing iproute2
    has nft || missing nftables
    ;;
test)
    has ip || missing iproute2
    has nft || missing nftables
    has fio || missing fio
    has mkfs.xfs || missing xfsprogs
    has mkfs.ext4 || missing e2fsprogs
    has losetup || missing mount
    ;;
esac

if [ -n "$packages" ]; then
    if [ "$(id -u)" = 0 ]; then
        as_root=
    elif has sudo && sudo -n true 2>/dev/null; then
        as_root=sudo
    else
        as_root=none
    fi
    if [ "$as_root" = none ] || ! has apt-get; then
        if [ "$purpose" = demo ] && [ "$packages" = " fio" ]; then
            echo "fio is not installed: the demo goes on without it" >&2
            exit 0
        fi
        echo "pfvol needs packages that are not installed, and this user cannot install them. Run:" >&2
        echo "    apt-get install$packages" >&2
        echo "as root (or install what corresponds to them on this system), then try again." >&2
        exit 1
    fi
    echo "installing$packages" >&2
    log=$(mktemp)
    # shellcheck disable=SC2086  # one word a package
    if ! { $as_root apt-get update -qq && $as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends $packages; } >"$log" 2>&1 </dev/null; then
        tail -n 20 "$log" >&2
        rm -f "$log"
        echo "apt-get failed (above): install$packages by hand, then try again." >&2
        exit 1
    fi
    rm -f "$log"
fi

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "pfvol needs Python 3.11 or later; $python is $("$python" -V 2>&1). Name another: make PYTHON=python3.12 …" >&2
    exit 1
fi

if [ "$purpose" != build ] && [ ! -e /dev/fuse ]; then
    modprobe fuse 2>/dev/null || true
    if [ ! -e /dev/fuse ]; then
        echo "there is no /dev/fuse: load the fuse module (modprobe fuse), or give the container the device (--device /dev/fuse)" >&2
        exit 1
    fi
fi
