"""The exercises themselves: stubs have the signature of what they mirror and fail, wrong answers are noticed. (The project's own functions: tests/exercises.)"""

import importlib
import inspect
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "exercises"))
from grading import answers, source  # noqa: E402

EXERCISES = sorted(p.stem for p in (ROOT / "exercises").glob("ex*.py"))
pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # Triton's interpreter computes with numpy, which speaks up about NaN

HELPERS = {  # functions that a mirrored one calls and in which a bug is planted
    "ex05_group_advantage": ("kernels.reference.advantage",),
    "ex11_loss": ("kernels.clipped_objective", "grpo_s.objective_of"),
    "ex15_triton_logsumexp": ("kernels.triton_kernels.row_kernel",),
    "ex16_triton_backward": ("kernels.triton_kernels.row_kernel",),
}
TWICE = (
    "lse = top + tl.log(total)",
    """total = 0.0
    for start in range(0, V, BLOCK):
        col = start + tl.arange(0, BLOCK)
        total += tl.sum(tl.exp(tl.load(Z + col, mask=col < V, other=float("-inf")).to(tl.float32) * inv_temperature - top), 0)
    lse = top + tl.log(total)""",
)
LINES = r"""
def parse_draft(text):
    head, *answers = text.split("\n#### ")
    if len(answers) != 1 or not answers[0].strip() or not all(s.strip() for s in head.split("\n")):
        raise ValueError("malformed")
    return head.split("\n"), answers[0]
"""
LOGITS = 'other=float("-inf")).to(tl.float32) * inv_temperature\n        '
REREAD = """
def generate(model, prompts, samples=1, max_new_tokens=64, temperature=1.0, top_k=0, top_p=1.0, seed=0, eos=()):
    tokens = torch.zeros(len(prompts) * samples, max_new_tokens, dtype=torch.long)
    mask = tokens.bool()
    for i, row in enumerate([p for p in prompts for _ in range(samples)]):
        for t in range(max_new_tokens):
            tokens[i, t], mask[i, t] = model(torch.tensor([row]))[0, -1].argmax(), True
            row = row + [tokens[i, t].item()]
            if row[-1] in eos:
                break
    return Rollout(tokens, mask, torch.zeros(tokens.shape))
"""
EQUAL = "tl.sum(tl.where(mine & (r != first), 1, 0), 0) == 0"
LOGPROBS = "def token_logprobs(h, W, targets, temperature=1.0):\n    return "
WRONG = {  # (what stands in the source, what is put there), or a wrong answer written out
    "ex01_balance": [
        ("k_center(embeddings[index], per_category, seed)", "range(per_category)"),
        (
            "sorted(k_center(embeddings[index], per_category, seed))",
            "k_center(embeddings[index], per_category, seed)",
        ),
        ("embeddings[index], per_category, seed", "embeddings[index], per_category"),
        ("per_category - n for", "n for"),
    ],
    "ex02_parse_draft": [
        ("answer[1:]", "answer.strip()"),
        ("text.split(SEPARATOR)", "text.rsplit(SEPARATOR, 1)"),
        ('head.removesuffix("\\n")', "head.strip()"),
        ('not head.endswith("\\n") or ', ""),
        LINES,
        ('.split("\\n")\n', ".splitlines()\n"),
    ],
    "ex03_completion_mask": [
        ("at >= prompt", "at > prompt"),
        ("at < lengths", "at <= lengths"),
        ("at < lengths[:, None]", "at < (prompt_lengths + lengths)[:, None]"),
    ],
    "ex04_token_logprobs": [
        LOGPROBS + body
        for body in (
            "(h @ W.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]",
            "((h @ W.T).log_softmax(-1) / temperature).gather(1, targets[:, None])[:, 0]",
            "(h @ W.T / temperature).softmax(-1).log().gather(1, targets[:, None])[:, 0]",
            "(h @ W.T / temperature).log_softmax(0).gather(1, targets[:, None])[:, 0]",
        )
    ],
    "ex05_group_advantage": [
        ("centred.pow(2).mean(dim=1, keepdim=True).sqrt()", "rewards.std(1, keepdim=True)"),
        (".masked_fill(\n        equal, 0.0\n    )", ""),
        ("(rewards == rewards[:, :1])", "rewards.isclose(rewards[:, :1])"),
        (
            "(rewards == rewards[:, :1]).all(\n        dim=1, keepdim=True\n    )",
            "rewards.std(1, correction=0, keepdim=True) < 1e-6",
        ),
        ("keepdim=True).sqrt() + eps", "keepdim=True).add(eps).sqrt()"),
        ("rewards.mean(dim=1, keepdim=True)", "rewards.mean()"),
        (
            "(len(rewards), 1), tuple(rewards.shape))",
            "(len(rewards), 1), tuple(rewards.shape), (rewards.shape[1],))",
        ),
    ],
    "ex06_difficulty_scale": [
        ("(a + b) / 2", "a + b"),
        ("z.detach()", "z"),
        ('"data": a,\n        "model": b', '"data": b,\n        "model": a'),
        ('= "product"', '= "sum"'),
    ],
    "ex07_kl_k3": [
        ("logp_ref - logp)", "logp - logp_ref)"),
        ("torch.exp(d) - d - 1", "torch.exp(d) - 1"),
        (".clamp(-20, 20)", ""),
        ("torch.exp(d) - d - 1", "d ** 2 / 2"),
        ("torch.exp(d) - d - 1", "-d"),
        (
            "(logp_ref - logp).clamp(-20, 20)",
            "(lambda d: d + (d.clamp(-20, 20) - d).detach())(logp_ref - logp)",
        ),
    ],
    "ex08_similarity": [
        ("cos.max(dim=1)", "cos.max(dim=0)"),
        (".max(dim=1).values", ""),
        ("F.normalize(response, dim=1)", "response"),
        ("torch.sigmoid(1 - W)", "torch.sigmoid(W)"),
        (
            "torch.sigmoid(\n        torch.as_tensor(mean_delta, dtype=W.dtype, device=W.device)\n    )",
            "mean_delta",
        ),
        (
            "torch.as_tensor(mean_delta, dtype=W.dtype, device=W.device)",
            "torch.as_tensor(mean_delta)",
        ),
    ],
    "ex09_model_responsiveness": [
        ("int(drop *", "round(drop *"),
        (".abs()", ""),
        ("(gaps - gaps.mean())", "gaps"),
        ("gaps[keep].mean()", "gaps.mean()"),
        ("stable=True)", "stable=True).flip(0)"),
        ("argsort(stable=True)", "argsort()"),
        (
            "torch.as_tensor(mean_gap, dtype=gaps.dtype, device=gaps.device)",
            "torch.as_tensor(mean_gap)",
        ),
    ],
    "ex10_irl_loss": [
        (
            "torch.logsumexp(r_samples / beta + log_ratio, dim=1)",
            "torch.logsumexp(r_samples / beta, dim=1)",
        ),
        (
            "torch.logsumexp(r_samples / beta + log_ratio, dim=1)",
            "(r_samples / beta + log_ratio).exp().sum(1).log()",
        ),
        ("(r_demo[:, None] - r_samples)", "(r_samples - r_demo[:, None])"),
        ("(r_samples.mean(1) - r_demo).mean() / beta", "(r_samples.mean(1) - r_demo).mean()"),
        ("dim=1) - r_demo / beta)", "dim=1) - r_demo)"),
    ],
    "ex11_loss": [
        ("return -(o.weight", "return (o.weight"),
        ("torch.minimum(", "(lambda free, held: held)("),
        ("sequences or len(mask)", "len(mask)"),
        (
            "1 / (sequences * lengths.to(logp_ref.dtype))",
            "torch.ones(len(mask), dtype=logp_ref.dtype) / mask.sum()",
        ),
        ("- o.beta_kl * kl", "+ o.beta_kl * kl"),
        ("* o.advantage.sign() > o.clip", "> o.clip"),
        (
            "(o.weight * kl).sum()",
            "(kl / mask.sum(1).repeat_interleave(mask.sum(1)) / len(mask)).sum()",
        ),
    ],
    "ex12_rope": [
        ("/ c.head_dim", "/ (c.head_dim // 2)"),
        ("((turns - low) / (high - low))", "((high - turns) / (high - low))"),
        (".clamp(0, 1)", ""),
        ("(-b, a)", "(b, -a)"),
        ("x.chunk(2, dim=-1)", "(x[..., ::2], x[..., 1::2])"),
        ("cos, sin = rope", "cos, sin = (z.to(x.dtype) for z in rope)"),
    ],
    "ex13_generate": [
        ("model.rope(position), L + t", "model.rope(position - 1), L + t"),
        ("k,\n                v,", "k,\n                k,"),
        ("done |= torch.isin(token, stop)", "done |= False"),
        REREAD,
    ],
    "ex14_triton_advantage": [
        ("centred * centred, 0) / samples)", "centred * centred, 0) / (samples - 1))"),
        ("tl.where(mine, r - tl.sum(r, 0) / samples, 0.0)", "r - tl.sum(r, 0) / samples"),
        ("R + prompt * r_prompt + i * r_sample", "R + prompt * samples + i"),
        ("tl.where(equal, 0.0, alpha * centred / (std + eps))", "alpha * centred / (std + eps)"),
        (".to(OUT.dtype.element_ty),\n        mask=mine,", ".to(OUT.dtype.element_ty),"),
        (EQUAL, "std < 1e-6"),
        (EQUAL, "std == 0"),
        (
            "centred * centred, 0) / samples)",
            "r * r, 0) / samples - tl.sum(r, 0) / samples * tl.sum(r, 0) / samples)",
        ),
        ("i * r_sample, mask=mine, other=0.0)", "i * r_sample, mask=mine)"),
        (EQUAL, 'tl.max(tl.where(mine, r, 0.0), 0) == tl.min(tl.where(mine, r, float("inf")), 0)'),
    ],
    "ex15_triton_logsumexp": [
        ("top, total = -3.4e38", 'top, total = float("-inf")'),
        ("total * tl.exp(top - higher)", "total"),
        (LOGITS + "higher", LOGITS.replace('float("-inf")', "0.0") + "higher"),
        (LOGITS + "higher", LOGITS.replace(" * inv_temperature", "") + "higher"),
        ('float("nan")).to(tl.float32) * inv_temperature', 'float("nan")).to(tl.float32)'),
        ("top, total = -3.4e38", "top, total = 0.0"),
        TWICE,
    ],
    "ex16_triton_backward": [
        ("slope * inv_temperature *", "slope *"),
        ("tl.where(slope == 0, 0.0, dz)", "dz"),
        (".to(Z.dtype.element_ty), mask=col < V)", ".to(Z.dtype.element_ty))"),
        ("tl.where(col == target, 1.0, 0.0) - ", "0.0 - "),
        ("tl.exp(x - lse))", "tl.exp(x - top))"),
        (
            "(tl.where(col == target, 1.0, 0.0) - tl.exp(x - lse))",
            "(tl.exp(x - lse) - tl.where(col == target, 1.0, 0.0))",
        ),
    ],
}


