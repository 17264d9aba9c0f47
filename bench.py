"""How fast? A GRPO-S step against TRL's GRPOTrainer, generation against transformers: side by side, each measurement in a process of its own.

    python bench.py step --pairs 5                          4 prompts x 8 samples x 48 tokens, one update, k3 KL to a reference, everything trained
    python bench.py step --pairs 3 --prompts 2 --samples 16 --tokens 128
    python bench.py generate --pairs 5                      the rollout alone
    python bench.py grow                                    our step against G, T and P
    python bench.py balance                                 50,000 rows through data.balance

Same weights (SmolLM2-135M-Instruct), prompts, lengths (no end of text: every sample has all its tokens), group size, loss, micro-batches (--accumulate) and threads;
training under bfloat16 autocast over float32 weights, a bfloat16 reference. Rollouts differ: ours come from a bfloat16 copy of the policy, TRL's from the policy under
autocast. The reward is a share of letters, for both; who goes first alternates. `pip install trl==1.16.0` first; nothing else needs it. The last line
is the ratio, theirs / ours, of medians. `--python` names the interpreter of theirs, if TRL lives in another environment.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch

PROMPTS = [
    "How do I prune an apple tree in winter?",
    "Write two lines about the sea.",
    "Why is the sky blue at noon and red in the evening?",
    "Name three uses of vinegar.",
    "Explain what a mortgage is to a child.",
    "Plan a picnic for six people.",
    "What makes bread rise?",
    "Give me a riddle about time.",
]


def folder() -> Path:
    import weights

    return weights.fetch("SmolLM2-135M-Instruct")


def share_of_e(text: str) -> float:
    return text.count("e") / max(1, len(text))


def peak_gb() -> float:
    """Peak memory of this process; VmHWM, as ru_maxrss starts at the parent's."""
    return (
        next(
            int(line.split()[1])
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("VmHWM")
        )
        / 2**20
    )


class Parts(Counter):
    """Seconds by part of a step, added up by functions that are wrapped."""

    def wrap(self, owner, name: str, part: str) -> None:
        def timed(*a, **k):
            start = time.time()
            try:
                return f(*a, **k)
            finally:
                self[part] += time.time() - start

        f = getattr(owner, name)
        setattr(owner, name, timed)


# ------------------------------------------------------------------------------------------------ one process: what it measures


def step_ours(a) -> dict:
    import grpo_s
    from chat import load_chat
    from encoder import WordEncoder
    from loop import Loop
    from model import load_model, run_blocks

    class Reward:  # what train wants of reward.RewardModels, without a network
        below = 0

        def __init__(self, trunk):
            self.trunk = [trunk]

        def hidden(self, batch, x, start):
            return run_blocks(self.trunk[0], batch, x, start, 0)

        def __call__(self, x, batch, categories):
            return torch.tensor(
                [
                    share_of_e(chat.decode(ids[m].tolist()))
                    for ids, m in zip(batch.completions, batch.mask)
                ]
            )

    policy, reference, chat = (
        load_model(folder()),
        load_model(folder(), torch.bfloat16).requires_grad_(False),
        load_chat(folder()),
    )
    chat.eos, chat.answer = (), lambda text: chat.encode(text)  # nothing ends early
    rows = [
        {"prompt": p, "category": "crime", "response": "An answer."} for p in PROMPTS[: a.prompts]
    ]
    c = grpo_s.GRPOConfig(
        rollouts=a.steps + 1,
        iterations=1,
        prompts=a.prompts,
        samples=a.samples,
        imitate=False,
        keep=1.0,
        blocks=0,
        lr=1e-6,
        helpful_share=0.0,
        tokens_per_batch=-(
            -sum(len(chat.prompt(p)) + a.samples * a.tokens for p in PROMPTS[: a.prompts])
            // a.accumulate
        ),
        recompute=a.recompute,
    )
    parts, records = Parts(), [(time.time(), {})]
    for owner, name, part in (
        (grpo_s, "frozen_copy", "rollout"),
        (grpo_s, "generate", "rollout"),
        (grpo_s, "score", "reward"),
        (grpo_s, "similarities", "reward"),
        (grpo_s, "prepare", "reference"),
        (grpo_s, "update", "train"),
        (torch.optim.AdamW, "step", "optimizer"),
    ):
        parts.wrap(owner, name, part)

    def log(length, **_):
        assert length == a.tokens
        records.append((time.time(), dict(parts)))
        parts.clear()

    grpo_s.train(
        policy,
        chat,
        Reward(reference),
        WordEncoder(),
        rows,
        c,
        lambda: torch.autocast("cpu", torch.bfloat16),
        1.0,
        a.tokens,
        torch.bfloat16,
        loop=Loop("grpo", log=log),
    )
    times = [y[0] - x[0] for x, y in zip(records[1:], records[2:])]  # the first step warms up
    parts = {k: statistics.median(r[k] for _, r in records[2:]) for k in records[2][1]}
    return {
        "seconds": statistics.median(times),
        **parts,
        "train": parts["train"] - parts["optimizer"],
    }


