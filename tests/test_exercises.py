"""The exercises themselves: stubs have the signature of what they mirror and fail, and wrong
answers are noticed. (The project's own functions: tests/exercises.)"""

import importlib
import inspect
import itertools
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
from exercises.grading import answers

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "teach" / "exercises"
EXERCISES = sorted(p.stem for p in FOLDER.glob("ex*.py"))
# Triton's interpreter computes with numpy, which warns about NaN
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

HELPERS = {  # functions that a mirrored one calls and in which a bug is planted
    "ex13_group_advantage": ("kernels.reference.advantage",),
    "ex21_triton_logsumexp": ("kernels.triton_kernels.row_kernel",),
    "ex22_triton_backward": ("kernels.triton_kernels.row_kernel",),
}
LOAD = "x = tl.load(Z + col, mask=col < V, other={}).to(tl.float32) * {}\n        higher"
LOGITS = LOAD.format('float("-inf")', "inv_temperature")
TWICE = (
    "lse = top + tl.log(total)",
    f"""total = 0.0
    for start in range(0, V, BLOCK):
        col = start + tl.arange(0, BLOCK)
        {LOGITS[: -len("higher")]}total += tl.sum(tl.exp(x - top), 0)
    lse = top + tl.log(total)""",
)
LINES = r"""
def parse_draft(text):
    head, *answers = text.split("\n#### ")
    if len(answers) != 1 or not answers[0].strip() or not all(s.strip() for s in head.split("\n")):
        raise ValueError("malformed")
    return head.split("\n"), answers[0]
"""
REREAD = """
def generate(model, prompts, samples=1, max_new_tokens=64, temperature=1.0, eos=()):
    out = []
    for prompt in [p for p in prompts for _ in range(samples)]:
        out.append([])
        while len(out[-1]) < max_new_tokens and not (out[-1] and out[-1][-1] in eos):
            ids = torch.tensor([prompt + out[-1]])
            out[-1].append(model(ids)[0, -1].argmax().item())
    return out
"""
DIFFER = "tl.sum(tl.where(mine & (r != first), 1, 0), 0)"
SPREAD = 'tl.max(r, 0) - tl.min(tl.where(mine, r, float("inf")), 0)'
MEAN_SQUARE = "r * r, 0) / samples - tl.sum(r, 0) / samples * tl.sum(r, 0) / samples)"
SHAPES = "((), (len(rewards), 1), rewards.shape)"
IMPORTANCE = "torch.logsumexp(r_samples / beta + log_ratio, dim=1)"
LOGPROBS = "def token_logprobs(h, W, targets, temperature=1.0):\n    return "
PICKED = ".gather(1, targets[:, None])[:, 0]"
SUM_OF_TOKENS = "torch.full((len(mask),), 1 / mask.sum(), dtype=logp_ref.dtype)"
LEFT = "mask = torch.arange(mask.shape[1]) < mask.sum(1, keepdim=True)\n    lengths = mask.sum(1)"
WRONG = {  # (what stands in the source, what is put there), or a wrong answer written out
    "ex01_balance": [
        ("k_center(embeddings[index], per_category, seed)", "range(per_category)"),
        ("sorted(k_center(embeddings[index], per_category, seed))",
         "k_center(embeddings[index], per_category, seed)"),
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
    "ex06_completion_mask": [
        ("at >= prompt", "at > prompt"),
        ("at < lengths", "at <= lengths"),
        ("at < lengths[:, None]", "at < (prompt_lengths + lengths)[:, None]"),
    ],
    "ex07_token_logprobs": [
        LOGPROBS + "(h @ W.T).log_softmax(-1)" + PICKED,
        LOGPROBS + "((h @ W.T).log_softmax(-1) / temperature)" + PICKED,
        LOGPROBS + "(h @ W.T / temperature).softmax(-1).log()" + PICKED,
        LOGPROBS + "(h @ W.T / temperature).log_softmax(0)" + PICKED,
    ],
    "ex13_group_advantage": [
        ("centred.pow(2).mean(dim=1, keepdim=True).sqrt()", "rewards.std(1, keepdim=True)"),
        (".masked_fill(equal, 0.0)", ""),
        ("(rewards == rewards[:, :1])", "rewards.isclose(rewards[:, :1])"),
        ("(rewards == rewards[:, :1]).all(dim=1, keepdim=True)",
         "rewards.std(1, correction=0, keepdim=True) < 1e-6"),
        ("(rewards == rewards[:, :1]).all(dim=1, keepdim=True)",
         "(rewards == rewards[:, :1]).all()"),
        ("keepdim=True).sqrt()", "keepdim=True).add(eps).sqrt() - eps"),
        ("rewards.mean(dim=1, keepdim=True)", "rewards.mean()"),
        ("rewards - rewards.mean(dim=1, keepdim=True)",
         "rewards.sub_(rewards.mean(dim=1, keepdim=True))"),
        (SHAPES, "((), (len(rewards), 1), rewards.shape, (rewards.shape[1],))"),
        (SHAPES, "((), (1,), (1, 1), (len(rewards), 1), rewards.shape)"),
    ],
    "ex12_difficulty_scale": [
        ("(a + b) / 2", "a + b"),
        ("z.detach()", "z"),
        ('"data": a,', '"data": b,'),
        ('= "product"', '= "sum"'),
    ],
    "ex15_kl_k3": [
        ("logp_ref - logp)", "logp - logp_ref)"),
        ("torch.exp(d) - d - 1", "torch.exp(d) - 1"),
        (".clamp(-20, 20)", ""),
        ("torch.exp(d) - d - 1", "d ** 2 / 2"),
        ("torch.exp(d) - d - 1", "-d"),
        ("(logp_ref - logp).clamp(-20, 20)",
         "(lambda d: d + (d.clamp(-20, 20) - d).detach())(logp_ref - logp)"),
    ],
    "ex10_similarity": [
        ("cos.max(dim=1)", "cos.max(dim=0)"),
        (".max(dim=1).values", ""),
        ("F.normalize(response, dim=1)", "response"),
        ("F.normalize(response, dim=1)", "response.div_(response.norm(dim=1, keepdim=True))"),
        ("response.new_zeros(())", "torch.zeros(())"),
        ("torch.sigmoid(1 - W)", "torch.sigmoid(W)"),
        ("/ torch.sigmoid(mean_delta)", "/ mean_delta"),
        ("torch.as_tensor(mean_delta, dtype=W.dtype, device=W.device)",
         "torch.as_tensor(mean_delta)"),
    ],
    "ex11_model_responsiveness": [
        ("int(drop *", "round(drop *"),
        (".abs()", ""),
        ("(gaps - gaps.mean())", "gaps"),
        ("inlying.mean()", "gaps.mean()"),
        ("stable=True)", "stable=True).flip(0)"),
        ("argsort(stable=True)", "argsort()"),
        ("torch.as_tensor(mean_gap, dtype=gaps.dtype, device=gaps.device)",
         "torch.as_tensor(mean_gap)"),
    ],
    "ex09_irl_loss": [
        (IMPORTANCE, "torch.logsumexp(r_samples / beta, dim=1)"),
        (IMPORTANCE, "(r_samples / beta + log_ratio).exp().sum(1).log()"),
        ("(r_demo[:, None] - r_samples)", "(r_samples - r_demo[:, None])"),
        ("(r_demo[:, None] - r_samples)", "(r_demo[:, None] - r_samples - log_ratio)"),
        ("(r_samples.mean(1) - r_demo).mean() / beta", "(r_samples.mean(1) - r_demo).mean()"),
        ("(r_samples.mean(1) - r_demo)", "((r_samples + log_ratio).mean(1) - r_demo)"),
        ("dim=1) - r_demo / beta)", "dim=1) - r_demo)"),
    ],
    "ex16_loss": [
        ("return -(weight", "return (weight"),
        ("torch.minimum(rho * A, rho.clamp(1 - clip, 1 + clip_high) * A)",
         "rho.clamp(1 - clip, 1 + clip_high) * A"),
        ("rho.clamp(1 - clip, 1 + clip_high)", "rho.clamp(1 - clip, 1 + clip)"),
        ("if clip_high == 0:", "if False:"),
        ("torch.where(A > 0, logp.detach(), logp_old)", "logp.detach()"),
        ("torch.where(A > 0, logp.detach(), logp_old)", "torch.where(A > 0, logp, logp_old)"),
        ("(sequences or len(mask))", "len(mask)"),
        ("1 / ((sequences or len(mask)) * lengths.to(logp_ref.dtype))", SUM_OF_TOKENS),
        ("lengths.to(logp_ref.dtype)", "lengths.float()"),
        ("lengths = mask.sum(1)", LEFT),
        ("- beta_kl * k3", "+ beta_kl * k3"),
        ("(A < 0) & (held > clip)", "held > clip"),
        ("(A > 0) & (held > clip_high)", "held > clip_high"),
        ("(weight * x).sum().item()", "x.float().mean().item()"),
    ],
    "ex03_rope": [
        ("/ c.head_dim\n", "/ (c.head_dim // 2)\n"),
        ("((turns - low) / (high - low))", "((high - turns) / (high - low))"),
        (".clamp(0, 1)", ""),
        ("(-b, a)", "(b, -a)"),
        ("x.chunk(2, dim=-1)", "(x[..., ::2], x[..., 1::2])"),
        ("cos, sin = rope", "cos, sin = (z.to(x.dtype) for z in rope)"),
    ],
    "ex05_generate": [
        ("model.rope(position), L + t", "model.rope(position - 1), L + t"),
        ("V[:, :, end] = k, v", "V[:, :, end] = k, k"),
        ("done |= torch.isin(token, stop)", "done |= False"),
        ("torch.isin(token, stop)", "torch.isin(token, stop[:1])"),
        REREAD,
    ],
    "ex20_triton_advantage": [
        ("centred * centred, 0) / samples)", "centred * centred, 0) / (samples - 1))"),
        ("tl.where(mine, r - tl.sum(r, 0) / samples, 0.0)", "r - tl.sum(r, 0) / samples"),
        ("R + prompt * r_prompt + i * r_sample", "R + prompt * samples + i"),
        ("tl.where(differ == 0, 0.0, alpha", "tl.where(differ < 0, 0.0, alpha"),
        (".to(OUT.dtype.element_ty), mask=mine)", ".to(OUT.dtype.element_ty))"),
        ("differ == 0", "std < 1e-6"),
        ("differ == 0", "std == 0"),
        ("centred * centred, 0) / samples)", MEAN_SQUARE),
        ("i * r_sample, mask=mine, other=0.0)", "i * r_sample, mask=mine)"),
        (DIFFER, SPREAD),
    ],
    "ex21_triton_logsumexp": [
        ("top, total = -3.4e38", 'top, total = float("-inf")'),
        ("top, total = -3.4e38", "top, total = -1e4"),
        ("top, total = -3.4e38", "top, total = 0.0"),
        ("total * tl.exp(top - higher)", "total"),
        (LOGITS, LOAD.format("0.0", "inv_temperature")),
        (LOGITS, LOAD.format("-1e4", "inv_temperature")),
        (LOGITS, LOAD.format('float("-inf")', "1.0")),
        ('float("nan")).to(tl.float32) * inv_temperature', 'float("nan")).to(tl.float32)'),
        TWICE,
    ],
    "ex22_triton_backward": [
        ("slope * inv_temperature *", "slope *"),
        ("tl.where(slope == 0, 0.0, dz)", "dz"),
        (".to(Z.dtype.element_ty), mask=col < V)", ".to(Z.dtype.element_ty))"),
        ("tl.where(col == target, 1.0, 0.0) - ", "0.0 - "),
        ("tl.exp(x - lse))", "tl.exp(x - top))"),
        ("dz = slope *", "dz = -slope *"),
    ],
}  # fmt: skip


def grader(exercise):
    return importlib.import_module(f"exercises.test_{exercise}")


def mirrors(exercise):
    return grader(exercise).MIRRORS


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
            for (names, _), value in zip(marks, case):
                names = names.split(", ")
                given.update(zip(names, value if len(names) > 1 else (value,)))
            yield test, given


def plant(exercise, wrong, folder):
    """What the tests take: the project's functions in folder/exercise.py, with one edit, or with
    an answer written out in place of its own."""
    paths = (*HELPERS.get(exercise, ()), *mirrors(exercise))
    text = "\n\n".join(inspect.getsource(plain(p)) for p in paths)
    if isinstance(wrong, tuple):
        times = text.count(wrong[0])
        assert times == 1, f"{wrong[0]!r} stands {times} times in {', '.join(paths)}"
        text = text.replace(*wrong)
    head = "import importlib\n"
    for module in dict.fromkeys(plain(p).__module__ for p in paths):
        head += f"names = vars(importlib.import_module({module!r}))\n"
        head += "globals().update({k: v for k, v in names.items() if not k.startswith('__')})\n"
    if exercise == "ex13_group_advantage":  # its arithmetic lies behind a choice of backend
        text = text.replace("backend(rewards).advantage", "advantage")
    folder.mkdir(exist_ok=True)
    more = wrong if isinstance(wrong, str) else ""
    (folder / f"{exercise}.py").write_text(f"{head}\n\n{text}\n\n{more}")
    return answers(exercise, mirrors(exercise), folder)


def complaint(exercise, my):
    """What the first check that fails says; None if all pass."""
    for test, given in checks(exercise):
        try:
            test(my, **given)
        except AssertionError as e:
            return str(e)


def test_all_are_here():
    graders = {p.stem[5:] for p in (ROOT / "tests" / "exercises").glob("test_*.py")}
    assert len(EXERCISES) == 16 and set(EXERCISES) == set(WRONG) == graders
    lines = (FOLDER / "README.md").read_text().split("\n")
    for exercise in EXERCISES:
        (line,) = [line for line in lines if line.startswith(f"| {exercise} |")]
        section = grader(exercise).SECTION
        assert mirrors(exercise)[0].rpartition(".")[0] in line and line.endswith(f"| {section} |")


def signature(f):
    found = inspect.signature(getattr(f, "fn", f)).parameters.values()
    return [(p.name, p.default) for p in found]


@pytest.mark.parametrize("exercise", EXERCISES)
def test_stub(exercise):
    """It has the arguments of what it mirrors, and no check passes."""
    stub = answers(exercise, mirrors(exercise), FOLDER)
    for path in mirrors(exercise):
        assert signature(getattr(stub, path.rpartition(".")[2])) == signature(plain(path))
    for test, given in checks(exercise):
        with pytest.raises(Exception) as e:
            test(stub, **given)
        error = e.value.__cause__ or e.value
        assert isinstance(error, NotImplementedError), f"{test.__name__}{given}: {error!r}"


@pytest.mark.parametrize("exercise", EXERCISES)
def test_wrong_answers_are_noticed(exercise, tmp_path):
    assert len(WRONG[exercise]) >= 3
    assert complaint(exercise, plant(exercise, None, tmp_path / "right")) is None
    for i, wrong in enumerate(WRONG[exercise]):
        found = complaint(exercise, plant(exercise, wrong, tmp_path / str(i)))
        assert found is not None, f"nobody noticed {wrong}"
        assert "\nexpected" in found and "\ngot" in found, found


STATES = {
    "ex15_kl_k3": "passes",
    "ex01_balance": "crashes Python in check 1",
    "ex02_parse_draft": "does not import, SyntaxError line 2: '(' was never closed",
    "ex06_completion_mask": "is not there",
    "ex07_token_logprobs": "not begun",
    "ex12_difficulty_scale": "does not end in check 1",
    "ex13_group_advantage": "15 of 23 checks pass",
}


def test_what_a_learner_sees(tmp_path):
    """One exercise done, one done wrong, one that kills Python, one that never ends, one that isn't
    Python, one that is gone, the others as they come."""
    for exercise in EXERCISES:
        (tmp_path / f"{exercise}.py").write_text((FOLDER / f"{exercise}.py").read_text())
    plant("ex15_kl_k3", None, tmp_path)
    plant("ex13_group_advantage", WRONG["ex13_group_advantage"][0], tmp_path)
    for name, text in {
        "ex01_balance": "import os\ndef balance(*args):\n    os.abort()\n",
        "ex02_parse_draft": "def parse_draft(text):\n    return (\n",
        "ex12_difficulty_scale": "def difficulty_scale(*args):\n    while True:\n        pass\n",
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
    assert "| 10 | grpo_s.kl_k3 | The loss |" in table, table
    assert table.count("not begun") == 10 and table.endswith("1 of 16 pass\n"), table
    out = run("-m", "pytest", "tests/exercises", "-k", "ex02 or ex07")
    assert f"grading: {tmp_path}/" in out and out.count("\n") < 20, out
    assert f"\nex04 not begun ({tmp_path}/ex07_token_logprobs.py)\n" in out, out
    assert "\nex02 does not import, SyntaxError line 2: " in out, out
    by_hand = ("-m", "pytest", "-q", "tests/exercises", "-k", "ex13 and by_hand")
    listed = run("-m", "pytest", "tests/exercises", "--collect-only", "-k", "ex13", given="")
    assert "grading: the project's own functions" in listed
    assert not run(*by_hand, given="nosuch")  # pytest's usage error: one line, on stderr
    out = run(*by_hand)
    assert "rewards 1, 2, 6, alpha 3, eps 0.5" in out, out
    assert "expected, (1, 3) torch.float64:" in out and "got, (1, 3) torch.float64:" in out, out
    assert "teach/WALKTHROUGH.md, section 'Advantages'" in out, out
