"""Bad input of every kind ends in one line that names the file and what to mend, in exit code 2, and in nothing written; a full disk leaves what was there. Mutated files: a UserError or a load."""

import ast
import errno
import json
import os
import random
import re
import resource
import shutil
import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import chat
import drirl
import encoder
import files
import loaders
import loop
import model
import reward
import runfolder
import settings
from data import CATEGORIES, HELPFUL, UserError
from transformer import Config, Transformer

ROOT = Path(__file__).parent.parent
CONFIG = {
    "model_type": "llama",
    "vocab_size": 260,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 400,
    "tie_word_embeddings": True,
    "eos_token_id": 258,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
BERT = {
    "model_type": "bert",
    "vocab_size": 260,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
}
FLAGS = (
    "--run W/run --model W/model --pool W/pool.jsonl --benign W/benign.jsonl --prompts W/prompts.jsonl --encoder words --per-category 2 --max-new-tokens 3 --steps 2 --sft-batch 4 --irl-prompts 2 "
    "--helpful-prompts 4 --rollouts 1 --grpo-prompts 8 --dtype fp32"
)


def edit(path, **changes):
    raw = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in raw.items() if v != "gone"}))


def tensors(path, change):
    state = load_file(path)
    change(state)
    save_file({k: v.clone() for k, v in state.items()}, path)


def rewrite(path, change):
    path.write_bytes(change(path.read_bytes()))


def header(path, change):
    """Changes the JSON header of a safetensors file; its length is set right."""
    raw = path.read_bytes()
    (n,) = struct.unpack("<Q", raw[:8])
    text = change(raw[8 : 8 + n])
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + n :])


def rows(path, *records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def demonstration(category, i):
    return {
        "prompt": f"{category} {i}?",
        "category": category,
        "draft": ["no", "kind"],
        "answer": f"No {i}.",
    }


def tokenizer(extra=()):
    t = Tokenizer(
        models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    t.pre_tokenizer, t.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    t.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *extra])
    return t


def bert_tensors():
    g, D, I = torch.Generator().manual_seed(0), 8, 12
    shapes = {
        "embeddings.word_embeddings.weight": (260, D),
        "embeddings.position_embeddings.weight": (64, D),
        "embeddings.token_type_embeddings.weight": (2, D),
    }
    for name, (out, into) in {
        "attention.self.query": (D, D),
        "attention.self.key": (D, D),
        "attention.self.value": (D, D),
        "attention.output.dense": (D, D),
        "intermediate.dense": (I, D),
        "output.dense": (D, I),
    }.items():
        shapes |= {
            f"encoder.layer.0.{name}.weight": (out, into),
            f"encoder.layer.0.{name}.bias": (out,),
        }
    for name in ("embeddings", "encoder.layer.0.attention.output", "encoder.layer.0.output"):
        shapes |= {f"{name}.LayerNorm.weight": (D,), f"{name}.LayerNorm.bias": (D,)}
    return {k: torch.randn(s, generator=g) for k, s in shapes.items()}


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A good model, a good encoder, good data and a whole run of them."""
    w = tmp_path_factory.mktemp("good")
    for name in ("model", "bert"):
        (w / name).mkdir()
        tokenizer().save(str(w / name / "tokenizer.json"))
    torch.manual_seed(0)
    model.save_model(Transformer(Config.from_dict(CONFIG)), w / "model")
    (w / "bert/config.json").write_text(json.dumps(BERT))
    save_file(bert_tensors(), w / "bert/model.safetensors")
    rows(w / "pool.jsonl", *(demonstration(c, i) for c in CATEGORIES for i in range(3)))
    rows(w / "benign.jsonl", *(demonstration(HELPFUL, i) for i in range(8)))
    rows(
        w / "prompts.jsonl",
        {"prompt": "Hello?", "kind": "ordinary"},
        {"prompt": "Insult me", "category": "insult"},
    )
    assert drirl.main(["all", *FLAGS.replace("W", str(w)).split()]) == 0
    return w


@pytest.fixture
def w(template, tmp_path):
    return shutil.copytree(
        template, tmp_path / "w"
    )  # keeps the times: rewards must not look older than the warm start


def tree(folder):
    return {
        str(p.relative_to(folder)): os.readlink(p)
        if p.is_symlink()
        else p.read_bytes()
        if p.is_file()
        else None
        for p in folder.rglob("*")
        if p.name != "embeddings.safetensors"
    }  # a cache


def refused(w, argv, capsys, *words):
    """main says one line with these words, returns 2, and writes nothing."""
    before = tree(w)
    capsys.readouterr()
    code, err = (
        drirl.main(
            [a.replace("W/", f"{w}/") for a in (argv.split() if isinstance(argv, str) else argv)]
        ),
        capsys.readouterr().err,
    )
    assert code == 2, err
    assert (
        err.startswith("drirl: ")
        and err.count("\n") == 1
        and "Traceback" not in err
        and len(err) < 1100
    ), err
    assert all(word in err for word in words), (words, err)
    assert tree(w) == before


EVAL, CUT = (
    "eval --model W/model --prompts W/prompts.jsonl --max-new-tokens 2 --dtype fp32",
    "cut off, or no safetensors file",
)
ALL, SFT, IRL, GRPO = (f"{stage} {FLAGS}" for stage in ("all", "sft", "irl", "grpo"))
DATA, BASELINE, RUN_EVAL, OWN = (
    f"data {FLAGS}",
    f"baseline {FLAGS}",
    f"eval {FLAGS}",
    f"{EVAL} --chat-format {{prompt}}",
)
WEIGHTS, INDEX, SETTINGS = (
    "model/model.safetensors",
    "model/model.safetensors.index.json",
    "run/config.json",
)


def config(**changes):
    return lambda w: edit(w / "model/config.json", **changes)


def index(content):
    return lambda w: (w / INDEX).write_text(json.dumps(content))


def settings_file(content):
    return lambda w: (w / SETTINGS).write_text(
        content if isinstance(content, str) else json.dumps(content)
    )


def outside(name, target="shard.safetensors"):
    """A link from the model's folder to a good file beside it."""

    def make(w):
        (w / "elsewhere").mkdir()
        shutil.move(w / WEIGHTS, w / "elsewhere" / target)
        (w / "model" / name).symlink_to(
            w / "elsewhere" / (target if name.endswith("safetensors") else "")
        )

    return make


