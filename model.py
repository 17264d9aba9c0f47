"""What the stages do with a transformer: score and sample completions of prompts, load and save Hugging Face folders.

Any range of blocks can run: the policy trains only its top blocks, and the reward models share a frozen trunk with
the reference policy.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import kernels
import parallel
from batch import Batch
from data import UserError
from files import fitting, inside, read_json, read_tensors, write
from transformer import Config, Transformer, attention


# ------------------------------------------------------------------------------------------------ scores


def run_blocks(
    model: Transformer,
    batch: Batch,
    x: Tensor | None = None,
    start: int = 0,
    stop: int | None = None,
    recompute: bool = False,
) -> Tensor:
    """Hidden states (N, D) of a batch after blocks start .. stop - 1; x: those before block `start` (None: the embeddings).

    recompute: gradient checkpointing; of each block only its input is kept, and the backward pass runs it again.
    """
    x = model.embed_tokens(batch.ids) if x is None else x
    rope = model.rope(batch.positions)
    for block in model.layers[start:stop]:
        x = (
            checkpoint(block, x, rope, batch.attend, use_reentrant=False)
            if recompute
            else block(x, rope, batch.attend)
        )
    return x


def head_inputs(model: Transformer, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """What kernels.token_logprobs and grpo_loss take, from the last block's output x (N, D): the state (n, D) that predicts each of
    the n completion tokens, row by row; the head; the tokens."""
    return model.norm(x[batch.before]), model.head, batch.completions[batch.mask]


def token_logps(
    model: Transformer, batch: Batch, temperature: float = 1.0, frozen: int = 0
) -> Tensor:
    """log softmax(logits / temperature)[token] of every completion token: (B, T) float32, zero where `batch.mask` is False.

    The lowest `frozen` blocks run without keeping anything for a backward pass.
    """
    with torch.set_grad_enabled(torch.is_grad_enabled() and frozen == 0):
        x = run_blocks(model, batch, stop=frozen)
    logps = kernels.token_logprobs(
        *head_inputs(model, run_blocks(model, batch, x, start=frozen), batch), temperature
    )
    return logps.new_zeros(batch.mask.shape).masked_scatter(batch.mask, logps)


# ------------------------------------------------------------------------------------------------ generation


@dataclass
class Rollout:
    """What generate returns; row p * samples + g is sample g of prompt p."""

    tokens: Tensor  # (B, T) long
    mask: Tensor  # (B, T) True where a token was sampled, the end-of-text token included
    logps: Tensor  # (B, T) float32, under the distribution sampled from; 0 where masked

    def rows(self) -> list[list[int]]:
        return [t[m].tolist() for t, m in zip(self.tokens.cpu(), self.mask.cpu())]


def choose(
    logits: Tensor, temperature: float, top_k: int, top_p: float, draws: Tensor
) -> tuple[Tensor, Tensor]:
    """One token a row from logits (B, V) by a uniform number each, draws (B,) in [0, 1): ids (B,) and their log-probs under the
    (filtered) distribution. temperature 0: the best, of log-prob 0."""
    if temperature == 0:
        best = logits.max(-1).indices  # argmax, but much faster on CPU in bfloat16
        return best, torch.zeros_like(best, dtype=torch.float32)
    logits = logits.float() / temperature
    if top_k and top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    if top_p < 1:
        sorted_logits, order = logits.sort(dim=-1, descending=True)
        p = sorted_logits.softmax(-1)
        drop = p.cumsum(-1) - p >= top_p  # keep the smallest set that reaches top_p
        logits = logits.masked_fill(drop.gather(1, order.argsort(-1)), -math.inf)
    p = logits.softmax(-1)
    cdf = p.cumsum(
        -1
    )  # inverse-CDF sampling: a search; torch.multinomial draws V exponentials a row
    ids = torch.searchsorted(cdf, draws[:, None] * cdf[:, -1:], right=True).clamp(
        max=p.shape[1] - 1
    )
    return ids[:, 0], p.gather(1, ids)[:, 0].log()


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: list[list[int]],
    samples: int = 1,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    eos: tuple[int, ...] = (),
    draws: Tensor | None = None,
) -> Rollout:
    """Samples `samples` completions of each prompt (token lists). Prompts run once; their cache is then shared out to the group.

    A row stops after any id of `eos`, which is kept. Finished rows leave the batch when an eighth of it is done (that copies every block's cache). draws (B, max_new_tokens):
    the uniform numbers that decide, by default of `seed`; a row's own, so that it says the same in whatever company, but for rounding (in
    bfloat16 that may change a sample).
    """
    device, c = model.device, model.c
    if draws is None:
        draws = torch.rand(
            len(prompts) * samples, max_new_tokens, generator=torch.Generator().manual_seed(seed)
        )
    draws = draws.to(device)
    batch, keys = Batch(prompts, [[] for _ in prompts], device), []
    x, rope = model.embed_tokens(batch.ids), model.rope(batch.positions)
    for block in model.layers:
        x = block(x, rope, lambda q, k, v: batch.attend(q, k, v, keys))
    owner = torch.arange(len(prompts), device=device).repeat_interleave(samples)
    h, (B, L) = (
        x[batch.prompt_last][owner],
        batch.levels[1].seen[owner].shape,
    )  # (B, D): hidden states where a token will be chosen
    # per block [keys, values], each (B, K, L + new, E): the prompt's, and room for the tokens to come
    cache = [[F.pad(z[owner], (0, 0, 0, max_new_tokens)) for z in kv] for kv in keys]
    keys.clear()

    tokens = torch.zeros(B, max_new_tokens, dtype=torch.long, device=device)
    mask, logps = (
        torch.zeros_like(tokens, dtype=torch.bool),
        torch.zeros(B, max_new_tokens, device=device),
    )
    stop = torch.tensor(list(eos), dtype=torch.long, device=device)
    row = torch.arange(B, device=device)  # which output row each batch row writes
    done = torch.zeros(B, dtype=torch.bool, device=device)
    can_see = F.pad(batch.levels[1].seen[owner][:, None, None], (0, max_new_tokens), value=True)
    position = batch.levels[1].ends[owner]
    for t in range(max_new_tokens):
        token, logp = choose(
            F.linear(model.norm(h), model.head), temperature, top_k, top_p, draws[row, t]
        )
        live = ~done
        tokens[row[live], t], logps[row[live], t], mask[row[live], t] = (
            token[live],
            logp[live],
            True,
        )
        done |= torch.isin(token, stop)
        finished = int(done.sum())
        if finished == len(done) or t + 1 == max_new_tokens:
            break
        if finished * 8 >= len(done):
            keep = (~done).nonzero()[:, 0]
            row, token, done, can_see, position = (
                row[keep],
                token[keep],
                done[keep],
                can_see[keep],
                position[keep],
            )
            cache = [[k[keep] for k in kv] for kv in cache]
        h, rope, end = model.embed_tokens(token), model.rope(position), L + t

        def attend(q, k, v):  # K, V: the cache of the block that calls
            K[:, :, end], V[:, :, end] = (
                k,
                v,
            )  # the new token sees every key, so a key head's H / K query heads can be its query rows
            q = q.view(len(q), c.kv_heads, -1, c.head_dim)
            return attention(
                q, K[:, :, : end + 1], V[:, :, : end + 1], can_see[..., : end + 1]
            ).flatten(1, 2)

        for block, (K, V) in zip(model.layers, cache):
            h = block(h, rope, attend)
        position = position + 1
    return Rollout(tokens, mask, logps)


# ------------------------------------------------------------------------------------------------ folders


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder: model.safetensors, or the shards that model.safetensors.index.json names."""
    index, names = inside(folder, "model.safetensors.index.json"), ["model.safetensors"]
    if index.exists():
        shards = read_json(index).get("weight_map")
        if (
            not isinstance(shards, dict)
            or not shards
            or not all(isinstance(name, str) for name in shards.values())
        ):
            raise UserError(
                f"{index}: weight_map: want an object that names a file for every tensor"
            )
        names = sorted(set(shards.values()))
    tensors = {}
    for name in names:
        if not inside(folder, name).exists():
            raise UserError(
                f"no weights: {folder / name} does not exist (only safetensors are read)"
            )
        tensors.update(read_tensors(folder / name))
    return tensors