def step_theirs(a) -> dict:
    import logging
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    logging.disable(logging.WARNING)
    parts, records = Parts(), []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            parts.clear()
            records.append([time.time()])

        def on_step_end(self, *_, **__):
            records[-1] += time.time(), dict(parts)

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder(), dtype=torch.float32),
        AutoTokenizer.from_pretrained(folder()),
    )
    data = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": p}]} for p in PROMPTS[: a.prompts]] * (a.steps + 1)
    )
    config = GRPOConfig(
        output_dir="/tmp/trl",
        use_cpu=True,
        bf16=True,
        per_device_train_batch_size=a.prompts * a.samples // a.accumulate,
        gradient_accumulation_steps=a.accumulate,
        shuffle_dataset=False,
        loss_type="grpo",
        num_generations=a.samples,
        beta=0.02,
        learning_rate=1e-6,
        max_completion_length=a.tokens,
        generation_kwargs={"min_new_tokens": a.tokens},
        max_steps=a.steps + 1,
        temperature=1.0,
        report_to=[],
        save_strategy="no",
        logging_steps=1000,
        disable_tqdm=True,
        gradient_checkpointing=a.recompute,
    )

    def reward(completions, **_):
        return [share_of_e(c[0]["content"]) for c in completions]

    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    trainer.ref_model.to(torch.bfloat16)
    for name, part in (
        ("_generate", "rollout"),
        ("_calculate_rewards", "reward"),
        ("_generate_and_score_completions", "before"),
        ("training_step", "train"),
    ):
        parts.wrap(trainer, name, part)
    parts.wrap(torch.optim.AdamW, "step", "optimizer")
    trainer.train()
    p = {k: statistics.median(r[2][k] for r in records[1:]) for k in records[1][2]}
    return {
        "seconds": statistics.median(r[1] - r[0] for r in records[1:]),
        "rollout": p["rollout"],
        "reward": p["reward"],
        "reference": p["before"] - p["rollout"] - p["reward"],
        "train": p["train"] - p["before"],
        "optimizer": p["optimizer"],
    }


def generate_ours(a) -> dict:
    from chat import load_chat
    from model import generate, load_model

    model, chat = load_model(folder(), torch.bfloat16), load_chat(folder())
    prompts = [chat.prompt(p) for p in PROMPTS[: a.prompts]]
    return timed(a, lambda: generate(model, prompts, a.samples, a.tokens).mask.sum().item())


def generate_theirs(a) -> dict:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder(), dtype=torch.bfloat16),
        AutoTokenizer.from_pretrained(folder()),
    )
    tokenizer.padding_side = "left"
    turns = [[{"role": "user", "content": p}] for p in PROMPTS[: a.prompts]]
    inputs = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    more = {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "min_new_tokens": a.tokens,
        "max_new_tokens": a.tokens,
        "num_return_sequences": a.samples,
    }
    return timed(
        a,
        lambda: (
            (model.generate(**inputs, **more).shape[1] - inputs["input_ids"].shape[1])
            * a.prompts
            * a.samples
        ),
    )


def timed(a, f) -> dict:
    times = []
    for _ in range(a.steps + 1):
        start = time.time()
        assert f() == a.prompts * a.samples * a.tokens
        times.append(time.time() - start)
    return {"seconds": statistics.median(times[1:])}


def balance(a) -> None:
    import data

    for n in (25_000, 50_000):
        rows = [
            {"prompt": str(i), "category": list(data.CATEGORIES)[min(i % 13, 6)]} for i in range(n)
        ]
        vectors = torch.nn.functional.normalize(
            torch.randn(n, 384, generator=torch.Generator().manual_seed(0)), dim=1
        )
        before, start = peak_gb(), time.time()
        assert len(data.balance(rows, 72, vectors)) == 504
        print(
            f"{n} rows: {time.time() - start:.1f} s; peak memory of the process {peak_gb():.2f} GB, {peak_gb() - before:.2f} GB of it from balancing"
        )


# ------------------------------------------------------------------------------------------------ the comparison