def mirrors(exercise):
    return importlib.import_module("test_" + exercise).MIRRORS


def plain(f):
    return getattr(f, "fn", f)  # what @triton.jit wraps


def checks(exercise):
    """(test, arguments) of every case of an exercise's tests, as pytest would call them."""
    for name, test in vars(importlib.import_module("test_" + exercise)).items():
        if name.startswith("test_"):
            marks = [
                mark.args for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"
            ]
            for case in itertools.product(*(values for _, values in marks)):
                given = {}
                for (names, _), value in zip(marks, case):
                    names = names.split(", ")
                    given.update(zip(names, value if len(names) > 1 else (value,)))
                yield test, given


def plant(exercise, wrong, folder):
    """The project's functions in folder/exercise.py, with one edit or with the answer written out in place of its own. Returns what tests take."""
    paths = (*HELPERS.get(exercise, ()), *mirrors(exercise))
    text = "\n\n".join(inspect.getsource(plain(source(p))) for p in paths)
    if isinstance(wrong, tuple):
        assert text.count(wrong[0]) == 1, (
            f"{wrong[0]!r} stands {text.count(wrong[0])} times in {', '.join(paths)}"
        )
        text = text.replace(*wrong)
    modules = [plain(source(p)).__module__ for p in paths]
    head = f"import importlib\nfor name in {modules}:\n    globals().update({{k: v for k, v in vars(importlib.import_module(name)).items() if not k.startswith('__')}})\n"
    if exercise == "ex05_group_advantage":  # its arithmetic lies behind a choice of backend
        text = text.replace("kernels.backend(rewards).advantage", "advantage")
    folder.mkdir(exist_ok=True)
    (folder / f"{exercise}.py").write_text(
        f"{head}\n\n{text}\n\n{wrong if isinstance(wrong, str) else ''}"
    )
    return answers(exercise, mirrors(exercise), folder)


