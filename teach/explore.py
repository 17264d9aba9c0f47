"""One group from the inside: python -m teach.explore --run R --prompt "..." [--grpo-samples 8]

Shows what a rollout of GRPO-S would compute for one prompt. The running means start from IRL's
samples. A token's log-ratio is log pi - log pi_ref at the sampling temperature, not at 1.
"""

import argparse
import sys

import torch

import drirl
import grpo_s
from encoder import similarities, split_sentences
from kernels import group_advantage
from reward import RewardModels
from sample import Batch, autocast, generate, run_blocks, token_logps
from support.hf import load_rewards
from support.judge import judge


def closest(prompt: str, rows: list[dict], held_out: list[dict], encoder) -> tuple:
    """(category, demonstration, cosine) of the most similar prompt, in its category if known."""
    category = {r["prompt"]: r["category"] for r in held_out + rows}.get(prompt)
    rows = [r for r in rows if r["category"] == category] or rows
    cos = encoder.embed([r["prompt"] for r in rows]) @ encoder.embed([prompt])[0]
    best = rows[int(cos.argmax())]
    return category or best["category"], best, cos.max().item()


def show(run, prompt: str) -> None:
    """Prints the group: the prompt's samples and, last, its demonstration."""
    c, encoder, samples = run.c, run.encoder(), run.c.grpo.samples
    limit, temperature = c.run.max_new_tokens, c.run.temperature
    held_out, (chat,) = run.prompts([run.stage_folder("policy")])
    rows, prompt = run.rows(chat), prompt or held_out[0]["prompt"]
    chat.check([{"prompt": prompt}], limit, "--prompt")
    category, row, cos = closest(prompt, rows, held_out, encoder)
    policy, reference = (run.load(run.stage_folder(name), run.dtype) for name in ("policy", "sft"))
    rewards = load_rewards(RewardModels(reference, c.irl), run.folder / "rewards")

    ids, demonstration = chat.prompt(prompt), row["response"]
    drawn = generate(policy, [ids], samples, limit, temperature, seed=c.run.seed, eos=chat.eos)
    answers = [*drawn, chat.answer(demonstration)]
    texts = [*map(chat.decode, answers[:-1]), demonstration]
    batch = Batch([ids], [answers], run.device)
    with torch.no_grad(), autocast(run.device, run.dtype):
        x = run_blocks(reference, batch, stop=rewards.below)
        R = rewards(x, batch, [category])[None].cpu()  # (1, G + 1)
        by_model = {name: shadow(x, batch).tolist() for name, shadow in rewards.shadows.items()}
        logp, logp_ref = (token_logps(m, batch, temperature) for m in (policy, reference))
    W, gaps = similarities(encoder, [texts[:-1]], [demonstration]).cpu(), R[:, -1:] - R[:, :-1]
    alphas, means = [], grpo_s.start_means(run.history(), encoder)
    for mode in ("data", "model", c.grpo.scaling):
        alphas.append(grpo_s.difficulty(W, gaps, [category], *map(dict, means.values()), mode))
    A = group_advantage(R[:, :-1], alphas[-1], c.grpo.std_eps)  # (1, G)
    whose = "its own" if row["prompt"] == prompt else f"that of {row['prompt']!r}, cosine {cos:.2f}"
    data, model, alpha = (f"{a.mean():.3f}" for a in alphas)
    print(f"prompt: {prompt}\ncategory: {category}; demonstration: {whose}")
    print(f"alphaD {data}, alphaM {model}, alpha ({c.grpo.scaling}) {alpha}; rewards of", end=" ")
    print(f"the samples: mean {R[0, :-1].mean():.2f}, std {R[0, :-1].std(correction=0):.2f}")
    theirs, ratios = split_sentences(demonstration), (logp - logp_ref).tolist()
    for i, text in enumerate(texts):
        name = f"sample {i + 1}" if i < samples else "demonstration"
        similar = f", advantage {A[0, i]:+.2f}, W {W[0, i]:.2f}" if i < samples else ""
        verdict = judge(text) + ("" if chat.ended(answers[i]) else ", cut")
        print(f"\n{name}: reward {R[0, i]:+.2f}{similar}; {verdict}")
        print("    " + text.replace("\n", "\n    "))
        print("  rewards:    " + ", ".join(f"{m} {r[i]:+.2f}" for m, r in by_model.items()))
        own = split_sentences(text) if i < samples and theirs else []
        cosines = (encoder.embed(own) @ encoder.embed(theirs).T).tolist() if own else []
        for sentence, near in zip(own, cosines):
            print(f"  {max(near):.2f}  {sentence}  ~  {theirs[near.index(max(near))]}")
        words = [chat.tokenizer.decode([t], skip_special_tokens=False) for t in answers[i]]
        words = [f"{w.strip() or repr(w)[1:-1]}{r:+.2f}" for w, r in zip(words, ratios[i])]
        print("  log-ratios: " + " ".join(words))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m teach.explore", allow_abbrev=False)
    parser.add_argument("--prompt", default="", help="default: the first held-out prompt")
    given, flags = parser.parse_known_args(argv)  # the other flags are drirl.py's
    return drirl.main(["explore", *flags], {"explore": lambda run: show(run, given.prompt)})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
