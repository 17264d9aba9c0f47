"""`--device cuda` does what the CPU does, in float32, and every stage ends: `-m gpu`, on a CUDA device. The kernels by themselves: test_triton.py."""

import json
import math
from dataclasses import replace

import pytest
import torch
import transformers

import drirl
from batch import Batch
from data import CATEGORIES, HELPFUL
from encoder import load_encoder
from kernels import token_logprobs
from loop import Loop
from model import generate, head_inputs, run_blocks, token_logps
from reward import IRLConfig, RewardModels, fit, prepare, sample_groups, score
from test_ablate import lines, world  # noqa: F401 (a fixture: model and corpus)
from test_encoder import CLIP, SMALL as ENCODER, TEXTS, randomise, save
from test_grpo_train import SMALL, Letters, run, start, tiny
from transformer import Config, Transformer

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
    return make("cpu"), [x.cpu() if isinstance(x, torch.Tensor) else x for x in make(DEVICE)]


def network(device):
    torch.manual_seed(0)
    model = Transformer(Config.from_dict(WIDE))
    for p in model.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.15)
    return model.to(device)


@pytest.mark.parametrize("recompute", (False, True))
def test_scores(recompute):
    """Logits of whole sequences; log-probs of completions behind shared prompts, and their gradient."""

    def make(device):
        model = network(device)
        batch = Batch(PROMPTS, [[[6, 7], [8, 9, 10, 11]], [[12]], [[13, 14, 15]]], device)
        logps = token_logprobs(
            *head_inputs(model, run_blocks(model, batch, recompute=recompute), batch), 0.7
        )
        logps.sum().backward()
        return [
            model(torch.tensor(PROMPTS[:1], device=device)).detach(),
            logps.detach(),
            token_logps(model, batch, 0.7, frozen=2).detach(),
            *(p.grad for p in model.parameters()),
        ]

    for x, y in zip(*both(make)):
        close(x, y, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("temperature", (0, 0.8))
def test_generation(temperature):
    """The same random numbers give the same tokens."""

    def make(device):
        out = generate(
            network(device), PROMPTS, 4, 16, temperature, top_k=50, top_p=0.9, seed=3, eos=(7, 8, 9)
        )
        return out.tokens, out.mask, out.logps

    (tokens, mask, logps), (tokens_, mask_, logps_) = both(make)
    assert torch.equal(tokens, tokens_) and torch.equal(mask, mask_) and mask.sum() < mask.numel()
    close(logps, logps_, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ("Bert", "CLIPText"))
def test_encoders(kind, tmp_path):
    config = getattr(transformers, kind + "Config")(
        **ENCODER, **(CLIP if kind == "CLIPText" else {})
    )
    save(randomise(getattr(transformers, kind + "Model")(config)), tmp_path, 18, 19)
    here, there = both(lambda device: [load_encoder(tmp_path, device).embed(TEXTS)])
    close(*here, *there, atol=1e-5, rtol=1e-5)


def rewards_of(trunk, **more):
    torch.manual_seed(1)
    return RewardModels(trunk.requires_grad_(False), IRLConfig(reward_blocks=1, **more))


@pytest.mark.parametrize("more", ({}, {"reward_models": 1}, {"integration": "linear"}), ids=str)
def test_rewards(more):
    """Samples, fit and scores."""
    rows = [
        {"prompt": f"{name[:4]}{w}", "category": name, "response": f"{w}{w}g"}
        for name in (*CATEGORIES, HELPFUL)
        for w in ("ab", "cde", "f", "hij")
    ]

    def make(device):
        trunk = tiny().to(device)
        models = rewards_of(trunk, **more)
        groups = sample_groups(
            trunk, Letters(), rows, IRLConfig(prompts=3, helpful_prompts=3, samples=2), 6, 1.0, 0
        )
        batches = prepare(models, groups, 3, lambda: torch.autocast(device, enabled=False))
        fit(
            models,
            batches,
            IRLConfig(epochs=2, lr=1e-3),
            lambda: torch.autocast(device, enabled=False),
        )
        score(models, batches, lambda: torch.autocast(device, enabled=False))
        return [torch.tensor([[g["reward_demo"], *g["rewards"]] for g in groups])]

    here, there = both(make)
    close(*here, *there, atol=2e-3, rtol=2e-3)
    assert here[0].std() > 0.5


@pytest.mark.parametrize(
    "more",
    ({}, {"recompute": True, "tokens_per_batch": 40}, {"blocks": 1, "scaling": "none"}),
    ids=str,
)
def test_grpo(more):
    """Two rollouts, two updates each: what is logged, and how the weights move."""
    c = replace(
        SMALL,
        **{
            "blocks": 0,
            "rollouts": 2,
            "iterations": 2,
            "imitate": True,
            "beta_kl": 0.1,
            "std_eps": 0.1,
            **more,
        },
    )

    def make(device):
        policy, rewards = start()
        policy, trunk = policy.to(device), rewards.trunk[0].to(device)
        rewards = rewards_of(trunk).requires_grad_(False)
        torch.manual_seed(2)
        for shadow in rewards.shadows.values():
            shadow.value.weight.copy_(torch.randn(shadow.value.weight.shape))
        before = [p.detach().clone() for p in policy.parameters()]
        records = run(policy, rewards, c, c.blocks)
        figures = torch.tensor(
            [
                r[k]
                for r in records
                for k in (
                    "loss",
                    "kl",
                    "grad_norm",
                    "clipped",
                    "length",
                    "reward_std",
                    "similarity",
                )
            ]
        )
        return [figures, *(p.detach() - q for p, q in zip(policy.parameters(), before))]

    (figures, *moves), (figures_, *moves_) = both(make)
    close(figures, figures_, atol=1e-5, rtol=1e-2)
    assert figures[8] > 1e-5  # the second rollout's KL
    x, y = (torch.cat([m.flatten() for m in each]) for each in (moves, moves_))
    assert (
        (x - y).abs().mean() < 0.05 * x.abs().mean() > 0
    )  # AdamW may turn a gradient near 0 around


def test_state(tmp_path):
    """A loop's state, moments included, comes back on the GPU."""

    def work(steps, path=None):
        goes_on = path is not None and path.exists()
        torch.manual_seed(9 if goes_on else 0)  # it must not begin where the other began
        model = torch.nn.Linear(5, 3).to(DEVICE)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        with Loop("sft", path, every=0) as loop:
            assert loop.resumed == 3 * goes_on
            for step in range(steps):
                if not loop.skip(step, model, optimizer):
                    loop.update(
                        step,
                        (model(torch.full((2, 5), step + 1.0, device=DEVICE)) - 1).pow(2).mean(),
                        model.parameters(),
                    )
        return model.weight.detach().cpu()

    want = work(6)
    work(3, tmp_path / "state.safetensors")
    close(work(6, tmp_path / "state.safetensors"), want, atol=1e-6, rtol=1e-6)


def test_every_stage(world, tmp_path, capsys):  # noqa: F811
    """data, sft, irl, grpo, baseline, eval, dpo and explore in bfloat16 by the command line, and the grid in float32: nothing is skipped, figures are finite."""
    flags = [
        *world[1:-3],
        "--device",
        DEVICE,
        "--dtype",
        "bf16",
        "--per-category",
        "3",
        "--helpful-demonstrations",
        "6",
        "--max-new-tokens",
        "12",
        "--steps",
        "3",
        "--sft-batch",
        "4",
        "--irl-prompts",
        "2",
        "--helpful-prompts",
        "4",
        "--rollouts",
        "2",
        "--grpo-prompts",
        "8",
        "--open-prompts",
        "true",
        "--updates",
        "2",
        "--rounds",
        "2",
        "--estimator",
        "linear",
        "--baseline-steps",
        "2",
        "--run",
        str(tmp_path / "run"),
    ]
    for stage in ("all", "dpo", "explore"):
        assert drirl.main([stage, *flags]) == 0, capsys.readouterr().err
    records = [
        json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    ]
    assert {r["stage"] for r in records} == {"sft", "irl", "grpo", "baseline", "dpo"} and not any(
        "skipped" in r for r in records
    )
    assert all(math.isfinite(r["loss"]) for r in records)
    assert (
        drirl.main(
            [*world[:-3], "--device", DEVICE, "--seeds", "1", "--run", str(tmp_path / "grid")]
        )
        == 0
    ), capsys.readouterr().err
    assert len(lines(tmp_path / "grid")) == 20 and all(
        torch.cuda.get_device_name() in r["machine"] for r in lines(tmp_path / "grid")
    )
    assert all(math.isfinite(r[key]) for r in lines(tmp_path / "grid") for key in ("nll", "kl"))
