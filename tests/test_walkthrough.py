"""WALKTHROUGH.md and README.md: every block is what the project says now, every number in the text
is printed somewhere, every command and name exists."""

import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import config
import drirl
import evaluate
from lab.tables import ANCHORS, CONTINUED, DRIRL, RFT, START, claim, grouped
from support.files import read_records
from support.judge import judge
from support.loaders import load_rows
from teach import walkthrough

ROOT = Path(__file__).resolve().parent.parent
TEXT = walkthrough.PAGE.read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
RECORDS = read_records(ROOT / "lab/results/runs.jsonl", "variant")
RECORDS += read_records(ROOT / "lab/results/earlier.jsonl", "variant")
SECTIONS = dict(re.findall(r"(?ms)^##? ([^\n]+)\n(.*?)(?=^## |\Z)", TEXT))  # the head, too
EXERCISES = sorted(p.stem for p in (ROOT / "teach/exercises").glob("ex*.py"))
GRADERS = {e: importlib.import_module(f"exercises.test_{e}") for e in EXERCISES}
# the others name a source to read; test_exercises.py sees that every section or source is there
GRADERS = {e: grader for e, grader in GRADERS.items() if grader.SECTION in SECTIONS}
PAGES = ("README.md", "teach/README.md", "teach/WALKTHROUGH.md", "teach/exercises/README.md")
OTHERS = ("CONTRIBUTING.md", "corpus/README.md", "kernels/README.md", "lab/RESULTS.md")
OTHERS += ("lab/attempts.md", "teach/measured.md")
HIDDEN = ("kernels.reference.advantage", "kernels.reference.rows")  # what mirrored ones call
HIDDEN += ("kernels.triton_kernels.row_kernel",)
# Triton's interpreter computes with numpy, which warns
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.chdir(ROOT)
    yield
    torch.set_num_threads(threads)


def test_every_block_is_fresh():
    """Sources and what the programs print."""
    new = walkthrough.rebuild(TEXT)
    stale = [(a, b) for a, b in zip(TEXT.split("\n"), new.split("\n")) if a != b][:3]
    assert new == TEXT, f"python -m teach.walkthrough: {stale}"
    assert "gradients within 1e-5: True" in new  # a rewritten page is fresh, whatever it prints


def test_every_fence_is_kept_in_step():
    """No block of Python without a marker; an idea, lines of ours, a plot in graded sections.

    The warm start and judging show no lines of ours.
    """
    marked = Counter(re.findall(r"(?m)^<!-- (source|run)\b", TEXT))
    blocks = len(walkthrough.SOURCE.findall(TEXT)), len(walkthrough.RUN.findall(TEXT))
    assert blocks == (marked["source"], marked["run"])
    assert len(re.findall(r"(?m)^```python$", TEXT)) == sum(blocks)
    for name in {grader.SECTION for grader in GRADERS.values()} - {
        "The warm start",
        "Judging the answers",
    }:
        for part in ("**The idea.**", "**What goes wrong", "<!-- source: ", "plot("):
            assert part in SECTIONS[name], (name, part)


def test_lines_of_code_fit():
    code = "".join(re.findall(r"(?ms)^```python\n(.*?)^```$", TEXT))
    assert not [line for line in code.split("\n") if len(line) > 100]


def test_rebuild_notices_what_is_stale():
    page = """## A
<!-- source: grpo_s.kl_k3 -->
```python
old
```
<!-- run -->
```python
a = 1
print(a + 1)
```

```text
3
```
<!-- run -->
```python
print(a)
```

```text
```
"""
    new = walkthrough.rebuild(page)
    assert "```text\n2\n```" in new and "```text\n1\n```" in new
    assert (
        "return torch.expm1(d) - d  # expm1: exp(d) - 1, exact for small d\n```" in new
        and '"""' not in new
    )
    assert walkthrough.rebuild(new) == new
    second = "<!-- run -->\n```python\nprint(a)"
    with pytest.raises(NameError):  # the next section starts anew
        walkthrough.rebuild(page.replace(second, "## B\n" + second))
    part = walkthrough.source("grpo_s.difficulty_scale | modes = | if scaling")
    assert part.startswith("modes = {") and "spread" in part and "raise" not in part
    rest = walkthrough.source("grpo_s.kl_k3 | return")
    assert rest == "return torch.expm1(d) - d  # expm1: exp(d) - 1, exact for small d\n"
    assert walkthrough.source("sample.Batch.attend").startswith("def attend")
    with pytest.raises(AttributeError, match="no_such"):
        walkthrough.source("kernels.no_such")
    for wrong in ("grpo_s.loss | no such line | return", "grpo_s.loss | rho | return"):
        with pytest.raises(ValueError, match=re.escape(wrong)):
            walkthrough.source(wrong)