def complaint(exercise, my):
    """What the first check that fails says; None if all pass."""
    for test, given in checks(exercise):
        try:
            test(my, **given)
        except AssertionError as e:
            return str(e)


def test_all_are_here():
    assert len(EXERCISES) == 16 and set(EXERCISES) == set(WRONG) == {
        p.stem[5:] for p in (ROOT / "tests" / "exercises").glob("test_*.py")
    }
    text = (ROOT / "exercises" / "README.md").read_text()
    for exercise in EXERCISES:
        (line,) = [line for line in text.split("\n") if line.startswith(f"| {exercise} |")]
        assert mirrors(exercise)[0].rpartition(".")[0] in line and line.endswith(
            f"| {importlib.import_module('test_' + exercise).SECTION} |"
        )


@pytest.mark.parametrize("exercise", EXERCISES)
def test_stub(exercise):
    """It has the signature of what it mirrors, and no check passes."""
    stub = answers(exercise, mirrors(exercise), "exercises")
    for path in mirrors(exercise):
        assert inspect.signature(
            plain(getattr(stub, path.rpartition(".")[2]))
        ) == inspect.signature(plain(source(path)))
    for test, given in checks(exercise):
        with pytest.raises(Exception) as e:
            test(stub, **given)
        assert isinstance(e.value.__cause__ or e.value, NotImplementedError), (
            f"{test.__name__}{given}: {e.value!r}"
        )


