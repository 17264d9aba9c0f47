# Sourced by train.sh and test.sh: sets PYTHON to one that has the packages (test.sh names more of them in NEED), making .venv on first use.
cd "$(dirname "${BASH_SOURCE[0]}")"
PYTHON=${PYTHON:-python3}
has_packages() {   # looks, without importing: torch alone takes seconds
    "$1" -c "import sys, importlib.util as u; sys.exit(any(u.find_spec(name) is None for name in sys.argv[1:]))" torch numpy tokenizers safetensors tqdm gguf matplotlib ${NEED:-}
}
if ! has_packages "$PYTHON"; then
    "$PYTHON" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' \
        || { echo "drirl: want Python 3.10 to 3.13, found $("$PYTHON" --version); set PYTHON=/path/to/python"; exit 2; }
    [ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
    PYTHON=$PWD/.venv/bin/python
    has_packages "$PYTHON" || echo "installing the packages of requirements.txt and requirements-extra.txt into .venv"
    has_packages "$PYTHON" || "$PYTHON" -m pip install --disable-pip-version-check -q -r requirements.txt -r requirements-extra.txt
fi
export PYTHON PYTHONUNBUFFERED=1
