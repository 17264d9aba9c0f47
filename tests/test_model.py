"""model.py against transformers: random small networks, same numbers. Generation: test_generate.py."""

import json
import random

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from batch import Batch
from data import UserError
from model import frozen_copy, load_model, run_blocks, save_model, token_logps

BASE = dict(
    vocab_size=61,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    tie_word_embeddings=False,
    max_position_embeddings=512,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
)
SCALED = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=7.0,
    low_freq_factor=1.5,
    high_freq_factor=5.0,
    original_max_position_embeddings=24,
)
CASES = {
    "llama gqa 1": ("Llama", dict(num_key_value_heads=4)),
    "llama gqa 2 tied": ("Llama", dict(tie_word_embeddings=True)),
    "llama gqa 3 wide heads": (
        "Llama",
        dict(num_attention_heads=6, head_dim=14, rms_norm_eps=1e-3),
    ),
    "llama attention bias": ("Llama", dict(attention_bias=True, head_dim=10)),
    "llama mlp bias": ("Llama", dict(mlp_bias=True)),
    "llama all biases tied": (
        "Llama",
        dict(
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=True,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=16,
        ),
    ),
    "llama3 rope": ("Llama", dict(rope_parameters=SCALED)),
    "llama3 rope tied theta": (
        "Llama",
        dict(
            rope_parameters={**SCALED, "rope_theta": 3000.0, "factor": 32.0},
            head_dim=22,
            tie_word_embeddings=True,
        ),
    ),
    "qwen2 tied": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen2 gqa 3": ("Qwen2", dict(num_attention_heads=6, num_key_value_heads=2, head_dim=8)),
    "qwen2 gqa 1 theta": (
        "Qwen2",
        dict(
            num_key_value_heads=4,
            rope_parameters=dict(rope_type="default", rope_theta=1e6),
            rms_norm_eps=1e-2,
        ),
    ),
    "qwen3 tied": ("Qwen3", dict(tie_word_embeddings=True, head_dim=20)),
    "qwen3 gqa 3 bias": ("Qwen3", dict(num_attention_heads=6, attention_bias=True, head_dim=18)),
    "qwen3 gqa 1": ("Qwen3", dict(num_key_value_heads=4, rms_norm_eps=1e-2)),
}


def make(folder, kind="Llama", shards=None, seed=0, **changes):
    """A transformers model with every parameter random (norms and biases too), saved to `folder`."""
    config = getattr(transformers, kind + "Config")(**{**BASE, **changes})
    theirs = getattr(transformers, kind + "ForCausalLM")(config).eval()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.18 + ("norm" in name))
    theirs.generation_config.eos_token_id = theirs.generation_config.bos_token_id = None
    theirs.save_pretrained(folder, **({"max_shard_size": shards} if shards else {}))
    return theirs


