"""The exercises themselves: stubs have the signature of what they mirror and fail, the answers
pass, and wrong answers are noticed. (The project's own functions: tests/exercises.)"""

import ast
import importlib
import inspect
import itertools
import os
import pkgutil
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from exercises.grading import Unusable, answers, where
from wrong_answers import KINDS, WRONG

from support.judge import judge

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "teach" / "exercises"
ANSWERS = FOLDER / "answers.py"
EXERCISES = sorted(p.stem for p in FOLDER.glob("ex*.py"))
# Triton's interpreter computes with numpy, which warns about NaN
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def grader(exercise):
    return importlib.import_module(f"exercises.test_{exercise}")


def names(exercise):
    return [path.rpartition(".")[2] for path in grader(exercise).MIRRORS]


def plain(path):
    """The function at a path; what @triton.jit wraps."""
    f = pkgutil.resolve_name(path)
    return getattr(f, "fn", f)


def checks(exercise):
    """(test, arguments) of every case of an exercise's tests, as pytest would call them."""
    for name, test in vars(grader(exercise)).items():
        if not name.startswith("test_"):
            continue
        marks = [m.args for m in getattr(test, "pytestmark", []) if m.name == "parametrize"]
        for case in itertools.product(*(values for _, values in marks)):
            given = {}
            for (said, _), value in zip(marks, case):
                said = said.split(", ")
                given.update(zip(said, value if len(said) > 1 else (value,)))
            yield test, given


def functions(path):
    """{name: source} of a file's functions, decorators included, and what stands before them."""
    text = path.read_text(encoding="utf-8")
    lines, found = text.splitlines(keepends=True), {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name] = "".join(lines[first - 1 : node.end_lineno])
    return found


def plant(exercise, edits, folder):
    """A learner's file, graded: the stub, and the answer with some texts replaced, or others."""
    stub, given = FOLDER / f"{exercise}.py", functions(ANSWERS)
    mine = "\n\n".join(given[name] for name in functions(stub) if name in given)
    if isinstance(edits, str):  # written out
        mine, edits = f"{mine}\n\n{edits}", ()
    for old, new in edits:
        assert mine.count(old) == 1, f"{old!r} stands {mine.count(old)} times in {exercise}"
        mine = mine.replace(old, new)
    imports = "".join(re.findall(r"(?m)^import .*\n", ANSWERS.read_text(encoding="utf-8")))
    folder.mkdir(exist_ok=True)
    body = stub.read_text(encoding="utf-8")
    (folder / f"{exercise}.py").write_text(f"{imports}\n{body}\n\n{mine}", encoding="utf-8")
    return answers(exercise, grader(exercise), folder)


def complaint(exercise, my):
    """What the first check that fails says; None if all pass."""
    for test, given in checks(exercise):
        try:
            test(my, **given)
        except AssertionError as e:
            return str(e)


def test_all_are_here():
    """Numbered without a gap; stub, README and grader say the same of each."""
    graders = {p.stem[5:] for p in (ROOT / "tests" / "exercises").glob("test_*.py")}
    assert len(EXERCISES) == 22 and set(EXERCISES) == set(WRONG) == graders
    assert [int(e[2:4]) for e in EXERCISES] == [*range(1, 23)]
    table = re.findall(r"(?m)^\| (ex\d\d_\w+) \|(.*)\|$", (FOLDER / "README.md").read_text())
    assert [name for name, _ in table] == EXERCISES
    for exercise, row in table:
        _, level, minutes, own, section = (cell.strip() for cell in row.split("|"))
        assert section == grader(exercise).SECTION
        path, line = where(section).partition(",")[0].split(":")
        source = f"the head of {path}" if line == "1" else f"{section} in {path}"
        source = f"{path}, section {section}" if path.endswith("md") else source
        head = " ".join((FOLDER / f"{exercise}.py").read_text().split())
        title = f'"""Exercise {int(exercise[2:4])}: '
        said = f" Difficulty {level} of 3, {minutes} minutes. Read first: {source}"
        assert head.startswith(title) and said in head and level in "123", exercise
        for mirrored in grader(exercise).MIRRORS:
            module, _, name = mirrored.rpartition(".")
            assert module.startswith("teach.") or name == "rows" or mirrored in own, exercise


