"""Prompts with their completions as one list of tokens without padding: what the transformer's blocks run over."""

import functools
import os

import torch
from torch import Tensor

from data import completion_mask, pad
from transformer import attention


class Level:
    """Token rows that each continue a row of the level before: padded (R, C), with masks."""

    def __init__(self, rows: list[list[int]], parent: "Level | None", owner: Tensor, device):
        self.ids, lengths = pad(rows, device)  # (R, C), (R,)
        self.parent, self.owner = (
            parent,
            owner,
        )  # owner (R,): the row of the level before that each row continues
        R, C = self.ids.shape
        self.mask = completion_mask(
            torch.zeros_like(lengths), lengths, C
        )  # (R, C) True on real tokens
        self.slots = self.mask.flatten().nonzero()[
            :, 0
        ]  # where each packed token stands in the padded table
        at = torch.arange(C, device=device)
        starts = torch.zeros_like(lengths) if parent is None else parent.ends[owner]
        self.ends = starts + lengths  # position after each row's last token
        self.positions = (starts[:, None] + at)[self.mask]
        self.seen = (
            self.mask if parent is None else torch.cat((parent.seen[owner], self.mask), 1)
        )  # (R, S) real tokens, ancestors first

    @functools.cached_property
    def look(self) -> Tensor | None:
        """What each token may look at, (R, 1, C, S): all real tokens of its ancestors, its own past. None: causal, of a level without parent."""
        (R, C), at = self.ids.shape, torch.arange(self.ids.shape[1], device=self.ids.device)
        past = (at <= at[:, None]).expand(R, 1, C, C)
        return (
            None
            if self.parent is None
            else torch.cat(
                (self.parent.seen[self.owner][:, None, None].expand(R, 1, C, -1), past), 3
            )
        )

    def spread(self, x: Tensor) -> Tensor:
        """Packed (n, heads, E) -> padded (R, heads, C, E)."""
        R, C = self.ids.shape
        table = x.new_zeros(R * C, x.shape[1] * x.shape[2]).index_copy(0, self.slots, x.flatten(1))
        return table.view(R, C, x.shape[1], x.shape[2]).transpose(1, 2)