def open_model(folder: str | Path) -> tuple[Transformer, dict[str, Tensor]]:
    """A Hugging Face folder's network, without its numbers (on the meta device), and the tensors, which fit it. Raises UserError for whatever is missing, wrong or unsupported."""
    folder = Path(folder)
    if not inside(folder, "config.json").exists():
        raise UserError(f"{folder} is no model folder: it has no config.json")
    with torch.device("meta"):  # no random initial weights
        model = Transformer(
            Config.from_dict(read_json(folder / "config.json"), folder / "config.json")
        )
    model.source = folder
    tensors = {
        k.removeprefix("model."): v
        for k, v in load_tensors(folder).items()
        if not k.endswith("rotary_emb.inv_freq")
    }
    if model.c.tied:
        tensors.pop("lm_head.weight", None)
    return model, fitting(model.named(model.state_dict()), tensors, folder)


def load_model(folder: str | Path, dtype: torch.dtype = torch.float32, device="cpu") -> Transformer:
    model, tensors = open_model(folder)
    for name, x in model.to(dtype).to_empty(device=device).named(model.state_dict()).items():
        x.copy_(tensors[name])
    return model


def save_model(model: Transformer, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Writes a folder that transformers, vLLM and load_model read; tokenizer files are copied from the folder it came from.

    One set (files.write): weights and tokenizer first, config.json, without which nobody reads the folder, last.
    """
    folder, source = Path(folder), model.source
    state = {}
    for (
        key,
        x,
    ) in model.state_dict().items():  # one after the other: all processes gather, the first keeps
        x = parallel.whole(x)
        if not parallel.rank():
            state.update(
                {
                    (k if k.startswith("lm_head") else "model." + k): v.to(
                        "cpu", dtype or v.dtype, copy=True
                    )
                    for k, v in model.named({key: x}).items()
                }
            )
    if parallel.rank():
        return
    raw = dict(model.c.raw)
    raw["dtype" if "dtype" in raw else "torch_dtype"] = str(
        next(iter(state.values())).dtype
    ).removeprefix("torch.")
    files = {
        folder / "model.safetensors": lambda path: save_file(
            state, path, metadata={"format": "pt"}
        ),
        folder / "model.safetensors.index.json": None,
    }  # one file now; old shards must not be read again
    if source and source.resolve() != folder.resolve():
        for name in (
            "tokenizer.json",
            "tokenizer_config.json",
            "generation_config.json",
            "special_tokens_map.json",
            "chat_template.jinja",
        ):
            files[folder / name] = (
                inside(source, name).read_bytes() if (source / name).exists() else None
            )
    write({**files, folder / "config.json": json.dumps(raw, indent=1) + "\n"})


@torch.no_grad()
def frozen_copy(model: Transformer, dtype: torch.dtype) -> Transformer:
    """A copy without gradients, for sampling; cast, and gathered if sharded, tensor by tensor."""
    with torch.device("meta"):
        out = Transformer(model.c).to(dtype).requires_grad_(False)
    for mine, theirs in zip(out.to_empty(device=model.device).parameters(), model.parameters()):
        mine.copy_(parallel.whole(theirs))
    return out