def signature(f):
    found = inspect.signature(getattr(f, "fn", f)).parameters.values()
    return [(p.name, p.default) for p in found]


@pytest.mark.parametrize("exercise", EXERCISES)
def test_stub(exercise):
    """It has the arguments of what it mirrors, and no check passes."""
    stub = answers(exercise, grader(exercise), FOLDER)
    for path in grader(exercise).MIRRORS:
        name = path.rpartition(".")[2]
        wanted = [name for name, _ in signature(plain(path))]
        assert [name for name, _ in signature(getattr(stub, name))] == wanted
        if not path.startswith("teach."):
            assert signature(getattr(stub, name)) == signature(plain(path))
    for test, given in checks(exercise):
        with pytest.raises(Exception) as e:
            test(stub, **given)
        error = e.value.__cause__ or e.value
        assert isinstance(error, NotImplementedError), f"{test.__name__}{given}: {error!r}"


@pytest.mark.parametrize("exercise", EXERCISES)
def test_wrong_answers_are_noticed(exercise, tmp_path):
    """The project's own function passes (tests/exercises), the answer does, wrong ones do not."""
    assert len(WRONG[exercise]) >= 4
    assert complaint(exercise, plant(exercise, (), tmp_path / "right")) is None
    for i, (kind, *wrong) in enumerate(WRONG[exercise]):
        edits = wrong[0] if len(wrong) == 1 else [wrong]
        found = complaint(exercise, plant(exercise, edits, tmp_path / str(i)))
        assert found is not None, f"nobody noticed {kind}: {wrong}"
        assert "\nexpected" in found and "\ngot" in found, found


def test_every_kind_is_tried():
    """Each kind of mistake that graders once let pass: at least three times, in its exercises."""
    tried = Counter(kind for wrong in WRONG.values() for kind, *_ in wrong if kind)
    assert tried.keys() == KINDS.keys() and min(tried.values()) >= 3, tried
    for exercise, wrong in WRONG.items():
        assert any(kind for kind, *_ in wrong), exercise


def test_answers_in_one_file():
    """Graded from the file itself, as the README says; every stub's function has its answer."""
    given = functions(ANSWERS)
    for exercise in EXERCISES:
        my = answers(exercise, grader(exercise), ANSWERS)
        stub = functions(FOLDER / f"{exercise}.py")
        assert any(name in given for name in stub), exercise
        if exercise < "ex20":  # the kernels: tests/exercises, and compiled there
            assert complaint(exercise, my) is None, exercise


