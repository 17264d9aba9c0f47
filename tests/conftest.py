"""Tests import the modules of the repository root. Triton kernels run in its interpreter, which must be asked for before triton is imported; with -m gpu they are compiled."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def pytest_configure(config):
    if config.getoption("-m") != "gpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
