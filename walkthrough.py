"""Keeps the blocks of WALKTHROUGH.md in step with the project: python walkthrough.py rewrites them, with --check it only says whether they are stale.

    <!-- source: grpo_s.difficulty -->                 the block below is that object's source, without its docstring
    <!-- source: grpo_s.train | # 3. | # 4. -->        ... from the line that contains the first text to the one before the second
    <!-- file: results/seed-0/explore.txt | a | b -->  the same of a file's lines
    <!-- run -->                                       the python block is run, the text block below it is what it prints

The run blocks of a section (##) share their names and are one small program.
"""

import ast
import contextlib
import importlib
import inspect
import io
import json
import os
import re
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent
PAGE = ROOT / "WALKTHROUGH.md"
BLOCK = re.compile(
    r"(?P<head><!-- (?P<kind>source|file): (?P<what>[^\n]+?) -->\n```\w+\n)(?P<body>.*?)(?P<tail>^```$)|"
    r"(?P<run><!-- run -->\n```python\n(?P<code>.*?)^```\n\n```text\n)(?P<printed>.*?)(?P<end>^```$)",
    re.S | re.M,
)


def plot(title: str, xs: list, height: int = 9, **curves: list[float]) -> None:
    """Prints curves of one length as a text picture: a column per point, a letter per curve (its name's first), # where they meet."""
    values = [v for curve in curves.values() for v in curve]
    low, high = min(values), max(values)
    wide = max(1, 60 // len(xs))
    rows = [[" "] * (wide * len(xs)) for _ in range(height)]
    for name, curve in curves.items():
        for i, v in enumerate(curve):
            y = round((v - low) / (high - low or 1) * (height - 1))
            rows[y][i * wide] = name[0] if rows[y][i * wide] in (" ", name[0]) else "#"
    for y in reversed(range(height)):
        print((f"{low + (high - low) * y / (height - 1):9.2f} |" + "".join(rows[y])).rstrip())
    print(" " * 10 + "+" + "-" * (wide * len(xs)))
    print(
        f"{xs[0]:>11}"
        + f"{xs[-1]:>{wide * (len(xs) - 1)}}   {title}; {', '.join(f'{name[0]} {name}' for name in curves)}".replace(
            "_", " "
        )
    )


def recorded(seed: int, stage: str) -> list[dict]:
    """What a stage logged in the run of results/seed-N, a dict per step."""
    records = map(
        json.loads, (ROOT / f"results/seed-{seed}/metrics.jsonl").read_text().splitlines()
    )
    return [r for r in records if r["stage"] == stage]


def between(text: str, anchors: list[str]) -> str:
    """The lines of text from the first that contains anchors[0] up to the next that contains anchors[1]; dedented. ValueError if there is none."""
    lines = text.split("\n")
    for n, anchor in enumerate(anchors):
        at = next((i for i, line in enumerate(lines) if i >= n and anchor in line), None)
        if at is None:
            raise ValueError(f"no line contains {anchor!r}")
        lines = lines[:at] if n else lines[at:]
    return inspect.cleandoc("\n" + "\n".join(lines)).rstrip() + "\n"


def source(what: str) -> str:
    """ "module.name | from | to" -> source of module.name, its docstring cut out unless anchors are given."""
    path, *anchors = [part.strip() for part in what.split(" | ")]
    thing, names = None, path.split(".")
    for n in range(
        len(names) - 1, 0, -1
    ):  # kernels.reference.advantage, batch.Batch.attend: the longest part that is a module
        with contextlib.suppress(ModuleNotFoundError):
            thing = importlib.import_module(".".join(names[:n]))
            break
    for name in names[n:]:
        thing = getattr(thing, name)
    text = inspect.cleandoc("\n" + inspect.getsource(getattr(thing, "fn", thing)))
    node = ast.parse(text).body[0]
    if ast.get_docstring(node) and not anchors:
        lines, doc = text.split("\n"), node.body[0]
        text = "\n".join(lines[: doc.lineno - 1] + lines[doc.end_lineno :])
    return between(text, anchors)


def run(code: str, names: dict) -> str:
    """What a program prints. It comes from a file, since Triton reads its kernels' source."""
    with tempfile.NamedTemporaryFile("w", suffix=".py", delete=False, encoding="utf-8") as f:
        f.write(code)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
            exec(compile(code, f.name, "exec"), names)
    finally:
        os.unlink(f.name)
    return "\n".join(line.rstrip() for line in printed.getvalue().split("\n"))


def rebuild(text: str) -> str:
    """The page with every block made anew."""

    def block(m, names):
        if m["kind"] == "source":
            return m["head"] + source(m["what"]) + m["tail"]
        if m["kind"] == "file":
            path, *anchors = [part.strip() for part in m["what"].split(" | ")]
            return (
                m["head"] + between((ROOT / path).read_text(encoding="utf-8"), anchors) + m["tail"]
            )
        return m["run"] + run(m["code"], names) + m["end"]

    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # before triton is imported: its interpreter needs no GPU
    threads, here, out = torch.get_num_threads(), os.getcwd(), []
    torch.set_num_threads(1)  # sums of floats in one order
    os.chdir(ROOT)
    try:
        for section in re.split(r"(?m)^(?=## )", text):
            names = {"__name__": "walkthrough_section"}
            out.append(BLOCK.sub(lambda m, names=names: block(m, names), section))
    finally:
        torch.set_num_threads(threads)
        os.chdir(here)
    return "".join(out)


def main(argv: list[str]) -> None:
    old = PAGE.read_text(encoding="utf-8")
    new = rebuild(old)
    if "--check" not in argv:
        PAGE.write_text(new, encoding="utf-8")
    elif new != old:
        sys.exit("WALKTHROUGH.md is stale: python walkthrough.py")


if __name__ == "__main__":
    main(sys.argv[1:])
