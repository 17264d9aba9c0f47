"""model.py against transformers: random small networks, same numbers."""
import json
import math

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from data import UserError
from model import Batch, choose, frozen_copy, generate, load_model, run_blocks, save_model, token_logps

BASE = dict(vocab_size=61, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            head_dim=12, tie_word_embeddings=False, max_position_embeddings=512, bos_token_id=None, eos_token_id=None, pad_token_id=0)
SCALED = dict(rope_type="llama3", rope_theta=10000.0, factor=7.0, low_freq_factor=1.5, high_freq_factor=5.0, original_max_position_embeddings=24)
CASES = {
    "llama gqa 1": ("Llama", dict(num_key_value_heads=4)),
    "llama gqa 2 tied": ("Llama", dict(tie_word_embeddings=True)),
    "llama gqa 3 wide heads": ("Llama", dict(num_attention_heads=6, head_dim=14, rms_norm_eps=1e-3)),
    "llama attention bias": ("Llama", dict(attention_bias=True, head_dim=10)),
    "llama mlp bias": ("Llama", dict(mlp_bias=True)),
    "llama all biases tied": ("Llama", dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, num_attention_heads=3, num_key_value_heads=1, head_dim=16)),
    "llama3 rope": ("Llama", dict(rope_parameters=SCALED)),
    "llama3 rope tied theta": ("Llama", dict(rope_parameters={**SCALED, "rope_theta": 3000.0, "factor": 32.0}, head_dim=22, tie_word_embeddings=True)),
    "qwen2 tied": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen2 gqa 3": ("Qwen2", dict(num_attention_heads=6, num_key_value_heads=2, head_dim=8)),
    "qwen2 gqa 1 theta": ("Qwen2", dict(num_key_value_heads=4, rope_parameters=dict(rope_type="default", rope_theta=1e6), rms_norm_eps=1e-2)),
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


PROMPTS = [random_ids(n, seed=n).tolist() for n in (3, 11, 1, 7, 5, 8, 2, 6)]


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
    assert (load_model(tmp_path)(random_ids(1, 9)) - theirs(random_ids(1, 9)).logits).abs().max() < 1e-4


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
    (folder / "config.json").write_text(json.dumps({k: v for k, v in {**raw, **changes}.items() if v is not None}))


@pytest.mark.parametrize("changes, words", [
    (dict(model_type="gpt2"), "unsupported architecture 'gpt2'"),
    (dict(rope_parameters=dict(rope_type="yarn", factor=4.0)), "unsupported rope scaling 'yarn'"),
    (dict(rope_parameters=None, rope_scaling=dict(type="linear", factor=2.0)), "unsupported rope scaling 'linear'"),
    (dict(use_sliding_window=True), "use_sliding_window"),
    (dict(hidden_act="gelu"), "hidden_act 'gelu'"),
    (dict(intermediate_size=None), "lacks 'intermediate_size'"),
    (dict(vocab_size=62), r"embed_tokens.weight has shape \(61, 48\), config.json asks for \(62, 48\)"),
    (dict(num_hidden_layers=4), r"layers.3.*has shape None"),
    (dict(attention_bias=True), r"self_attn.k_proj.bias has shape None, config.json asks for \(24,\)"),
])
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

COMPLETIONS = [[random_ids(n, seed=20 + n).tolist() for n in group] for group in ((4, 9), (1,), (), (6, 2, 3))]


def reference_logps(theirs, prompt, completion, temperature):
    logits = theirs(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1:-1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


@torch.no_grad()
@pytest.mark.parametrize("temperature", (1.0, 0.7))
def test_token_logps(pair, temperature):
    ours, theirs = pair
    batch = Batch(PROMPTS[:4], COMPLETIONS)
    got, row = token_logps(ours, batch, temperature), 0
    assert got.shape == batch.mask.shape == (6, 9) and (got[~batch.mask] == 0).all()
    for prompt, group in zip(PROMPTS, COMPLETIONS):
        for completion in group:
            assert batch.mask[row].tolist() == [i < len(completion) for i in range(9)]
            assert batch.completions[row, :len(completion)].tolist() == completion
            assert (got[row, :len(completion)] - reference_logps(theirs, prompt, completion, temperature)).abs().max() < 1e-4
            row += 1
    assert row == 6


def test_select_is_the_batch_of_those_prompts(pair):
    ours, batch = pair[0], Batch(PROMPTS[:4], COMPLETIONS)
    part, tokens, rows = batch.select([3, 0])
    assert torch.equal(batch.ids[tokens], part.ids) and rows.tolist() == [0, 1, 3, 4, 5]
    assert torch.allclose(run_blocks(ours, batch)[tokens], run_blocks(ours, part), atol=1e-5)
    assert torch.allclose(token_logps(ours, batch)[rows], token_logps(ours, part), atol=1e-5)


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


# ------------------------------------------------------------------------------------------------ generation

@pytest.fixture(scope="module")
def greedy(pair):
    """20 greedy tokens of every prompt by transformers, one prompt at a time."""
    out = []
    for p in PROMPTS:
        ids = torch.tensor([p])
        got = pair[1].generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20, pad_token_id=0)
        out.append(got[0, len(p):].tolist())
    return out


