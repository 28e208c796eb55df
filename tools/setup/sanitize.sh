#!/bin/sh
# Builds the extensions with AddressSanitizer and UndefinedBehaviorSanitizer in a tree of their own and runs the tests of the
# engines against them there. A finding aborts the test process.
#
# usage: sanitize.sh PYTHON DIRECTORY [PYTEST ARGUMENT...]
set -eu

python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
tree=$2
shift 2

mkdir -p "$tree"
if ! PFVOL_SANITIZE=1 "$python" setup.py -q build --build-base "$tree/build" --build-lib "$tree/lib" >"$tree/log" 2>&1; then
    cat "$tree/log" >&2
    exit 1
fi
# A copy of the tests beside the build: run from there, `import datapath` can find nothing else.
rm -rf "$tree/lib/tests" "$tree/lib/tools"
cp -R tests tools pyproject.toml "$tree/lib/"
cd "$tree/lib"

# The leaks that it would report are the interpreter's. PYTHONMALLOC: so that every object is an allocation of its own.
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:allocator_may_return_null=1
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export PYTHONMALLOC=malloc PYTHONPATH=$PWD
LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
export LD_PRELOAD
if [ $# -eq 0 ]; then
    # Every test that drives the engines, in its own process or in one that it starts.
    drives='^(from|import) (datapath|sdcengine_fakes|tests\.support\.sdspair)|"tools" / "fuzz"'
    # shellcheck disable=SC2046
    set -- $(grep -rlE "$drives" tests/unit tests/integration tests/property --include 'test_*.py' | sort)
fi
exec "$python" -m pytest -q -p no:cacheprovider -o timeout=600 -o faulthandler_timeout=550 "$@"
