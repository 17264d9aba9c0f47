"""WALKTHROUGH.md and README.md: every block is what the project says now, every number in the text is printed somewhere, every command and name exists."""

import importlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import data
import drirl
import evaluate
import settings
import walkthrough
from loaders import load_demonstrations

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "exercises"))
TEXT = walkthrough.PAGE.read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"(?ms)^##? ([^\n]+)\n(.*?)(?=^## |\Z)", TEXT))  # the head, too
HIDDEN = (
    "kernels.reference.advantage",
    "kernels.reference.rows",
    "kernels.clipped_objective",
    "kernels.triton_kernels.row_kernel",
)  # what mirrored ones call
EXERCISES = sorted(p.stem for p in (ROOT / "exercises").glob("ex*.py"))
pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # Triton's interpreter computes with numpy


def test_every_block_is_fresh():
    """Sources, recorded lines and what the programs print."""
    new = walkthrough.rebuild(TEXT)
    stale = [(a, b) for a, b in zip(TEXT.split("\n"), new.split("\n")) if a != b][:3]
    assert new == TEXT, f"python walkthrough.py: {stale}"
    assert "gradients within 1e-5: True" in new  # a rewritten page is fresh, whatever it prints


def test_check_fails_when_stale(tmp_path, monkeypatch):
    """python walkthrough.py --check says so and leaves the page alone; without --check it is rewritten."""
    page = tmp_path / "WALKTHROUGH.md"
    monkeypatch.setattr(walkthrough, "PAGE", page)
    for given, stale in ((["--check"], True), ([], False), (["--check"], False)):
        if stale:
            page.write_text(old := "<!-- run -->\n```python\nprint(2)\n```\n\n```text\n3\n```\n")
            with pytest.raises(SystemExit, match="stale"):
                walkthrough.main(given)
            assert page.read_text() == old
        else:
            walkthrough.main(given)
            assert page.read_text() == old.replace("3", "2")


def test_every_fence_is_kept_in_step():
    """No block of Python without a marker; programs and lines exist in every section on the method."""
    fences = re.findall(r"(?m)^```(?:python|text)$", TEXT)
    marked = re.findall(r"(?m)^<!-- (source|file|run)\b", TEXT)
    n = Counter(marked)
    assert fences.count("```python") == n["source"] + n["run"] and len(
        list(walkthrough.BLOCK.finditer(TEXT))
    ) == len(marked)
    for name in {importlib.import_module("test_" + e).SECTION for e in EXERCISES}:
        assert (
            "**The idea.**" in SECTIONS[name]
            and "**What goes wrong" in SECTIONS[name]
            and "<!-- source: " in SECTIONS[name]
            and "plot(" in SECTIONS[name]
        ), name


def test_rebuild_notices_what_is_stale():
    page = "## A\n<!-- source: kernels.kl_k3 -->\n```python\nold\n```\n<!-- run -->\n```python\na = 1\nprint(a + 1)\n```\n\n```text\n3\n```\n<!-- run -->\n```python\nprint(a)\n```\n\n```text\n```\n"
    new = walkthrough.rebuild(page)
    assert (
        "```text\n2\n```" in new
        and "```text\n1\n```" in new
        and "return torch.exp(d) - d - 1\n```" in new
        and '"""' not in new
        and walkthrough.rebuild(new) == new
    )
    with pytest.raises(NameError):  # the next section starts anew
        walkthrough.rebuild(
            page.replace(
                "<!-- run -->\n```python\nprint(a)", "## B\n<!-- run -->\n```python\nprint(a)"
            )
        )
    assert walkthrough.source("grpo_s.difficulty_scale | modes = | return modes").startswith(
        "modes = {"
    ) and "def " in walkthrough.source("batch.Batch.attend")
    for wrong, says in (
        ("kernels.no_such", "no_such"),
        ("grpo_s.loss | no such line", "no such line"),
        ("grpo_s.loss | o = | no such end", "no such end"),
    ):
        with pytest.raises((AttributeError, ValueError), match=says):
            walkthrough.source(wrong)


def test_exercises_are_named_in_their_sections():
    for exercise in EXERCISES:
        section = importlib.import_module("test_" + exercise).SECTION
        assert (
            exercise in SECTIONS[section] and sum(exercise in s for s in SECTIONS.values()) == 1
        ), (exercise, section)


