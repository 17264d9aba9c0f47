"""Exercise 13: write text without reading it all again.

A new token's query looks at the keys and values of all tokens before it, and these never change, as no token looks ahead. Keep them, and a new token
costs one token's work; without them, each would run the whole text again. Greedy choice is enough here: temperature 0, so top_k, top_p,
seed and draws are not used. The project's version runs all rows at once and drops finished ones; yours may take one row after the other.

Letters as everywhere: P prompts, G samples per prompt, B = P * G rows of completions, L prompt tokens, T completion tokens, V vocabulary, D width, H query heads,
K key/value heads, E width of one head. Here also N, the tokens a block is given at once, and S, the keys that a query may look at.

What you have: model.embed_tokens(ids), model.rope(positions) of int64 positions, model.layers, each called block(x, rope, attend) with x (N, D), model.norm, and
model.head (V, D), the logits being F.linear(model.norm(x), model.head). A block gives your attend(q, k, v) the new tokens' q (N, H, E), k and v (N, K, E), already
turned, and wants (N, H, E). transformer.attention(q (B, H, T, E), k (B, K, S, E), v, mask (B, 1, T, S)) does the arithmetic.

Hint: run the prompt once and keep every block's k and v; then run one token at a time, at its own position, its k and v joined to what was kept. mask None means
causal, which is right for the prompt; for one query against S keys it would see the first key only: pass a mask of ones.
"""

import torch
from torch import Tensor

from model import Rollout
from transformer import Transformer, attention  # noqa: F401 (for you to use)


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
    """Greedy completions: each token is the argmax of its logits. Rollout(tokens, mask, logps), each (B, max_new_tokens) with B = len(prompts) * samples.

    Row p * samples + g continues prompts[p]. It ends after max_new_tokens tokens or after its first id of `eos`, which is kept. tokens are 0 and mask
    is False behind the end; logps are 0 everywhere. Blocks see each prompt token once per row at most, and each new token once.
    """
    raise NotImplementedError