def test_greedy_matches_transformers(pair, greedy):
    assert len({tuple(g) for g in greedy}) == len(PROMPTS)
    assert generate(pair[0], PROMPTS, max_new_tokens=20, temperature=0).rows() == greedy
    assert [generate(pair[0], [p], max_new_tokens=20, temperature=0).rows()[0] for p in PROMPTS] == greedy
    assert generate(pair[0], PROMPTS[:3], samples=2, max_new_tokens=20, temperature=0).rows() == [g for g in greedy[:3] for _ in "ab"]


def cut(row, eos):
    """Up to and with the first end-of-text id."""
    return next((row[:i + 1] for i, t in enumerate(row) if t in eos), row)


def lengths(greedy, eos):
    return {len(cut(g, eos)) for g in greedy}


def test_rows_end_at_different_times(pair, greedy):
    """With end-of-text ids that stop rows at many different lengths, finished rows leave and the others do not notice."""
    for count in (1, 2, 4):
        eos = ()
        for _ in range(count):                               # the ids after which lengths differ most
            eos += (max(range(61), key=lambda t: len(lengths(greedy, (*eos, t)))),)
        want = [cut(g, eos) for g in greedy]
        assert len(lengths(greedy, eos)) > 2 + (count > 1) and any(len(w) < 20 for w in want)
        got = generate(pair[0], PROMPTS, max_new_tokens=20, temperature=0, eos=eos)
        assert got.rows() == want
        assert got.rows() == [generate(pair[0], [p], max_new_tokens=20, temperature=0, eos=eos).rows()[0] for p in PROMPTS]
        for w, tokens, mask, logps in zip(want, got.tokens, got.mask, got.logps):
            assert mask.tolist() == [i < len(w) for i in range(20)]
            assert (tokens[len(w):] == 0).all() and (logps[len(w):] == 0).all() and (logps[:len(w)] < 0).all()
        batch = Batch(PROMPTS, [[w] for w in want])
        assert (token_logps(pair[0], batch)[batch.mask] - got.logps[got.mask]).abs().max() < 1e-4


@pytest.mark.parametrize("temperature", (1.0, 0.6))
def test_rollout_logps_are_token_logps(pair, temperature):
    """Sampled in groups, rows ending at their own times: scoring the rollout again gives the log-probs it was sampled with."""
    got = generate(pair[0], PROMPTS[:5], samples=3, max_new_tokens=12, temperature=temperature, seed=4, eos=(5, 9, 17))
    assert len({len(r) for r in got.rows()}) > 2
    batch = Batch(PROMPTS[:5], [got.rows()[3 * p:3 * p + 3] for p in range(5)])
    again = token_logps(pair[0], batch, temperature)
    assert torch.equal(batch.mask, got.mask[:, :batch.mask.shape[1]])
    assert (again - got.logps[:, :again.shape[1]]).abs().max() < 1e-4
    same = generate(pair[0], PROMPTS[:5], samples=3, max_new_tokens=12, temperature=temperature, seed=4, eos=(5, 9, 17))
    other = generate(pair[0], PROMPTS[:5], samples=3, max_new_tokens=12, temperature=temperature, seed=5, eos=(5, 9, 17))
    assert torch.equal(same.tokens, got.tokens) and torch.equal(same.logps, got.logps) and other.rows() != got.rows()


def filtered(logits, temperature, top_k, top_p):
    """The distribution to sample from, by hand for one row: the best top_k, then the smallest set that reaches top_p."""
    p = (logits.double() / temperature).softmax(-1).tolist()
    order = sorted(range(len(p)), key=lambda i: -p[i])[:top_k or len(p)]
    total, kept, reached = sum(p[i] for i in order), [], 0.0
    for i in order:
        if reached < top_p:
            kept.append(i)
            reached += p[i] / total
    kept_sum = sum(p[i] for i in kept)
    return [p[i] / kept_sum if i in kept else 0.0 for i in range(len(p))]


FILTERS = [(1.0, 0, 1.0), (0.5, 0, 1.0), (1.3, 5, 1.0), (1.0, 0, 0.7), (0.8, 6, 0.8), (1.0, 1, 1.0), (1.0, 0, 0.01)]


@pytest.mark.parametrize("temperature, top_k, top_p", FILTERS)
def test_choose_samples_the_filtered_distribution(temperature, top_k, top_p):
    n, logits = 20000, torch.randn(12, generator=torch.Generator().manual_seed(2)) * 1.5
    want = filtered(logits, temperature, top_k, top_p)
    ids, logps = choose(logits.expand(n, -1), temperature, top_k, top_p, torch.Generator().manual_seed(3))
    counts = torch.bincount(ids, minlength=12).tolist()
    for p, c in zip(want, counts):
        assert abs(c - n * p) <= 5 * math.sqrt(n * p * (1 - p))           # five standard deviations; 0 for what was filtered out
    assert torch.allclose(logps.double(), torch.tensor(want, dtype=torch.double)[ids].log(), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("temperature, top_k, top_p", FILTERS[2:5])
def test_rollout_logps_with_filters(pair, temperature, top_k, top_p):
    got = generate(pair[0], PROMPTS[:3], samples=2, max_new_tokens=6, temperature=temperature, top_k=top_k, top_p=top_p)
    for i, row in enumerate(got.rows()):
        prompt = PROMPTS[i // 2]
        logits = pair[1](torch.tensor([prompt + row])).logits[0, len(prompt) - 1:-1]
        want = [math.log(filtered(z, temperature, top_k, top_p)[t]) for z, t in zip(logits, row)]
        assert got.logps[i, :len(row)].tolist() == pytest.approx(want, abs=1e-4)
