"""What the exercises' tests share: where the functions to grade come from, and comparisons that say what they expected."""

import importlib
import importlib.util
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


def source(path: str):
    """ "kernels.kl_k3" -> the project's function kl_k3."""
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def answers(
    exercise: str, mirrors: tuple[str, ...], folder: str | Path | None = None
) -> SimpleNamespace:
    """The functions to grade, by name: the project's own, or those of folder/exercise.py (the folder seen from the repository root)."""
    names = [path.rsplit(".", 1)[1] for path in mirrors]
    if not folder:
        return SimpleNamespace(**{name: source(path) for name, path in zip(names, mirrors)})
    path = ROOT / folder / f"{exercise}.py"
    if not path.exists():
        raise Unusable("is not there")
    spec = importlib.util.spec_from_file_location(exercise, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return SimpleNamespace(**{name: getattr(module, name) for name in names})
    except Exception as e:
        lines = (
            [e.lineno]
            if isinstance(e, SyntaxError)
            else [
                f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == str(path)
            ]
        )
        raise Unusable(
            f"does not import, {type(e).__name__}{f' line {lines[-1]}' if lines else ''}: {getattr(e, 'msg', e)}"
        ) from e


def same(got, want, what: str, atol: float = 1e-6) -> None:
    """AssertionError with both values unless got is want: tensors (shape and dtype too) and floats up to atol, anything else exactly."""
    __tracebackhide__ = True  # pytest then shows the line that called
    got = got.detach() if isinstance(got, Tensor) else got
    if isinstance(want, Tensor):
        fits = (
            isinstance(got, Tensor)
            and got.shape == want.shape
            and got.dtype == want.dtype
            and torch.allclose(got.double(), want.double(), rtol=0, atol=atol)
        )
    elif isinstance(want, float):
        got = got.item() if isinstance(got, Tensor) and got.ndim == 0 else got
        fits = isinstance(got, (int, float)) and abs(got - want) <= atol
    else:
        fits = type(got) is type(want) and got == want
    if not fits:
        shapes = [
            f", {tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else f", {type(x).__name__}"
            for x in (want, got)
        ]
        raise AssertionError(f"{what}\nexpected{shapes[0]}:\n{want}\ngot{shapes[1]}:\n{got}")


def refuses(f, *args, says: str = "", error=ValueError, **more) -> None:
    """AssertionError unless f(*args) raises `error` with `says` in its message."""
    __tracebackhide__ = True
    try:
        got = f(*args, **more)
    except error as e:
        if says in str(e):
            return
        got = f"the message lacks {says!r}: {e}"
    raise AssertionError(
        f"{f.__name__}({', '.join(map(SHORT.repr, args))})\nexpected:\n{error.__name__} {says}\ngot:\n{got}"
    )


@contextmanager
def loads():
    """How many elements each tl.load of Triton's interpreter reads, as a list. What a mask without `other` leaves out is NaN here; a GPU says it is undefined."""
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
