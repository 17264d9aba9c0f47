#!/usr/bin/env bash
# Format, lint and all tests that need no GPU. bash test.sh -k grpo passes arguments on to pytest.
set -euo pipefail
NEED="pytest xdist transformers ruff jupytext"
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
"$PYTHON" -m ruff format --check --quiet .
"$PYTHON" -m ruff check --quiet .
if [ $# != 0 ]; then
    exec "$PYTHON" -m pytest -q "$@"
fi
# two processes of a thread each: 5 minutes instead of 8 on two Zen 4 cores
OMP_NUM_THREADS=1 "$PYTHON" -m pytest -q -n 2 --dist worksteal
echo "not run, as they need a GPU: $("$PYTHON" -m pytest -q --collect-only -m gpu | tail -n 1)"
