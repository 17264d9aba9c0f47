"""How fast? Ours and a peer by turns, each measurement in a process of its own.

    python -m lab.bench step --pairs 5       a GRPO-S step, beside TRL's GRPOTrainer
    python -m lab.bench generate             sampling, beside transformers' generate

`pip install trl==1.16.0` first, and set GLIBC_TUNABLES as train.sh does. A comparison adds a line
to speed.jsonl. --device cuda: on a GPU. --name ours measures ours alone. Both compute in what is
faster here; in a step TRL samples in float32.
"""

import argparse
import statistics
import subprocess
import sys
import time
import timeit
from importlib.metadata import version
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import torch

from config import Config, changed
from data import HELPFUL
from encoder import WordEncoder
from grpo_s import train
from sample import generate
from support.chat import load_chat
from support.files import append
from support.hf import load_model
from support.resume import Loop
from support.run import likes_bfloat16, machine
from support.weights import fetch

PROMPTS = ["How do I prune an apple tree in winter?", "Write two lines about the sea."]
PROMPTS += ["Why is the sky blue at noon and red in the evening?", "Name three uses of vinegar."]
SPEED = Path(__file__).parent / "speed.jsonl"
MODEL = "SmolLM2-135M-Instruct"
FLAGS = dict(pairs=5, steps=2, prompts=4, samples=8, tokens=48, name="", device="cpu")
prompts_of = lambda a: (PROMPTS * a.prompts)[: a.prompts]
fast = lambda a: torch.bfloat16 if likes_bfloat16(a.device) else torch.float32
share_of_e = lambda texts: [text.count("e") / max(1, len(text)) for text in texts]  # the reward


def our_step(a, tick) -> None:
    def reward(x, batch, categories):
        rows = [ids[m].tolist() for ids, m in zip(batch.completions, batch.mask)]
        return torch.tensor(share_of_e([chat.decode(ids) for ids in rows]), device=a.device)

    reward.below, chat = 0, load_chat(fetch(MODEL))
    chat.eos, chat.answer = (), chat.encode  # no answer ends early
    models = [load_model(fetch(MODEL), t, a.device) for t in (torch.float32, fast(a))]
    kinds = ("crime", HELPFUL) * a.prompts
    rows = [{"prompt": p, "category": k, "response": "Yes."} for p, k in zip(prompts_of(a), kinds)]
    settings = {"grpo.rollouts": a.steps + 1, "grpo.prompts": a.prompts, "grpo.samples": a.samples}
    settings |= {"grpo.tokens_per_batch": 10**6, "grpo.beta_kl": 0.02}
    c = changed(Config(), {**settings, "run.max_new_tokens": a.tokens})
    loop = Loop("grpo", log=lambda **_: tick())
    train(*models, reward, chat, WordEncoder(), rows, c, fast(a), loop=loop)


def trl_step(a, tick) -> None:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    reward = lambda completions, **_: share_of_e([c[0]["content"] for c in completions])
    clock, folder = TrainerCallback(), str(fetch(MODEL))
    clock.on_step_end = lambda *_, **__: tick()
    data = [{"prompt": [{"role": "user", "content": p}]} for p in prompts_of(a)]
    settings = dict(num_generations=a.samples, per_device_train_batch_size=a.prompts * a.samples)
    settings |= dict(max_completion_length=a.tokens, max_steps=a.steps + 1, beta=0.02)
    settings |= dict(generation_kwargs={"min_new_tokens": a.tokens}, gradient_checkpointing=False)
    settings |= dict(loss_type="grpo", save_strategy="no", use_cpu=a.device == "cpu")
    settings |= dict(bf16=fast(a) == torch.bfloat16)
    settings = GRPOConfig("/tmp/trl", model_init_kwargs={"dtype": "float32"}, **settings)
    trainer = GRPOTrainer(folder, reward, settings, Dataset.from_list(data), callbacks=[clock])
    trainer.ref_model.to(fast(a))
    trainer.train()


def samples(a, tick) -> None:
    prompts = [load_chat(fetch(MODEL)).prompt(p) for p in prompts_of(a)]
    if a.name == "ours":
        model = load_model(fetch(MODEL), fast(a), a.device)
        draw = lambda: generate(model, prompts, a.samples, a.tokens)
    else:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(fetch(MODEL), dtype=fast(a))
        model.to(a.device)
        width = max(map(len, prompts))  # padded with 0, which no prompt contains
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=a.device)
        sizes = {"min_new_tokens": a.tokens, "max_new_tokens": a.tokens, "do_sample": True}
        sizes |= {"num_return_sequences": a.samples, "attention_mask": (ids > 0).long()}
        draw = lambda: model.generate(ids, top_k=0, **sizes)
    for _ in range(a.steps + 1):
        draw()
        tick()


def measure(a) -> tuple[float, float]:
    """Median seconds of a.steps steps, after one that warms up, and peak memory in GB."""
    step, times, gpu = our_step if a.name == "ours" else trl_step, [], a.device != "cpu"
    work = step if a.what == "step" else samples

    def tick():
        if gpu:
            torch.cuda.synchronize()
        times.append(time.time())

    work(a, tick)
    peak = torch.cuda.max_memory_allocated() or getrusage(RUSAGE_SELF).ru_maxrss * 1024
    return statistics.median(y - x for x, y in zip(times, times[1:])), peak / 2**30


def compare(a) -> None:
    found, peer = {"ours": [], "theirs": []}, "trl" if a.what == "step" else "transformers"
    for name in (("ours", "theirs", "theirs", "ours") * a.pairs)[: 2 * a.pairs]:
        command = [sys.executable, "-m", "lab.bench", *sys.argv[1:], "--name", name]
        seconds, gb = map(float, subprocess.check_output(command, text=True).split()[-2:])
        print(f"{name}: {seconds:.3f} s, {gb:.3f} GB", flush=True)
        found[name].append((seconds, gb))
    ours, theirs = ([statistics.median(x) for x in zip(*runs)] for runs in found.values())
    ratio = {"time": round(theirs[0] / ours[0], 2), "memory": round(theirs[1] / ours[1], 2)}
    facts = {**vars(a), "date": time.strftime("%F"), "machine": machine(torch.device(a.device))}
    x = torch.ones(2048, 2048, dtype=fast(a), device=a.device)  # how fast is this machine?
    products = lambda: [x @ x for _ in range(10)][-1][0, 0].item()
    seconds = min(timeit.repeat(products, number=1, repeat=5)) / 10
    facts |= {"GFLOP/s": round(2 * 2048**3 / seconds / 1e9), "dtype": str(x.dtype)[6:]}
    facts |= {name: version(name) for name in ("torch", peer)}
    append(SPEED, {**facts, "ours, s and GB": ours, "theirs": theirs, **ratio})
    print("ratio time={time} memory={memory}".format(**ratio))


if __name__ == "__main__":
    p = argparse.ArgumentParser(usage=__doc__)
    p.add_argument("what", choices=("step", "generate"))
    for name, default in FLAGS.items():
        p.add_argument("--" + name, type=type(default), default=default)
    a = p.parse_args()
    print(*measure(a)) if a.name else compare(a)
