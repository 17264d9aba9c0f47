# Sourced by train.sh and test.sh: sets PYTHON to one that has the packages; test.sh names more in
# NEED. Makes .venv on first use.
cd "$(dirname "${BASH_SOURCE[0]}")"
PYTHON=${PYTHON:-python3}
has_packages() { # looks, without importing: torch alone takes seconds
    "$1" - torch numpy tokenizers safetensors tqdm gguf matplotlib ${NEED:-} <<'LOOK'
import importlib.util, sys
sys.exit(any(importlib.util.find_spec(name) is None for name in sys.argv[1:]))
LOOK
}
if ! has_packages "$PYTHON"; then
    "$PYTHON" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || {
        echo "drirl: want Python 3.10 to 3.13, found $("$PYTHON" --version); set PYTHON=/path"
        exit 2
    }
    [ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
    PYTHON=$PWD/.venv/bin/python
    if ! has_packages "$PYTHON"; then
        echo "installing the packages of pyproject.toml into .venv"
        "$PYTHON" -m pip install --disable-pip-version-check -q \
            ".[weights,pictures,templates${NEED:+,dev}]"
    fi
fi
export PYTHON PYTHONUNBUFFERED=1
