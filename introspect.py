"""Demonstrations that a model makes: it introspects on a harmful prompt and drafts a refusal.

The template asks for Chain of Draft (arXiv 2502.18600): a few steps of at most five words, then
`####` and the answer. What passes the filters of `fault` is kept. These see form, phrases and
shared words, not meaning: read data/generated.jsonl before training on it.
"""

import random
import re

from torch import Tensor

from data import CATEGORIES, SEPARATOR, format_draft, k_center, normalise, parse_draft
from sample import generate
from support.judge import judge, without_thought

# What a careful reader would ask before answering, for each category.
QUESTIONS = {
    "insult": "Whom would this humiliate, and how would it feel to read it?",
    "unfairness": "Who would be judged or shut out for what they are, and not for what they did?",
    "crime": "Which law would this break, and who would pay for it?",
    "physical_harm": "Whose body could be hurt, and how badly?",
    "mental_health": "Whose mind would suffer, and what would help instead?",
    "privacy": "Whose data, home or belongings are these, and did they agree?",
    "ethics": "Whose trust would be abused, and would it stand being known?",
}
TASK = (
    "Think first, but keep only a draft of it: two to four steps, one a line, five words at most "
    "in each: what is asked, why it harms, what to do. "
    f"Then write {SEPARATOR} and, in one or two sentences of 45 words in all, first refuse and say "
    "why, then offer something better."
)
SHOWN = 3  # demonstrations shown to the model before the prompt
SAME = 0.9  # cosine from which two prompts count as one
ASKED = 10  # prompts tried at most for each demonstration that a category lacks
TRIES = 3  # attempts at each prompt
COPY = 0.6  # share of words in common from which two answers count as one
MAX_STEPS, MAX_WORDS, MAX_ANSWER = 4, 5, 45
REFUSE = r"\b(?:refus|declin|say(?:ing)? no\b|won['’]t\b|will not\b"
REFUSE += r"|can['’]?t\b|cannot\b|not help)"
FILTERS = ("form", "length", "draft", "compliance", "copy")


def introspection(prompt: str, category: str, shown: list[dict]) -> str:
    """The user turn that asks for one demonstration. shown: some of the category."""
    about = f"The request below is about {CATEGORIES[category]} and must be refused."
    head = " ".join([about, QUESTIONS[category], TASK])
    seen = [f"Request: {r['prompt']}\n{format_draft(r['draft'], r['answer'])}" for r in shown]
    return "\n\n".join([head, *seen, f"Request: {prompt}"])


def fault(text: str, others=()) -> str | None:
    """Which of FILTERS turns a demonstration down; None if it is good.

    draft: its last step doesn't say to refuse; compliance: its answer doesn't, or too late.
    """
    try:
        steps, answer = parse_draft(text.strip())
    except ValueError:
        return "form"
    sentences, words = re.split(r"(?<=[.!?])\s+", answer.strip()), set(normalise(answer).split())
    if not 2 <= len(steps) <= MAX_STEPS or any(len(s.split()) > MAX_WORDS for s in steps):
        return "length"
    if len(answer.split()) > MAX_ANSWER or len(sentences) > 2 or "\n" in answer.strip():
        return "length"
    if not re.search(REFUSE, steps[-1].lower()):
        return "draft"
    if judge(sentences[0]) != "refuses" or judge(answer) != "refuses":
        return "compliance"
    for other in (set(normalise(o).split()) for o in others):
        if len(words & other) >= COPY * len(words | other):
            return "copy"
    return None


def grow(model, chat, prompts, category, wanted, known, seed, max_new_tokens, batch=32):
    """At least `wanted` new demonstrations of a category for `prompts`, in order, if it can.

    known: its demonstrations. Returns the new ones and counts of asked, kept and each of FILTERS.
    """
    made, counts = [], dict.fromkeys(("asked", "kept", *FILTERS), 0)
    shown = min(SHOWN, len(known))
    for _ in range(TRIES):
        left = [p for p in prompts if p not in {r["prompt"] for r in made}]
        for i in range(0, len(left), batch):
            if len(made) >= wanted:
                return made, counts
            part, seed = left[i : i + batch], seed + 1
            rng = random.Random(seed)
            turns = [introspection(p, category, rng.sample(known, shown)) for p in part]
            chat.check([{"prompt": turn} for turn in turns], max_new_tokens, "--generate true")
            ids = [chat.prompt(turn) for turn in turns]
            drawn = generate(model, ids, 1, max_new_tokens, 0.7, seed=seed, eos=chat.eos)
            for prompt, sample in zip(part, drawn):
                text = without_thought(chat.decode(sample)).strip()
                why = fault(text, [r["answer"] for r in known + made])
                counts["asked"] += 1
                counts[why or "kept"] += 1
                if not why:
                    steps, answer = parse_draft(text)
                    row = {"prompt": prompt, "category": category, "draft": steps, "answer": answer}
                    made.append({**row, "response": text, "generated": True})
    return made, counts


def fill(model, chat, rows, vectors: Tensor, per_category, seed, max_new_tokens=96) -> tuple:
    """Demonstrations for categories with fewer than per_category, the most diverse prompts first.

    rows: the labelled pool, those with a `draft` being demonstrations; vectors (N, D): of their
    prompts. Returns the new rows, each with `source`, the index of its prompt, and by category the
    counts of `grow` and of near-duplicates left out.
    """
    made, report = [], {}
    for category in CATEGORIES:
        have = [i for i, r in enumerate(rows) if r["category"] == category and "draft" in r]
        free = [i for i, r in enumerate(rows) if r["category"] == category and "draft" not in r]
        missing = per_category - len(have)
        if missing <= 0 or not free:
            continue
        chosen = k_center(vectors[free], min(len(free), ASKED * missing), seed, vectors[have])
        chosen = [free[i] for i in chosen]
        around = vectors[have + chosen]
        nearest = (around @ around.T).tril(-1).amax(1)[len(have) :]  # cosine to one before it
        source = {rows[i]["prompt"]: i for i, cos in zip(chosen, nearest) if cos < SAME}
        prompts, known = list(source), [rows[i] for i in have]
        new, counts = grow(model, chat, prompts, category, missing, known, seed, max_new_tokens)
        made += [{**r, "source": source[r["prompt"]]} for r in new]
        report[category] = {**counts, "duplicate": len(chosen) - len(source)}
    return made, report
