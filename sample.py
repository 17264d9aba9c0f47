"""What the stages do with a transformer: packed batches, log-probs of tokens, samples.

run_blocks runs any range of blocks, so policy, reference and rewards can share frozen ones.
"""

import functools
import os

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from model import Transformer, attention

RECORDED = ("cuda",)  # devices that record a decoding step and repeat it; (): none


def completion_mask(prompt_lengths: Tensor, lengths: Tensor, width: int) -> Tensor:
    """True where prompt_length <= position < length. (B,), (B,) -> (B, width) bool.

    lengths count prompt and completion. The mask comes from positions, never from token ids: a
    pad id may equal the end-of-text id, and the sampled end-of-text must stay in.
    """
    at = torch.arange(width, device=lengths.device)
    return (at >= prompt_lengths[:, None]) & (at < lengths[:, None])


class Level:
    """R rows of up to C tokens, each continuing a row of its parent; padded on the right."""

    def __init__(self, rows: list[list[int]], parent: "Level | None", owner, device):
        self.owner = owner  # (R,): the parent's row that each continues; None: no parent
        lengths = torch.tensor([len(r) for r in rows], dtype=torch.long, device=device)  # (R,)
        C, starts = max([1, *map(len, rows)]), torch.zeros_like(lengths)
        self.mask = completion_mask(starts, lengths, C)  # (R, C) real tokens
        tokens = torch.tensor([t for r in rows for t in r], dtype=torch.long, device=device)
        self.ids = tokens.new_zeros(self.mask.shape).masked_scatter(self.mask, tokens)  # (R, C)
        self.seen = self.mask  # (R, S) real tokens, ancestors' first
        if parent is not None:
            starts = parent.ends[owner]
            self.seen = torch.cat((parent.seen[owner], self.mask), 1)
        self.row, self.column = self.mask.nonzero().unbind(1)  # of each packed token
        self.slots = self.row * C + self.column  # its place in the table
        self.positions = starts[self.row] + self.column
        self.ends = starts + lengths  # position after each row's last token

    @functools.cached_property
    def look(self) -> Tensor | None:
        """(R, 1, C, S): a token looks at its ancestors' real tokens and its own past."""
        if self.owner is None:
            return None  # causal
        R, C = self.ids.shape
        at = torch.arange(C, device=self.ids.device)
        past = (at <= at[:, None]).expand(R, 1, C, C)
        ancestors = self.seen[:, None, None, :-C].expand(R, 1, C, -1)
        return torch.cat((ancestors, past), 3)

    def spread(self, x: Tensor) -> Tensor:
        """Packed (n, heads, E) -> padded (R, heads, C, E)."""
        (R, C), (_, heads, E) = self.ids.shape, x.shape
        table = x.new_zeros(R * C, heads * E).index_copy(0, self.slots, x.flatten(1))
        return table.view(R, C, heads, E).transpose(1, 2)


