#!/bin/sh
# Makes (or repairs) the virtual environment of this checkout and installs pfvol into it in place, with its extensions built.
# What is installed already is not fetched again, so that it also works offline then.
#
# usage: environment.sh DIRECTORY
set -eu

directory=$1
python=${PYTHON:-python3}

quiet() { # COMMAND...: its output only if it fails
    log=$(mktemp)
    if ! "$@" >"$log" 2>&1 </dev/null; then
        tail -n 60 "$log" >&2
        rm -f "$log"
        echo "failed (above): $*" >&2
        exit 1
    fi
    rm -f "$log"
}

if ! "$directory/bin/python" -c 'import pip' 2>/dev/null; then
    echo "making the virtual environment $directory" >&2
    quiet "$python" -m venv --clear "$directory"
fi
echo "installing pfvol and its dependencies into $directory (minutes the first time)" >&2
pip="$directory/bin/python -m pip install --quiet --disable-pip-version-check --no-input"
# First what builds the extensions, as they are built without isolation: in place, against these very versions.
# shellcheck disable=SC2086
quiet $pip 'setuptools>=77' 'cython>=3.1,<4' wheel
# shellcheck disable=SC2086
quiet $pip --no-build-isolation --editable '.[dev]'
