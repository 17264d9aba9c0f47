"""Exercise 5: the same tokens as reading everything again, for less work."""

import pytest
import torch

from exercises.grading import same
from model import Transformer
from support.hf import read_config

MIRRORS, SECTION = ("sample.generate",), "The transformer"
V = 53
NUMBERS = {
    "model_type": "qwen3",
    "vocab_size": V,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
}


def network(seed):
    """Three blocks, four query heads on two key heads, every weight random."""
    model = Transformer(read_config(NUMBERS, "the test"))
    g = torch.Generator().manual_seed(seed)
    for name, p in model.requires_grad_(False).named_parameters():
        p.copy_(0.25 * torch.randn(p.shape, generator=g) + ("norm" in name))
    return model


def reread(model, prompt, count, eos):
    """The whole text through the network for every new token."""
    row = []
    while len(row) < count and not (row and row[-1] in eos):
        row.append(model(torch.tensor([prompt + row]))[0, -1].argmax().item())
    return row


def prompts_of(lengths, seed):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(V, (n,), generator=g).tolist() for n in lengths]


@pytest.mark.parametrize(
    "lengths, samples, count, seed",
    [((1,), 1, 9, 0), ((3, 7, 1, 5), 1, 8, 1), ((4, 4), 2, 6, 2), ((9, 2, 6), 1, 12, 3)],
)
def test_same_tokens_less_work(my, lengths, samples, count, seed):
    model, prompts, work = network(seed), prompts_of(lengths, seed), []
    want = [reread(model, p, count, ()) for p in prompts for _ in range(samples)]
    handle = model.layers[0].register_forward_pre_hook(
        lambda block, args: work.append(len(args[0]))
    )
    got = my.generate(model, prompts, samples, max_new_tokens=count, temperature=0)
    handle.remove()
    same(got, want, f"tokens for the prompts {prompts}")
    most = samples * sum(lengths) + len(want) * (count - 1)
    same(
        0 < sum(work) <= most + len(want),
        True,
        f"{sum(work)} tokens went through the first block; prompts and new tokens are {most}",
    )


@pytest.mark.parametrize("seed", (4, 5))
def test_end_of_text(my, seed):
    model, prompts = network(seed), prompts_of((3, 6, 2, 8, 5), seed)
    free = [reread(model, p, 10, ()) for p in prompts]
    first = free[0][2]
    eos = (first, next(row[3] for row in free if first not in row))  # each ends a row
    want = [reread(model, p, 10, eos) for p in prompts]
    assert len({len(row) for row in want}) > 1
    got = my.generate(model, prompts, max_new_tokens=10, temperature=0, eos=eos)
    same(got, want, f"rows that end with {eos}")