def test_without_triton(tmp_path):
    """Where there is none, exercises 1 to 19 are graded all the same, and 20 says why it isn't."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['triton'] = None\n")
    (tmp_path / "ex20_triton_advantage.py").write_text("import triton\n")
    found = inspect.getsource(pkgutil.resolve_name("teach.exercises.answers.group_advantage"))
    (tmp_path / "ex13_group_advantage.py").write_text(f"import torch\n\n\n{found}")
    for given, passed in ((tmp_path, "13"), ("teach/exercises/answers.py", "04, 13")):
        env = {**os.environ, "PYTHONPATH": str(tmp_path), "DRIRL_IMPL": str(given)}
        names = ("ex04_sampling", "ex13_group_advantage", "ex20_triton_advantage")
        tests = [f"tests/exercises/test_{name}.py" for name in names if name[2:4] in passed + "20"]
        command = [sys.executable, "-m", "pytest", "-q", "--maxfail=1000", *tests]
        run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert re.search(r"\n[1-9]\d passed, \d+ not graded", run.stdout), run.stdout
        assert "ex20 does not import" in run.stdout


def test_the_judge_obeys_the_rule_it_is_the_model_of():
    my = answers("ex18_refusal_rule", grader("ex18_refusal_rule"))
    my.refuses = lambda text: judge(text) == "refuses"
    assert complaint("ex18_refusal_rule", my) is None


BORROWED = [
    "from kernels import group_advantage",
    "from kernels import group_advantage as mine\ngroup_advantage = lambda *a, **k: mine(*a, **k)",
    "import kernels\ndef group_advantage(*a, **k):\n    return kernels.group_advantage(*a, **k)",
    "import kernels as k\ngroup_advantage = lambda *a, **b: k.reference.advantage(*a, **b)",
    "def group_advantage(*a):\n    from kernels import group_advantage as g\n    return g(*a)",
    "def group_advantage(*a):\n    import kernels.reference\n"
    "    return kernels.reference.advantage(*a)",
    "from kernels.reference import advantage\ngroup_advantage = lambda r, a, e: advantage(r, a, e)",
    "from kernels import *\nimport kernels.reference",
    "import importlib\ngroup_advantage = getattr(importlib.import_module('kernels'),"
    " 'group_advantage')",
    "import importlib\ndef group_advantage(*a):\n"
    "    return importlib.import_module('kernels').group_advantage(*a)",
    "import kernels\ndef group_advantage(*a):\n    return getattr(kernels, 'group_advantage')(*a)",
    "import kernels\ngroup_advantage = lambda *a: getattr(kernels, 'group_advantage', None)(*a)",
    "import kernels\ngroup_advantage = lambda *a: vars(kernels)['group_advantage'](*a)",
    "import kernels\ngroup_advantage = lambda *a: kernels.__dict__['group_advantage'](*a)",
    "import importlib\ndef group_advantage(*a):\n"
    "    return importlib.import_module('teach.exercises.answers').group_advantage(*a)",
    "from teach.exercises.answers import group_advantage",
    "import teach.exercises.answers as a\ngroup_advantage = a.group_advantage",
]


@pytest.mark.parametrize("text", BORROWED)
def test_borrowed_answers_are_flagged(text, tmp_path):
    (tmp_path / "ex13_group_advantage.py").write_text(text + "\n")
    with pytest.raises(Unusable, match="^imports the function it should implement: (kern|teach)"):
        answers("ex13_group_advantage", grader("ex13_group_advantage"), tmp_path)
    if "reference" not in text:  # in one file as well
        with pytest.raises(Unusable, match="^imports the function it should implement: "):
            path = tmp_path / "ex13_group_advantage.py"
            answers("ex13_group_advantage", grader("ex13_group_advantage"), path)


def test_the_judges_parts_are_flagged_too(tmp_path):
    for name in ("judge", "search", "normalised", "PHRASES"):
        text = f"import support.judge as j\n\n\ndef refuses(answer):\n    return j.{name}\n"
        (tmp_path / "ex18_refusal_rule.py").write_text(text)
        with pytest.raises(Unusable, match=f"should implement: support.judge.{name}, line 5"):
            answers("ex18_refusal_rule", grader("ex18_refusal_rule"), tmp_path)


def test_what_may_be_borrowed(tmp_path):
    """Other functions of the project; a name of one's own; and the pieces that a stub imports."""
    text = "import kernels\nfrom grpo_s import kl_k3, loss\nclass k: advantage = 1\nk.advantage\n"
    text += "def group_advantage(rewards):\n    return kernels.token_logprobs, rewards.advantage\n"
    (tmp_path / "ex13_group_advantage.py").write_text(text)
    answers("ex13_group_advantage", grader("ex13_group_advantage"), tmp_path)
    for exercise in EXERCISES:
        answers(exercise, grader(exercise), FOLDER)
    text = "from grpo_s import loss\n\n\ndef loss(*args):\n    return args\n"  # replaced
    (tmp_path / "all.py").write_text(
        text + "import importlib\nif 0: importlib.import_module(3).x\n"
    )
    answers("ex16_loss", grader("ex16_loss"), tmp_path / "all.py")