def prose(text):
    """Text without blocks, markers, code in backticks, addresses, papers' numbers and the recorded runs' seeds."""
    for pattern in (
        r"(?ms)^```.*?^```$",
        r"(?m)^<!--.*?-->$",
        r"`[^`]*`",
        r"\(https?://\S+\)",
        r"arXiv \d+\.\d+",
        r"Llama 3\.1",
        r"\bex\d\d\w*",
    ):
        text = re.sub(pattern, " ", text)
    return text


def numbers(text):
    """Numbers of two digits or more, or with a point."""
    return [
        n
        for n in re.findall(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?:e-?\d+)?(?![\w]|\.\d)", text)
        if len(n.strip("+-")) > 1
    ]


@pytest.mark.parametrize("name", SECTIONS)
def test_every_number_is_printed(name):
    """A number in the text stands in a block of the same section, where a program, a source or a recorded file put it."""
    blocks = " ".join(re.findall(r"(?ms)^```\w+\n(.*?)^```$", SECTIONS[name]))
    printed = (
        set(numbers(blocks))
        | set(re.findall(r"[\d.]+(?:e-?\d+)?", blocks))
        | {n.lstrip("+") for n in re.findall(r"[-+][\d.]+", blocks)}
    )
    lost = [n for n in numbers(prose(SECTIONS[name])) if n.lstrip("+") not in printed]
    assert not lost, lost


def test_answers_stand_behind_the_exercises():
    """Lines that an exercise asks for come after it, so that nobody meets them by reading on."""
    for exercise in EXERCISES:
        test = importlib.import_module("test_" + exercise)
        before = SECTIONS[test.SECTION].partition("**Exercise")[0]
        assert not [
            path for path in (*test.MIRRORS, *HIDDEN) if f"<!-- source: {path} " in before
        ], exercise