@pytest.mark.parametrize("exercise", EXERCISES)
def test_wrong_answers_are_noticed(exercise, tmp_path):
    assert len(WRONG[exercise]) >= 3
    assert complaint(exercise, plant(exercise, None, tmp_path / "right")) is None
    for i, wrong in enumerate(WRONG[exercise]):
        found = complaint(exercise, plant(exercise, wrong, tmp_path / str(i)))
        assert found is not None, f"nobody noticed {wrong}"
        assert "\nexpected" in found and "\ngot" in found, found


def test_what_a_learner_sees(tmp_path):
    """A folder with exercise 7 done, exercise 5 done wrong, one that kills Python, one that isn't Python, one that is gone, the others as they come."""
    for exercise in EXERCISES:
        (tmp_path / f"{exercise}.py").write_text(
            (ROOT / "exercises" / f"{exercise}.py").read_text()
        )
    plant("ex07_kl_k3", None, tmp_path)
    plant("ex05_group_advantage", WRONG["ex05_group_advantage"][0], tmp_path)
    (tmp_path / "ex01_balance.py").write_text(
        "import os\n\n\ndef balance(rows, per_category, embeddings, seed=0):\n    os.abort()\n"
    )
    (tmp_path / "ex02_parse_draft.py").write_text("def parse_draft(text):\n    return (\n")
    (tmp_path / "ex03_completion_mask.py").unlink()
    (tmp_path / "ex06_difficulty_scale.py").write_text(
        "def difficulty_scale(alpha_data, alpha_model, scaling='product'):\n    while True:\n        pass\n"
    )
    run = lambda *args, given=tmp_path: (
        subprocess.run(
            [sys.executable, *args],
            capture_output=True,
            text=True,
            timeout=300,
            cwd=ROOT,
            env={**os.environ, "DRIRL_IMPL": str(given)},
        ).stdout
    )
    table = run("exercises/progress.py", str(tmp_path), "5")
    for exercise, state in (
        ("ex07_kl_k3", "passes"),
        ("ex01_balance", "crashes Python in check 1"),
        ("ex02_parse_draft", "does not import, SyntaxError line 2: '(' was never closed"),
        ("ex03_completion_mask", "is not there"),
        ("ex04_token_logprobs", "not begun"),
        ("ex06_difficulty_scale", "does not end in check 1"),
        ("ex05_group_advantage", "12 of 19 checks pass"),
    ):
        assert f"| {exercise} | {state} |" in table, table
    assert (
        "| 10 | kernels.kl_k3 | The loss |" in table
        and table.count("not begun") == 10
        and table.endswith("1 of 16 pass\n")
    ), table
    out = run("-m", "pytest", "tests/exercises", "-k", "ex02 or ex04")
    assert (
        f"grading: {tmp_path}/" in out
        and f"\nex04 not begun ({tmp_path}/ex04_token_logprobs.py)\n" in out
        and "\nex02 does not import, SyntaxError line 2: " in out
        and out.count("\n") < 20
    ), out
    assert "grading: the project's own functions" in run(
        "-m", "pytest", "tests/exercises", "--collect-only", "-k", "ex05 and by_hand", given=""
    )
    assert not run(
        "-m", "pytest", "tests/exercises", given="nosuch"
    )  # pytest's usage error: one line, on stderr
    out = run("-m", "pytest", "-q", "tests/exercises", "-k", "ex05 and by_hand")
    assert (
        "rewards 1, 2, 6, alpha 3, eps 0.5" in out
        and "expected, (1, 3) torch.float64:" in out
        and "got, (1, 3) torch.float64:" in out
        and "WALKTHROUGH.md, section 'Advantages'" in out
    ), out
