"""A model small enough to align in a minute: a 1M-parameter Llama and a byte-level BPE tokenizer, both made from the corpus.

It learns to answer every harmless training prompt, and nothing else: like a base model it never refuses. It shows that
the pipeline works, not that the model knows anything.
"""

import hashlib
import json
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import sft
from chat import load_chat
from data import HELPFUL
from files import read_json, write
from model import save_model
from transformer import Config, Transformer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
STEPS = 350


def make(folder: Path, demonstrations: list[dict], benign: list[dict], seed: int = 0) -> None:
    """Writes a Hugging Face folder, unless the one that is there was made from the same."""
    made_from = hashlib.sha256(
        json.dumps([demonstrations, benign, seed, STEPS]).encode()
    ).hexdigest()
    if (folder / "config.json").exists() and read_json(folder / "config.json").get(
        "made_from"
    ) == made_from:
        return print(f"{folder} was made before")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        [r[k] for r in demonstrations + benign for k in ("prompt", "response")], trainer
    )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "torch_dtype": "float32",
        "made_from": made_from,
    }
    torch.manual_seed(seed)
    model = Transformer(Config.from_dict(config))
    for p in model.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.02)
    print(f"tiny: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters")
    rows = [r for r in benign if r["category"] == HELPFUL]
    c = sft.SFTConfig(steps=STEPS, lr=5e-3, batch=8, helpful_share=1.0, blocks=0)
    with (
        tempfile.TemporaryDirectory() as aside
    ):  # the folder itself appears only with the trained model
        write(
            {
                Path(aside) / "tokenizer.json": tokenizer.to_str(),
                Path(aside) / "generation_config.json": json.dumps({"eos_token_id": 2}) + "\n",
            }
        )
        sft.train(
            model,
            load_chat(aside, system=""),
            rows,
            c,
            amp=lambda: torch.autocast("cpu", enabled=False),
            seed=seed,
        )
        model.source = Path(aside)
        save_model(model, folder)
