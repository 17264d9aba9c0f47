"""Keeps the blocks of WALKTHROUGH.md in step: python -m teach.walkthrough

<!-- source: grpo_s.loss -->                this block is its source, without the docstring
<!-- source: grpo_s.train | # 3. | # 4. --> from the line with one text to before the other's
<!-- source: grpo_s.train | # 3. -->        from there to the end
<!-- run -->                                a program, and below it what it prints
"""

import ast
import contextlib
import inspect
import io
import linecache
import os
import pkgutil
import re
import sys
from pathlib import Path

import torch

PAGE = Path(__file__).with_name("WALKTHROUGH.md")
SOURCE = re.compile(r"(?ms)^(<!-- source: ([^\n]+) -->\n```python\n).*?^```$")
RUN = re.compile(r"(?ms)^(<!-- run -->\n```python\n(.*?)^```\n\n```text\n).*?^```$")
START = """import os, pathlib, sys
root = next(p for p in pathlib.Path("x").resolve().parents if (p / "drirl.py").exists())
os.chdir(root)  # wherever in the project the notebook lies
sys.path.insert(0, str(root))
os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: no GPU needed
"""


def plot(title: str, xs: list, height: int = 9, **curves: list[float]) -> None:
    """Prints curves as text: a column per point, a curve's first letter, # where they meet."""
    low, high = (f(f(curve) for curve in curves.values()) for f in (min, max))
    wide = max(1, 60 // len(xs))
    rows = [[" "] * (wide * len(xs)) for _ in range(height)]
    for name, curve in curves.items():
        for i, v in enumerate(curve):
            y = round((v - low) / (high - low or 1) * (height - 1))
            rows[y][i * wide] = name[0] if rows[y][i * wide] in (" ", name[0]) else "#"
    for y in reversed(range(height)):
        print((f"{low + (high - low) * y / (height - 1):9.2f} |" + "".join(rows[y])).rstrip())
    print(" " * 10 + "+" + "-" * (wide * len(xs)))
    names = ", ".join(f"{name[0]} {name}" for name in curves).replace("_", " ")
    print(f"{xs[0]:>11}{xs[-1]:>{wide * (len(xs) - 1)}}   {title}; {names}")


def source(what: str) -> str:
    """The lines of "module.name", "module.name | from" or "module.name | from | to"; see above."""
    path, *anchors = what.split(" | ")
    text = inspect.cleandoc("\n" + inspect.getsource(pkgutil.resolve_name(path)))
    lines, node = text.split("\n"), ast.parse(text).body[0]
    if anchors:
        at = [i for a in anchors for i, line in enumerate(lines) if a in line]
        if len(at) != len(anchors):
            raise ValueError(f"{what}: want each text in one line, found {len(at)} lines")
        start, stop = (*at, len(lines))[:2]
        lines = lines[start:stop]
    elif ast.get_docstring(node):
        del lines[node.body[0].lineno - 1 : node.body[0].end_lineno]
    return inspect.cleandoc("\n" + "\n".join(lines)).rstrip() + "\n"


def run(code: str, names: dict) -> str:
    """What a program prints. Triton reads its kernels' source from linecache."""
    name, printed = f"<program {hash(code)}>", io.StringIO()
    linecache.cache[name] = len(code), None, code.splitlines(keepends=True), name
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        exec(compile(code, name, "exec"), names)
    return "\n".join(line.rstrip() for line in printed.getvalue().split("\n"))


def rebuild(text: str) -> str:
    """The page with every block made anew. The programs of a section (##) share their names."""
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: no GPU needed
    torch.set_num_threads(1)  # sums of floats in one order
    out = []
    for section in re.split(r"(?m)^(?=## )", text):
        names = {"__name__": "section"}
        out.append(RUN.sub(lambda m: f"{m[1]}{run(m[2], names)}```", section))
    return SOURCE.sub(lambda m: f"{m[1]}{source(m[2])}```", "".join(out))


def notebook(path: Path) -> None:
    """python -m teach.walkthrough notebook [FILE]: a cell per program, without what it prints."""
    try:
        import jupytext
    except ImportError:
        sys.exit('no notebook: jupytext is not installed: pip install ".[notebook]"')
    text = SOURCE.sub(lambda m: m[0].replace("```python", "```py"), PAGE.read_text("utf-8"))
    text = RUN.sub(lambda m: f"```python\n{m[2]}```", text)
    book = jupytext.reads(f"```python\n{START}```\n\n{text}", fmt="md")
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    path.write_text(jupytext.writes(book, fmt="ipynb"), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["notebook"]:
        notebook(Path(*sys.argv[2:3] or [PAGE.with_suffix(".ipynb")]))
    else:
        PAGE.write_text(rebuild(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
