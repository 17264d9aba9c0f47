"""sample.py against transformers, one sequence at a time; batches and choices by hand."""

import math
import random

import pytest
import torch
from test_hf import make, random_ids
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sample
from sample import (
    Batch,
    Level,
    autocast,
    choose,
    completion_logps,
    completion_mask,
    generate,
    run_blocks,
    token_logps,
)
from support.hf import frozen_copy, load_model

LENGTHS = (3, 11, 1, 7, 5, 8, 2, 6, 9, 4, 10, 3, 1, 12, 6, 2, 5, 8, 7, 4)
PROMPTS = [random_ids(n, seed=i).tolist() for i, n in enumerate(LENGTHS)]
SIZES = ((4, 9), (1,), (), (6, 2, 3))
COMPLETIONS = [[random_ids(n, seed=20 + n).tolist() for n in group] for group in SIZES]
ONE, TWO = PROMPTS[1], PROMPTS[5]
MANY = [[i % 50] for i in range(1500)]
STARTS = {  # prompts, and how many tokens they start with in common
    "nothing": (PROMPTS[:4], 0),
    "five": ([ONE[:5] + TWO[:n] for n in (1, 4, 8, 2)], 5),
    "one is the start of others": ([ONE, ONE[:3], ONE[:3], ONE[:3] + TWO], 2),
    "all": ([ONE] * 4, 10),
    "a single token": ([ONE[:1]] * 3 + [ONE[:1] + TWO], 0),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """One model of ours and the transformers model it was loaded from."""
    folder = tmp_path_factory.mktemp("pair")
    theirs = make(folder, "Qwen3", head_dim=14)
    return load_model(folder), theirs


# ---------------------------------------------------------------------------- batches


def test_a_level_is_padded():
    level = Level([[5, 6, 7], [8], []], None, None, "cpu")
    assert level.ids.tolist() == [[5, 6, 7], [8, 0, 0], [0, 0, 0]]
    assert level.mask.sum(1).tolist() == level.ends.tolist() == [3, 1, 0]
    assert level.ids.dtype == level.ends.dtype == torch.long
    for rows in ([[]], []):
        level = Level(rows, None, None, "cpu")
        assert level.ids.shape == level.mask.shape == (len(rows), 1) and not level.mask.any()


def test_completion_mask_is_the_written_list():
    """Rows: prompt 2 + completion 3; prompt 1 + completion 1; no completion; empty prompt."""
    mask = completion_mask(torch.tensor([2, 1, 4, 0]), torch.tensor([5, 2, 4, 2]), 6)
    assert mask.dtype == torch.bool
    rows = ["".join(map(str, row)) for row in mask.int().tolist()]
    assert rows == ["001110", "010000", "000000", "110000"]


def test_the_end_of_text_stays_in_even_if_it_is_the_pad_id():
    eos = 0
    ids, lengths = torch.tensor([[3, 4, 9, eos], [3, 9, eos, 0]]), torch.tensor([4, 3])
    mask = completion_mask(torch.tensor([2, 1]), lengths, 4)
    assert [row[m].tolist() for row, m in zip(ids, mask)] == [[9, eos], [9, eos]]


def test_the_example_in_batch():
    b = Batch([[1, 2, 3], [1, 2, 4, 5]], [[[6, 7], [8]], [[9]]])
    assert b.ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert b.positions.tolist() == [0, 1, 2, 2, 3, 3, 4, 3, 4]
    assert b.before.tolist() == [2, 5, 2, 4] and b.owner.tolist() == [0, 0, 1]


def test_a_prompt_needs_a_token():
    for prompts in ([], [[1], []]):
        with pytest.raises(ValueError, match="every prompt needs at least one token"):
            Batch(prompts, [[] for _ in prompts])


@torch.no_grad()
@pytest.mark.parametrize("temperature", (1.0, 0.7))
@pytest.mark.parametrize("start", STARTS)
def test_token_logps(pair, start, temperature):
    """Every completion token's log-prob is that of its sequence alone. A common start runs once."""
    (ours, theirs), (prompts, shared) = pair, STARTS[start]
    batch, row = Batch(prompts, COMPLETIONS), 0
    assert len(batch.ids) == shared + sum(len(p) - shared for p in prompts) + 25
    got = token_logps(ours, batch, temperature)
    assert got.shape == batch.mask.shape == (6, 9) and got.dtype == torch.float32
    assert (got[~batch.mask] == 0).all()
    for prompt, group in zip(prompts, COMPLETIONS):
        for completion in group:
            n = len(completion)
            assert batch.mask[row].tolist() == [i < n for i in range(9)]
            assert batch.completions[row, :n].tolist() == completion
            logits = theirs(torch.tensor([prompt + completion])).logits[0, -n - 1 : -1]
            logps = (logits / temperature).log_softmax(-1)
            want = logps.gather(1, torch.tensor(completion)[:, None])[:, 0]
            assert (got[row, :n] - want).abs().max() < 1e-4
            row += 1
    assert row == 6


@torch.no_grad()
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("chosen", ([0, 1, 3, 4, 5], [2], [1, 3, 5], [0, 1, 2, 3, 4, 5]))
def test_select_is_the_batch_of_those_completions(pair, start, chosen):
    ours, batch = pair[0], Batch(STARTS[start][0], COMPLETIONS)
    part, places = batch.select(chosen)
    assert torch.equal(batch.ids[places], part.ids)
    flat = [c for group in COMPLETIONS for c in group]
    assert [c[m].tolist() for c, m in zip(part.completions, part.mask)] == [flat[b] for b in chosen]
    assert torch.allclose(run_blocks(ours, batch)[places], run_blocks(ours, part), atol=1e-5)
    logps = token_logps(ours, part)
    assert torch.allclose(token_logps(ours, batch)[chosen, : logps.shape[1]], logps, atol=1e-5)


def test_split_keeps_the_budget():
    """Every completion once and in order; a part ends only where the next one has no room."""
    rng = random.Random(0)
    tokens = lambda most: rng.choices(range(9), k=rng.randint(1, most))
    for _ in range(200):
        prompts = [[1, *tokens(12)] for _ in range(rng.randint(1, 6))]
        groups = [[tokens(20) for _ in range(rng.randint(1, 5))] for _ in prompts]
        batch, budget = Batch(prompts, groups), rng.randint(1, 90)
        size = lambda part: len(batch.select(part)[0].ids) - batch.shared
        parts = batch.split(budget)
        assert [b for part in parts for b in part] == list(range(len(batch.owner))) and all(parts)
        assert all(size(part) <= budget or len(part) == 1 for part in parts)
        assert all(size([*a, b[0]]) > budget for a, b in zip(parts, parts[1:]))
    even = Batch([[1, 2]] * 8, [[[3] * 9] * 4] * 8)  # 8 groups of 37 tokens
    assert [len(p) for p in even.split(140)] == [15, 15, 2]
    assert even.split(10**6) == [list(range(32))]


def test_gradients_are_the_same_bits_every_time(pair):
    """Sixty prompts share a start, and 1,500 answers a prompt: two threads add in one order."""
    threads, model = torch.get_num_threads(), pair[0]
    prompts = [[1] * 20 + [i + 2, 3] for i in range(60)]
    wide, many = (Batch(p, c) for p, c in ((prompts, [[[5] * 9] * 3] * 60), ([[1, 2]], [MANY])))
    g, found = torch.Generator().manual_seed(0), set()
    sizes = *((len(wide.ids), heads, 32) for heads in (4, 2, 2)), (len(many.ids), 48)
    q, k, v, x = leaves = [torch.randn(size, generator=g).requires_grad_() for size in sizes]
    weights = torch.randn(len(wide.ids), 4, 32, generator=g)
    try:
        torch.set_num_threads(2)
        for _ in range(10):
            total = (wide.attend(q, k, v) * weights).sum() + completion_logps(model, x, many).sum()
            grads = torch.autograd.grad(total, leaves)
            found.add(b"".join(grad.numpy().tobytes() for grad in grads))
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1


@pytest.mark.parametrize("frozen", (0, 1, 2, 3))
def test_frozen_blocks_get_no_gradient(pair, frozen):
    ours, batch = pair[0], Batch(PROMPTS[:4], COMPLETIONS)
    ours.zero_grad()
    logps = token_logps(ours, batch, frozen=frozen)
    with torch.no_grad():
        assert torch.allclose(logps, token_logps(ours, batch), atol=1e-6)
    logps.sum().backward()
    for i, block in enumerate(ours.layers):
        for p in block.parameters():
            assert p.grad is None if i < frozen else p.grad.abs().max() > 0
    assert (ours.embed_tokens.weight.grad is None) == (frozen > 0)
    assert ours.head.grad.abs().max() > 0 and ours.norm.weight.grad.abs().max() > 0


def test_autocast(pair):
    """In bfloat16 with frozen blocks, as in training: Qwen3's float32 head norms do no harm."""
    ours, _ = pair
    batch = Batch(PROMPTS[:4], [[p[::-1]] * 2 for p in PROMPTS[:4]])
    want = token_logps(ours, batch)
    with autocast(ours.device, torch.float32):
        assert torch.equal(token_logps(ours, batch), want)
    with autocast(ours.device, torch.bfloat16):
        got = token_logps(ours, batch, frozen=1)
        assert torch.isfinite(got).all() and 0 < (got - want).abs().mean() < 0.1
        got.sum().backward()
        with torch.no_grad():
            torch.testing.assert_close(token_logps(ours, batch, frozen=1), got, atol=0.1, rtol=0.1)


def test_frozen_copy(pair):
    ours, _ = pair
    copy = frozen_copy(ours, torch.bfloat16)
    assert not any(p.requires_grad for p in copy.parameters())
    for mine, theirs in zip(copy.parameters(), ours.parameters()):
        assert torch.equal(mine, theirs.bfloat16()) and mine.data_ptr() != theirs.data_ptr()


# ---------------------------------------------------------------------------- greedy


def their_greedy(theirs, prompt, count):
    ids = torch.tensor([prompt])
    more = {"do_sample": False, "max_new_tokens": count, "pad_token_id": 0}
    out = theirs.generate(ids, attention_mask=torch.ones_like(ids), **more)
    return out[0, len(prompt) :].tolist()


def our_greedy(ours, prompts, count=20, **more):
    return generate(ours, prompts, max_new_tokens=count, temperature=0, **more)


@pytest.fixture(scope="module")
def greedy(pair):
    """20 greedy tokens of every prompt by transformers, one prompt at a time."""
    return [their_greedy(pair[1], p, 20) for p in PROMPTS]


def test_greedy_matches_transformers(pair, greedy):
    ours, _ = pair
    assert len({tuple(g) for g in greedy}) == len(PROMPTS)
    assert our_greedy(ours, PROMPTS) == greedy
    assert [our_greedy(ours, [p])[0] for p in PROMPTS] == greedy
    assert our_greedy(ours, PROMPTS[:3], samples=2) == [g for g in greedy[:3] for _ in "ab"]


@pytest.mark.parametrize("start", STARTS)
def test_greedy_of_prompts_with_a_common_start(pair, start):
    prompts = STARTS[start][0]
    assert our_greedy(pair[0], prompts, 8) == [their_greedy(pair[1], p, 8) for p in prompts]


def cut(row, eos):
    """Up to and with the first end-of-text id."""
    return next((row[: i + 1] for i, t in enumerate(row) if t in eos), row)


def test_rows_end_at_different_times(pair, greedy):
    """Finished rows wait, then leave; the others do not notice.

    A row leaves when it is done; what the others say doesn't change.
    """
    ours, _ = pair
    lengths = lambda eos: {len(cut(g, eos)) for g in greedy}
    for count in (1, 2, 4):
        eos = ()
        for _ in range(count):  # the ids after which lengths differ most
            eos += (max(range(61), key=lambda t: len(lengths((*eos, t)))),)
        want = [cut(g, eos) for g in greedy]
        assert len(lengths(eos)) > 2 + (count > 1) and any(len(w) < 20 for w in want)
        got = generate(ours, PROMPTS, max_new_tokens=20, temperature=0, eos=eos)
        assert got == want == [our_greedy(ours, [p], eos=eos)[0] for p in PROMPTS]


# ---------------------------------------------------------------------------- sampling


def plain(logits, temperature):
    """The distribution to sample from, one row in plain numbers."""
    return (logits.double() / temperature).softmax(-1).tolist()


@pytest.mark.parametrize("temperature", (1.0, 0.5, 0.8, 1.3))
def test_choose_samples_the_distribution(temperature):
    """Counts lie within five standard deviations."""
    n, g = 20000, torch.Generator().manual_seed(2)
    logits = torch.randn(12, generator=g) * 1.5
    ids = choose(logits.expand(n, -1), temperature, torch.rand(n, generator=g))
    counts = torch.bincount(ids, minlength=12).tolist()
    for p, count in zip(plain(logits, temperature), counts):
        assert abs(count - n * p) <= 5 * math.sqrt(n * p * (1 - p))


@torch.no_grad()
@pytest.mark.parametrize("temperature", (0.5, 0.8, 1.0, 1.3))
def test_tokens_are_those_that_the_draws_choose(pair, temperature):
    """In groups, rows ending at their own times: each draw lies in its token's stretch of the cdf.

    The distributions are those of transformers.
    """
    draws = torch.rand(15, 12, generator=torch.Generator().manual_seed(4))
    more = {"samples": 3, "max_new_tokens": 12, "eos": (5, 9, 17, 3, 30)}
    more["temperature"] = temperature
    rows = generate(pair[0], PROMPTS[:5], **more, draws=draws)
    assert len({len(r) for r in rows}) > 2
    for i, row in enumerate(rows):
        prompt = PROMPTS[i // 3]
        logits = pair[1](torch.tensor([prompt + row])).logits[0, len(prompt) - 1 : -1]
        for z, token, u in zip(logits, row, draws[i].tolist()):
            p = plain(z, temperature)
            low = sum(p[:token])
            assert p[token] > 0 and low - 1e-4 < u < low + p[token] + 1e-4
    assert generate(pair[0], PROMPTS[:5], **more, seed=4) == rows
    assert generate(pair[0], PROMPTS[:5], **more, seed=5) != rows


def test_a_row_says_the_same_in_whatever_company(pair):
    """Its uniform numbers are its own, also after other rows have ended and left."""
    draws = torch.rand(10, 12, generator=torch.Generator().manual_seed(1))
    one = lambda prompts, samples, draws: generate(
        pair[0], prompts, samples, 12, 1.3, eos=(5, 9, 17, 3), draws=draws
    )
    rows = one(PROMPTS[:5], 2, draws)
    assert len({len(r) for r in rows}) > 2
    assert rows == [one([PROMPTS[i // 2]], 1, draws[i : i + 1])[0] for i in range(10)]


# ---------------------------------------------------------------------------- a GPU's steps


class Recording(TorchDispatchMode):
    """What a CUDA graph does, on a CPU: notes the operations of a step and repeats them in place.

    A recording computes nothing: its end undoes what was written, and its result is NaN until a
    replay. An operation that a graph can't hold is an error. It can't tell devices apart.
    """

    made = []
    NEVER = ("_local_scalar_dense", "nonzero", "_unique2", "lift_fresh", "_to_copy", "equal")

    def __init__(self):
        super().__init__()
        self.noted, self.before, self.replays = [], [], 0
        self.made.append(self)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.__name__.split(".")[0] not in self.NEVER, func
        written = [bool(a.alias_info and a.alias_info.is_write) for a in func._schema.arguments]
        self.before += [(x, x.clone()) for x, w in zip(args, written) if w]
        out = func(*args, **(kwargs or {}))
        self.noted.append((func, args, kwargs or {}, out))
        return out

    def __exit__(self, *error):
        super().__exit__(*error)
        for x, old in reversed(self.before):
            x.copy_(old)
        self.noted[-1][3].fill_(math.nan)

    def replay(self):
        self.replays += 1
        for func, args, kwargs, out in self.noted:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs))):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():  # no view
                    old.copy_(new)


@torch.no_grad()
def by_whole_sequences(model, prompts, G, T, temperature, eos, draws):
    """Sampling without a cache: each prompt's samples run from their first token every time."""
    rows = []
    for p, prompt in enumerate(prompts):
        ids = torch.tensor([prompt] * G)
        for t in range(T):
            next_ids = choose(model(ids)[:, -1], temperature, draws[p * G :][:G, t])
            ids = torch.cat((ids, next_ids[:, None]), 1)
        rows += [cut(row[len(prompt) :], eos) for row in ids.tolist()]
    return rows


@pytest.mark.parametrize("T", (1, 2, 3, 16, 64))
@pytest.mark.parametrize("P, G", ((1, 1), (6, 1), (5, 3), (2, 8)))
@pytest.mark.parametrize("eos", ((), (5,), (5, 9, 17, 3, 30)))
def test_same_draws_same_tokens(pair, monkeypatch, eos, P, G, T):
    """With the cache, on a CPU and as on a GPU: the tokens that sequences run anew would get."""
    draws = torch.rand(P * G, T, generator=torch.Generator().manual_seed(P + T))
    asked = PROMPTS[:P], G, T, 0.9
    want = by_whole_sequences(pair[0], *asked, eos, draws)
    assert generate(pair[0], *asked, eos=eos, draws=draws) == want
    monkeypatch.setattr(sample, "RECORDED", ("cpu",))
    monkeypatch.setattr(Recording, "made", [])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph)
    assert generate(pair[0], *asked, eos=eos, draws=draws) == want
    eights = math.ceil(max(map(len, want)) / 8)  # it looks whether all have ended every 8 tokens
    replays = [graph.replays for graph in Recording.made]
    assert replays == ([min(T, 8 * eights) - 2] if T > 2 else [])
