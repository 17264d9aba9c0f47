"""Exercise 6, against a written list and position by position."""

import pytest
import torch

from exercises.grading import same

MIRRORS, SECTION = ("sample.completion_mask",), "Log-probs"


def test_written_list(my):
    """Prompt 2 and completion 3; prompt 1 and completion 1; no completion; no prompt."""
    got = my.completion_mask(torch.tensor([2, 1, 4, 0]), torch.tensor([5, 2, 4, 2]), 6)
    want = [[0, 0, 1, 1, 1, 0], [0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]]
    same(got, torch.tensor(want, dtype=torch.bool), "the mask")


@pytest.mark.parametrize("B, width, seed", [(1, 1, 0), (3, 7, 1), (7, 7, 2), (5, 12, 3)])
def test_positions(my, B, width, seed):
    g = torch.Generator().manual_seed(seed)
    prompts = torch.randint(0, width + 1, (B,), generator=g)
    lengths = torch.maximum(prompts, torch.randint(0, width + 1, (B,), generator=g))
    want = [[prompts[b].item() <= t < lengths[b].item() for t in range(width)] for b in range(B)]
    same(
        my.completion_mask(prompts, lengths, width),
        torch.tensor(want),
        f"prompts {prompts.tolist()}, lengths {lengths.tolist()}",
    )
