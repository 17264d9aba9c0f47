"""hf.py against transformers: folders in and out; whatever is wrong with one is a UserError."""

import json
import os
import random
import re
import resource
import shutil
import struct
import time

import pytest
import torch
import transformers
from conftest import TINY_LLAMA, make_model
from safetensors.torch import load_file, save_file
from test_files import die_at, mutate_json, mutate_tensors
from transformers import AutoModelForCausalLM

from config import UserError
from support.chat import load_chat
from support.hf import frozen_copy, load_model, read_config, save_model

BASE = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "tie_word_embeddings": False,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
TIED, BIAS, MLP = {"tie_word_embeddings": True}, {"attention_bias": True}, {"mlp_bias": True}
SCALED = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 7.0, "low_freq_factor": 1.5}
OLD = "original_max_position_embeddings"
SCALED |= {"high_freq_factor": 5.0, OLD: 24}
OTHER = {**SCALED, "rope_theta": 3000.0, "factor": 32.0}
PLAIN = {"rope_type": "default", "rope_theta": 1e6}


def heads(query: int, key: int, width: int = 12) -> dict:
    return {"num_attention_heads": query, "num_key_value_heads": key, "head_dim": width}


CASES = {
    "llama gqa 1": ("Llama", heads(4, 4)),
    "llama gqa 2 tied": ("Llama", TIED),
    "llama gqa 3 wide heads": ("Llama", {**heads(6, 2, 14), "rms_norm_eps": 1e-3}),
    "llama attention bias": ("Llama", {**BIAS, "head_dim": 10}),
    "llama mlp bias": ("Llama", MLP),
    "llama all biases tied": ("Llama", {**BIAS, **MLP, **TIED, **heads(3, 1, 16)}),
    "llama3 rope": ("Llama", {"rope_parameters": SCALED}),
    "llama3 rope tied theta": ("Llama", {**TIED, "rope_parameters": OTHER, "head_dim": 22}),
    "qwen2 tied": ("Qwen2", TIED),
    "qwen2 gqa 3": ("Qwen2", heads(6, 2, 8)),
    "qwen2 theta": ("Qwen2", {**heads(4, 4), "rope_parameters": PLAIN, "rms_norm_eps": 1e-2}),
    "qwen3 tied": ("Qwen3", {**TIED, "head_dim": 20}),
    "qwen3 gqa 3 bias": ("Qwen3", {**BIAS, **heads(6, 2, 18)}),
    "qwen3 gqa 1": ("Qwen3", {**heads(4, 4), "rms_norm_eps": 1e-2}),
}


def make(folder, kind="Llama", shards=None, seed=0, **changes):
    """A transformers model with every parameter random (norms and biases too), saved to folder."""
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


# ---------------------------------------------------------------------------- good folders


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_logits_match_transformers(name, tmp_path):
    """Loaded, run, saved and read back by transformers: the same logits.

    Positions reach beyond the rope scaling's old context.
    """
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
def test_two_thetas(tmp_path):
    """That of rope_parameters counts, as in transformers."""
    make(tmp_path, "Qwen2", rope_parameters=PLAIN)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"rope_theta": 5000.0}))
    theirs, ids = AutoModelForCausalLM.from_pretrained(tmp_path), random_ids(1, 30)
    assert (load_model(tmp_path)(ids) - theirs(ids).logits).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize(
    "kind, changes, edits",
    [
        ("Llama", {"rope_parameters": PLAIN}, {"rope_scaling": SCALED}),
        ("Llama", {"rope_parameters": SCALED}, {"original_max_position_embeddings": 60}),
        ("Llama", {}, {"rope_parameters": {k: x for k, x in SCALED.items() if k != OLD}}),
        ("Qwen3", {"head_dim": 128}, {"head_dim": None}),
    ],
    ids=("both scalings", "an old context on top", "no old context", "no head_dim"),
)
def test_edited_configs(tmp_path, kind, changes, edits):
    """What transformers makes of a config.json that was edited by hand. None: left out."""
    make(tmp_path, kind, **changes)
    raw = json.loads((tmp_path / "config.json").read_text()) | edits
    kept = {k: x for k, x in raw.items() if k not in edits or x is not None}
    (tmp_path / "config.json").write_text(json.dumps(kept))
    theirs, ids = AutoModelForCausalLM.from_pretrained(tmp_path), random_ids(1, 90)
    assert (load_model(tmp_path)(ids) - theirs(ids).logits).abs().max() < 1e-4


