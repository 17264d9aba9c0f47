#!/usr/bin/env bash
# Format, lint and all tests that need no GPU. bash test.sh -k grpo passes arguments on to pytest.
set -euo pipefail
NEED="pytest xdist transformers ruff jinja2 jupytext" source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
"$PYTHON" -m ruff format --check --quiet .
"$PYTHON" -m ruff check --quiet .
if [ $# = 0 ]; then # two processes of a thread each: 4.5 minutes instead of 8 on two Zen 4 cores
    export OMP_NUM_THREADS=1
    set -- -n 2 --dist worksteal
fi
"$PYTHON" -m pytest -q "$@"
