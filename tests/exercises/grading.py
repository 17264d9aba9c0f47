"""What the exercises' tests share: the functions to grade, and comparisons that say what they
expected."""

import importlib.util
import pkgutil
import reprlib
import traceback
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
SHORT = reprlib.Repr()
SHORT.maxlist = 2


class Unusable(Exception):
    """An answer that can't be graded; the message ends a sentence about it."""


def answers(exercise: str, mirrors: tuple[str, ...], folder: str | Path = "") -> SimpleNamespace:
    """The functions to grade, by name: the project's own (mirrors: "grpo_s.loss"), or the folder's.

    The answers are in folder/exercise.py, the folder seen from the repository root.
    """
    names = [path.rpartition(".")[2] for path in mirrors]
    if not folder:
        return SimpleNamespace(**dict(zip(names, map(pkgutil.resolve_name, mirrors))))
    path = ROOT / folder / f"{exercise}.py"
    if not path.exists():
        raise Unusable("is not there")
    spec = importlib.util.spec_from_file_location(exercise, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return SimpleNamespace(**{name: getattr(module, name) for name in names})
    except Exception as e:
        frames = traceback.extract_tb(e.__traceback__)
        lines = [f.lineno for f in frames if f.filename == str(path)]
        line = e.lineno if isinstance(e, SyntaxError) else lines[-1] if lines else None
        where = f" line {line}" if line else ""
        message = getattr(e, "msg", e)
        raise Unusable(f"does not import, {type(e).__name__}{where}: {message}") from e


def same(got, want, what: str, atol: float = 1e-6) -> None:
    """AssertionError with both values unless got is want.

    Tensors (shape and dtype too) and floats may differ by atol, anything else not at all.
    """
    __tracebackhide__ = True  # pytest then shows the line that called
    got = got.detach() if isinstance(got, Tensor) else got
    fits = type(got) is type(want) and got is not None
    if isinstance(want, Tensor):
        fits = fits and got.shape == want.shape and got.dtype == want.dtype
        fits = fits and torch.allclose(got.double(), want.double(), rtol=0, atol=atol)
    elif isinstance(want, float):
        fits = fits and abs(got - want) <= atol
    else:
        fits = fits and got == want
    if not fits:
        kinds = [f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
                 for x in (want, got)]  # fmt: skip
        expected, found = f"expected, {kinds[0]}:\n{want}", f"got, {kinds[1]}:\n{got}"
        raise AssertionError(f"{what}\n{expected}\n{found}")


def refuses(f, *args, says: str = "", error=ValueError, **more) -> None:
    """AssertionError unless f(*args) raises `error` with `says` in its message."""
    __tracebackhide__ = True
    try:
        got = f(*args, **more)
    except error as e:
        if says in str(e):
            return
        got = f"the message lacks {says!r}: {e}"
    call = f"{f.__name__}({', '.join(map(SHORT.repr, args))})"
    raise AssertionError(f"{call}\nexpected:\n{error.__name__} {says}\ngot:\n{got}")


@contextmanager
def loads():
    """How many elements each tl.load of Triton's interpreter reads, as a list.

    What a mask without `other` leaves out is NaN here; a GPU says it is undefined.
    """
    from triton.runtime.interpreter import InterpreterBuilder

    counts, load = [], InterpreterBuilder.create_masked_load

    def counted(builder, pointers, mask, other, *more):
        counts.append(int(mask.data.sum()))
        got = load(builder, pointers, mask, other, *more)
        if other is None and got.data.dtype.kind == "f":
            got.data[~mask.data] = float("nan")
        return got

    with mock.patch.object(InterpreterBuilder, "create_masked_load", counted):
        yield counts
