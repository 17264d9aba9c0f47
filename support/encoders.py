"""Folders of text encoders, BERT / MiniLM and CLIP's text tower; and one without a folder."""

import functools
import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from config import UserError
from data import normalise
from support.files import SIZES, inside, load_tensors, number, read_folder, read_json

# A folder's names of tensors and encoder.Encoder's, replaced in this order; gamma, beta: old ones.
BERT_NAMES = """
bert.=                     embeddings.word_embeddings.weight=words
embeddings.LayerNorm=norm  embeddings.position_embeddings.weight=positions
encoder.layer.=layers.     embeddings.token_type_embeddings.weight=segment
attention.self.query=q     attention.output.dense=o          intermediate.dense=up
attention.self.key=k       attention.output.LayerNorm=norm1  output.dense=down
attention.self.value=v     output.LayerNorm=norm2            .gamma=.weight  .beta=.bias
"""
CLIP_NAMES = """
text_model.=               embeddings.token_embedding.weight=words
final_layer_norm=norm      embeddings.position_embedding.weight=positions
encoder.layers.=layers.    text_projection.weight=projection
self_attn.q_proj=q         self_attn.out_proj=o              mlp.fc1=up
self_attn.k_proj=k         layer_norm1=norm1                 mlp.fc2=down
self_attn.v_proj=v         layer_norm2=norm2
"""
CLIP = {"num_hidden_layers": 12, "num_attention_heads": 8, "hidden_size": 512}
CLIP |= {"intermediate_size": 2048, "max_position_embeddings": 77, "vocab_size": 49408}
CLIP |= {"layer_norm_eps": 1e-5, "hidden_act": "quick_gelu"}  # what a text_config may leave out


def pooling(folder: Path) -> str:
    """mean or cls (the first token), as files of sentence-transformers say; mean without them."""
    path, at = inside(folder, "modules.json"), ""
    for module in read_json(path, list) if path.exists() else ():
        kind = str(module.get("type") if isinstance(module, dict) else module).split(".")[-1]
        if kind not in ("Transformer", "Pooling", "Normalize"):
            raise UserError(f"{path}: unsupported module {kind!r:.99} after the encoder")
        at = str(module.get("path")) if kind == "Pooling" and isinstance(module, dict) else at
    path = inside(inside(folder, at or "1_Pooling"), "config.json")
    raw = {"pooling_mode_mean_tokens": True, **(read_json(path) if at or path.exists() else {})}
    on = [name[13:] for name, value in raw.items() if name.startswith("pooling_mode_") and value]
    mode = str(raw.get("pooling_mode") or " + ".join(on))
    mode = mode.removesuffix("_tokens").removesuffix("_token")
    if mode not in ("mean", "cls"):
        raise UserError(f"{path}: unsupported pooling {mode!r:.99}: want mean or cls")
    return mode


def read_encoder(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """A BERT or CLIP folder's numbers, and its tensors; encoder.Encoder's under its names."""
    where, raw = folder / "config.json", read_folder(folder, "encoder", "tokenizer.json")
    c, kind = raw, raw.get("model_type")
    if kind not in ("bert", "clip", "clip_text_model"):
        raise UserError(f"{where}: text encoder {kind!r}: want bert, clip or clip_text_model")
    if kind == "clip":  # the text half of a whole CLIP
        older = c.get("text_config_dict")  # counts where both are
        if not isinstance(text := older or c.get("text_config") or {}, dict):
            raise UserError(f"{where}: text_config: want an object")
        c = CLIP | text
    if (act := c.get("hidden_act")) not in ("gelu", "quick_gelu"):
        raise UserError(f"{where}: activation {act!r} of the encoder: want gelu or quick_gelu")
    if c.get("is_decoder") or c.get("position_embedding_type", "absolute") != "absolute":
        raise UserError(f"{where}: unsupported: is_decoder, or positions that are not absolute")
    sizes = SIZES | {"max_position_embeddings": 10**6}
    numbers = {name: number(c, name, where, 1, most) for name, most in sizes.items()}
    if numbers["hidden_size"] % numbers["num_attention_heads"]:
        raise UserError(f"{where}: hidden_size must be a multiple of num_attention_heads")
    numbers["layer_norm_eps"] = number(c, "layer_norm_eps", where, 0.0, 1.0)
    numbers["eos_token_id"] = number(c, "eos_token_id", where, 0, 10**7, 2)
    numbers["pooling"] = pooling(folder) if kind == "bert" else "end"
    names, state = BERT_NAMES if kind == "bert" else CLIP_NAMES, {}
    for name, x in load_tensors(folder, raw).items():
        for pair in names.split():
            name = name.replace(*pair.split("="))
        state[name] = torch.atleast_2d(x)[:1] if name == "segment" else x  # BERT's first segment
    if kind != "bert":
        state["segment"] = torch.zeros(1, numbers["hidden_size"])
    return {**numbers, "model_type": kind, "hidden_act": act}, state


class WordEncoder:
    """For tests and the recipe tiny: a word has a random unit vector, a text is their sum."""

    def __init__(self, width: int = 256):
        self.width = width

    @functools.lru_cache(maxsize=100_000)
    def word(self, w: str) -> Tensor:
        seed = int.from_bytes(hashlib.sha256(w.encode()).digest()[:7], "little")
        vector = torch.randn(self.width, generator=torch.Generator().manual_seed(seed))
        return F.normalize(vector, dim=0)

    def embed(self, texts: list[str]) -> Tensor:
        sums = torch.zeros(len(texts), self.width)
        for i, text in enumerate(texts):
            for w in normalise(text).split():
                sums[i] = sums[i] + self.word(w)
        return F.normalize(sums, dim=1)