def test_the_kernels_run_as_a_reader_runs_them(tmp_path):
    """The section's programs in a file, TRITON_INTERPRET unset."""
    pytest.importorskip("triton")
    (tmp_path / "mine.py").write_text(
        "\n".join(m["code"] for m in walkthrough.BLOCK.finditer(SECTIONS["Kernels"]) if m["code"]),
        encoding="utf-8",
    )
    done = subprocess.run(
        [sys.executable, tmp_path / "mine.py"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={
            **{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
            "PYTHONPATH": str(ROOT),
        },
    )
    assert "gradients within 1e-5: True" in done.stdout, done.stderr


# ------------------------------------------------------------------------------------------------ both pages


@pytest.mark.parametrize("page", ["README.md", "WALKTHROUGH.md", "exercises/README.md"])
def test_commands_and_links_exist(page):
    """Every `python drirl.py ...` parses, every file that is linked to or run is there."""
    text = (ROOT / page).read_text(encoding="utf-8")
    commands = re.findall(
        r"(?:^ {4}|`)python drirl\.py ([^`#\n]*(?:\n[^`#\n]*)??)(?=`|#|$)", text, re.M
    )
    assert commands or page == "exercises/README.md"
    for command in commands:
        words = command.split()
        if words != ["--help"]:
            settings.parse(re.sub(r'"[^"]*"|\'[^\']*\'', "x", command).split(), drirl.STAGES)
    for script in re.findall(r"(?:python|bash) ([\w/]+\.(?:py|sh))", text):
        assert (ROOT / script).exists(), script
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", re.sub(r"(?ms)^```.*?^```$", "", text)):
        assert (ROOT / page).parent.joinpath(link).exists(), link
    for anchor in re.findall(r"README\.md#([\w-]+)", text):
        assert anchor in [
            re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-")
            for h in re.findall(r"(?m)^#+ (.*)", README)
        ]
    known = {flag for *_, flag, _ in settings.settings()}
    for flag in re.findall(r"`(--[\w-]+)", text):
        assert flag in known | {"--help", "--check", "--debug"}, flag


def test_readme_tables():
    """Every top-level file has its line, every function of the paper's table exists."""
    listed = re.findall(
        r"(?m)^\| (?:\*\*)?([\w./]+)(?:\*\*)? \|",
        README.partition("## The files")[2].partition("## From")[0],
    )
    assert {p.name for p in ROOT.glob("*.py")} <= set(listed) and all(
        (ROOT / name).exists() for name in listed if name != "file"
    )
    named = re.findall(r"`((?:data|introspect|reward|encoder|grpo_s|kernels)\.\w+)`", README)
    assert len(named) > 20
    for path in named:
        module, name = path.split(".")
        assert (
            (ROOT / path.replace(".", "/", 1)).exists()
            or path.endswith(".py")
            or hasattr(importlib.import_module(module), name)
        ), path


def test_readme_counts_lines():
    """The method's lines, those of the files in bold, and all others."""
    bold = re.findall(r"(?m)^\| \*\*([\w./]+)\*\* \|", README)
    method = [
        p
        for name in bold
        for p in ((ROOT / name).glob("*.py") if name.endswith("/") else [ROOT / name])
        if p.name not in ("bench.py", "compile_report.py")
    ]
    lines = [
        sum(len(p.read_text(encoding="utf-8").splitlines()) for p in paths)
        for paths in (method, {*ROOT.glob("*.py"), *ROOT.glob("kernels/*.py")} - {*method})
    ]
    assert (
        "The method itself is {:,} lines, the files in bold; the other {:,}".format(
            *(round(n, -2) for n in lines)
        )
        in README
    )


def test_readme_results():
    """The table is that of the recorded runs, whole, and so are the differences told below it."""
    runs = [
        json.loads((ROOT / f"results/seed-{s}/results.json").read_text(encoding="utf-8"))
        for s in range(3)
    ]
    assert (
        re.search(r"(?m)^\| refused, %: mean .*\n(?:\|.*\n)*", README)[0]
        == evaluate.means(runs) + "\n"
    )
    rates = [
        {
            m["name"]: 100
            * (
                m["rates"]["harmful"][0] / m["rates"]["harmful"][1]
                - m["rates"]["lookalike"][0] / m["rates"]["lookalike"][1]
            )
            for m in run
        }
        for run in runs
    ]
    gains = {
        (a, b): [r[a] - r[b] for r in rates]
        for a, b in (
            ("DR-IRL from it", "SFT warm start"),
            ("SFT continued", "SFT warm start"),
            ("DR-IRL from it", "SFT continued"),
        )
    }
    ours, theirs, ahead = (
        (
            f"{abs(sum(g) / 3):.1f} points",
            f"{abs(sum(g) / 3):.1f}",
            ["{:+.1f}".format(x) for x in g],
        )
        for g in gains.values()
    )
    text = " ".join(README.split())
    assert (
        f"DR-IRL gains {ours[0]} on average (harmful minus look-alikes; {ours[2][0]}, {ours[2][1]} and {ours[2][2]} by seed)"
        in text
        and sum(gains["DR-IRL from it", "SFT warm start"]) > 0
    )
    assert (
        f"loses {theirs[1]} ({', '.join(theirs[2])})" in text
        and sum(gains["SFT continued", "SFT warm start"]) < 0
    )
    assert (
        f"ends {ahead[0]} ahead of it, in all three seeds ({', '.join(ahead[2])})" in text
        and min(gains["DR-IRL from it", "SFT continued"]) > 0
    )
    gpu = {
        m["name"]: m["rates"]
        for m in json.loads((ROOT / "results/h200/results.json").read_text(encoding="utf-8"))
    }
    figures = [
        "{:.1f}".format(
            100 * (m["harmful"][0] / m["harmful"][1] - m["lookalike"][0] / m["lookalike"][1])
        )
        for m in gpu.values()
    ]
    assert "warm start {1}, DR-IRL {2}, SFT continued {3}".format(*figures) in text


def test_readme_pool():
    text, pool = (
        " ".join(README.split()),
        data.balance_report(load_demonstrations(settings.SHIPPED["pool"])),
    )
    assert (
        f"pool's {sum(pool['counts'].values())} (largest : smallest {pool['imbalance']:.2f}, normalised entropy {pool['entropy']:.3f})"
        in text
    )
    assert f"takes {settings.RunConfig.per_category} of each category" in text


def test_readme_counts():
    """Prompts, exercises, planted bugs, tests that need a GPU."""
    words = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty".split()
    text, held_out = (
        " ".join(README.split()),
        [
            json.loads(line)
            for line in (ROOT / "corpus/test.jsonl").read_text(encoding="utf-8").splitlines()
        ],
    )
    kinds = Counter(evaluate.kind_of(r) for r in held_out)
    assert (
        f"{len(held_out)} held-out prompts" in text
        and f"({kinds['harmful']} harmful, {kinds['ordinary']} ordinary, {kinds['lookalike']} look-alikes"
        in text
    )
    assert (
        f"{words[len(importlib.import_module('test_triton').BUGS) - 1]} planted bugs" in text
        and f"{words[len(EXERCISES)]} of these functions" in text
    )
    found = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--collect-only",
            "-m",
            "gpu",
            "tests/test_triton.py",
            "tests/test_cuda.py",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
    ).stdout
    assert "the " + re.search(r"(\d+)/", found)[1] + " tests that need one" in text