TUNABLES = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592:glibc.malloc.top_pad=268435456"  # train.sh's, for both
SIZES = ("prompts", "samples", "tokens", "steps", "accumulate")
SINGLE = {f.__name__: f for f in (step_ours, step_theirs, generate_ours, generate_theirs)}


def measure(what: str, a, **sizes) -> dict:
    """One measurement in a process of its own."""
    flags = [f"--{k.replace('_', '-')}={sizes.get(k, getattr(a, k))}" for k in SIZES] + [
        "--recompute"
    ] * a.recompute
    python = a.python if what.endswith("theirs") else sys.executable
    environment = {"PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1", "GLIBC_TUNABLES": TUNABLES}
    result = subprocess.run(
        [python, __file__, what, *flags],
        capture_output=True,
        text=True,
        env={**environment, **os.environ},
    )
    if result.returncode:
        sys.exit(f"{what} failed: {(result.stderr.strip() or 'no message').splitlines()[-1]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def compare(a) -> None:
    pairs = []
    for i in range(a.pairs):  # alternating: the machine's moods hit both
        names = ("ours", "theirs") if i % 2 == 0 else ("theirs", "ours")
        pair = {name: measure(f"{a.what}_{name}", a) for name in names}
        pairs.append((pair["ours"], pair["theirs"]))
        print(
            f"pair {i + 1}: seconds {pairs[-1][0]['seconds']:.2f} and {pairs[-1][1]['seconds']:.2f}",
            file=sys.stderr,
            flush=True,
        )
    keys, tokens = pairs[0][0].keys(), a.prompts * a.samples * a.tokens
    print(
        f"{a.prompts} prompts x {a.samples} samples x {a.tokens} tokens, {torch.get_num_threads()} threads, medians of {a.pairs} pairs, {time.strftime('%Y-%m-%d')}\n"
    )
    print("| | " + " | ".join(keys) + " | tokens/s |\n" + "|---" * (len(keys) + 2) + "|")
    middle = [{k: statistics.median(p[side][k] for p in pairs) for k in keys} for side in (0, 1)]
    for name, m in zip(("ours", "TRL" if a.what == "step" else "transformers"), middle):
        print(
            f"| {name} | "
            + " | ".join(f"{m[k]:.2f}" for k in keys)
            + f" | {tokens / m['seconds']:.0f} |"
        )
    ratios = [theirs["seconds"] / ours["seconds"] for ours, theirs in pairs]
    print(
        f"\ntime ratio of the pairs: {min(ratios):.2f} to {max(ratios):.2f}, median {statistics.median(ratios):.2f}"
    )
    print(
        f"ratio time={middle[1]['seconds'] / middle[0]['seconds']:.2f} memory={middle[1]['gb'] / middle[0]['gb']:.2f}"
    )


def grow(a) -> None:
    """Our step's seconds and peak memory against each size; unique tokens: each prompt's once, and the completions'."""
    from chat import load_chat
    from batch import Batch

    chat = load_chat(folder())
    print(
        "| prompts | samples | tokens | G (P + T) tokens | unique tokens | seconds | ms per unique token | peak GB |\n"
        + "|---" * 8
        + "|"
    )
    for P, G, T in (
        [(4, g, 48) for g in (4, 8, 16, 32)]
        + [(4, 8, t) for t in (32, 64, 128, 256)]
        + [(p, 8, 48) for p in (1, 2, 8)]
    ):
        r, ids = (
            measure("step_ours", a, prompts=P, samples=G, tokens=T),
            [chat.prompt(p) for p in PROMPTS[:P]],
        )
        unique = len(Batch(ids, [[] for _ in ids]).ids) + P * G * T
        print(
            f"| {P} | {G} | {T} | {G * sum(len(i) + T for i in ids)} | {unique} | {r['seconds']:.2f} | {1000 * r['seconds'] / unique:.2f} | {r['gb']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "what",
        choices=("step", "generate", "grow", "balance", *SINGLE),
        metavar="step | generate | grow | balance",
    )
    for name, default in zip(("pairs", *SIZES), (5, 4, 8, 48, 2, 1)):
        p.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    p.add_argument("--recompute", action="store_true")
    p.add_argument("--python", default=sys.executable)
    a = p.parse_args()
    if not 0 < a.prompts <= len(PROMPTS):
        p.error(f"--prompts: at most {len(PROMPTS)}")
    if a.what in SINGLE:
        print(json.dumps({**SINGLE[a.what](a), "gb": peak_gb()}))
    else:
        {"balance": balance, "grow": grow}.get(a.what, compare)(a)
