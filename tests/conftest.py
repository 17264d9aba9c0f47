"""Tests import the modules of the repository root, and the helpers below from here.

Triton's interpreter must be asked for before triton is imported; with -m gpu kernels are compiled.
"""

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TINY_LLAMA = {
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
WORLD = "--model W/model --pool W/pool.jsonl --benign W/benign.jsonl --prompts W/prompts.jsonl"


def pytest_configure(config):
    if config.getoption("-m") != "gpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")


def rows(path: Path, *records: dict) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def demonstration(category: str, i: int) -> dict:
    draft = {"draft": ["no", "kind"], "answer": f"No {i}."}
    return {"prompt": f"{category} {i}?", "category": category, **draft}


def tokenizer(extra=()):
    """A token a byte, and three special ones: 257 and 258 are those of chatml."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    t = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    t.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *extra])
    return t


def make_model(folder: Path) -> None:
    """A random model of 6,000 weights, one token a byte."""
    import torch

    from model import Transformer
    from support.hf import read_config, save_model

    folder.mkdir()
    tokenizer().save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    save_model(Transformer(read_config(TINY_LLAMA, folder)), folder)


def make_world(w: Path, per_category: int, helpful: int, prompts: list[dict]) -> None:
    """What the flags WORLD name: a model, a pool, harmless demonstrations, held-out prompts."""
    from data import CATEGORIES, HELPFUL

    make_model(w / "model")
    rows(w / "pool.jsonl", *(demonstration(c, i) for c in CATEGORIES for i in range(per_category)))
    rows(w / "benign.jsonl", *(demonstration(HELPFUL, i) for i in range(helpful)))
    rows(w / "prompts.jsonl", *prompts)


def flags(w: Path, text: str = WORLD) -> list[str]:
    """A command line's words, its W/ replaced by the folder w."""
    return text.replace("W/", f"{w}/").split()