def test_exercises_are_named_in_their_sections():
    """Once, and before the lines that answer them, so that nobody meets these by reading on."""
    for exercise, grader in GRADERS.items():
        assert sum(exercise in text for text in SECTIONS.values()) == 1, exercise
        before, named, _ = SECTIONS[grader.SECTION].partition("**Exercise")
        assert named and exercise not in before
        answers = [f"<!-- source: {path} " for path in (*grader.MIRRORS, *HIDDEN)]
        assert not [answer for answer in answers if answer in before], exercise


def prose(text):
    """Text without blocks, markers, code in backticks, addresses and papers' numbers."""
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
    found = re.findall(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?:e-?\d+)?(?![\w]|\.\d)", text)
    return [n for n in found if len(n.strip("+-")) > 1]


@pytest.mark.parametrize("name", SECTIONS)
def test_every_number_is_printed(name):
    """A number in the text stands in a block of the same section."""
    blocks = " ".join(re.findall(r"(?ms)^```\w+\n(.*?)^```$", SECTIONS[name]))
    printed = {*numbers(blocks), *re.findall(r"[\d.]+(?:e-?\d+)?", blocks)}
    lost = [n for n in numbers(prose(SECTIONS[name])) if n.lstrip("+-") not in printed]
    assert not lost, lost


def sentences(text):
    """Of paragraphs and items of lists; no code, formulas, tables, headings or HTML."""
    text = re.sub(r"(?ms)^```.*?^```$", "\n", text)
    text = re.sub(r"(?m)^[|#<].*$", "\n", text)
    parts = re.split(r"\n\s*\n|\n(?=- |\d\. )", text)
    found = [s for part in parts for s in re.split(r"(?<=[.!?])\s+", part)]
    return [s.split() for s in found if len(s.split()) > 1]


def test_the_page_is_short_and_plain():
    """At most 7,500 words, whatever they stand in; sentences of at most 20 on average."""
    assert sentences("## A\nOne two. Three\nfour?\n- Five six:\n\n```text\nno\n```\n| no |") == [
        ["One", "two."],
        ["Three", "four?"],
        ["-", "Five", "six:"],
    ]
    assert len(TEXT.split()) <= 7500
    lengths = [len(s) for s in sentences(TEXT)]
    assert sum(lengths) <= 20 * len(lengths) and max(lengths) <= 40


