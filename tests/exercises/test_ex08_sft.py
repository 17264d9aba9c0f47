"""Exercise 8: the loss by hand; the step against plain passes over whole texts."""

import copy
import math

import pytest
import torch

from exercises.grading import same
from model import Transformer
from sample import Batch
from support.hf import read_config

MIRRORS, SECTION = ("sft.sft_loss", "teach.exercises.answers.sft_step"), "The warm start"
BORROWED = ("sft.train",)
V = 31
NUMBERS = {
    "model_type": "llama",
    "vocab_size": V,
    "hidden_size": 12,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def test_loss_by_hand(my):
    """Means 2 and 3, in rows that begin elsewhere and have a gap. A mean over all is 2.75."""
    logps = torch.tensor([[0.0, -2.0, 0.0, 0.0], [-1.0, 0.0, -2.0, -6.0]], dtype=torch.float64)
    same(my.sft_loss(logps, logps < 0).item(), 2.5, f"the loss of {logps.tolist()}")


@pytest.mark.parametrize("B, T, seed", [(1, 1, 0), (3, 5, 1), (5, 5, 2), (4, 9, 3)])
def test_loss(my, B, T, seed):
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(B, T, generator=g) < 0.5
    mask[torch.arange(B), torch.randint(T, (B,), generator=g)] = True
    logps = -3 * torch.rand(B, T, generator=g, dtype=torch.float64) * mask
    mask[0, 0], logps[0, 0] = True, 0.0  # a sure token's log-prob is 0, and it counts
    means = [sum(row) / n for row, n in zip(logps.tolist(), mask.sum(1).tolist())]
    want = torch.tensor(-sum(means) / B, dtype=torch.float64)
    same(my.sft_loss(logps, mask), want, f"the loss; the responses' means are {means}")


def network(scale):
    model = Transformer(read_config(NUMBERS, "the test")).double()
    g = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        p.data.copy_(scale * torch.randn(p.shape, generator=g) / 2 + scale * ("norm" in name))
    return model


def plain_step(model, prompts, responses, lr):
    """Whole texts one by one, autograd, and a step of SGD written out. Returns the loss."""
    loss = 0.0
    for prompt, response in zip(prompts, responses):
        logps = model(torch.tensor([prompt + response]))[0].log_softmax(-1)
        at = torch.arange(len(prompt) - 1, len(prompt) + len(response) - 1)
        loss = loss - logps[at, torch.tensor(response)].mean() / len(prompts)
    trained = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, trained)
    norm = math.sqrt(sum(g.pow(2).sum().item() for g in grads))
    for p, g in zip(trained, grads):
        p.data -= lr * g / max(1.0, norm)
    return loss.item(), norm


@pytest.mark.parametrize("scale, frozen", [(0.1, 0), (1.0, 0), (1.0, 1)])
def test_steps(my, scale, frozen):
    """Three steps of SGD. Small weights have a gradient shorter than 1, large ones a longer."""
    mine, lengths = network(scale), []
    mine.requires_grad_(not frozen)
    mine.layers[frozen:].requires_grad_(True)
    theirs = copy.deepcopy(mine)
    prompts, responses = [[1, 2, 3], [1, 4], [1, 5, 6, 7]], [[8, 9], [10, 11, 12, 13, 14], [15]]
    batch = Batch(prompts, [[r] for r in responses])
    optimizer = torch.optim.SGD([p for p in mine.parameters() if p.requires_grad], 0.3)
    for step in range(3):
        want, length = plain_step(theirs, prompts, responses, 0.3)
        lengths.append(length)
        same(my.sft_step(mine, batch, optimizer), want, f"the loss before step {step + 1}", 1e-6)
        for (name, p), q in zip(mine.named_parameters(), theirs.parameters()):
            told = f"{name} after step {step + 1}, where the gradient's length is {length}"
            told += "; step 1 was right: is its gradient left over?" if step else ""
            same((p - q).abs().max().item(), 0.0, f"the largest error of the weights {told}", 1e-6)
    assert min(lengths) > 1 if scale == 1 else max(lengths) < 1, lengths


def test_float32(my):
    logps = torch.tensor([[-2.0, 0.0], [-1.0, -2.0]])
    same(my.sft_loss(logps, logps < 0), torch.tensor(1.75), "the loss in float32, means 2 and 1.5")