STATES = {
    "ex15_kl_k3": "passes",
    "ex01_balance": "crashes Python in check 1",
    "ex02_parse_draft": "does not import, SyntaxError line 2: '(' was never closed",
    "ex06_completion_mask": "is not there",
    "ex07_token_logprobs": "not begun",
    "ex09_irl_loss": "does not import, ValueError line 1: two",
    "ex12_difficulty_scale": "does not end in check 1",
    "ex13_group_advantage": "16 of 24 checks pass",
    "ex16_loss": "imports the function it should implement: grpo_s.loss, line 1",
    "ex19_wilson_auc": "has no function auc",
}


def test_what_a_learner_sees(tmp_path):
    """One exercise done, one done wrong, one that kills Python, one that never ends, one that isn't
    Python, one that is gone, one borrowed, one half there, the others as they come."""
    for exercise in EXERCISES:
        (tmp_path / f"{exercise}.py").write_text((FOLDER / f"{exercise}.py").read_text())
    plant("ex15_kl_k3", (), tmp_path)
    plant("ex13_group_advantage", [WRONG["ex13_group_advantage"][0][1:]], tmp_path)
    for name, text in {
        "ex01_balance": "import os\ndef balance(*args):\n    os.abort()\n",
        "ex02_parse_draft": "def parse_draft(text):\n    return (\n",
        "ex09_irl_loss": "raise ValueError('two\\nlines')\n",
        "ex12_difficulty_scale": "def difficulty_scale(*args):\n    while True:\n        pass\n",
        "ex16_loss": "from grpo_s import loss\n",
        "ex19_wilson_auc": "def wilson(hits, n):\n    return 0.0, 1.0\n",
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "ex06_completion_mask.py").unlink()

    def run(*args, given=tmp_path):
        env = {**os.environ, "DRIRL_IMPL": str(given)}
        command = [sys.executable, *args]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
        return done.stdout

    table = run("teach/exercises/progress.py", str(tmp_path), "5")
    for exercise, state in STATES.items():
        assert f"| {exercise} | {state} |" in table, table
    assert "| 1 | 10 | grpo_s.kl_k3 | The loss |" in table, table
    assert table.count("not begun") == 13 and "\n1 of 22 pass\n" in table, table

    listed = run("-m", "pytest", "tests/exercises", "--collect-only", "-k", "ex13", given="")
    assert "grading: the project's own functions" in listed
    assert not run("-m", "pytest", "tests/exercises", given="nosuch")  # one line, on stderr
    out = run("-m", "pytest", "tests/exercises", "-k", "ex02 or ex07")  # the first ends the run
    assert f"grading: {tmp_path}" in out and out.count("\n") < 20 and "ex07" not in out, out
    assert "\nex02 does not import, SyntaxError line 2: " in out, out
    out, lines = run("-m", "pytest", "tests/exercises", "-k", "ex07"), where("Log-probs")
    assert f"\nex07 not begun ({tmp_path}/ex07_token_logprobs.py); read {lines}\n" in out, out
    out = run("-m", "pytest", "-q", "tests/exercises", "-k", "ex13")
    assert "rewards 1, 2, 6, alpha 3, eps 0.5" in out and out.count("expected") == 1, out
    assert "expected, (1, 3) torch.float64:" in out and "got, (1, 3) torch.float64:" in out, out
    path, line = re.search(r"(?m)^(teach/WALKTHROUGH\.md):(\d+), section Advantages$", out).groups()
    assert (ROOT / path).read_text().split("\n")[int(line) - 1] == "## Advantages"


def test_where_to_read():
    """A function's line and a module's are those of the source; an unknown section is an error."""
    path, line = where("sft.train").partition(",")[0].split(":")
    assert (ROOT / path).read_text().split("\n")[int(line) - 1].startswith("def train(")
    assert where("support.judge") == "support/judge.py:1, its head"
    with pytest.raises((AttributeError, ImportError, ValueError)):
        where("No such section")