def random_ids(*shape, seed=1):
    return torch.randint(BASE["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


PROMPTS = [
    random_ids(n, seed=i).tolist()
    for i, n in enumerate((3, 11, 1, 7, 5, 8, 2, 6, 9, 4, 10, 3, 1, 12, 6, 2, 5, 8, 7, 4))
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """One model of ours and the transformers model it was loaded from."""
    folder = tmp_path_factory.mktemp("pair")
    return (make(folder, "Qwen3", head_dim=14), load_model(folder))[::-1]


# ------------------------------------------------------------------------------------------------ folders


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_logits_match_transformers(name, tmp_path):
    """Loaded, run, saved and read back by transformers: the same logits, at positions beyond the rope scaling's old context."""
    kind, changes = CASES[name]
    theirs, ids = make(tmp_path, kind, **changes), random_ids(2, 90)
    want = theirs(ids).logits
    assert want.std() > 0.3
    ours = load_model(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert (ours(ids) - want).abs().max() < 1e-4
    save_model(ours, tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert type(again) is type(theirs) and again.dtype == torch.float32
    assert torch.equal(again(ids).logits, want)


@torch.no_grad()
def test_shards(tmp_path):
    theirs = make(tmp_path, shards="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert (
        load_model(tmp_path)(random_ids(1, 9)) - theirs(random_ids(1, 9)).logits
    ).abs().max() < 1e-4


def test_save_in_bfloat16_and_copy_tokenizer(tmp_path):
    make(tmp_path, tie_word_embeddings=True)
    (tmp_path / "tokenizer.json").write_text("{}")
    save_model(load_model(tmp_path), tmp_path / "half", torch.bfloat16)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert (tmp_path / "half" / "tokenizer.json").read_text() == "{}"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert again.dtype == torch.bfloat16
    assert torch.equal(again.lm_head.weight, load_model(tmp_path).head.bfloat16())


def test_rope_stays_exact_in_bfloat16(tmp_path):
    """Rotation speeds rounded to 8 bits would be wrong by a radian after some hundred tokens."""
    make(tmp_path)
    at, whole = torch.arange(400), load_model(tmp_path)
    for half in (load_model(tmp_path, torch.bfloat16), frozen_copy(whole, torch.bfloat16)):
        assert half.head.dtype == torch.bfloat16
        assert (half.rope(at)[0] - whole.rope(at)[0]).abs().max() < 1e-6


def edit_config(folder, **changes):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in {**raw, **changes}.items() if v is not None})
    )


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(model_type="gpt2"), "unsupported architecture 'gpt2'"),
        (
            dict(rope_parameters=dict(rope_type="yarn", factor=4.0)),
            "unsupported rope scaling 'yarn'",
        ),
        (
            dict(rope_parameters=None, rope_scaling=dict(type="linear", factor=2.0)),
            "unsupported rope scaling 'linear'",
        ),
        (dict(use_sliding_window=True), "use_sliding_window"),
        (dict(hidden_act="gelu"), "hidden_act 'gelu'"),
        (dict(intermediate_size=None), "lacks 'intermediate_size'"),
        (
            dict(vocab_size=62),
            r"embed_tokens.weight has shape \(61, 48\), config.json asks for \(62, 48\)",
        ),
        (dict(num_hidden_layers=4), r"layers.3.*has shape None"),
        (
            dict(attention_bias=True),
            r"self_attn.k_proj.bias has shape None, config.json asks for \(24,\)",
        ),
    ],
)
def test_config_errors(changes, words, tmp_path):
    make(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(UserError, match=words):
        load_model(tmp_path)


def test_file_errors(tmp_path):
    with pytest.raises(UserError, match="nowhere.*config.json"):
        load_model(tmp_path / "nowhere")
    make(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors here")
    with pytest.raises(UserError, match="cannot read .*model.safetensors"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="model.safetensors does not exist"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot read .*config.json"):
        load_model(tmp_path)


# ------------------------------------------------------------------------------------------------ log-probs of completions

COMPLETIONS = [
    [random_ids(n, seed=20 + n).tolist() for n in group] for group in ((4, 9), (1,), (), (6, 2, 3))
]


def reference_logps(theirs, prompt, completion, temperature):
    logits = (
        theirs(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / temperature
    )
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


ONE, TWO = PROMPTS[1], PROMPTS[5]
STARTS = {  # prompts, and how many tokens they start with in common
    "nothing": (PROMPTS[:4], 0),
    "five": ([ONE[:5] + TWO[:n] for n in (1, 4, 8, 2)], 5),
    "one is the start of others": ([ONE, ONE[:3], ONE[:3], ONE[:3] + TWO], 2),
    "all": ([ONE] * 4, 10),
    "a single token": ([ONE[:1]] * 3 + [ONE[:1] + TWO], 0),
}


@torch.no_grad()
@pytest.mark.parametrize("temperature", (1.0, 0.7))
@pytest.mark.parametrize("start", STARTS)
def test_token_logps(pair, start, temperature):
    """Prompts with and without a common start: every completion token's log-prob as if its sequence ran alone."""
    (ours, theirs), (prompts, shared) = pair, STARTS[start]
    batch = Batch(prompts, COMPLETIONS)
    assert (
        len(batch.ids) == shared + sum(len(p) - shared for p in prompts) + 25
    )  # what is common runs once
    got, row = token_logps(ours, batch, temperature), 0
    assert (
        got.shape == batch.mask.shape == (6, 9)
        and got.dtype == torch.float32
        and (got[~batch.mask] == 0).all()
    )
    for prompt, group in zip(prompts, COMPLETIONS):
        for completion in group:
            assert batch.mask[row].tolist() == [i < len(completion) for i in range(9)]
            assert batch.completions[row, : len(completion)].tolist() == completion
            assert (
                got[row, : len(completion)]
                - reference_logps(theirs, prompt, completion, temperature)
            ).abs().max() < 1e-4
            row += 1
    assert row == 6


@torch.no_grad()
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("chosen", ([0, 1, 3, 4, 5], [2], [1, 3, 5], [0, 1, 2, 3, 4, 5]))
def test_select_is_the_batch_of_those_completions(pair, start, chosen):
    ours, batch = pair[0], Batch(STARTS[start][0], COMPLETIONS)
    part, tokens = batch.select(chosen)
    assert torch.equal(batch.ids[tokens], part.ids)
    flat = [c for group in COMPLETIONS for c in group]
    assert [c[m].tolist() for c, m in zip(part.completions, part.mask)] == [flat[b] for b in chosen]
    assert torch.allclose(run_blocks(ours, batch)[tokens], run_blocks(ours, part), atol=1e-5)
    logps = token_logps(ours, part)
    assert torch.allclose(token_logps(ours, batch)[chosen, : logps.shape[1]], logps, atol=1e-5)


def test_split_keeps_the_budget():
    """Every completion once and in order, no more parts than needed for the budget or one of a single completion, and these of similar size."""
    rng = random.Random(0)
    for _ in range(200):
        prompts = [
            [1, *rng.choices(range(9), k=rng.randint(1, 12))] for _ in range(rng.randint(1, 6))
        ]
        groups = [
            [rng.choices(range(9), k=rng.randint(1, 20)) for _ in range(rng.randint(1, 5))]
            for _ in prompts
        ]
        batch, tokens = Batch(prompts, groups), rng.randint(1, 90)
        rows = sorted(rng.sample(range(len(batch.owner)), rng.randint(1, len(batch.owner))))
        parts = batch.split(rows, tokens)
        assert [b for part in parts for b in part] == rows and all(parts)
        sizes = [len(batch.select(part)[0].ids) - batch.shared for part in parts]
        assert all(size <= tokens or len(part) == 1 for size, part in zip(sizes, parts))
        if len(rows) == len(batch.owner):
            assert len(parts) == 1 or sum(sizes) > tokens
    even = Batch([[1, 2]] * 8, [[[3] * 9] * 4] * 8)  # 8 groups of 37 tokens
    assert [len(p) for p in even.split(list(range(32)), 160)] == [16, 16]
    assert [len(p) for p in even.split(list(range(32)), 140)] == [11, 11, 10]  # not 15, 15, 2


@pytest.mark.parametrize("frozen", (0, 1, 2, 3))
def test_frozen_blocks_get_no_gradient(pair, frozen):
    ours, batch = pair[0], Batch(PROMPTS[:4], COMPLETIONS)
    ours.zero_grad(set_to_none=True)
    logps = token_logps(ours, batch, frozen=frozen)
    with torch.no_grad():
        assert torch.allclose(logps, token_logps(ours, batch), atol=1e-6)
    logps.sum().backward()
    for i, block in enumerate(ours.layers):
        for p in block.parameters():
            assert p.grad is None if i < frozen else p.grad.abs().max() > 0
    assert (ours.embed_tokens.weight.grad is None) == (frozen > 0)
    assert ours.head.grad.abs().max() > 0 and ours.norm.weight.grad.abs().max() > 0


def test_the_example_in_batch():
    b = Batch([[1, 2, 3], [1, 2, 4, 5]], [[[6, 7], [8]], [[9]]])
    assert [z.tolist() for z in (b.ids, b.positions, b.before, b.owner)] == [
        [1, 2, 3, 4, 5, 6, 7, 8, 9],
        [0, 1, 2, 2, 3, 3, 4, 3, 4],
        [2, 5, 2, 4],
        [0, 0, 1],
    ]


def test_autocast(pair):
    """bfloat16 autocast with frozen blocks below, as in training: Qwen3's float32 head norms must not part q and k from v."""
    ours, _ = pair
    batch = Batch(PROMPTS[:4], [[p[::-1]] * 2 for p in PROMPTS[:4]])
    want = token_logps(ours, batch)
    with torch.autocast("cpu", torch.bfloat16):
        got = token_logps(ours, batch, frozen=1)
        assert torch.isfinite(got).all() and (got - want).abs().mean() < 0.1
        got.sum().backward()
        with torch.no_grad():
            torch.testing.assert_close(token_logps(ours, batch, frozen=1), got, atol=0.1, rtol=0.1)
    ours.zero_grad(set_to_none=True)
