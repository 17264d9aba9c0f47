"""What the exercises' tests share: the functions to grade, and comparisons that say what they
expected."""

import ast
import functools
import importlib.util
import inspect
import pkgutil
import reprlib
import subprocess
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
STUBS = ROOT / "teach" / "exercises"
PAGE = ROOT / "teach" / "WALKTHROUGH.md"
SHORT = reprlib.Repr()
SHORT.maxlist = 2


class Unusable(Exception):
    """An answer that can't be graded; the message ends a sentence about it."""


# ---------------------------------------------------------------------------- what is graded


def load(name: str, path: Path):
    """The module in a file. Unusable says which line of it fails."""
    if not path.exists():
        raise Unusable("is not there")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as e:
        frames = traceback.extract_tb(e.__traceback__)
        lines = [f.lineno for f in frames if f.filename == str(path)]
        line = e.lineno if isinstance(e, SyntaxError) else lines[-1] if lines else None
        where = f" line {line}" if line else ""
        message = str(getattr(e, "msg", e)).split("\n")[0]
        raise Unusable(f"does not import, {type(e).__name__}{where}: {message}") from e
    return module


def answers(exercise: str, grader, given: str | Path = "") -> SimpleNamespace:
    """The functions to grade, by name: those of grader.MIRRORS ("grpo_s.loss"), or a learner's.

    given: a folder with exercise.py, or one file of answers to all exercises, seen from the root.
    """
    names = [path.rpartition(".")[2] for path in grader.MIRRORS]
    if not given:
        found = dict(zip(names, map(pkgutil.resolve_name, grader.MIRRORS)))
    else:
        path = ROOT / given
        if path.is_file():  # its functions take the places of the stubs'
            whole = load("answers", path)
            refuse_borrowed(whole, path, {*grader.MIRRORS})  # others it may need elsewhere
            module, more = load(exercise, STUBS / f"{exercise}.py"), vars(whole)
            own = vars(module)
            own.update({k: v for k, v in more.items() if k in own and not k.startswith("__")})
        else:
            module = load(exercise, path / f"{exercise}.py")
            borrowed = {*grader.MIRRORS, *getattr(grader, "BORROWED", ())}
            refuse_borrowed(module, path / f"{exercise}.py", borrowed)
        if missing := [name for name in names if not hasattr(module, name)]:
            raise Unusable(f"has no function {missing[0]}")
        found = {name: getattr(module, name) for name in names}
    changes = getattr(grader, "CHANGES", ())
    return SimpleNamespace(**{name: guarded(f, changes) for name, f in found.items()})


def refuse_borrowed(module, path: Path, paths: set[str]) -> None:
    """Unusable if an answer takes one of `paths`: imports it, or reaches it in a module."""
    ours = [p for p in paths if not p.startswith("teach.")]
    banned = {id(f): p for p in ours if (f := resolved(p)) is not None}  # None: no Triton here
    # what stands there under any name; what a function imports or reaches is found in the text
    found = [(banned[id(v)], 0) for v in vars(module).values() if id(v) in banned]
    names, tree = dict(vars(module)), ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [(p, node.lineno) for p in whole if p.startswith("teach.exercises.answers")]
            for alias, p in zip(node.names, whole):
                here = alias.asname or alias.name
                names.setdefault(here, resolved(p))
                replaced = node in tree.body and id(vars(module).get(here)) not in banned
                if id(resolved(p)) in banned and not replaced:  # by a function of its own
                    found.append((banned[id(resolved(p))], node.lineno))
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("teach.exercises.answers"):
                    found.append((alias.name, node.lineno))
                top = alias.name if alias.asname else alias.name.partition(".")[0]
                names.setdefault(alias.asname or top, resolved(top))
    for node in ast.walk(tree):
        home, name = None, None
        if isinstance(node, ast.Attribute):
            home, name = node.value, ast.Constant(node.attr)
        elif isinstance(node, ast.Subscript):  # vars(module)["name"], module.__dict__["name"]
            inner = node.value
            inside = inner.args if isinstance(inner, ast.Call) and inner.args else [None]
            home, name = getattr(inner, "value", inside[0]), node.slice
        elif isinstance(node, ast.Call) and len(node.args) >= 2 and isinstance(node.func, ast.Name):
            home, name = node.args[:2] if node.func.id == "getattr" else (None, None)
        place, name = owner(home, names), str(getattr(name, "value", None))
        value = getattr(place, name, None)
        if id(value) in banned or getattr(place, "__name__", "") == "teach.exercises.answers":
            found.append((banned.get(id(value), f"teach.exercises.answers.{name}"), node.lineno))
    if found:
        what, line = max(found, key=lambda f: f[1])
        where = f", line {line}" if line else ""
        raise Unusable(f"imports the function it should implement: {what}{where}")


def resolved(path: str):
    """What a dotted path names, or None."""
    try:
        return pkgutil.resolve_name(path)
    except (AttributeError, ImportError, TypeError, ValueError):
        return None


def owner(node, names: dict):
    """The module that an expression is, such as `kernels.reference`; else None."""
    if isinstance(node, ast.Name):
        found = names.get(node.id)
    elif isinstance(node, ast.Attribute):
        found = getattr(owner(node.value, names), node.attr, None)
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        loader = ast.unparse(node.func).rpartition(".")[2] in ("import_module", "__import__")
        found = resolved(node.args[0].value) if loader else None
    else:
        found = None
    return found if inspect.ismodule(found) else None


# ---------------------------------------------------------------------------- comparisons