class Batch:
    """P prompts and B completions as N packed tokens, in three levels: what all prompts start with (the system turn), run once;
    the rest of each prompt; the completions, each continuing its prompt. Prompts 1 2 3 and 1 2 4 5, completions 6 7, 8 and 9:

        Batch([[1, 2, 3], [1, 2, 4, 5]], [[[6, 7], [8]], [[9]]])
        packed index   0 1 | 2 3 4 | 5 6 7 8
        ids            1 2 | 3 4 5 | 6 7 8 9
        positions      0 1 | 2 2 3 | 3 4 3 4
        before                       2 5 2 4      packed index of the token before: its output predicts this one
        owner                        0   0 1      of each completion: its prompt
    """

    def __init__(
        self,
        prompts: list[list[int]],
        completions: list[list[list[int]]],
        device="cpu",
        shared: int | None = None,
    ):
        """completions[p] lists the token lists that answer prompts[p]; groups may differ in size. shared: length of the common start, found if None."""
        if shared is None:
            if not all(prompts) or not prompts:
                raise ValueError("every prompt needs at least one token")
            shared = len(
                os.path.commonprefix(prompts)
            )  # works on any sequences, not on paths alone
            shared = max(
                0, min(shared, min(map(len, prompts)) - 1)
            )  # every prompt keeps a token of its own
        self.source, self.shared = (prompts, completions), shared
        self.owner = torch.tensor(
            [p for p, group in enumerate(completions) for _ in group],
            dtype=torch.long,
            device=device,
        )  # (B,)
        start = Level([prompts[0][:shared]], None, None, device)
        middle = Level(
            [p[shared:] for p in prompts],
            start,
            torch.zeros(len(prompts), dtype=torch.long, device=device),
            device,
        )
        end = Level([c for group in completions for c in group], middle, self.owner, device)
        self.levels = start, middle, end
        self.completions, self.mask = (
            end.ids,
            end.mask,
        )  # (B, T); mask True on real tokens, the end-of-text token included
        self.ids = torch.cat([level.ids[level.mask] for level in self.levels])  # (N,)
        self.positions = torch.cat([level.positions for level in self.levels])  # (N,)
        self.first = len(start.slots) + len(
            middle.slots
        )  # packed index of the first completion token
        self.prompt_last = (
            len(start.slots) + middle.mask.sum(1).cumsum(0) - 1
        )  # (P,) packed index of each prompt's last token
        self.before = torch.arange(
            self.first - 1, len(self.ids) - 1, device=device
        )  # the token before each completion token:
        sizes = end.mask.sum(1)
        self.before[(sizes.cumsum(0) - sizes)[sizes > 0]] = self.prompt_last[self.owner][
            sizes > 0
        ]  # for its first, the end of its prompt

    def attend(self, q: Tensor, k: Tensor, v: Tensor, keep=None) -> Tensor:
        """Each level looks at its ancestors' keys and its own past. keep: collects the prompts' keys and values, (P, K, S, E) each."""
        sizes, out, keys, values = [len(level.slots) for level in self.levels], [], None, None
        for level, ql, kl, vl in zip(self.levels, q.split(sizes), k.split(sizes), v.split(sizes)):
            ql, kl, vl = level.spread(ql), level.spread(kl), level.spread(vl)
            if level.parent is not None:
                kl, vl = (
                    torch.cat((keys[level.owner], kl), 2),
                    torch.cat((values[level.owner], vl), 2),
                )
            keys, values = kl, vl
            if level is self.levels[1] and keep is not None:
                keep.append((keys, values))
            if len(level.slots):
                out.append(
                    attention(ql, keys, values, level.look)
                    .transpose(1, 2)
                    .flatten(0, 1)[level.slots]
                )
        return torch.cat(out)

    def select(self, rows: list[int]) -> tuple["Batch", Tensor]:
        """The batch of some completions, in ascending order, with their prompts; where its tokens stand in this one (n,)."""
        texts, groups = self.source
        owner, answers = self.owner.tolist(), [c for group in groups for c in group]
        prompts = sorted({owner[b] for b in rows})
        part = Batch(
            [texts[p] for p in prompts],
            [[answers[b] for b in rows if owner[b] == p] for p in prompts],
            self.ids.device,
            self.shared,
        )
        start, middle, end = self.levels
        wanted = [start.mask[start.mask]]
        for level, which in ((middle, prompts), (end, rows)):
            keep = torch.zeros(len(level.mask), dtype=torch.bool, device=self.ids.device)
            keep[which] = True
            wanted.append(keep[:, None].expand_as(level.mask)[level.mask])
        return part, torch.cat(wanted).nonzero()[:, 0]

    def split(self, rows: list[int], tokens: int) -> list[list[int]]:
        """Some completions (ascending), in order, cut into as few parts as hold at most `tokens` tokens each with their prompts, of about equal length.

        A group that is cut has its prompt in each part; a completion too long for `tokens` is a part of its own. The start common to all prompts is
        not counted, nor is what attention pads: rows as long as the longest, and a prompt's keys once a completion.
        """
        owner, own, prompt = (
            self.owner.tolist(),
            self.mask.sum(1).tolist(),
            self.levels[1].mask.sum(1).tolist(),
        )

        def cut(limit):
            parts, room = [], 0
            for b in rows:
                again = parts and owner[parts[-1][-1]] == owner[b]  # its prompt is there
                size = own[b] + (0 if again else prompt[owner[b]])
                if not parts or size > room:
                    parts.append([])
                    size, room = own[b] + prompt[owner[b]], limit
                parts[-1].append(b)
                room -= size
            return parts

        cuts = [cut(limit) for limit in range(tokens, 0, -max(1, tokens // 16))]
        return [parts for parts in cuts if len(parts) == len(cuts[0])][
            -1
        ]  # the lowest limit that needs no more parts makes them most equal
