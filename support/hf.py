"""Folders in and out, as Hugging Face lays them out: config.json, safetensors, a tokenizer."""

import functools
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from config import UserError
from model import ModelConfig, Transformer
from support import files, parallel
from support.files import inside, number

COPIED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
COPIED += ("special_tokens_map.json", "chat_template.jinja")
ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def read_config(raw: dict, where: str | Path = "config.json") -> ModelConfig:
    """The network of a config.json. UserError for what model.py lacks and for wrong numbers."""
    kind, flags = raw.get("model_type"), {}
    if kind not in ("llama", "qwen2", "qwen3"):
        raise UserError(f"{where}: unsupported architecture {kind!r}: want llama, qwen2 or qwen3")
    other = raw.get("hidden_act", "silu") != "silu" or raw.get("is_causal") is False
    if other or raw.get("use_sliding_window"):
        what = "use_sliding_window, is_causal false, or hidden_act other than silu"
        raise UserError(f"{where}: unsupported: {what}")
    for name in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
        flags[name] = raw.get(name) or False
        if not isinstance(flags[name], bool):
            raise UserError(f"{where}: {name} is {raw[name]!r}: want true or false")
    sizes = [number(raw, name, where, 1, most) for name, most in files.SIZES.items()]
    heads, bias = sizes[-1], flags["attention_bias"]
    kv_heads = number(raw, "num_key_value_heads", where, 1, heads, heads)
    usual = 128 if kind == "qwen3" else raw["hidden_size"] // heads
    head_dim = number(raw, "head_dim", where, 1, 10**4, usual)
    if heads % kv_heads or head_dim % 2:
        found = f"{heads} heads, {kv_heads} key heads, head_dim {head_dim}"
        raise UserError(f"{where}: {found}: want a multiple of the key heads, and an even number")
    theta, scaling = read_rope(raw, where)
    return ModelConfig(
        *sizes,  # in this order
        kv_heads,
        head_dim,
        eps=number(raw, "rms_norm_eps", where, 0.0, 1.0, 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tied=flags["tie_word_embeddings"],
        qkv_bias=bias or kind == "qwen2",
        out_bias=bias and kind != "qwen2",
        mlp_bias=kind == "llama" and flags["mlp_bias"],
        qk_norm=kind == "qwen3",
        raw=raw,
    )


def read_rope(raw: dict, where: str | Path) -> tuple[float, dict | None]:
    """theta, and llama3's four numbers if its scaling is asked for."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}  # transformers 4, 5
    rope = rope if type(rope) is dict else {"rope_type": rope}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise UserError(f"{where}: unsupported rope scaling {kind!r}: want default or llama3")
    theta = number(raw | rope, "rope_theta", where, 1.0, 1e12, 10000.0)  # rope's counts
    if kind == "default":
        return theta, None
    where, old = f"{where}: llama3 rope scaling", ROPE[-1]
    rope = rope | {old: raw.get(old) or rope.get(old) or raw.get("max_position_embeddings")}
    scaling = {name: number(rope, name, where, 1e-3, 1e9) for name in ROPE}
    if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise UserError(f"{where}: low_freq_factor must be below high_freq_factor")
    return theta, scaling


def fitting(state: dict, tensors: dict, where: str | Path) -> dict[str, Tensor]:
    """The tensors for a network's state. UserError if shapes differ."""
    for name in sorted(state.keys() | tensors.keys()):
        want, got = (tuple(x[name].shape) if name in x else "nothing" for x in (state, tensors))
        if want != got:
            raise UserError(f"{where}: tensor {name}: found {got}, config.json asks for {want}")
    return tensors


def named(c: ModelConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict() under Hugging Face's names: views of the joined products' parts."""
    heads, out = [n * c.head_dim for n in (c.heads, c.kv_heads, c.kv_heads)], {}
    qkv, mlp = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
    parts = {"qkv_proj": (qkv, heads), "gate_up_proj": (mlp, [c.intermediate_size] * 2)}
    for key, x in state.items():
        joined = next((j for j in parts if f".{j}." in key), "")
        names, sizes = parts.get(joined, ([""], len(x)))
        out.update(zip([key.replace(joined, name) for name in names], x.split(sizes)))
    return out


def open_model(folder: str | Path) -> tuple[Transformer, dict[str, Tensor]]:
    """A folder's network on the meta device, without numbers, and the tensors that fit it."""
    raw, where = files.read_folder(folder := Path(folder), "model"), folder / "config.json"
    config = read_config(raw, where)
    tensors = files.load_tensors(folder, raw)
    tensors = {k.removeprefix("model."): x for k, x in tensors.items() if "inv_freq" not in k}
    head = tensors.get("lm_head.weight")
    if config.tied and head is not None:  # as transformers: one serves as both, or they differ
        if torch.equal(head, tensors.setdefault("embed_tokens.weight", head)):
            del tensors["lm_head.weight"]
        else:
            config = read_config({**raw, "tie_word_embeddings": False}, where)
    with torch.device("meta"):  # no random initial weights
        model = Transformer(config)
    model.source = folder
    return model, fitting(named(config, model.state_dict()), tensors, folder)


def load_model(folder: str | Path, dtype=torch.float32, device="cpu") -> Transformer:
    model, tensors = open_model(folder)
    model.to(dtype).to_empty(device=device)
    for name, x in named(model.config, model.state_dict()).items():
        x.copy_(tensors[name])
    return model


@torch.no_grad()
def frozen_copy(model: Transformer, dtype: torch.dtype) -> Transformer:
    """A copy without gradients, for sampling; cast, and gathered if sharded, tensor by tensor."""
    with torch.device("meta"):
        out = Transformer(model.config).to(dtype).requires_grad_(False)
    for mine, theirs in zip(out.to_empty(device=model.device).parameters(), model.parameters()):
        mine.copy_(parallel.whole(theirs))
    return out


def save_model(model: Transformer, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Writes a folder that transformers and vLLM read, with the tokenizer of the model's source."""
    folder, source, state = Path(folder), model.source, {}
    for key, x in model.state_dict().items():  # all processes gather, the first keeps
        x = parallel.whole(x)
        for name, part in named(model.config, {key: x}).items() if not parallel.rank() else ():
            name = name if name.startswith("lm_head") else "model." + name
            state[name] = part.to("cpu", dtype or part.dtype, copy=True)
    if parallel.rank():
        return
    save = lambda aside: save_file(state, aside, metadata={"format": "pt"})
    new = {files.WEIGHTS: save, files.INDEX: None}  # no shards now
    for name in COPIED if source and source.resolve() != folder.resolve() else ():
        new[name] = inside(source, name).read_bytes() if (source / name).exists() else None
    raw = {k: x for k, x in model.config.raw.items() if not k.startswith("quantization")}
    kind = str(next(iter(state.values())).dtype).removeprefix("torch.")
    raw["dtype" if "dtype" in raw else "torch_dtype"] = kind
    new["config.json"] = files.as_json(raw)
    files.write({folder / name: content for name, content in new.items()})


def save_rewards(models, folder: Path, beside: dict[str, str]) -> None:
    """A reward.RewardModels, and files of text that belong to it, as one set."""
    new = {folder / name: text for name, text in beside.items()}
    for name, shadow in models.shadows.items():
        new[folder / f"{name}.safetensors"] = functools.partial(save_file, shadow.state_dict())
    files.write(new)


def load_rewards(models, folder: Path):
    """Fills a reward.RewardModels and returns it, frozen."""
    for name, shadow in models.shadows.items():
        path = folder / f"{name}.safetensors"
        if not path.exists():
            raise UserError(f"no reward model {path}; run irl first, with this integration")
        where = f"{path}, of another --model or --irl-reward-blocks (run irl again)"
        shadow.load_state_dict(fitting(shadow.state_dict(), files.read_tensors(path), where))
    return models.requires_grad_(False)
