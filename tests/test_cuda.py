"""--device cuda does what the CPU does, in float32, and every stage ends: pytest -m gpu.

The kernels by themselves: test_triton.py.
"""

import math

import pytest
import torch
import transformers
from conftest import WORLD, flags, make_world
from test_encoder import CLIP, TEXTS, randomise, save
from test_encoder import SMALL as ENCODER
from test_grid import lines, world  # noqa: F401 (a fixture)
from test_grpo_train import ROWS, Letters, tiny

import drirl
import grpo_s
from config import Config, changed
from data import CATEGORIES, HELPFUL
from encoder import WordEncoder, load_encoder
from lab import grid
from model import Transformer
from reward import RewardModels, fit, pack_groups, sample_groups, score_groups
from sample import Batch, completion_logps, generate, run_blocks, token_logps
from support import resume
from support.files import read_records
from support.hf import read_config
from support.resume import Loop
from teach import explore

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
WIDE = {
    "model_type": "qwen3",
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
PROMPTS = [[1, 2, 3, 4, 5], [1, 2, 9], [1, 2, 3, 8, 8, 8, 8]]
close = torch.testing.assert_close


def both(make):
    """What make(device) returns on the CPU and on the GPU, the latter brought back."""
    return make("cpu"), [x.cpu() for x in make(DEVICE)]


def network(device):
    torch.manual_seed(0)
    model = Transformer(read_config(WIDE, "config.json"))
    for p in model.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.15)
    return model.to(device)


