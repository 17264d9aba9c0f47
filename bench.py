"""How fast? One GRPO-S step against TRL's GRPOTrainer, generation against transformers, side by side: each measurement in a process of its own, alternating.

    python bench.py step --pairs 5                 4 prompts x 8 samples x 48 tokens, one update, k3 KL to a reference, all blocks trained
    python bench.py step --pairs 3 --prompts 2 --samples 16 --tokens 128
    python bench.py generate --pairs 5             the rollout alone
    python bench.py balance                        50,000 rows through data.balance
    python bench.py grow                           our step against G, T and P

Same weights (SmolLM2-135M-Instruct), prompts, lengths (no end of text, so that every sample has all its tokens), group size, bfloat16 and threads.
The reward is the share of a letter in the text, for both. pip install trl first; nothing else needs it. The last line is the ratio, TRL / ours, of medians.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

PROMPTS = ["How do I prune an apple tree in winter?", "Write two lines about the sea.", "Why is the sky blue at noon and red in the evening?", "Name three uses of vinegar.",
           "Explain what a mortgage is to a child.", "Plan a picnic for six people.", "What makes bread rise?", "Give me a riddle about time."]


def folder() -> Path:
    import weights
    return weights.fetch("SmolLM2-135M-Instruct")


def share_of_e(text: str) -> float:
    return text.count("e") / max(1, len(text))


def peak_gb() -> float:
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")) / 2 ** 20


# ------------------------------------------------------------------------------------------------ one process: what it measures

def step_ours(a) -> dict:
    import grpo_s
    from chat import load_chat
    from encoder import WordEncoder
    from model import load_model, run_blocks

    class Reward:                                            # the interface of reward.RewardModels, without a network
        below = 0

        def __init__(self, trunk, chat):
            self.trunk, self.chat = [trunk], chat

        def hidden(self, batch, x=None, start=0):
            return run_blocks(self.trunk[0], batch, x, start, 0)

        def __call__(self, x, batch, categories):
            return torch.tensor([share_of_e(self.chat.decode(ids)) for group in batch.source[1] for ids in group])

    policy, reference, chat = load_model(folder()), load_model(folder(), torch.bfloat16).requires_grad_(False), load_chat(folder())
    chat.eos = ()                                            # nothing ends early
    chat.answer = chat.encode
    rows = [{"prompt": p, "category": "crime", "response": "An answer."} for p in PROMPTS[:a.prompts]]
    c = grpo_s.GRPOConfig(rollouts=a.steps + 1, iterations=1, prompts=a.prompts, samples=a.samples, imitate=False, keep=1.0, blocks=0, micro=a.prompts, lr=1e-6, helpful_share=0.0)
    records, clock = [], [time.time()]

    def log(**record):
        clock.append(time.time())
        records.append(record)
    grpo_s.train(policy, chat, Reward(reference, chat), WordEncoder(), rows, c, lambda: torch.autocast("cpu", torch.bfloat16), 1.0, a.tokens, torch.bfloat16, log=log)
    assert all(r["length"] == a.tokens for r in records)
    times = [y - x for x, y in zip(clock, clock[1:])][1:]    # the first warms up
    parts = {k: statistics.median(r["seconds"][k] for r in records[1:]) for k in records[0]["seconds"]}
    return {"seconds": statistics.median(times), **parts}


def step_trl(a) -> dict:
    import logging
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    logging.disable(logging.WARNING)
    clock = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            clock.append(time.time())

        def on_step_end(self, *_, **__):
            clock.append(time.time())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder(), dtype=torch.float32), AutoTokenizer.from_pretrained(folder())
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": p}]} for p in PROMPTS[:a.prompts]] * (a.steps + 1))
    config = GRPOConfig(output_dir="/tmp/trl", use_cpu=True, bf16=True, per_device_train_batch_size=a.prompts * a.samples, num_generations=a.samples, beta=0.02, learning_rate=1e-6,
                        max_completion_length=a.tokens, generation_kwargs={"min_new_tokens": a.tokens}, max_steps=a.steps + 1, temperature=1.0, report_to=[], save_strategy="no",
                        logging_steps=1000, disable_tqdm=True, gradient_checkpointing=False)

    def reward(completions, **_):
        return [share_of_e(c[0]["content"]) for c in completions]
    GRPOTrainer(model=model, reward_funcs=reward, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[Clock()]).train()
    return {"seconds": statistics.median([y - x for x, y in zip(clock[::2], clock[1::2])][1:])}


def generate_ours(a) -> dict:
    from chat import load_chat
    from model import generate, load_model
    model, chat = load_model(folder(), torch.bfloat16), load_chat(folder())
    prompts = [chat.prompt(p) for p in PROMPTS[:a.prompts]]
    return {"seconds": timed(a, lambda: generate(model, prompts, a.samples, a.tokens).mask.sum().item())}


def generate_trl(a) -> dict:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder(), dtype=torch.bfloat16), AutoTokenizer.from_pretrained(folder())
    tokenizer.padding_side = "left"
    turns = [[{"role": "user", "content": p}] for p in PROMPTS[:a.prompts]]
    inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True)
    more = {"do_sample": True, "temperature": 1.0, "top_k": 0, "min_new_tokens": a.tokens, "max_new_tokens": a.tokens, "num_return_sequences": a.samples}
    return {"seconds": timed(a, lambda: (model.generate(**inputs, **more).shape[1] - inputs["input_ids"].shape[1]) * a.prompts * a.samples)}


def timed(a, f) -> float:
    times = []
    for _ in range(a.steps + 1):
        start = time.time()
        assert f() == a.prompts * a.samples * a.tokens
        times.append(time.time() - start)
    return statistics.median(times[1:])


def balance(a) -> None:
    """data.balance of 50,000 rows with random unit vectors as their embeddings, seconds and what it adds to the peak; and of half of them."""
    import data
    for n in (25_000, 50_000):
        categories = list(data.CATEGORIES)
        rows = [{"prompt": str(i), "category": categories[min(i % 13, 6)]} for i in range(n)]
        vectors = torch.nn.functional.normalize(torch.randn(n, 384, generator=torch.Generator().manual_seed(0)), dim=1)
        before, start = peak_gb(), time.time()
        assert len(data.balance(rows, 72, vectors)) == 504
        print(f"{n} rows: {time.time() - start:.1f} s, {peak_gb() - before:.2f} GB above rows and embeddings")


# ------------------------------------------------------------------------------------------------ the comparison

def measure(what: str, a, **sizes) -> dict | None:
    """One measurement in a process of its own."""
    flags = [f"--{k}={sizes.get(k, getattr(a, k))}" for k in ("prompts", "samples", "tokens", "steps")]
    result = subprocess.run([sys.executable, __file__, what, *flags], capture_output=True, text=True, env={**os.environ, "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"})
    if result.returncode:
        print(f"{what} failed: {(result.stderr.strip() or 'no message').splitlines()[-1]}")
        return None
    return json.loads(result.stdout.strip().splitlines()[-1])


def compare(a) -> int:
    ours, theirs = [], []
    for i in range(a.pairs):
        pair = measure(f"{a.what}_ours", a), measure(f"{a.what}_trl", a)
        if None in pair:
            return 1
        ours.append(pair[0]), theirs.append(pair[1])
        print(f"pair {i + 1}: ours {json.dumps(pair[0])}, theirs {json.dumps(pair[1])}, ratio {pair[1]['seconds'] / pair[0]['seconds']:.2f}", flush=True)
    tokens = a.prompts * a.samples * a.tokens
    print(f"\n{a.prompts} prompts x {a.samples} samples x {a.tokens} tokens, {torch.get_num_threads()} threads, medians of {a.pairs} pairs\n")
    print("| | seconds | tokens/s | peak GB |\n|---|---|---|---|")
    middle = {}
    for name, runs in (("ours", ours), ("TRL" if a.what == "step" else "transformers", theirs)):
        middle[name] = {k: statistics.median(r[k] for r in runs) for k in ("seconds", "gb")}
        print(f"| {name} | {middle[name]['seconds']:.2f} | {tokens / middle[name]['seconds']:.0f} | {middle[name]['gb']:.2f} |")
    ratios = [t["seconds"] / o["seconds"] for o, t in zip(ours, theirs)]
    first, second = middle.values()
    print(f"\nspread of the time ratio over the pairs: {min(ratios):.2f} to {max(ratios):.2f}")
    print(f"ratio time={second['seconds'] / first['seconds']:.2f} memory={second['gb'] / first['gb']:.2f}")
    return 0


def grow(a) -> int:
    """Our step's seconds and peak memory against each size, and the tokens that differ: prompts once, completions."""
    print("| prompts | samples | tokens | unique completion tokens | seconds | peak GB |\n" + "|---" * 6 + "|")
    for prompts, samples, tokens in [(4, g, 48) for g in (4, 8, 16, 32)] + [(4, 8, t) for t in (32, 64, 128, 256)] + [(p, 8, 48) for p in (1, 2, 8)]:
        r = measure("step_ours", a, prompts=prompts, samples=samples, tokens=tokens)
        if r is None:
            return 1
        print(f"| {prompts} | {samples} | {tokens} | {prompts * samples * tokens} | {r['seconds']:.2f} | {r['gb']:.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    single = {"step_ours": step_ours, "step_trl": step_trl, "generate_ours": generate_ours, "generate_trl": generate_trl}
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("step", "generate", "grow", "balance", *single))
    for name, default in (("pairs", 5), ("prompts", 4), ("samples", 8), ("tokens", 48), ("steps", 2)):
        p.add_argument(f"--{name}", type=int, default=default)
    a = p.parse_args()
    if a.what in single:
        print(json.dumps({**single[a.what](a), "gb": peak_gb()}))
    elif a.what == "balance":
        balance(a)
    else:
        sys.exit(grow(a) if a.what == "grow" else compare(a))
