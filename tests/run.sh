#!/usr/bin/env bash
# Lint, types, all tests, in the environment of the quickstart. --soak adds the long tests.
set -euo pipefail
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/demo/env.sh"
setup_environment
marks="not soak" processes="-n 2 --dist loadfile"  # a file's tests share what they train
if [ "${1:-}" = --soak ]; then
    marks="soak or not soak" processes="-n 0"  # some measure time and memory
    shift
fi
cd "$root"
echo "== ruff"
"$python" -m ruff check .
"$python" -m ruff format --check .
echo "== mypy"
"$python" -m mypy
echo "== pytest"
exec "$python" -m pytest -m "$marks" $processes "$@"
