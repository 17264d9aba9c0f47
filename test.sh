#!/usr/bin/env bash
# Format, lint and all tests that need no GPU. bash test.sh -k grpo passes arguments on to pytest.
set -euo pipefail
NEED="pytest transformers ruff jinja2 jupytext" source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
"$PYTHON" -m ruff format --check --quiet .
"$PYTHON" -m ruff check --quiet .
"$PYTHON" -m pytest -q "$@"