def differs(got, want, atol: float | None) -> str:
    """In what two values differ; "" if in nothing.

    Tensors (dtype and shape too) and floats may differ by atol, anything else not at all. NaN is
    NaN. None: 1e-10 for float64 and Python's floats, 1e-6 for others.
    """
    if type(got) is not type(want):
        return f"a {type(want).__name__} was expected, not a {type(got).__name__}"
    if isinstance(want, Tensor):
        fine = want.dtype == torch.float64
        close = (1e-10 if fine else 1e-6) if atol is None else atol
        for name in ("dtype", "shape"):
            if getattr(got, name) != getattr(want, name):
                return name
        near = torch.allclose(got.double(), want.double(), rtol=0, atol=close, equal_nan=True)
        return "" if near else "values"
    if isinstance(want, float):
        near = abs(got - want) <= (1e-10 if atol is None else atol)
        return "" if near or got == want or (got != got and want != want) else "values"
    if isinstance(want, (list, tuple, dict)):
        if len(got) != len(want) or (isinstance(want, dict) and got.keys() != want.keys()):
            return "length" if len(got) != len(want) else "keys"
        keys = want if isinstance(want, dict) else range(len(want))
        inside = ((key, differs(got[key], want[key], atol)) for key in keys)
        return next((f"[{key!r}]: {why}" for key, why in inside if why), "")
    return "" if got == want else "values"


def same(got, want, what: str, atol: float | None = None) -> None:
    """AssertionError with both values unless got is want, types and all (see `differs`)."""
    __tracebackhide__ = True  # pytest then shows the line that called
    got = got.detach() if isinstance(got, Tensor) else got
    if why := differs(got, want, atol):
        kinds = [f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
                 for x in (want, got)]  # fmt: skip
        inner = f"\n(they differ in {why})" if why not in ("values", "dtype", "shape") else ""
        expected, found = f"expected, {kinds[0]}:\n{want}", f"got, {kinds[1]}:\n{got}"
        raise AssertionError(f"{what}\n{expected}\n{found}{inner}")


def refuses(f, *args, says: str = "", error=ValueError, **more) -> None:
    """AssertionError unless f(*args) raises `error` with `says` in its message."""
    __tracebackhide__ = True
    try:
        got = f(*args, **more)
    except NotImplementedError:
        raise
    except Exception as e:
        if isinstance(e, error) and says in str(e):
            return
        right = f"the message lacks {says!r}: " if isinstance(e, error) else ""
        got = f"{type(e).__name__}, {right}{e}"
    call = f"{f.__name__}({', '.join(map(SHORT.repr, args))})"
    raise AssertionError(f"{call}\nexpected:\n{error.__name__} {says}\ngot:\n{got}")


def copied(x):
    """A copy of tensors, and of lists, tuples and dicts with what is in them."""
    if isinstance(x, Tensor):
        return x.detach().clone().requires_grad_(x.requires_grad)
    if type(x) in (list, tuple):
        return type(x)(map(copied, x))
    return {k: copied(v) for k, v in x.items()} if type(x) is dict else x


def guarded(f, changes=()):
    """f, with an AssertionError if it changes an argument in place that `changes` doesn't name."""
    if not inspect.isfunction(f):
        return f  # a kernel

    @functools.wraps(f)
    def call(*args, **more):
        __tracebackhide__ = True
        names = [*inspect.signature(f).parameters][: len(args)]
        given = {k: v for k, v in {**dict(zip(names, args)), **more}.items() if k not in changes}
        before = copied(given)
        out = f(*args, **more)
        for name, was in before.items():
            now = given[name]
            told = f"{f.__name__} changed its argument {name} in place"
            same(now, was, told, 0.0)
            if isinstance(now, Tensor):
                same(now.requires_grad, was.requires_grad, f"{told}: its requires_grad")
        return out

    return call


# ---------------------------------------------------------------------------- where to read


def where(section: str) -> str:
    """The file and line to read: of a section of the walkthrough, or of a module or function."""
    lines = PAGE.read_text(encoding="utf-8").split("\n")
    if f"## {section}" in lines:
        return f"teach/WALKTHROUGH.md:{lines.index(f'## {section}') + 1}, section {section}"
    thing = inspect.unwrap(pkgutil.resolve_name(section))
    line = 1 if inspect.ismodule(thing) else inspect.getsourcelines(thing)[1]
    path = Path(inspect.getsourcefile(thing)).relative_to(ROOT).as_posix()
    return f"{path}:{line}, {'its head' if line == 1 else section}"


# ---------------------------------------------------------------------------- Triton


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


def compiles(kernel, types: dict, constants: dict) -> None:
    """AssertionError unless Triton compiles the kernel for an H100. Needs no GPU.

    In a process of its own, as the interpreter's kernels can't be compiled. types: of the
    arguments; those of `constants` have values instead, and may be more than the kernel has.
    """
    __tracebackhide__ = True
    file, name = inspect.getsourcefile(kernel.fn), kernel.fn.__name__
    code = f"""
import sys
sys.path[:0] = {[str(ROOT / "tests"), str(ROOT)]}
from compile_report import TARGETS, compiled
from exercises.grading import load
from pathlib import Path
kernel = getattr(load("answer", Path({file!r})), {name!r})
compiled(kernel, {types}, {{k: v for k, v in {constants}.items() if k in kernel.arg_names}},
         TARGETS["sm_90"])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        told = done.stderr.rpartition("triton.compiler.errors.")[2].rstrip().split("\n")
        told = "\n".join(told[:1] + told[1:][-12:])
        raise AssertionError(f"{name} for a GPU\nexpected:\nit compiles for sm_90\ngot:\n{told}")
