"""Tests import the modules of the repository root. Without a GPU, Triton kernels run in its interpreter, which must be asked for before triton is imported."""
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