@torch.no_grad()
def test_shards(tmp_path):
    """Read, and gone when a model is saved over them."""
    theirs, ids = make(tmp_path, shards="60KB"), random_ids(1, 9)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    want, ours = theirs(ids).logits, load_model(tmp_path)
    assert (ours(ids) - want).abs().max() < 1e-4
    ours.norm.weight.mul_(2)
    save_model(ours, tmp_path)
    assert not (tmp_path / "model.safetensors.index.json").exists()
    assert (load_model(tmp_path)(ids) - 2 * want).abs().max() < 2e-4


@torch.no_grad()
def test_a_single_file_wins_over_shards(tmp_path):
    """As in transformers: an index may be left from before."""
    make(tmp_path, shards="60KB", seed=1)
    make(tmp_path / "newer", seed=2)
    shutil.copy(tmp_path / "newer" / WEIGHTS, tmp_path)
    assert (tmp_path / INDEX).exists()
    ids, theirs = random_ids(1, 9), AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (load_model(tmp_path)(ids) - theirs(ids).logits).abs().max() < 1e-4
    (tmp_path / WEIGHTS).unlink()
    assert (load_model(tmp_path)(ids) - theirs(ids).logits).abs().max() > 0.1


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
STORED = {  # of a tied model: what is done to its tensors, whether it stays tied
    "only the embedding": (lambda s: None, True),
    "only the head": (lambda s: s.update({HEAD: s.pop(EMBEDDING)}), True),
    "both": (lambda s: s.update({HEAD: s[EMBEDDING].clone()}), True),
    "a head of its own": (lambda s: s.update({HEAD: s[EMBEDDING].flip(0)}), False),
}


@torch.no_grad()
@pytest.mark.parametrize("name", STORED)
def test_tied_models(name, tmp_path):
    """transformers ties by what it finds; saved, the folder says which it is."""
    change, tied = STORED[name]
    make(tmp_path, **TIED)
    tensors(change)(tmp_path)
    ids, theirs = random_ids(1, 9), AutoModelForCausalLM.from_pretrained(tmp_path)
    want, ours = theirs(ids).logits, load_model(tmp_path)
    assert (ours(ids) - want).abs().max() < 1e-4 and ours.config.tied == tied
    save_model(ours, tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["tie_word_embeddings"] == tied
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(ids).logits, want)