class Batch:
    """P prompts with B completions as N packed tokens, in three levels.

    First what all prompts start with (the system turn), run once; then the rest of each prompt;
    then the completions, each continuing its prompt. Prompts 1 2 3 and 1 2 4 5, completions 6 7,
    8 and 9:

        Batch([[1, 2, 3], [1, 2, 4, 5]], [[[6, 7], [8]], [[9]]])
        packed index   0 1 | 2 3 4 | 5 6 7 8
        ids            1 2 | 3 4 5 | 6 7 8 9
        positions      0 1 | 2 2 3 | 3 4 3 4
        before                       2 5 2 4      index of the token whose output predicts this one
        owner                        0   0 1      each completion's prompt
    """

    def __init__(self, prompts, completions, device="cpu", shared: int | None = None):
        """completions[p]: the token lists that answer prompts[p]. shared: length of the start."""
        if shared is None:
            if not all(prompts) or not prompts:
                raise ValueError("every prompt needs at least one token")
            common = len(os.path.commonprefix(prompts))  # works on any sequences
            shared = min(common, min(map(len, prompts)) - 1)  # each keeps a token
        self.source, self.shared = (prompts, completions), shared
        self.cache = None  # or a list: collects the prompts' keys and values, (P, K, S, E) each
        owner = [p for p, group in enumerate(completions) for _ in group]
        self.owner = torch.tensor(owner, dtype=torch.long, device=device)  # (B,)
        first = torch.zeros(len(prompts), dtype=torch.long, device=device)
        start = Level([prompts[0][:shared]], None, None, device)
        middle = Level([p[shared:] for p in prompts], start, first, device)
        end = Level([c for group in completions for c in group], middle, self.owner, device)
        self.levels = start, middle, end
        self.completions, self.mask = end.ids, end.mask  # (B, T); the end-of-text token is real
        self.ids = torch.cat([level.ids[level.mask] for level in self.levels])  # (N,)
        self.positions = torch.cat([level.positions for level in self.levels])  # (N,)
        self.first = len(start.slots) + len(middle.slots)  # index of the first completion token
        self.prompt_last = len(start.slots) + middle.mask.sum(1).cumsum(0) - 1  # (P,) indices
        before = torch.arange(self.first - 1, len(self.ids) - 1, device=device)
        last = self.prompt_last[self.owner][end.row]  # of each completion token's prompt
        self.before = torch.where(end.column == 0, last, before)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Each level looks at its ancestors' keys and its own past."""
        sizes, out, keys, values = [len(level.slots) for level in self.levels], [], None, None
        for level, *parts in zip(self.levels, q.split(sizes), k.split(sizes), v.split(sizes)):
            ql, kl, vl = (level.spread(x) for x in parts)
            if level.owner is not None:  # a CPU sums the gradient of keys[owner] in any order
                kl = torch.cat((keys.index_select(0, level.owner), kl), 2)
                vl = torch.cat((values.index_select(0, level.owner), vl), 2)
            keys, values = kl, vl
            if level is self.levels[1] and self.cache is not None:
                self.cache.append((keys, values))
            if len(level.slots):
                y = attention(ql, keys, values, level.look)  # (R, H, C, E)
                out.append(y.transpose(1, 2).flatten(0, 1)[level.slots])
        return torch.cat(out)

    def select(self, rows: list[int]) -> tuple["Batch", Tensor]:
        """A batch of completions `rows` (ascending) with prompts; its tokens' indices in self."""
        texts, groups = self.source
        owner, answers = self.owner.tolist(), [c for group in groups for c in group]
        prompts = sorted({owner[b] for b in rows})
        kept = [[answers[b] for b in rows if owner[b] == p] for p in prompts]
        part = Batch([texts[p] for p in prompts], kept, self.ids.device, self.shared)
        parts = zip(self.levels, ([0], prompts, rows))
        wanted = [torch.isin(level.row, level.row.new_tensor(which)) for level, which in parts]
        return part, torch.cat(wanted).nonzero()[:, 0]

    def split(self, tokens: int) -> list[list[int]]:
        """The completions in as few consecutive parts of at most `tokens` tokens as possible.

        Each part counts its prompts once, and the common start never. A completion too long for
        `tokens` is a part of its own.
        """
        prompt_lengths, parts, room, last = self.levels[1].mask.sum(1).tolist(), [], 0, None
        for b, (p, length) in enumerate(zip(self.owner.tolist(), self.mask.sum(1).tolist())):
            whole = length + prompt_lengths[p]
            size = length if p == last else whole
            if size > room:
                parts.append([])
                size, room = whole, tokens
            parts[-1].append(b)
            room, last = room - size, p
        return parts


