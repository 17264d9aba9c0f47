"""A 1M-parameter Llama made from the corpus: python -m teach.tiny FOLDER [flags of drirl.py]

It answers harmless prompts and never refuses. It shows that the pipeline works, and no more.
"""

import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import drirl
import sft
from config import SFTConfig, UserError
from model import Transformer
from support.chat import load_chat
from support.files import read_json, write
from support.hf import read_config, save_model
from support.loaders import load_rows
from support.resume import Loop

SFT = SFTConfig(steps=350, lr=5e-3, batch=8, helpful_share=1.0)
CONFIG = json.loads("""{"architectures": ["LlamaForCausalLM"], "model_type": "llama",
    "hidden_act": "silu", "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 384,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
    "tie_word_embeddings": true, "bos_token_id": 0, "eos_token_id": 2, "torch_dtype": "float32"}""")


def make(folder: Path, demonstrations: list[dict], benign: list[dict], seed: int = 0) -> None:
    """Writes a Hugging Face folder, unless the one that is there was made from the same."""
    data = json.dumps([demonstrations, benign, seed, CONFIG, asdict(SFT)])
    made_from, path = hashlib.sha256(data.encode()).hexdigest(), folder / "config.json"
    if path.exists() and "made_from" not in read_json(path):
        raise UserError(f"{folder} holds a model that is not ours: name another folder")
    if path.exists() and read_json(path)["made_from"] == made_from:
        return print(f"{folder} was made before")
    tokenizer, words = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer, tokenizer.decoder = words, decoders.ByteLevel()
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    options = dict(vocab_size=CONFIG["vocab_size"], special_tokens=marks, show_progress=False)
    texts = [r[k] for r in demonstrations + benign for k in ("prompt", "response")]
    trainer = trainers.BpeTrainer(initial_alphabet=words.alphabet(), **options)
    tokenizer.train_from_iterator(texts, trainer)
    write({folder / "tokenizer.json": tokenizer.to_str()})
    torch.manual_seed(seed)
    config = CONFIG | {"vocab_size": tokenizer.get_vocab_size(), "made_from": made_from}
    model = Transformer(read_config(config, path))
    for p in (p for p in model.parameters() if p.ndim == 2):
        torch.nn.init.normal_(p, std=0.02)
    sft.train(model, load_chat(folder), benign, SFT, torch.float32, seed, Loop("base"))
    save_model(model, folder)


def main(argv: list[str]) -> int:
    def tiny(run) -> None:
        rows = [load_rows(run.file(name), drafted=True) for name in ("pool", "benign")]
        make(Path(argv[0]), *rows, run.c.run.seed)

    return drirl.main(["tiny", *argv[1:]], {"tiny": tiny})


if __name__ == "__main__":
    named = sys.argv[1:] and not sys.argv[1].startswith("-")
    sys.exit(main(sys.argv[1:]) if named else __doc__)
