"""What did it buy? Phrase-matched refusal rates on held-out prompts, and signs of collapse.

A refusal rate measures phrases (support/judge.py), not safety.
"""

import math
from collections import Counter

import torch
from tqdm import tqdm

from data import CATEGORIES, HELPFUL, SEPARATOR, counts
from model import Transformer
from sample import generate
from support.chat import Chat
from support.judge import gibberish, judge, unread

KINDS = ("harmful", "ordinary", "lookalike")  # look-alikes are harmless, but sound harmful
COLUMNS = ("harmful", "ordinary", "look-alikes", "harmful − look-alikes")  # of tables
SHORT = 10  # words of a prompt that counts as short
BATCH = 320  # rows decoded together, so that all models meet the same shapes


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of a rate, 95% for z 1.96: (low, high); (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    p = hits / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def respond(model: Transformer, chat: Chat, prompts, max_new_tokens: int, desc=None) -> list[dict]:
    """Greedy responses {"response", "tokens", "ended"}, in order. desc: title of a progress bar."""
    ids = [chat.prompt(p) for p in prompts]
    order, out = sorted(range(len(ids)), key=lambda i: len(ids[i])), [None] * len(ids)
    for i in tqdm(range(0, len(order), BATCH), desc=desc, disable=desc is None):
        part = order[i : i + BATCH]
        rows = generate(model, [ids[j] for j in part], 1, max_new_tokens, 0, eos=chat.eos)
        for j, row in zip(part, rows):
            out[j] = {"response": chat.decode(row), "tokens": len(row), "ended": chat.ended(row)}
    return out


def evaluate(model, chat, rows: list[dict], max_new_tokens: int, name: str = "model") -> dict:
    """Answers every prompt greedily and judges it: {"name", "answers", "rates"}."""
    prompts, answers = [r["prompt"] for r in rows], []
    for r, a in zip(rows, respond(model, chat, prompts, max_new_tokens, f"eval {name}")):
        facts = {"prompt": r["prompt"], "kind": r["kind"], "category": r.get("category")}
        text = a["response"]
        seen = {"verdict": judge(text), "gibberish": gibberish(text), "unread": unread(text)}
        answers.append({**facts, **a, **seen})
    return {"name": name, "rates": rates(answers), "answers": answers}


def verdicts(answers: list[dict]) -> dict:
    """{kind: "rrpc..."}: a letter for each prompt's verdict."""
    return {k: "".join(a["verdict"][0] for a in answers if a["kind"] == k) for k in KINDS}


def rates(answers: list[dict]) -> dict:
    """{metric: [hits, n]} per kind and category; the mean length; {script: unread answers}."""

    def judged(verdict, field, value, words=math.inf):
        rows = [a for a in answers if a[field] == value and len(a["prompt"].split()) <= words]
        return [sum(a["verdict"] == verdict for a in rows), len(rows)]

    out = {}
    for kind in KINDS:
        out[kind] = judged("refuses", "kind", kind)
        out[kind + " partly"] = judged("partial", "kind", kind)
        out[kind + " short"] = judged("refuses", "kind", kind, SHORT)
    out |= {name: judged("refuses", "category", name) for name in CATEGORIES}
    out["gibberish"] = [sum(a["gibberish"] for a in answers), len(answers)]
    out["truncated"] = [sum(not a["ended"] for a in answers), len(answers)]
    out["drafted"] = [sum(SEPARATOR in a["response"] for a in answers), len(answers)]
    counted = [a for a in answers if a["verdict"] == "complies" and not a["gibberish"]]
    out["unread"] = dict(Counter(filter(None, (a.get("unread") for a in counted))))
    out["tokens"] = sum(a["tokens"] for a in answers) / max(1, len(answers))
    return out


def auc(positive: list[float], negative: list[float]) -> float:
    """Chance that a positive scores above a negative, ties half; NaN if either is empty."""
    pairs = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    return sum(pairs) / len(pairs) if pairs else math.nan


def reward_report(groups: list[dict], chat: Chat) -> dict:
    """AUC of wanted samples (refusing; of harmless prompts, answering), all prompts together."""
    out = {}
    for kind in ("harmful", "harmless"):
        good, bad = [], []
        for g in (g for g in groups if (g["category"] == HELPFUL) == (kind == "harmless")):
            for ids, r in zip(g["samples"], g["rewards"]):
                refuses = judge(chat.decode(ids)) == "refuses"
                (good if refuses == (kind == "harmful") else bad).append((r, len(ids)))
        by_reward, by_length = (auc([x[i] for x in good], [x[i] for x in bad]) for i in (0, 1))
        out[kind] = {"good": len(good), "bad": len(bad), "auc": by_reward, "auc_length": by_length}
    return out


def sample_facts(chat: Chat, groups) -> torch.Tensor:
    """(P, G, 3) of groups of token lists: whether each refuses, its length, whether it ended."""
    facts = lambda ids: [judge(chat.decode(ids)) == "refuses", len(ids), chat.ended(ids)]
    return torch.tensor([[facts(ids) for ids in group] for group in groups])


def rollout_record(categories: list[str], scores, facts) -> dict:
    """What samples say, as means: over all, and over harmful and harmless prompts.

    scores (P, G + 1): rewards, the demonstration's last. facts (P, G, 4): W, then sample_facts.
    right: a harmful prompt is refused, a harmless one not.
    auc: chance that a right sample has a higher reward than a wrong one of the same prompt.
    best_right: the group's top-reward sample is right. agree: all of a group are, or none is.
    """
    R, (W, refused, length, ended) = scores[:, :-1], facts.unbind(2)
    harmless = torch.tensor([name == HELPFUL for name in categories], device=R.device)  # (P,)
    right = refused.bool() != harmless[:, None]  # (P, G)
    means = {"reward_std": R.std(1, correction=0), "gap_demo_minus_sample": scores[:, -1:] - R}
    means |= {"similarity": W, "length": length, "ended": ended, "right": right}
    means["agree"] = right.all(1) | ~right.any(1)
    better = (R[:, :, None] > R[:, None]) + 0.5 * (R[:, :, None] == R[:, None])  # (P, G, G)
    pairs, best = right[:, :, None] & ~right[:, None], right.gather(1, R.argmax(1, keepdim=True))
    parts = {"refused": refused, "reward": R, "right": right, "best_right": best}
    for kind, mine in (("harmful", ~harmless), ("helpful", harmless)):
        means |= {f"{kind}_{name}": x[mine] for name, x in parts.items()}
        means[f"{kind}_auc"] = better[mine][pairs[mine]]
    return {name: x.float().mean().item() for name, x in means.items() if x.numel()}


def look(roll, held: list[dict], seed: int) -> dict:
    """rollout_record of samples of `held`, prompts that nothing learns from; {} for none.

    roll(part, P, updates, seed): grpo_s.roll_out with its other arguments filled in.
    """
    if not held:
        return {}
    scores, facts, _ = roll(held, len(held), [range(len(held))], seed)
    told = rollout_record([r["category"] for r in held], scores, facts)
    return {f"held_{name}": x for name, x in told.items()}


def cosine(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """Of two gradients, each a list of tensors."""
    dot = lambda a, b: sum((x * y).sum().item() for x, y in zip(a, b))
    return dot(a, b) / math.sqrt(max(dot(a, a) * dot(b, b), 1e-30))


def noise_scale(records: list[dict]) -> tuple[float, float]:
    """(c, n (1 - c) / c) of GRPO-S. c: mean cosine of consecutive updates' gradients.

    n: sequences of an update. With n (1 - c) / c of them, noise equals signal (arXiv 1812.06162).
    Demonstrations that both updates hold would count as signal. Infinite where c is not positive.
    """
    found = [r for r in records if r.get("cosine") is not None]
    c, n = (sum(r[key] for r in found) / max(1, len(found)) for key in ("cosine", "sequences"))
    return c, n * (1 - c) / c if c > 0 else math.inf


def markdown(head: list[str], rows: list[list]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def percent(pair: list[int]) -> str:
    """A rate with its interval, in percent."""
    if pair[1] == 0:
        return "-"
    low, high = wilson(*pair)
    return f"{100 * pair[0] / pair[1]:.0f} [{100 * low:.0f}, {100 * high:.0f}]"


def table(results: list[dict]) -> str:
    """Markdown: refused % with 95% Wilson intervals, one model a row; then per category."""
    shares = ("harmful partly", "gibberish", "truncated", "drafted")
    head = ["refused, % [95% interval]", *COLUMNS, *(f"{name} %" for name in shares), "tokens"]
    rows, notes = [], ""
    for r in results:
        m = r["rates"]
        share = {k: 100 * m[k][0] / max(1, m[k][1]) for k in (*KINDS, *shares)}
        both = m["harmful"][1] and m["lookalike"][1]
        difference = f"{share['harmful'] - share['lookalike']:.1f}" if both else "-"
        cells = [percent(m[k]) for k in KINDS] + [difference]
        rows.append([r["name"], *cells, *(f"{share[k]:.1f}" for k in shares), f"{m['tokens']:.0f}"])
        if unread := m.get("unread"):
            scripts = ", ".join(f"{script} {n}" for script, n in unread.items())
            notes += f"\n\n{r['name']}, not read and counted as complies, by script: {scripts}"
    text = markdown(head, rows) + notes
    asked = lambda name: any(r["rates"].get(name, [0, 0])[1] for r in results)
    if short := [f"{k} short" for k in KINDS if asked(f"{k} short")]:
        rows = [[r["name"], *(percent(r["rates"][k]) for k in short)] for r in results]
        text += "\n\n" + markdown([f"refused, prompts of {SHORT} words or fewer, %", *short], rows)
    if any(map(asked, CATEGORIES)):
        rows = [[r["name"], *(percent(r["rates"][c]) for c in CATEGORIES)] for r in results]
        text += "\n\n" + markdown(["refused, harmful, %", *CATEGORIES], rows)
    return text


def balance_report(rows: list[dict]) -> dict:
    """Counts, imbalance (largest : smallest category), normalised entropy (1: perfectly even)."""
    n = counts(rows).values()
    imbalance = max(n) / min(n) if min(n) else math.inf
    shares = [c / sum(n) for c in n if c]
    entropy = -sum(p * math.log(p) for p in shares) / math.log(len(n))
    return {"counts": counts(rows), "imbalance": imbalance, "entropy": entropy}


def balance_table(report: dict) -> str:
    """Markdown: demonstrations per category, imbalance and entropy, before and after."""
    head = ["demonstrations", *CATEGORIES, "all", "largest : smallest", "entropy"]
    rows = []
    for when, r in (("before", report["before"]), ("after", report["after"])):
        n = r["counts"].values()
        rows.append([when, *n, sum(n), f"{r['imbalance']:.2f}", f"{r['entropy']:.3f}"])
    return markdown(head, rows)


def samples_side_by_side(results: list[dict], per_kind: int = 4) -> str:
    """Markdown: some prompts, chosen by position and not by outcome, with every model's answer."""
    text = ""
    for kind in KINDS:
        found = [row for row in zip(*(r["answers"] for r in results)) if row[0]["kind"] == kind]
        for row in found[:: max(1, len(found) // per_kind)][:per_kind]:
            text += f"\n**{kind}: {row[0]['prompt']}**\n\n"
            for r, a in zip(results, row):
                said = a["response"].replace("\n", " / ")
                text += f"- {r['name']} ({a['verdict']}): {said}\n"
    return text
