#!/usr/bin/env bash
# All tests that need no GPU. bash test.sh -k grpo passes arguments on to pytest.
set -euo pipefail
NEED="pytest transformers" source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
"$PYTHON" -m pytest -q "$@" tests