def test_scores():
    """Logits of whole sequences; log-probs of completions behind shared prompts; gradients."""

    def make(device):
        model = network(device)
        answers = [[[6, 7], [8, 9, 10, 11]], [[12]], [[13, 14, 15]]]
        batch = Batch(PROMPTS, answers, device)
        x = run_blocks(model, batch)
        logps = completion_logps(model, x, batch, 0.7)
        logps.sum().backward()
        logits = model(torch.tensor(PROMPTS[:1], device=device)).detach()
        partly = token_logps(model, batch, 0.7, frozen=2).detach()
        return [logits, logps.detach(), partly, *(p.grad for p in model.parameters())]

    for x, y in zip(*both(make)):
        close(x, y, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("temperature", (0, 0.8))
@pytest.mark.parametrize("tokens, eos", [(1, ()), (2, (7,)), (16, (7, 8, 9)), (64, ())])
def test_generation(tokens, eos, temperature):
    """The same random numbers give the same tokens, though the GPU's steps are a CUDA graph."""

    def make(device):
        how = dict(seed=3, eos=eos)
        return generate(network(device), PROMPTS, 4, tokens, temperature, **how)

    rows = make("cpu")
    assert make(DEVICE) == rows and (len(eos) < 3 or len({len(row) for row in rows}) > 1)


@pytest.mark.parametrize("kind", ("Bert", "CLIPText"))
def test_encoders(kind, tmp_path):
    more = CLIP if kind == "CLIPText" else {}
    config = getattr(transformers, kind + "Config")(**ENCODER, **more)
    save(randomise(getattr(transformers, kind + "Model")(config)), tmp_path, 18, 19)
    here, there = both(lambda device: [load_encoder(tmp_path, device).embed(TEXTS)])
    close(*here, *there, atol=1e-5, rtol=1e-5)


IRL = {"irl.reward_blocks": 1, "irl.prompts": 3, "irl.samples": 2}
IRL |= {"irl.epochs": 2, "irl.lr": 1e-3, "run.max_new_tokens": 6}


@pytest.mark.parametrize("integration", ("categorized", "one", "linear"))
def test_rewards(integration):
    """Samples, fit and scores."""
    rows = []
    for name in (*CATEGORIES, HELPFUL):
        for w in ("ab", "cde", "f", "hij"):
            prompt = {"prompt": f"{name[:4]}{w}", "category": name}
            rows.append({**prompt, "response": f"{w}{w}g"})
    c = changed(Config(), {**IRL, "irl.integration": integration})

    def make(device):
        reference = tiny().to(device).requires_grad_(False)
        torch.manual_seed(1)
        models = RewardModels(reference, c.irl)
        groups = sample_groups(reference, Letters(), rows, c)
        batches = pack_groups(models, reference, groups, torch.float32, size=3)
        fit(models, batches, c.irl, torch.float32)
        score_groups(models, batches, torch.float32)
        return [torch.tensor([[g["reward_demo"], *g["rewards"]] for g in groups])]

    here, there = both(make)
    close(*here, *there, atol=2e-3, rtol=2e-3)
    assert here[0].std() > 0.5


GRPO = {"grpo.rollouts": 2, "grpo.passes": 2, "grpo.prompts": 4, "grpo.samples": 4}
GRPO |= {"grpo.anchor": 2, "grpo.lr": 1e-3, "grpo.beta_kl": 0.1, "grpo.std_eps": 0.1}
GRPO |= {"run.max_new_tokens": 6, "irl.reward_blocks": 1}
FIGURES = ("loss", "kl", "grad_norm", "clipped_low", "length", "reward_std", "similarity")


@pytest.mark.parametrize(
    "more",
    (
        {},
        {"grpo.tokens_per_batch": 40},
        {"grpo.blocks": 1, "grpo.scaling": "none"},
    ),
    ids=str,
)
def test_grpo(more):
    """Two rollouts, two updates each: what is logged, and how the weights move."""
    c = changed(Config(), {**GRPO, **more})

    def make(device):
        policy, reference = tiny().to(device), tiny().to(device).requires_grad_(False)
        rewards, records = RewardModels(reference, c.irl).requires_grad_(False), []
        torch.manual_seed(2)
        for shadow in rewards.shadows.values():
            shadow.value.weight.copy_(torch.randn(shadow.value.weight.shape))
        before = [p.detach().clone() for p in policy.parameters()]
        fixed = (reference, rewards, Letters(), WordEncoder(16), ROWS, c, torch.float32)
        grpo_s.train(policy, *fixed, loop=Loop("grpo", log=lambda **r: records.append(r)))
        figures = torch.tensor([r[k] for r in records for k in FIGURES if k in r])
        assert len(records) == 4 and "length" in records[2] and abs(records[3]["kl"]) > 1e-5
        return [figures, *(p.detach() - q for p, q in zip(policy.parameters(), before))]

    (figures, *moves), (figures_, *moves_) = both(make)
    close(figures, figures_, atol=1e-5, rtol=1e-2)
    x, y = (torch.cat([m.flatten() for m in each]) for each in (moves, moves_))
    # AdamW may turn a gradient near 0 around
    assert (x - y).abs().mean() < 0.05 * x.abs().mean() > 0


def test_state(tmp_path, monkeypatch):
    """A loop's state, moments included, comes back on the GPU."""
    monkeypatch.setattr(resume, "SAVE_EVERY", 0.0)

    def work(steps, path=None):
        goes_on = path is not None and path.exists()
        torch.manual_seed(9 if goes_on else 0)  # it must not begin where the other began
        model = torch.nn.Linear(5, 3).to(DEVICE)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        with Loop("sft", path) as loop:
            assert loop.resumed == 3 * goes_on
            for step in range(steps):
                if not loop.skip(step, model, optimizer):
                    x = torch.full((2, 5), step + 1.0, device=DEVICE)
                    loop.update(step, (model(x) - 1).pow(2).mean(), model.parameters())
        return model.weight.detach().cpu()

    want, path = work(6), tmp_path / "state.safetensors"
    work(3, path)
    close(work(6, path), want, atol=1e-6, rtol=1e-6)


def test_every_stage(tmp_path, capsys):
    """data to eval and explore in bfloat16: figures are finite."""
    prompts = [{"prompt": f"{c} 9?", "category": c, "kind": "harmful"} for c in CATEGORIES]
    prompts += [{"prompt": f"Hello {kind}?", "kind": kind} for kind in ("ordinary", "lookalike")]
    make_world(tmp_path, 4, 70, prompts)
    argv = flags(
        tmp_path,
        f"{WORLD} --recipe gpu --encoder words --per-category 3 --max-new-tokens 12 --run W/run"
        " --sft-steps 3 --sft-batch 4 --sft-lr 1e-2 --irl-prompts 2"
        " --irl-lr 3e-4 --grpo-rollouts 2 --grpo-prompts 8"
        " --grpo-open-prompts true --rival true",
    )
    assert drirl.main(["all", *argv]) == 0, capsys.readouterr().err
    run = ["--run", str(tmp_path / "run")]
    assert explore.main(run) == 0, capsys.readouterr().err
    records = read_records(tmp_path / "run/metrics.jsonl")
    assert {r["stage"] for r in records} == {"sft", "irl", "grpo", "baseline"}
    assert all(math.isfinite(r["loss"]) for r in records)
    report = (tmp_path / "run/report.md").read_text()
    assert torch.cuda.get_device_name() in report and "bfloat16" in report


def test_the_grid(world, tmp_path, capsys):  # noqa: F811
    assert grid.main([*world, "standard", "--device", DEVICE]) == 0, capsys.readouterr().err
    found = lines(tmp_path)
    assert [r["variant"] for r in found] == list(grid.VARIANTS)
    assert all(r["rates"]["harmful"][1] == 7 if "rates" in r else r["auc"] for r in found)
    assert all(torch.cuda.get_device_name() in r["machine"] for r in found)