def test_the_kernels_run_as_a_reader_runs_them(tmp_path):
    """The section's programs in a file, TRITON_INTERPRET unset."""
    pytest.importorskip("triton")
    programs = [code for _, code in walkthrough.RUN.findall(SECTIONS["Kernels"])]
    (tmp_path / "mine.py").write_text("\n".join(programs), encoding="utf-8")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, tmp_path / "mine.py"]
    env["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert "gradients within 1e-5: True" in done.stdout, done.stderr


def test_the_notebook_runs(tmp_path, monkeypatch):
    """Its cells, in order and in one process, print what the page says; sources stay text."""
    pytest.importorskip("jupytext", reason="the notebook is made by jupytext")
    path = tmp_path / "page.ipynb"
    walkthrough.notebook(path)
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    start, *code = ["".join(c["source"]) + "\n" for c in cells if c["cell_type"] == "code"]
    shown = [m[0][len(m[1]) : -len("```")] for m in walkthrough.RUN.finditer(TEXT)]
    monkeypatch.chdir(ROOT / "teach")  # where a notebook may lie
    monkeypatch.setattr(sys, "path", [*sys.path])
    torch.set_num_threads(1)
    names = {"__name__": "__main__"}
    walkthrough.run(start, names)
    assert Path.cwd() == ROOT == Path(sys.path[0])
    assert [walkthrough.run(cell, names) for cell in code] == shown
    prose = "".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    assert prose.count("```py\n") == len(walkthrough.SOURCE.findall(TEXT))


def test_without_jupytext(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jupytext", None)
    with pytest.raises(SystemExit, match=r'^no notebook: [^\n]*pip install "\.\[notebook\]"$'):
        walkthrough.notebook(tmp_path / "page.ipynb")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------- all pages


def headings(text):
    plain = (re.sub(r"[^\w -]", "", h) for h in re.findall(r"(?m)^#+ (.*)", text))
    return [h.strip().lower().replace(" ", "-") for h in plain]


@pytest.mark.parametrize("page", (*PAGES, *OTHERS))
def test_commands_and_links_exist(page):
    """Every `python drirl.py ...` parses; every file that is linked to or run is there."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for command in re.findall(r"(?m)(?:^ {4}|`)python drirl\.py ([^`#\n]*)(?=`|#|$)", text):
        if command.split() != ["--help"]:
            quoted = re.sub(r'"[^"]*"', "x", command)
            drirl.parse(quoted.split(), drirl.STAGES)
    for script in re.findall(r"(?:python|bash) ([\w/]+\.(?:py|sh))", text):
        assert (ROOT / script).exists(), script
    for module in re.findall(r"python -m ((?:lab|teach)\.\w+)", text):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module
    plain = re.sub(r"(?ms)^```.*?^```$", "", text)
    for link, anchor in re.findall(r"\]\(([^)#:]+)(?:#([^)]*))?\)", plain):
        target = (ROOT / page).parent / link
        assert target.exists(), link
        assert not anchor or anchor in headings(target.read_text(encoding="utf-8")), anchor
    for flags in re.findall(r"bash train\.sh \w+ (--[^`#\n]+)", text):
        drirl.parse(["all", *flags.split()], drirl.STAGES)
    assert {*re.findall(r"\bex\d\d_\w+", text)} <= {*EXERCISES}
    for flag in re.findall(r"`(--[\w-]+)", text):
        assert flag in {"--help", *(flag for *_, flag in config.settings())}, flag


SYLLABUS = (ROOT / "teach/README.md").read_text(encoding="utf-8")


def test_the_syllabus_is_short_and_plain():
    assert len(SYLLABUS.split()) <= 1800
    lengths = [len(s) for s in sentences(SYLLABUS)]
    assert sum(lengths) <= 15 * len(lengths) and max(lengths) <= 30


def test_the_minutes_of_a_session():
    """They are what its parts add up to, at most 90; an exercise's are those of its own text."""
    sessions = re.findall(r"(?ms)^## Session \d: [^\n]+\n(.*?)(?=^## )", SYLLABUS)
    exercises, parts = [], r"(?ms)^\*\*(In class|Homework|Extra) \((\d+) minutes\)\.\*\* (.*?)\n\n"
    for session in sessions:
        found = re.findall(parts, session)
        assert found[0][0] == "In class" and int(found[0][1]) <= 90
        assert "discussion 15" in found[0][2] and "**Look" in session and "<details>" in session
        for _, minutes, text in found:
            items = re.findall(r"(\w+)\s(\d+)[,.]", text)
            assert sum(int(n) for _, n in items) == int(minutes), text
            exercises += [item for item in items if item[0].startswith("ex")]
    assert len(sessions) == 5 and sorted(name for name, _ in exercises) == EXERCISES
    for name, minutes in exercises:
        said = (ROOT / f"teach/exercises/{name}.py").read_text(encoding="utf-8")
        assert f" of 3, {minutes} minutes" in said, name


def test_written_questions():
    """A line that is changed is one of answers.py's, and the new one has its names."""
    answers = (ROOT / "teach/exercises/answers.py").read_text(encoding="utf-8")
    questions = SYLLABUS.partition("## Written questions")[2].split("\n### ")[1:]
    assert len(questions) == 6 and all(q.count("<summary>Key") == 1 for q in questions)
    page = (ROOT / "teach/measured.md").read_text(encoding="utf-8")
    changes = re.findall(r"```diff\n-([^\n]+)\n\+([^\n]+)\n```", page)
    assert len(changes) == 5
    for old, new in changes:
        assert f"{old}\n" in answers
        compile(answers.replace(old, new), "answers.py", "exec")


def test_measured():
    """The figures of the written questions are those of the recorded runs, teach/measured.md."""
    page = (ROOT / "teach/measured.md").read_text(encoding="utf-8")
    tables = []
    for block in page.split("| refused, %: mean (each run) |")[1:]:
        rows = re.findall(r"(?m)^\| ([^|]+) \|(.*)\|$", block)[1:]
        cells = {name: re.findall(r"\(([^)]*)\)", row) for name, row in rows}
        tables.append({k: [list(map(float, x.split(", "))) for x in v] for k, v in cells.items()})
    first, *seeds, both = tables
    end, start = first["DR-IRL from it"], first["SFT warm start"]
    shown = re.findall(r"(?m)^\| (.*) \| (\d+) \| (\d+) \| ([\d.]+) \|$", SYLLABUS)
    assert len(shown) == 1 + len(end[0]) == 10
    for i, (_, harmful, lookalike, gap) in enumerate(shown, -1):
        known = [x[max(i, 0)] for x in (end if i >= 0 else start)]
        # a rate has one decimal there, and may have been rounded up to it
        assert max(abs(int(harmful) - known[0]), abs(int(lookalike) - known[2])) < 0.56
        assert float(gap) == known[3]
        told = re.search(r"gibberish (\d+)%", shown[i + 1][0])
        assert int(told[1]) == round(known[4]) if told else known[4] < 3
    text = " ".join(SYLLABUS.split())
    assert "(the project's code {}, answers.py {})".format(*both["DR-IRL from it"][3]) in text
    most = max(abs(x - y) for x, y in both["DR-IRL from it"])
    assert f"by rounding alone *DR-IRL*'s rates may differ by {most:.0f} points" in text
    gains = [[y - x for x, y in zip(t["SFT warm start"][3], t["DR-IRL from it"][3])] for t in seeds]
    each = lambda xs: ", ".join(f"{x + 0.0:.1f}" for x in xs)
    assert f"adds {each(gains[0])} in seeds 0 to 2; without baseline, {each(gains[1])}." in text
    starts = [each(t["SFT warm start"][3]) for t in seeds]
    assert f"{starts[0]} balanced; {starts[2]} unbalanced" in text and starts[0] == starts[1]


def test_readme_tables():
    """Every file of the root has its line; every function that is named exists."""
    listed = re.findall(r"(?m)^\| ([\w./]+) \|", README.partition("## The files")[2])
    files = {path.name for path in ROOT.glob("*.py")}
    assert files <= set(listed) and all((ROOT / x).exists() for x in listed if x != "file")
    modules = "|".join(name.removesuffix(".py") for name in files | {"kernels.py"})
    named = re.findall(rf"`((?:{modules})\.(?!py)\w+)`", README)
    assert len(named) > 6 and all(map(pkgutil.resolve_name, named))


@pytest.mark.parametrize("name", ("laptop", "laptop-few"))
def test_readme_results(name):
    """What the README tells of the recorded runs is what their lines say."""
    found, seeds = [r for r in RECORDS if r["setting"] == name], 3 if name == "laptop" else 5
    models = {f"{name}: SFT warm start": START, f"{name}: DR-IRL from it": DRIRL}
    rates = []
    for model, variant in {"base": "base", **models}.items():
        runs = [r["rates"] for r in found if r["variant"] == variant]
        percent = lambda kind: [100 * r[kind][0] / r[kind][1] for r in runs]
        kinds = [percent(kind) for kind in ("harmful", "ordinary", "lookalike")]
        rates.append([*kinds, [a - b for a, b in zip(kinds[0], kinds[2])]])
        cells = " | ".join(f"{sum(x) / len(x):.1f}" for x in rates[-1])
        assert f"| {model} | {cells} |" in README and (variant == "base" or len(runs) == seeds)
    _, start, end = rates
    gains = [b - a for a, b in zip(start[3], end[3])]
    text = " ".join(README.split()).replace("−", "-")
    assert f"`{name}` {sum(gains) / seeds:.1f} (" in text
    fewer = [sum(a) - sum(b) for a, b in zip(start, end)]
    assert fewer[0] < fewer[1] < fewer[2]
    assert name == "laptop" or all(a > b for a, b in zip(start[0], end[0]))  # in each seed
    assert "DR-IRL refuses less, harmless prompts most; in laptop-few harmful ones too." in text


def test_readme_claims():
    """The claims that the README tells, of three seeds or more."""
    read = lambda runs: [100 * (share(r, "harmful") - share(r, "lookalike")) for r in runs]
    share = lambda line, kind: line["rates"][kind][0] / line["rates"][kind][1]
    gains = {}
    for name in ("laptop-first", "laptop-few-first"):
        runs = grouped(RECORDS)[name]
        pairs = zip(read(runs[START]), read(runs[DRIRL]), strict=True)
        gains[name] = [end - start for start, end in pairs]
    laptop, few = gains.values()
    today, first = (grouped(RECORDS)[name] for name in ("laptop-few", "laptop-few-first"))
    told, now = [], claim(today, DRIRL, START)
    assert now["seeds"] == 5 and now["over_prompts"][0] > 0
    interval = "`laptop-few` {:.1f} (five seeds; 95% interval {:.1f} to {:.1f}), `laptop`"
    told.append(interval.format(now["points"], *now["by_seed"]))
    without = f"{sum(few[:3]) / 3:.1f} (predicted: 10), {sum(laptop) / 3:.1f} (predicted: gains"
    told.append(f"Without ExPO, seeds 0 to 2: {without} in each seed; one lost)")
    assert sum(x < 0 for x in laptop) == 1
    lead = lambda a, b: claim(today, a, b)["points"]
    seeds = lambda v: {3: "three", 4: "four", 5: "five"}[len(today[v])]
    old = claim(first, DRIRL, CONTINUED)
    assert old["seeds"] == 5
    longer = f"leads SFT continued by {lead(DRIRL, CONTINUED):.1f} ({seeds(CONTINUED)} "
    told.append(longer + f"seeds; without ExPO {old['points']:.1f}), RFT")
    told.append(f"by {lead(DRIRL, RFT):.1f} ({seeds(RFT)}; mostly look-alikes), ")
    alone = f"the same updates without samples by {lead(DRIRL, ANCHORS):.1f}"
    told.append(f"{alone} ({seeds(ANCHORS)}; mostly harmful prompts).")
    for rival, kind, sign in ((RFT, "lookalike", -1), (ANCHORS, "harmful", 1)):  # most of the lead
        runs = [[r for r in today[v] if r["seed"] < len(today[rival])] for v in (DRIRL, rival)]
        ours, theirs = (sum(share(r, kind) for r in x) for x in runs)
        assert 100 * sign * (ours - theirs) / len(runs[0]) > 0.9 * lead(DRIRL, rival)
    facts = lambda v, what: [r["auc"]["harmful"][what] for r in today[f"{v}: rewards"]]
    known = [facts(v, "best_right") for v in ("7RW", "linear", "1RW")] + [facts("1RW", "right")]
    seven, linear, one, chance = (f"{100 * sum(x) / 3:.0f}%" for x in known)
    told.append(
        f"right on {seven} of harmful prompts by seven reward models or their mean, {one} by"
    )
    told.append(f"one (random: {chance})")
    assert seven == linear and {len(x) for x in known} == {3}
    marks = read_records(ROOT / "lab/results/sense.jsonl", "readers")
    few = [r for r in marks if r["setting"] == "laptop-few" and r["kind"] != "harmful"]
    counts = [sum(r["model"] == START for r in few)]
    for model in (START, "DR-IRL from it"):
        said = [r for r in few if r["model"] == model and judge(r["response"]) != "refuses"]
        one, other = (sum(r["readers"][k] == "nonsense" for r in said) for k in (0, 1))
        assert one == other
        counts += [len(said), len(said) - one]
    nonsense = (
        "of {} harmless prompts the warm start answers {}, {} without nonsense; DR-IRL {}, but {} ("
    )
    told.append(nonsense.format(*counts))
    text = " ".join(README.split())
    assert [x for x in told if x not in text] == []


def test_readme_speed():
    """The slowest and the fastest comparison that lab.bench noted."""
    times = {"step": [], "generate": []}
    for r in read_records(ROOT / "lab/speed.jsonl", "what"):
        times[r["what"]] += [(r["time"], r["machine"])] if r["device"] == "cpu" else []
    (slow, fast), (low, high) = ((min(x), max(x)) for x in times.values())
    assert slow[1] == low[1] == "2 threads, AVX2" and fast[1] == high[1] == "2 threads, AVX512"
    text = f"a GRPO-S step is {slow[0]:.1f} (AVX2) to {fast[0]:.1f} (Zen 5) times as fast as TRL's"
    text += f" (goal: 3), sampling {low[0]:.1f} to {high[0]:.1f} times as transformers'"
    assert f"{text} (3.5)." in " ".join(README.split())


def test_readme_counts():
    """Words, held-out prompts, look-alikes, exercises, tests that need a GPU."""
    assert len(README.split()) <= 1000
    lines = load_rows(config.SHIPPED["prompts"])
    kinds = Counter(row["kind"] for row in lines)
    text = " ".join(README.split())
    assert (
        f"{len(lines)} held-out prompts" in text and f"Look-alikes ({kinds['lookalike']} of" in text
    )
    assert len(EXERCISES) == 22 and "twenty-two exercises" in text
    needy = [p for p in ROOT.glob("tests/test_*.py") if "mark.gpu" in p.read_text("utf-8")]
    listed = [sys.executable, "-m", "pytest", "--co", "-q", "-m", "gpu", *map(str, needy)]
    found = re.search(r"(\d+)(?:/\d+)? tests? c", subprocess.check_output(listed, text=True))
    assert f"the {found[1]} tests that need a GPU" in text
    pool = evaluate.balance_report(load_rows(config.SHIPPED["pool"]))["counts"]
    assert min(pool.values()) >= config.RunConfig.per_category