def both(*steps):
    return lambda w: [step(w) for step in steps]


CASES = {  # what is done to a good folder, the command, words of the message
    "width of 10^12": (
        config(hidden_size=10**12),
        EVAL,
        "model/config.json: hidden_size is 1000000000000: want a whole number from 1",
    ),
    "negative width": (config(hidden_size=-8), EVAL, "model/config.json: hidden_size is -8"),
    "width a text": (config(hidden_size="8"), EVAL, "model/config.json: hidden_size is '8'"),
    "width true": (config(hidden_size=True), EVAL, "model/config.json: hidden_size is True"),
    "width a fraction": (config(hidden_size=8.5), EVAL, "hidden_size is 8.5"),
    "width missing": (config(hidden_size="gone"), EVAL, "model/config.json lacks 'hidden_size'"),
    "billion layers": (config(num_hidden_layers=10**9), EVAL, "num_hidden_layers is 1000000000"),
    "no layers": (config(num_hidden_layers=0), EVAL, "num_hidden_layers is 0"),
    "vocabulary of 10^12": (config(vocab_size=10**12), EVAL, "vocab_size is 1000000000000"),
    "heads and key heads": (
        config(num_attention_heads=3, head_dim=4, num_key_value_heads=2),
        EVAL,
        "3 num_attention_heads must be a multiple of 2 num_key_value_heads",
    ),
    "no key heads": (config(num_key_value_heads=0), EVAL, "num_key_value_heads is 0"),
    "odd heads": (config(head_dim=3), EVAL, "head_dim, 3, even"),
    "eps NaN": (config(rms_norm_eps=float("nan")), EVAL, "rms_norm_eps is nan: want a number"),
    "theta infinite": (config(rope_theta=float("inf")), EVAL, "rope_theta is inf"),
    "theta 0": (config(rope_theta=0), EVAL, "rope_theta is 0"),
    "tied a text": (
        config(tie_word_embeddings="false"),
        EVAL,
        "tie_word_embeddings is 'false': want true or false",
    ),
    "scaling a list": (config(rope_scaling=[1]), EVAL, "unsupported rope scaling '[1]'"),
    "scaling lacks numbers": (
        config(rope_scaling={"rope_type": "llama3"}),
        EVAL,
        "llama3 rope scaling lacks 'factor'",
    ),
    "scaling upside down": (
        config(
            rope_scaling={
                "rope_type": "llama3",
                "factor": 8,
                "low_freq_factor": 4,
                "high_freq_factor": 1,
                "original_max_position_embeddings": 64,
            }
        ),
        EVAL,
        "low_freq_factor must be below",
    ),
    "context negative": (config(max_position_embeddings=-1), EVAL, "max_position_embeddings is -1"),
    "config a list": (
        lambda w: (w / "model/config.json").write_text("[]"),
        EVAL,
        "model/config.json: want an object, found list",
    ),
    "config too deep": (
        lambda w: (w / "model/config.json").write_text('{"a":' * 99 + "1" + "}" * 99),
        EVAL,
        "model/config.json: no JSON: nested too deep",
    ),
    "config far too deep": (
        lambda w: (w / "model/config.json").write_text("[" * 10**6),
        EVAL,
        "model/config.json: no JSON: nested too deep",
    ),
    "config too large": (
        lambda w: os.truncate(w / "model/config.json", files.MAX_JSON + 1),
        EVAL,
        "model/config.json: larger than",
    ),
    "config a number of 5000 digits": (
        lambda w: (w / "model/config.json").write_text('{"hidden_size": ' + "9" * 5000 + "}"),
        EVAL,
        "model/config.json: no JSON",
    ),
    "config of UTF-16": (
        lambda w: rewrite(w / "model/config.json", lambda b: b.decode().encode("utf-16")),
        EVAL,
        "model/config.json: not UTF-8",
    ),
    "a line break in a name": (
        config(model_type="a\nb\x1b[31m"),
        EVAL,
        "unsupported architecture 'a\\nb",
    ),
    "config a link": (
        both(
            lambda w: shutil.copy(w / "model/config.json", w / "c"),
            lambda w: (w / "model/config.json").unlink(),
            lambda w: (w / "model/config.json").symlink_to("../c"),
        ),
        EVAL,
        "'config.json' leads out of the folder",
    ),
    # weights
    "weights cut off": (
        lambda w: rewrite(w / WEIGHTS, lambda b: b[:-100]),
        EVAL,
        "model/model.safetensors: ",
    ),
    "weights cut in the header": (
        lambda w: rewrite(w / WEIGHTS, lambda b: b[:50]),
        EVAL,
        "model/model.safetensors: a header of",
        CUT,
    ),
    "weights empty": (
        lambda w: rewrite(w / WEIGHTS, lambda b: b""),
        EVAL,
        "model/model.safetensors: a header of",
        CUT,
    ),
    "header of 2^63 bytes": (
        lambda w: rewrite(w / WEIGHTS, lambda b: struct.pack("<Q", 2**63) + b[8:]),
        EVAL,
        "a header of 9223372036854775808 bytes",
        CUT,
    ),
    "header above the cap": (
        lambda w: (
            rewrite(w / WEIGHTS, lambda b: struct.pack("<Q", files.MAX_HEADER + 1)),
            os.truncate(w / WEIGHTS, 2**25),
        ),
        EVAL,
        "a header of 16777217 bytes",
        CUT,
    ),
    "header no JSON": (
        lambda w: header(w / WEIGHTS, lambda b: b"x" * len(b)),
        EVAL,
        "model/model.safetensors: ",
        "fetch or make it again",
    ),
    "header nested": (
        lambda w: header(w / WEIGHTS, lambda b: b"[" * 10**5),
        EVAL,
        "model/model.safetensors: ",
    ),
    "offsets overlap": (
        lambda w: header(
            w / WEIGHTS, lambda b: re.sub(rb'"data_offsets":\[\d+,', b'"data_offsets":[0,', b)
        ),
        EVAL,
        "model/model.safetensors: ",
    ),
    "tensor missing": (
        lambda w: tensors(w / WEIGHTS, lambda s: s.pop("model.norm.weight")),
        EVAL,
        "model: tensor norm.weight has shape None, config.json asks for (8,)",
    ),
    "tensor too many": (
        lambda w: tensors(w / WEIGHTS, lambda s: s.update({"model.more": torch.ones(2)})),
        EVAL,
        "model: tensor more has shape (2,), config.json asks for None",
    ),
    "tensor of whole numbers": (
        lambda w: tensors(
            w / WEIGHTS, lambda s: s.update({"model.norm.weight": torch.ones(8, dtype=torch.int8)})
        ),
        EVAL,
        "tensor norm.weight is torch.int8",
    ),
    "weights a link": (
        outside("model.safetensors"),
        EVAL,
        "'model.safetensors' leads out of the folder",
    ),
    "index absolute": (
        index({"weight_map": {"a": "/etc/passwd"}}),
        EVAL,
        "'/etc/passwd' leads out of the folder",
    ),
    "index above": (
        index({"weight_map": {"a": "../bert/model.safetensors"}}),
        EVAL,
        "'../bert/model.safetensors' leads out",
    ),
    "index in a linked folder": (
        both(outside("sub"), index({"weight_map": {"a": "sub/shard.safetensors"}})),
        EVAL,
        "'sub/shard.safetensors' leads out",
    ),
    "index to a link": (
        both(outside("s.safetensors"), index({"weight_map": {"a": "s.safetensors"}})),
        EVAL,
        "'s.safetensors' leads out",
    ),
    "index to a link to itself": (
        both(lambda w: (w / "model/s").symlink_to("s"), index({"weight_map": {"a": "s"}})),
        EVAL,
        "model/s does not exist",
    ),
    "index with NUL": (index({"weight_map": {"a": "s\0"}}), EVAL, "leads out of the folder"),
    "index to nothing": (
        index({"weight_map": {"a": "none.safetensors"}}),
        EVAL,
        "model/none.safetensors does not exist",
    ),
    "index to the folder": (index({"weight_map": {"a": ".."}}), EVAL, "leads out"),
    "index a list": (index({"weight_map": ["a"]}), EVAL, "index.json: weight_map: want an object"),
    "index of numbers": (
        index({"weight_map": {"a": 1}}),
        EVAL,
        "index.json: weight_map: want an object",
    ),
    "index without a map": (index({}), EVAL, "index.json: weight_map: want an object"),
    "index no JSON": (
        lambda w: (w / INDEX).write_text("{"),
        EVAL,
        "model.safetensors.index.json: no JSON",
    ),
    # tokenizer and chat
    "tokenizer too large": (
        lambda w: tokenizer(["<a>", "<b>"]).save(str(w / "model/tokenizer.json")),
        EVAL,
        "model/tokenizer.json: ids go up to 260",
        "260 rows",
    ),
    "tokenizer cut off": (
        lambda w: rewrite(w / "model/tokenizer.json", lambda b: b[:-50]),
        EVAL,
        "cannot read",
        "model/tokenizer.json",
    ),
    "tokenizer too deep": (
        lambda w: (w / "model/tokenizer.json").write_text('{"model":' * 10**5),
        EVAL,
        "model/tokenizer.json",
    ),
    "tokenizer a link": (
        both(
            lambda w: (w / "model/tokenizer.json").unlink(),
            lambda w: (w / "model/tokenizer.json").symlink_to("../bert/tokenizer.json"),
        ),
        EVAL,
        "'tokenizer.json' leads out",
    ),
    "template a link": (
        lambda w: (w / "model/chat_template.jinja").symlink_to("/etc/passwd"),
        EVAL,
        "'chat_template.jinja' leads out",
    ),
    "no eos": (config(eos_token_id="gone"), OWN, "model: no eos_token_id"),
    "eos a text": (config(eos_token_id="2"), EVAL, "eos_token_id is ['2']"),
    "eos beyond the vocabulary": (
        config(eos_token_id=[258, 260]),
        EVAL,
        "eos_token_id is [258, 260]: want ids below 260",
    ),
    "eos true": (config(eos_token_id=True), EVAL, "eos_token_id is [True]"),
    "generation config a list": (
        lambda w: (w / "model/generation_config.json").write_text("[]"),
        EVAL,
        "generation_config.json: want an object",
    ),
    "system without a place": (
        lambda w: None,
        [*OWN.split(), "--system", "Be kind"],
        "--system has no place in the chat format '{prompt}'",
    ),
    # text encoder
    "encoder too wide": (
        lambda w: edit(w / "bert/config.json", hidden_size=10**9),
        DATA.replace("words", "W/bert"),
        "bert/config.json: hidden_size is 1000000000",
    ),
    "encoder of other shapes": (
        lambda w: edit(w / "bert/config.json", intermediate_size=13),
        DATA.replace("words", "W/bert"),
        "bert/config.json: tensor layers.0.down.weight has shape (8, 12)",
    ),
    "encoder of fewer positions": (
        lambda w: edit(w / "bert/config.json", max_position_embeddings=65),
        DATA.replace("words", "W/bert"),
        "tensor positions has shape (64, 8)",
    ),
    "encoder's heads": (
        lambda w: edit(w / "bert/config.json", num_attention_heads=3),
        DATA.replace("words", "W/bert"),
        "hidden_size 8 must be a multiple of num_attention_heads 3",
    ),
    # data
    "prompt beyond the context": (
        lambda w: rows(w / "prompts.jsonl", {"prompt": "a"}, {"prompt": "b" * 400}),
        EVAL,
        "prompts.jsonl, row 2: a prompt of",
        "context of 400",
    ),
    "answers beyond the context": (
        lambda w: None,
        EVAL.replace("tokens 2", "tokens 390"),
        "prompts.jsonl, row 1",
        "lower --max-new-tokens",
    ),
    "demonstration beyond the context": (
        lambda w: rows(
            w / "benign.jsonl",
            *(demonstration(HELPFUL, i) for i in range(8)),
            {**demonstration(HELPFUL, 9), "answer": "yes " * 99},
        ),
        SFT,
        "benign.jsonl, row 9",
    ),
    "all: prompt beyond the context": (
        lambda w: rows(w / "prompts.jsonl", {"prompt": "b" * 400}),
        ALL,
        "prompts.jsonl, row 1",
    ),
    "all: benign without harmless": (
        lambda w: rows(w / "benign.jsonl", demonstration("crime", 1)),
        ALL,
        "benign.jsonl: no demonstrations of category helpful",
    ),
    "all: prompts empty": (
        lambda w: (w / "prompts.jsonl").write_text(""),
        ALL,
        "prompts.jsonl: no rows",
    ),
    "all: no model": (lambda w: shutil.rmtree(w / "model"), ALL, "model is no model folder"),
    "unknown kind": (
        lambda w: rows(w / "prompts.jsonl", {"prompt": "a", "kind": "odd"}),
        EVAL,
        "kind 'odd'; known are harmful",
    ),
    "pool all harmless": (
        lambda w: shutil.copy(w / "benign.jsonl", w / "pool.jsonl"),
        DATA,
        "pool.jsonl: no harmful prompts",
    ),
    "pool lacks a category": (
        lambda w: rows(
            w / "pool.jsonl", *(demonstration(c, i) for c in list(CATEGORIES)[1:] for i in range(3))
        ),
        DATA,
        "too few demonstrations for insult (2 missing)",
    ),
    "balanced lacks a category": (
        lambda w: rows(
            w / "run/data/balanced.jsonl",
            *(demonstration(c, i) for c in list(CATEGORIES)[1:] for i in range(3)),
        ),
        SFT,
        "data/balanced.jsonl: no demonstrations of category insult",
    ),
    "line too long": (
        lambda w: rows(
            w / "pool.jsonl", demonstration("crime", 1), {"prompt": "a" * loaders.MAX_LINE}
        ),
        DATA,
        "pool.jsonl:2: a line of 10000",
    ),
    "line too deep": (
        lambda w: (w / "pool.jsonl").write_text(
            '{"prompt": "a"}\n{"prompt": "b", "x": ' + "[" * 70 + "]" * 70 + "}\n"
        ),
        DATA,
        "pool.jsonl:2: not JSON: nested too deep, more than 64",
    ),
    "number of 5000 digits": (
        lambda w: (w / "pool.jsonl").write_text(
            '{"prompt": "a"}\n{"prompt": "b", "x": ' + "9" * 5000 + "}\n"
        ),
        DATA,
        "pool.jsonl:2: not JSON",
    ),
    "pool a folder": (
        lambda w: None,
        DATA.replace("pool.jsonl", "model"),
        "cannot read",
        "Is a directory",
    ),
    "pool without end": (
        lambda w: None,
        DATA.replace("W/pool.jsonl", "/dev/zero"),
        "/dev/zero: larger than",
    ),
    "contrast beyond the data": (
        lambda w: None,
        SFT + " --contrast 9",
        "benign.jsonl: 8 demonstrations of helpful, --contrast asks for 9",
    ),
    # the run's own files
    "settings of a model": (
        lambda w: shutil.copy(w / "model/config.json", w / SETTINGS),
        SFT,
        "run/config.json: unknown section 'model_type'",
    ),
    "all over a model": (
        lambda w: None,
        ALL.replace("W/run", "W/model"),
        "model/config.json: unknown section 'model_type'",
        "choose another --run",
    ),
    "setting a text": (
        settings_file({"grpo": {"lr": "fast"}}),
        SFT,
        "run/config.json: grpo.lr (or --grpo-lr) 'fast': want a number",
    ),
    "setting true": (
        settings_file({"irl": {"epochs": True}}),
        SFT,
        "run/config.json: irl.epochs (or --epochs) True: want a whole number",
    ),
    "setting null": (
        settings_file({"run": {"system": None}}),
        SFT,
        "run/config.json: run.system (or --system) None: want text",
    ),
    "setting with NUL": (
        settings_file({"run": {"chat_format": "a\0"}}),
        SFT,
        "run/config.json: run.chat_format",
    ),
    "setting a number for true": (
        settings_file({"run": {"generate": 1}}),
        SFT,
        "run/config.json: run.generate (or --generate) 1: want true or false",
    ),
    "setting NaN": (
        settings_file({"grpo": {"clip": float("nan")}}),
        SFT,
        "run/config.json: grpo.clip (or --clip) nan: too small",
    ),
    "setting negative": (
        settings_file({"sft": {"lr": -1}}),
        SFT,
        "run/config.json: sft.lr (or --sft-lr) -1: too small",
    ),
    "setting of another version": (
        settings_file({"sft": {"warmup": 3}}),
        SFT,
        "run/config.json: unknown setting sft.warmup",
        "remove it there",
    ),
    "section of another version": (
        settings_file({"ppo": {}}),
        SFT,
        "run/config.json: unknown section 'ppo'",
    ),
    "section a number": (settings_file({"run": 3}), SFT, "run/config.json: unknown section 'run'"),
    "settings a list": (settings_file([]), SFT, "run/config.json: want an object"),
    "settings no JSON": (settings_file("{"), SFT, "run/config.json: no JSON"),
    "metrics no JSON": (
        lambda w: rewrite(w / "run/metrics.jsonl", lambda b: b"{\n" + b),
        SFT,
        "metrics.jsonl:1: want an object with a stage; delete that line",
    ),
    "metrics without a stage": (
        lambda w: rewrite(w / "run/metrics.jsonl", lambda b: b + b"3\n"),
        RUN_EVAL,
        "metrics.jsonl:",
        "delete that line",
    ),
    "progress a text": (
        lambda w: edit(w / "run/progress.json", sft="done"),
        ALL,
        "progress.json: want an object for each of the stages",
        "delete it to start anew",
    ),
    "progress of another version": (
        lambda w: edit(w / "run/progress.json", ppo={}),
        SFT,
        "progress.json: want an object",
    ),
    "a run of other settings": (
        lambda w: None,
        f"{ALL} --steps 3 --clip 0.1",
        "run, data: begun with other settings: ",
        "--clip 0.2 there, 0.1 here; ",
        "--steps 2 there, 3 here",
        "Say the same",
        "--resume false",
    ),
    "a run of another corpus": (
        lambda w: rows(
            w / "pool.jsonl", *(demonstration(c, i) for c in CATEGORIES for i in range(4))
        ),
        ALL,
        "begun with other settings: ",
        "text of --pool",
    ),
    "state cut off": (
        lambda w: (w / "run/unfinished-sft.safetensors").write_bytes(b"x" * 99),
        SFT,
        "unfinished-sft.safetensors: not the state of this run: delete it, or say --resume false",
    ),
    "state without its numbers": (
        lambda w: save_file(
            {"x": torch.ones(2)}, w / "run/unfinished-sft.safetensors", metadata={"state": "{}"}
        ),
        SFT,
        "unfinished-sft.safetensors: not the state of this run",
    ),
    "one harmless demonstration": (
        lambda w: None,
        SFT + " --helpful-demonstrations 1",
        "--helpful-demonstrations 1: want 2 to 8, or 0 for all",
    ),
    "too many harmless demonstrations": (
        lambda w: None,
        SFT + " --helpful-demonstrations 9",
        "--helpful-demonstrations 9: want 2 to 8",
    ),
    "open prompts, one sample": (
        lambda w: None,
        GRPO + " --open-prompts true --grpo-samples 1",
        "--grpo-samples 1 leaves nothing to compare an open prompt's sample with",
    ),
    "times a text": (
        lambda w: edit(w / "run/times.json", irl="long"),
        BASELINE,
        "times.json: irl is 'long': want a number",
    ),
    "samples of another version": (
        lambda w: (w / "run/rewards/samples.json").write_text('[{"prompt": "a"}]'),
        GRPO,
        "rewards/samples.json: want category",
        "run irl again",
    ),
    "rewards cut off": (
        lambda w: rewrite(w / "run/rewards/crime.safetensors", lambda b: b[:-5]),
        GRPO,
        "rewards/crime.safetensors",
    ),
    "rewards missing": (
        lambda w: (w / "run/rewards/crime.safetensors").unlink(),
        GRPO,
        "rewards/crime.safetensors",
        "run the irl stage",
    ),
    "rewards of another shape": (
        lambda w: tensors(
            w / "run/rewards/crime.safetensors", lambda s: s.update({"norm.weight": torch.ones(9)})
        ),
        GRPO,
        "rewards/crime.safetensors",
        "norm.weight has shape (9,)",
        "run irl again",
    ),
    "warm start cut off": (
        lambda w: rewrite(w / "run/sft/model.safetensors", lambda b: b[:-5]),
        IRL,
        "sft/model.safetensors",
    ),
    "warm start unfinished": (
        lambda w: (w / "run/sft/config.json").unlink(),
        IRL,
        "run/sft does not exist",
        "run the stages in order",
    ),
    "run in a file": (lambda w: None, SFT.replace("W/run", "W/pool.jsonl"), "pool.jsonl"),
    "run below a file": (
        lambda w: None,
        DATA.replace("W/run", "W/pool.jsonl/run"),
        "cannot write",
        "Not a directory",
    ),
    "run not to be written": (
        lambda w: None,
        DATA.replace("W/run", "/proc/run"),
        "cannot write /proc/run",
    ),
}
FLAG_CASES = {
    "--learning-rate 1": "unrecognized arguments: --learning-rate 1 (all flags",
    "--steps": "argument --steps: expected one argument",
    "--steps 1.5": "argument --steps: invalid int value: '1.5'",
    "--sft-lr fast": "argument --sft-lr: invalid float value",
    "--sft-lr nan": "--sft-lr nan: too small",
    "--sft-lr inf": "--sft-lr inf: too large",
    "--sft-lr -1e-3": "--sft-lr",
    "--sft-lr=-inf": "--sft-lr -inf: too small",
    "--steps 1000000000000": "--steps 1000000000000: too large",
    "--max-new-tokens 99999999": "--max-new-tokens 99999999: too large",
    "--seed -1": "--seed -1: too small",
    "--seed " + "9" * 30: "too large",
    "--temperature 1e-9": "--temperature 1e-09: too small, want at least 0.01",
    "--imitate yes": "argument --imitate: want true or false",
    "--reward-models 3": "--reward-models 3: want one of 8, 1",
    "--device meta": "--device meta: want cpu or cuda",
    "--device cuda:99": "--device cuda:99: this torch sees",
    "--per-sample true --scaling none": "--per-sample true changes nothing with --scaling none",
    "--epochs 0 --joint-epochs 0": "leave the rewards unfitted",
    "--grpo-samples 1 --imitate false": "nothing to compare",
    "--irl-prompts 1": "--irl-prompts 1: too small, want at least 2",
    "--clip 0": "--clip 0.0: too small, want more than 0",
    "--helpful-share 2": "unrecognized arguments: --helpful-share",
    "--sft-helpful-share 2": "--sft-helpful-share 2.0: too large",
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(w, capsys, name):
    change, argv, *words = CASES[name]
    change(w)
    refused(w, argv, capsys, *words)


@pytest.mark.parametrize("flags", FLAG_CASES)
def test_bad_flags(tmp_path, capsys, flags):
    refused(tmp_path, f"sft --run W/run {flags}", capsys, FLAG_CASES[flags])


def test_stages_and_debug(tmp_path, capsys, monkeypatch):
    refused(tmp_path, "", capsys, "stage")
    refused(tmp_path, "fly", capsys, "invalid choice: 'fly'")
    assert drirl.main(["sft", "--steps", "0", "--debug"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and err.splitlines()[-1].startswith(
        "drirl: --steps 0: too small"
    )

    def denied(*_):
        raise PermissionError(errno.EACCES, "Permission denied", "runs/x")

    monkeypatch.setattr(drirl, "Run", denied)
    refused(tmp_path, "sft", capsys, "Permission denied", "runs/x")


def test_the_good_folder_is_good(w, capsys):
    assert drirl.main(EVAL.replace("W/", f"{w}/").split()) == 0
    assert drirl.main(DATA.replace("words", "W/bert").replace("W/", f"{w}/").split()) == 0
    with open(w / "run/metrics.jsonl", "a") as f:
        f.write('{"stage": "sf')  # cut off while it was written: left out
    assert drirl.main(SFT.replace("W/", f"{w}/").split()) == 0
    assert [
        r["step"] for r in files.read_records(w / "run/metrics.jsonl") if r["stage"] == "sft"
    ] == [1, 2]


def test_a_folder_of_the_hugging_face_cache(w):
    """Its files are links to blobs/, two folders up."""
    (w / "blobs").mkdir()
    (w / "snapshots").mkdir()
    shutil.move(w / "model", w / "snapshots/abc")
    for path in list((w / "snapshots/abc").iterdir()):
        shutil.move(path, w / "blobs" / path.name)
        path.symlink_to(f"../../blobs/{path.name}")
    chat.load_chat(w / "snapshots/abc")
    model.save_model(model.load_model(w / "snapshots/abc"), w / "again")
    assert (w / "again/tokenizer.json").read_bytes() == (w / "blobs/tokenizer.json").read_bytes()


# ------------------------------------------------------------------------------------------------ writing


def fail_at(monkeypatch, op, n):
    """The n-th write, flush or rename of the helper fails as on a full disk; a write leaves half of its bytes."""
    calls = [0]

    def count(real, kind=OSError):
        def call(*args, **kw):
            calls[0] += 1
            if calls[0] != n:
                return real(*args, **kw)
            if op == "write":
                path, content = (
                    next(a for a in args if isinstance(a, Path)),
                    next((a for a in args if isinstance(a, bytes)), b"half a tensor"),
                )
                with open(path, "wb") as f:
                    f.write(content[: len(content) // 2])
            raise (
                kind("No space left on device (os error 28)")
                if kind is not OSError
                else OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            )

        return call

    if op == "write":
        monkeypatch.setattr(Path, "write_bytes", count(Path.write_bytes))
        for module in (model, reward, runfolder, loop):
            monkeypatch.setattr(module, "save_file", count(save_file, files.SafetensorError))
    else:
        monkeypatch.setattr(os, op, count(getattr(os, op)))
    return calls


SETS = {
    "data": ("report.json", "balanced.jsonl"),
    "sft": ("model.safetensors", "tokenizer.json", "config.json"),
    "baseline": ("model.safetensors", "tokenizer.json", "config.json"),
    "policy": ("model.safetensors", "tokenizer.json", "config.json"),
    "rewards": ("samples.json", *(f"{name}.safetensors" for name in (*CATEGORIES, HELPFUL))),
}


@pytest.mark.parametrize("op", ("write", "fsync", "replace"))
@pytest.mark.parametrize(
    "stage, folder",
    (
        ("data", "data"),
        ("sft", "sft"),
        ("irl", "rewards"),
        ("grpo", "policy"),
        ("baseline", "baseline"),
    ),
)
def test_a_full_disk(w, capsys, monkeypatch, op, stage, folder):
    """A write fails, at each in turn: one line, no temporary file, and the stage's earlier result is whole; only where one of several renames fails may it be refused as unfinished."""
    argv, run = (
        f"{stage} {FLAGS} --seed 5 --resume false --save-every {120 if stage == 'irl' else 0}".replace(
            "W/", f"{w}/"
        ).split(),
        w / "run",
    )
    edit(run / "times.json", irl=0.05, grpo=0.05)
    old, failures = {name: (run / folder / name).read_bytes() for name in SETS[folder]}, 0
    for n in range(1, 99):
        with monkeypatch.context() as m:
            calls = fail_at(m, op, n)
            code = drirl.main(argv)
            err = capsys.readouterr().err.rpartition("drirl: ")[2]
        assert not list(run.rglob("*.tmp"))
        if calls[0] < n:
            assert code == 0
            break
        failures += 1
        assert code == 2 and "No space left" in err and "cannot write" in err and str(run) in err, (
            err
        )
        now = {
            name: (run / folder / name).read_bytes() if (run / folder / name).exists() else None
            for name in SETS[folder]
        }
        written = (
            "times.json" in err or "balance.png" in err or "progress.json" in err
        )  # these follow the set
        assert now == old or written or op == "replace" and now[SETS[folder][-1]] is None, (
            op,
            n,
            err,
        )
        if "config.json" in now:
            assert now["config.json"], (op, n, err)
            model.load_model(run / folder), chat.load_chat(run / folder)
        for name in now:  # the next try starts from the earlier result
            (run / folder / name).write_bytes(old[name])
    assert failures >= 3 and (
        stage == "data"
        or {name: (run / folder / name).read_bytes() for name in SETS[folder]} != old
    )


def test_a_really_full_disk(w, capsys):
    """The system itself refuses more than 4 KB a file: also in the library that writes tensors."""
    was, before = (
        resource.getrlimit(resource.RLIMIT_FSIZE),
        (w / "run/sft/model.safetensors").read_bytes(),
    )
    shutil.copytree(w / "model", w / "source")
    policy = model.load_model(w / "source")
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, was[1]))
    try:
        with pytest.raises(UserError, match="cannot write .*sft/model.safetensors.*File too large"):
            model.save_model(policy, w / "run/sft")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, was)
    assert (w / "run/sft/model.safetensors").read_bytes() == before and sorted(
        p.name for p in (w / "run/sft").iterdir()
    ) == ["config.json", "model.safetensors", "tokenizer.json"]


@pytest.mark.parametrize("at", range(1, 5))
def test_config_and_weights_are_never_of_two_models(w, monkeypatch, at):
    """Another model is saved over a first one, and the process dies at a rename: the folder is the old model, the new one, or none."""
    other = model.load_model(w / "model")
    other.c.raw["rope_theta"] = 77.0  # same shapes, another network
    (w / "model/chat_template.jinja").write_text("first")
    with torch.no_grad():
        other.embed_tokens.weight.add_(1)
    model.save_model(model.load_model(w / "model"), w / "out")
    assert (w / "out/chat_template.jinja").exists()
    (w / "model/chat_template.jinja").unlink()
    config, weights = (
        (w / "out/config.json").read_bytes(),
        (w / "out/model.safetensors").read_bytes(),
    )
    with monkeypatch.context() as m:
        fail_at(m, "replace", at)
        try:
            model.save_model(other, w / "out")
        except UserError:
            pass
    folder = {p.name: p.read_bytes() for p in (w / "out").iterdir()}
    assert "config.json" not in folder or (folder["config.json"] == config) == (
        folder["model.safetensors"] == weights
    )
    if "config.json" not in folder:
        with pytest.raises(UserError, match="no config.json"):
            model.load_model(w / "out")
    elif folder["config.json"] != config:
        assert "chat_template.jinja" not in folder  # what the new model doesn't have must go


def test_whatever_a_stage_writes_goes_through_the_helper():
    """Nothing in the stages opens a file to write or saves past files.write; weights.py makes its folder aside and renames it."""
    for path in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and path.name not in (
                "files.py",
                "weights.py",
                "walkthrough.py",
            ):
                name, text = (
                    getattr(node.func, "attr", getattr(node.func, "id", "")),
                    ast.unparse(node),
                )
                assert (
                    name
                    not in ("write_text", "write_bytes", "open", "copyfile", "rename", "replace")
                    or "os." not in text
                    and name == "replace"
                ), (path.name, text)
                assert (
                    name not in ("save_file", "savefig")
                    or "aside" in text
                    or re.search(r"save_file\((state|cache), path", text)
                ), (path.name, text)


# ------------------------------------------------------------------------------------------------ fuzzing

NASTY = [
    0,
    -1,
    1,
    2,
    3,
    7,
    10**6,
    10**12,
    2**63,
    1e308,
    -0.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\ud800",
    None,
    True,
    [],
    {},
    [[]],
    {"a": 1},
    ["x"],
    "llama3",
    "default",
]


def mutate(raw, rng):
    """A few random changes of bytes: flipped, cut, doubled, put in, replaced by another number."""
    raw = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        at, n = rng.randrange(len(raw) + 1), rng.randint(1, 12)
        how = rng.randrange(6)
        if how == 0 and at < len(raw):
            raw[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            del raw[at : at + n]
        elif how == 2:
            raw[at:at] = raw[at : at + n]
        elif how == 3:
            raw[at:at] = rng.choice(
                [
                    b'"',
                    b"{",
                    b"[",
                    b"]",
                    b"}",
                    b",",
                    b"\n",
                    b"\r",
                    b"\0",
                    b"\xff",
                    b"\\",
                    b"-",
                    b"1e999",
                    b"null",
                    b"[" * 200,
                    b'{"a":' * 200,
                    b"9" * 5000,
                ]
            )
        elif how == 4 and rng.random() < 0.3:
            del raw[at:]
        elif numbers := list(re.finditer(rb"\d+", raw)):
            found = rng.choice(numbers)
            raw[found.start() : found.end()] = str(
                rng.choice([0, 1, -1, 2**31, 2**63, 10**12, 10**30, 5, 63])
            ).encode()
    return bytes(raw)


def mutate_json(raw, rng):
    """A field gets a nasty value, is lost, or the text itself is mutated."""
    if rng.random() < 0.3:
        return mutate(raw, rng)
    value = json.loads(raw)
    part = rng.choice([value, *(v for v in value.values() if isinstance(v, dict) and v)])
    for _ in range(rng.randint(1, 2)):
        key = rng.choice(list(part) or ["a"])
        part[key] = rng.choice(NASTY)
        if rng.random() < 0.1:
            del part[key]
    return json.dumps(value).encode()


def mutate_tensors(raw, rng):
    """The header changes and its length is set right, or anything changes, the length too."""
    (n,) = struct.unpack("<Q", raw[:8])
    if rng.random() < 0.6:
        text = mutate(raw[8 : 8 + n], rng)
        return struct.pack("<Q", len(text)) + text + raw[8 + n :]
    if rng.random() < 0.5:
        return (
            struct.pack(
                "<Q", rng.choice([0, 1, n - 1, n + 1, len(raw), 2**24, 2**32, 2**63, 2**64 - 1])
            )
            + raw[8:]
        )
    return mutate(raw, rng)


FUZZED = {  # file, how it is mutated, how it is read, how often
    "safetensors": (WEIGHTS, mutate_tensors, lambda w: model.load_model(w / "model"), 600),
    "config": (
        "model/config.json",
        mutate_json,
        lambda w: (model.load_model(w / "model"), chat.load_chat(w / "model")),
        500,
    ),
    "encoder": (
        "bert/config.json",
        mutate_json,
        lambda w: encoder.load_encoder(w / "bert").embed(["a b"]),
        200,
    ),
    "index": (INDEX, mutate_json, lambda w: model.load_model(w / "model"), 100),
    "rewards": (
        "run/rewards/crime.safetensors",
        mutate_tensors,
        lambda w: files.read_tensors(w / "run/rewards/crime.safetensors"),
        100,
    ),
    "settings": (
        SETTINGS,
        mutate_json,
        lambda w: settings.parse(["sft", "--run", str(w / "run")], drirl.STAGES),
        400,
    ),
    "metrics": (
        "run/metrics.jsonl",
        mutate,
        lambda w: files.read_records(w / "run/metrics.jsonl"),
        100,
    ),
    "JSON lines": ("pool.jsonl", mutate, lambda w: loaders.load_rows(w / "pool.jsonl"), 500),
    "JSON": ("pool.json", mutate, lambda w: loaders.load_rows(w / "pool.json"), 200),
    "CSV": ("pool.csv", mutate, lambda w: loaders.load_rows(w / "pool.csv"), 300),
}


@pytest.mark.parametrize("name", FUZZED)
def test_fuzz(w, name):
    """Mutated files load or are refused by a UserError of one line, in bounded time and memory: 3000 of them, under ten kinds."""
    file, change, read, times = FUZZED[name]
    (w / "pool.json").write_text(
        json.dumps(
            {
                "Insult": [{"prompt": "a", "response": "r"}, {"prompt": "b", "response": "s"}],
                "Privacy_And_Property": [{"prompt": "c"}],
            },
            indent=1,
        )
    )
    (w / "pool.csv").write_text(
        'prompt,category,label,n\n"one, ""two""\nthree",crime,unsafe,1\nfour,insult,,2\nfive,,safe,3\n'
    )
    if name == "index":
        (w / INDEX).write_text(
            json.dumps(
                {
                    "metadata": {"total_size": 9},
                    "weight_map": {k: "model.safetensors" for k in load_file(w / WEIGHTS)},
                }
            )
        )
    good, rng, outcomes, memory = (
        (w / file).read_bytes(),
        random.Random(name),
        [0, 0],
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    )
    read(w)
    for n in range(times):
        (w / file).write_bytes(change(good, rng))
        start = time.process_time()
        try:
            read(w)
            outcomes[0] += 1
        except UserError as e:
            outcomes[1] += 1
            assert str(w) in str(e) or "kind" in str(e) or str(e).startswith("--"), e
        assert time.process_time() - start < 5, n
    assert outcomes[1] > times / 10 and sum(outcomes) == times
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 2**19, "half a GB"


# ------------------------------------------------------------------------------------------------ the source itself


def unsafe(text):
    """What could run a stranger's code: pickle and its like, torch.load, eval, exec, shell=True, yaml.load. A method called eval is none."""
    found = []
    for node in ast.walk(ast.parse(text)):
        names = (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        found += [
            n
            for n in names
            if n.split(".")[0]
            in ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml")
        ]
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            found += [a.name for a in node.names if a.name == "load"]
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            found += (
                [called]
                if called
                in (
                    "eval",
                    "exec",
                    "__import__",
                    "os.system",
                    "os.popen",
                    "torch.load",
                    "torch.jit.load",
                    "yaml.load",
                    "pd.read_pickle",
                )
                else []
            )
            found += [
                f"{called}({k.arg}=...)"
                for k in node.keywords
                if k.arg in ("shell", "allow_pickle", "trust_remote_code")
                and not (isinstance(k.value, ast.Constant) and k.value.value is False)
            ]
    return found


def test_nothing_here_runs_what_a_file_says():
    for text in (
        "import pickle",
        "from joblib import load",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "eval('1')",
        "exec('1')",
        "import subprocess as s\ns.run('ls', shell=True)",
        "yaml.load(f)",
        "np.load(f, allow_pickle=True)",
    ):
        assert unsafe(text), text
    assert not unsafe("model.eval()\nre.compile('x')\nexecute()\nrun(x, shell=False)")
    paths = [
        p
        for p in ROOT.rglob("*.py")
        if not {".venv", "models", "runs", ".git"} & set(p.relative_to(ROOT).parts)
    ]
    assert len(paths) > 30
    assert {p.name: found for p in paths if (found := unsafe(p.read_text()))} == {
        "walkthrough.py": ["exec"]
    }  # of WALKTHROUGH.md's own blocks, by who writes it