@torch.no_grad()
def test_names_without_model_and_old_buffers(tmp_path):
    """As a base model is saved, and as old checkpoints have it: both as transformers reads them."""
    theirs, ids = make(tmp_path, **TIED), random_ids(1, 9)
    tensors(lambda s: s.update({k.removeprefix("model."): s.pop(k) for k in list(s)}))(tmp_path)
    old = {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
    tensors(lambda s: s.update(old))(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, theirs(ids).logits)
    assert (load_model(tmp_path)(ids) - theirs(ids).logits).abs().max() < 1e-4


def test_save_in_bfloat16_and_copy_tokenizer(tmp_path):
    make(tmp_path, **TIED)
    (tmp_path / "tokenizer.json").write_text("{}")
    save_model(load_model(tmp_path), tmp_path / "half", torch.bfloat16)
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "bfloat16"
    assert (tmp_path / "half/tokenizer.json").read_text() == "{}"
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


def test_a_folder_of_the_hugging_face_cache(tmp_path):
    """Its files are links to blobs/, two folders up."""
    folder, blobs = tmp_path / "snapshots/abc", tmp_path / "blobs"
    blobs.mkdir()
    folder.parent.mkdir()
    make_model(folder)
    for path in list(folder.iterdir()):
        shutil.move(path, blobs / path.name)
        path.symlink_to(f"../../blobs/{path.name}")
    load_chat(folder)
    save_model(load_model(folder), tmp_path / "again")
    for name in ("tokenizer.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (blobs / name).read_bytes()


@pytest.mark.parametrize("at", range(1, 6))
def test_config_and_weights_are_never_of_two_models(tmp_path, monkeypatch, at):
    """A model is saved over another, and the process dies at a rename.

    The folder is the old model, the new one, or none.
    """
    make_model(tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").write_text("first")
    out, other = tmp_path / "out", load_model(tmp_path / "model")
    save_model(load_model(tmp_path / "model"), out)
    assert (out / "chat_template.jinja").exists()
    (tmp_path / "model/chat_template.jinja").unlink()
    other.config.raw["rope_theta"] = 77.0  # the same shapes, another network
    with torch.no_grad():
        other.embed_tokens.weight.add_(1)
    config, weights = ((out / name).read_bytes() for name in ("config.json", "model.safetensors"))
    with monkeypatch.context() as m:
        died = die_at(m, os, "replace", at)
        try:
            save_model(other, out)
        except UserError:
            pass
    assert died[0] == min(at, 3)  # weights, tokenizer, config.json
    if not (out / "config.json").exists():
        assert at <= 3
        with pytest.raises(UserError, match="no config.json"):
            load_model(out)
        return
    assert (out / "config.json").read_bytes() != config
    assert (out / "model.safetensors").read_bytes() != weights
    assert not (out / "chat_template.jinja").exists()  # what the new model lacks has to go


# ---------------------------------------------------------------------------- bad folders

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def edit(**changes):
    def change(folder):
        raw = {**json.loads((folder / "config.json").read_text()), **changes}
        kept = {name: value for name, value in raw.items() if value != "gone"}
        (folder / "config.json").write_text(json.dumps(kept))

    return change


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def weights(change):
    """Changes the bytes of the weights."""
    path = lambda folder: folder / WEIGHTS
    return lambda folder: path(folder).write_bytes(change(path(folder).read_bytes()))


def header(change):
    """Changes the JSON header of the weights; its length is set right."""

    def change_all(raw):
        n = int.from_bytes(raw[:8], "little")
        head = change(raw[8 : 8 + n])
        return struct.pack("<Q", len(head)) + head + raw[8 + n :]

    return weights(change_all)


def tensors(change):
    def change_all(folder):
        state = load_file(folder / WEIGHTS)
        change(state)
        save_file({k: v.clone() for k, v in state.items()}, folder / WEIGHTS)

    return change_all


def index(content):
    """Only shards, as this index.json or this map of tensors to files says."""

    def change(folder):
        (folder / WEIGHTS).unlink(missing_ok=True)
        whole = content if isinstance(content, str) else json.dumps({"weight_map": content})
        (folder / INDEX).write_text(whole)

    return change


def renamed(change):
    """Gives the tensors other names."""
    return tensors(lambda s: s.update({change(k): s.pop(k) for k in list(s)}))


def outside(name):
    """A link from the folder to good weights beside it."""

    def change(folder):
        elsewhere = folder.parent / "elsewhere"
        elsewhere.mkdir()
        target = elsewhere / "s.safetensors"
        shutil.move(folder / WEIGHTS, target)
        (folder / name).symlink_to(target if name.endswith("safetensors") else elsewhere)

    return change


def both(*changes):
    return lambda folder: [change(folder) for change in changes]


def adapter(base):
    return text(
        "adapter_config.json", json.dumps({"base_model_name_or_path": base, "peft_type": "LORA"})
    )


def lost(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def moved(name):
    """The weights under another name."""
    return lambda folder: (folder / WEIGHTS).rename(folder / name)


def moved_config(folder):
    shutil.move(folder / "config.json", folder.parent / "c")
    (folder / "config.json").symlink_to("../c")


LLAMA3 = {"rope_type": "llama3", "factor": 8, "original_max_position_embeddings": 64}
UPSIDE_DOWN = {**LLAMA3, "low_freq_factor": 4, "high_freq_factor": 1}
OVERLAP = lambda b: re.sub(rb'"data_offsets":\[\d+,', b'"data_offsets":[0,', b)
HUGE = struct.pack("<Q", 10**8 + 1) + bytes(2**27)
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 10\n"
AGAIN, MAP, OUT = "fetch or make it again", "weight_map: want an object", "leads out of the"
BAD = {  # what is done to a good folder, words of the message
    "width of 10^12": (edit(hidden_size=10**12), "config.json: hidden_size is 1000000000000: want"),
    "negative width": (edit(hidden_size=-8), "hidden_size is -8: want a whole number from 1"),
    "width a text": (edit(hidden_size="8"), "hidden_size is '8'"),
    "width true": (edit(hidden_size=True), "hidden_size is True"),
    "width a fraction": (edit(hidden_size=8.5), "hidden_size is 8.5"),
    "width missing": (edit(hidden_size="gone"), "config.json lacks 'hidden_size'"),
    "billion layers": (edit(num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
    "no layers": (edit(num_hidden_layers=0), "num_hidden_layers is 0"),
    "vocabulary of 10^12": (edit(vocab_size=10**12), "vocab_size is 1000000000000"),
    "heads and key heads": (
        edit(num_attention_heads=3, head_dim=4, num_key_value_heads=2),
        "3 heads, 2 key heads, head_dim 4: want a multiple of the key heads",
    ),
    "no key heads": (edit(num_key_value_heads=0), "num_key_value_heads is 0"),
    "odd heads": (edit(head_dim=3), "head_dim 3: want"),
    "eps NaN": (edit(rms_norm_eps=float("nan")), "rms_norm_eps is nan: want a number"),
    "theta infinite": (edit(rope_theta=float("inf")), "rope_theta is inf"),
    "theta 0": (edit(rope_theta=0), "rope_theta is 0"),
    "tied a text": (edit(tie_word_embeddings="false"), "is 'false': want true or false"),
    "scaling a list": (edit(rope_scaling=[1]), "unsupported rope scaling [1]"),
    "scaling a word": (edit(rope_scaling="llama3"), "llama3 rope scaling lacks 'factor'"),
    "scaling linear": (edit(rope_scaling={"type": "linear"}), "rope scaling 'linear'"),
    "scaling yarn": (edit(rope_parameters={"rope_type": "yarn"}), "rope scaling 'yarn'"),
    "scaling lacks": (edit(rope_scaling={"rope_type": "llama3"}), "rope scaling lacks 'factor'"),
    "scaling upside down": (edit(rope_scaling=UPSIDE_DOWN), "low_freq_factor must be below"),
    "gpt2": (edit(model_type="gpt2"), "unsupported architecture 'gpt2'"),
    "line break": (edit(model_type="a\nb\x1b[31m"), r"unsupported architecture 'a\nb\x1b"),
    "sliding window": (edit(use_sliding_window=True), "unsupported: use_sliding_window"),
    "both ways": (edit(is_causal=False), "unsupported: use_sliding_window, is_causal false"),
    "gelu": (edit(hidden_act="gelu"), "or hidden_act other than silu"),
    "other vocabulary": (
        edit(vocab_size=261),
        "tensor embed_tokens.weight: found (260, 8), config.json asks for (261, 8)",
    ),
    "more layers": (edit(num_hidden_layers=2), ": found nothing, config.json asks for (8,)"),
    "bias": (edit(attention_bias=True), "bias: found nothing, config.json asks for (4,)"),
    "config a list": (text("config.json", "[]"), "config.json: want an object, found list"),
    "config no JSON": (text("config.json", "{"), "config.json as JSON"),
    "config too deep": (text("config.json", '{"a":' * 99 + "1" + "}" * 99), "nested too deep"),
    "config a link": (moved_config, f"'config.json' {OUT} folder"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "it has no config.json"),
    # weights
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), f"{WEIGHTS}: No such file"),
    "weights cut off": (weights(lambda b: b[:-100]), f"{WEIGHTS}: "),
    "weights cut in the header": (weights(lambda b: b[:50]), AGAIN),
    "weights empty": (weights(lambda b: b""), AGAIN),
    "weights a text": (text(WEIGHTS, "no tensors here"), "cannot read ", AGAIN),
    "header of 2^63": (weights(lambda b: struct.pack("<Q", 2**63) + b[8:]), AGAIN),
    "header above the cap": (weights(lambda b: HUGE), AGAIN),
    "header no JSON": (header(lambda b: b"x" * len(b)), f"{WEIGHTS}: ", AGAIN),
    "header nested": (header(lambda b: b"[" * 10**5), f"{WEIGHTS}: "),
    "offsets overlap": (header(OVERLAP), f"{WEIGHTS}: "),
    "tensor missing": (
        tensors(lambda s: s.pop("model.norm.weight")),
        "tensor norm.weight: found nothing, config.json asks for (8,)",
    ),
    "tensor too many": (
        tensors(lambda s: s.update({"model.more": torch.ones(2)})),
        "tensor more: found (2,), config.json asks for nothing",
    ),
    "tensor of whole numbers": (
        tensors(lambda s: s.update({"model.norm.weight": torch.ones(8, dtype=torch.int8)})),
        "these weights are quantised (torch.int8): take the folder with the original weights",
    ),
    "no head": (
        edit(tie_word_embeddings=False),
        "tensor lm_head.weight: found nothing, config.json asks for (260, 8)",
    ),
    "names of torch.compile": (
        renamed(lambda k: "_orig_mod." + k),
        "tensor _orig_mod.model.embed_tokens.weight: found (260, 8), config.json asks for nothing",
    ),
    "names of peft": (renamed(lambda k: "base_model.model." + k), "tensor base_model.model.model"),
    "names of GPT-2": (renamed(lambda k: k.replace("model.", "transformer.")), "found nothing"),
    "weights a link": (outside(WEIGHTS), f"'{WEIGHTS}' {OUT}"),
    "index absolute": (index({"a": "/etc/passwd"}), f"'/etc/passwd' {OUT}"),
    "index above": (index({"a": "../model2/w"}), f"'../model2/w' {OUT}"),
    "linked folder": (both(outside("sub"), index({"a": "sub/s.safetensors"})), f"tensors' {OUT}"),
    "linked shard": (both(outside("s.safetensors"), index({"a": "s.safetensors"})), OUT),
    "link to itself": (
        both(lambda folder: (folder / "s").symlink_to("s"), index({"a": "s"})),
        "cannot read ",
    ),
    "index with NUL": (index({"a": "s\0"}), OUT),
    "index to nothing": (index({"a": "none.safetensors"}), "none.safetensors: No such file"),
    "index to the folder": (index({"a": ".."}), OUT),
    "index a list": (index(["a"]), MAP),
    "index of numbers": (index({"a": 1}), "model/1: No such file"),
    "index of nothing": (index({}), MAP),
    "index without a map": (index("{}"), MAP),
    "index no JSON": (index("{"), f"{INDEX} as JSON"),
    # folders of something else
    "LoRA": (both(adapter("x/y"), lost("config.json", WEIGHTS)), "folder: an adapter (LORA):"),
    "LoRA beside a model": (adapter("x/y"), "merge it into 'x/y', or use that"),
    "LoRA of nothing": (adapter(None), "an adapter (LORA): merge it"),
    "LoRA with a long base": (adapter("a\nb" * 10**5), r"into 'a\nba\nba"),
    "pickled": (moved("pytorch_model.bin"), "'pytorch_model.bin' is pickled; convert it to safet"),
    "pickled shards": (moved("pytorch_model-00001-of-00001.bin"), "00001.bin' is pickled"),
    "GGUF": (both(moved("tiny-q4.gguf"), lost("config.json")), "'tiny-q4.gguf' is GGUF; convert"),
    "arguments of a trainer": (moved("training_args.bin"), f"{WEIGHTS}: No such file"),
    "git-LFS": (text(WEIGHTS, POINTER), f"{WEIGHTS}: a git-LFS pointer", "run git lfs pull"),
    "git-LFS shard": (both(index({"a": "s"}), text("s", POINTER)), "model/s: a git-LFS pointer"),
    "no folder": (lambda folder: shutil.rmtree(folder), "no such folder; download it first: hf d"),
    "a file": (
        lambda folder: [shutil.rmtree(folder), folder.write_text("")],
        "no model folder: no such folder",
    ),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "model"
    make_model(folder)
    return folder


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good, tmp_path / "model")


@pytest.mark.parametrize("name", BAD)
def test_bad_folders(folder, name):
    change, *words = BAD[name]
    load_model(folder)
    change(folder)
    with pytest.raises(UserError) as e:
        load_model(folder)
    said = str(e.value)
    assert str(folder) in said and "\n" not in said and all(word in said for word in words), said


PROJECTION = "model.layers.0.mlp.down_proj."
SCALE = {"weight_scale": torch.ones(1)}
ABSMAX = {"weight.absmax": torch.ones(1), "weight.quant_map": torch.ones(16)}
FP8, WORDS = torch.float8_e4m3fn, torch.zeros(2, 12, dtype=torch.int32)
BYTES, SMALL = torch.zeros(48, 1, dtype=torch.uint8), torch.ones(8, 12)
PACKED = {  # quant_method in config.json, what stands in a layer's place
    "bitsandbytes": {"weight": BYTES, **ABSMAX},
    "bitsandbytes in 8 bits": {"weight": SMALL.char(), "SCB": torch.ones(8)},
    "gptq": {"qweight": WORDS, "qzeros": WORDS, "scales": torch.ones(1, 8).half()},
    "awq": {"qweight": WORDS.T.contiguous(), "scales": torch.ones(1, 8).half()},
    "fp8": {"weight": SMALL.to(FP8), "weight_scale_inv": torch.ones(1, 1)},
    "fp8 without scales": {"weight": SMALL.to(FP8)},
    "fbgemm_fp8": {"weight": SMALL.to(torch.float8_e5m2)},
    "compressed-tensors": {"weight_packed": WORDS, **SCALE},
    "fake compressed-tensors": {"weight": SMALL, **SCALE},
    "hqq": {"W_q": BYTES, "scale": torch.ones(48, 1), "zero": torch.ones(48, 1)},
    "hqq seen as float": {"W_q": torch.ones(24, 1), "scale": torch.ones(48, 1)},
    "mxfp4": {"weight_blocks": BYTES, "weight_scales": BYTES},
    "torchao": {"weight:qdata": SMALL.char(), "weight:scale": torch.ones(8, 1)},
    "quanto": {"weight._data": SMALL.char(), "weight._scale": torch.ones(8, 1)},
}


def packed(state, parts):
    del state[PROJECTION + "weight"]
    state.update({PROJECTION + name: x for name, x in parts.items()})


@pytest.mark.parametrize("name", PACKED)
def test_quantised_weights(folder, name):
    """Refused by the method's name, or by a tensor's type; nothing is said of shapes."""
    tensors(lambda state: packed(state, PACKED[name]))(folder)
    for its, word in (
        ({"quant_method": name, "bits": 4}, repr(name)),
        ({"bits": 4}, "torch."),
        (None, "torch."),
        (["x"], "torch."),
        ({"quant_method": "a\nb" * 99}, r"('a\nba\nb"),
    ):
        edit(quantization_config=its)(folder)
        with pytest.raises(UserError) as e:
            load_model(folder)
        start, _, how = str(e.value).partition("): ")
        assert start.startswith(f"{folder}: these weights are quantised (") and word in start
        assert how == "take the folder with the original weights, in bf16 or fp32"
        assert "\n" not in start and len(start) < len(str(folder)) + 150


def test_float_weights_that_were_quantised(folder, tmp_path):
    """A merge of QLoRA leaves its settings behind: they go when the model is saved."""
    plain = load_model(folder)
    its = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    edit(quantization_config=its, quantization={"bits": 4})(folder)  # the second is MLX's
    save_model(load_model(folder), tmp_path / "saved")
    assert "quant" not in (tmp_path / "saved/config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.lm_head.weight, plain.head)


def test_other_files_beside_the_weights(folder):
    for name in ("pytorch_model.bin", "tiny.gguf", "training_args.bin"):
        (folder / name).write_bytes(b"anything")
    load_model(folder)


def test_one_config_of_each_kind():
    """Which biases and norms a family has; the whole file is kept."""
    for kind, found in (("llama", (1, 1, 1, 0)), ("qwen2", (1, 0, 0, 0)), ("qwen3", (1, 1, 0, 1))):
        raw = {**TINY_LLAMA, "model_type": kind, "attention_bias": True, "mlp_bias": True, "x": 1}
        c = read_config(raw)
        assert (c.qkv_bias, c.out_bias, c.mlp_bias, c.qk_norm) == found and c.raw == raw
    c = read_config({**TINY_LLAMA, "model_type": "qwen2"})
    assert c.qkv_bias and not c.out_bias and c.head_dim == 4


FUZZED = {  # file, how it is mutated, how often
    "safetensors": (WEIGHTS, mutate_tensors, 600),
    "config": ("config.json", mutate_json, 500),
    "index": (INDEX, mutate_json, 100),
}


@pytest.mark.parametrize("name", FUZZED)
def test_fuzz(folder, name):
    """Mutated files load or are refused by a UserError, in bounded time and memory."""
    file, change, times = FUZZED[name]
    if name == "index":
        moved("s.safetensors")(folder)
        index({k: "s.safetensors" for k in load_file(folder / "s.safetensors")})(folder)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    raw, rng, refused = (folder / file).read_bytes(), random.Random(name), 0
    for n in range(times):
        (folder / file).write_bytes(change(raw, rng))
        start = time.process_time()
        try:
            load_model(folder)
            load_chat(folder)
        except UserError as e:
            refused += 1
            assert str(folder) in str(e)
        assert time.process_time() - start < 5, n
    assert times / 10 < refused < times
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    assert grown < 2**19, "half a GB"