def autocast(device: torch.device, dtype: torch.dtype):
    """Context manager for model calls: bfloat16 products if dtype is bfloat16."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def run_blocks(model, batch, x=None, start=0, stop=None) -> Tensor:
    """Hidden states (N, D) after blocks start .. stop - 1; x: those before, None: embeddings."""
    x = model.embed_tokens(batch.ids) if x is None else x
    rope = model.rope(batch.positions)
    for block in model.layers[start:stop]:
        x = block(x, rope, batch.attend)
    return x


def completion_logps(model: Transformer, x: Tensor, batch: Batch, temperature: float = 1.0):
    """log softmax(logits / temperature)[token] of the completions, from the last block's x (N, D).

    (B, T) float32, zero where batch.mask is False.
    """
    h, targets = model.norm(x.index_select(0, batch.before)), batch.completions[batch.mask]
    logps = kernels.token_logprobs(h, model.head, targets, temperature)
    return logps.new_zeros(batch.mask.shape).masked_scatter(batch.mask, logps)


def token_logps(model: Transformer, batch: Batch, temperature: float = 1.0, frozen: int = 0):
    """completion_logps of a whole pass; the lowest `frozen` blocks keep nothing for a backward."""
    with torch.set_grad_enabled(torch.is_grad_enabled() and frozen == 0):
        x = run_blocks(model, batch, stop=frozen)
    return completion_logps(model, run_blocks(model, batch, x, frozen), batch, temperature)


def choose(logits: Tensor, temperature: float, draws: Tensor) -> Tensor:
    """Token ids (B,) by logits (B, V) and draws (B,) in [0, 1). temperature 0: the best."""
    if temperature == 0:
        return logits.max(-1).indices  # argmax, but faster on a CPU in bfloat16
    cdf = (logits.float() / temperature).softmax(-1).cumsum(-1)
    # a search in the cdf; torch.multinomial draws V exponentials a row
    ids = torch.searchsorted(cdf, draws[:, None] * cdf[:, -1:], right=True)
    return ids.clamp(max=cdf.shape[1] - 1)[:, 0]


def read_prompts(model: Transformer, prompts: list[list[int]], room: int):
    """Runs prompts of up to L tokens once.

    Returns states h (P, D) where the first tokens are chosen; each block's keys and values
    (P, K, L + room, E); seen (P, L), True on real tokens; the new tokens' position (P,).
    """
    batch = Batch(prompts, [[] for _ in prompts], model.device)
    batch.cache = []
    h = run_blocks(model, batch)[batch.prompt_last]
    cache = [[F.pad(z, (0, 0, 0, room)) for z in pair] for pair in batch.cache]
    return h, cache, batch.levels[1].seen, batch.levels[1].ends


def read_tokens(model: Transformer, tokens, rope, place, column, cache, sees, end: int) -> Tensor:
    """States (B, D) of one new token a row, after the last block.

    tokens, place, column (B,): the token's id; prompt * G + sample; where its key is kept in the
    prompt's cache, whose first `end` columns are read. sees (P, G, S): keys that samples look at.
    """
    c, (P, G, _) = model.config, sees.shape
    R, prompt = c.heads // c.kv_heads, place // G
    sees[prompt, place % G, column] = sees.new_ones(())  # True, on the same device
    mask = sees[:, None, :, :end].repeat_interleave(R, 2)  # a key head's query heads are its rows

    def attend(q, k, v):  # K, V: the cache of the block that calls
        K[prompt, :, column], V[prompt, :, column] = k, v
        every = q.new_zeros(P * G, c.heads, c.head_dim).index_copy(0, place, q)
        every = every.view(P, G, c.kv_heads, R, -1).transpose(1, 2).flatten(2, 3)
        y = attention(every, K[:, :, :end], V[:, :, :end], mask)
        return y.view(P, c.kv_heads, G, R, -1).transpose(1, 2).reshape(P * G, c.heads, -1)[place]

    h = model.embed_tokens(tokens)
    for block, (K, V) in zip(model.layers, cache):
        h = block(h, rope, attend)
    return h


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: list[list[int]],
    samples: int = 1,  # of each prompt
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
    eos: tuple[int, ...] = (),  # a row stops after any of these ids, which is kept
    draws: Tensor | None = None,  # (B, max_new_tokens) uniform numbers; None: of `seed`
) -> list[list[int]]:
    """Sampled completions; row p * samples + g is sample g of prompt p.

    Prompts run once, and their samples share a cache: the prompt's keys, then those of the samples'
    first tokens, second tokens, and so on. On a CPU finished rows leave the batch. On a GPU they
    stay: one step is recorded and replayed (a CUDA graph), so tensors keep their places and shapes.
    Each row has draws of its own, so other rows change it only by rounding.
    """
    G, T, B, gpu = samples, max_new_tokens, len(prompts) * samples, model.device.type in RECORDED
    if draws is None:
        draws = torch.rand(B, T, generator=torch.Generator().manual_seed(seed))
    draws = draws.to(model.device)
    h, cache, seen, first = read_prompts(model, prompts, T * G)
    h, L, sees = h.repeat_interleave(G, 0), seen.shape[1], seen[:, None].repeat(1, G, 1)
    sees = F.pad(sees, (0, T * G))  # (P, G, L + T * G): keys that a sample looks at
    table = model.rope(torch.arange(int(first.max()) + T, device=draws.device))
    first, tokens = first.repeat_interleave(G), torch.full_like(draws, -1, dtype=torch.long)
    row = place = torch.arange(B, device=draws.device)  # a row's index in tokens; in the cache
    t, stop = row.new_zeros(1), torch.tensor(list(eos), dtype=torch.long, device=draws.device)

    def step(end):
        rope, column = [x[first[row] + t] for x in table], L + t * G + place % G
        return read_tokens(model, tokens[row, t], rope, place, column, cache, sees, end)

    for n in range(T):
        logits = F.linear(model.norm(h), model.head)
        tokens[row, t.fill_(n)] = choose(logits, temperature, draws[row, n])
        live = ~torch.isin(tokens, stop).any(1)[row]
        asked = not gpu or n % 8 == 7  # a GPU waits for its host when asked for a value
        if n + 1 == T or (asked and not live.any()):
            break
        if not gpu:
            row, place = row[live], place[live]
            kept = (place // G).unique()
            if len(kept) * 8 <= len(sees) * 7:
                place = torch.searchsorted(kept, place // G) * G + place % G
                sees, cache = sees[kept], [[z[kept] for z in pair] for pair in cache]
        if gpu and n == 1:  # step 0 ran as it is, to warm up; a recording computes nothing
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                h = step(L + T * G)
        if gpu and n > 0:
            graph.replay()
        else:
            h = step(L + (T if gpu else n + 1) * G)
    return [r[: 1 + next((i for i, x in enumerate(r) if x in eos), T)] for r in tokens.tolist()]
