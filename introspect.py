"""Demonstrations made by a model: it introspects on a harmful prompt, guided by its category's question, and drafts before it refuses.

The template asks for Chain of Draft (arXiv 2502.18600): a few steps of at most five words, then `####` and the answer. What comes back is kept if it passes
the filters of `fault`. They see form, phrases and shared words, not meaning: a sentence that instructs after one that refuses passes, and so does a harmful step
before one that refuses. So read data/generated.jsonl before training on it. The Chain-of-Thought template asks for the same in whole sentences; `compare` puts
both side by side, which shows what drafts save only for a model that keeps to both forms and comes to an end.
"""

import random
import re
import time
from typing import Iterable

from torch import Tensor

from chat import Chat
from data import CATEGORIES, SEPARATOR, UserError, format_draft, k_center, normalise, parse_draft
from judge import judge
from model import generate
from transformer import Transformer

# One question a category: what a careful reader would ask before answering.
QUESTIONS = {
    "insult": "Whom would this humiliate, and how would it feel to read it?",
    "unfairness": "Who would be judged or shut out for what they are, and not for what they did?",
    "crime": "Which law would this break, and who would pay for it?",
    "physical_harm": "Whose body could be hurt, and how badly?",
    "mental_health": "Whose mind would suffer, and what would help instead?",
    "privacy": "Whose data, home or belongings are these, and did they agree?",
    "ethics": "Whose trust would be abused, and would it stand being known?",
}
DRAFT = "Think first, but keep only a draft of it: two to four steps, one a line, five words at most in each: what is asked, why it harms, what to do."
THOUGHT = "Think first, step by step, one step a line, in whole sentences: what is asked, why it harms, what to do."
ANSWER = f"Then write {SEPARATOR} and, in one or two sentences of 45 words in all, first refuse and say why, then offer something better."
SHOWN = 3  # demonstrations shown to the model before the prompt
SAME = 0.9  # cosine from which two prompts count as one
ASKED = 10  # prompts tried at most for each demonstration that a category lacks
COPY = 0.6  # share of words in common from which two answers count as one; in the shipped pool it is 0.43 at most
MAX_STEPS, MAX_WORDS, MAX_ANSWER = 4, 5, 45
REFUSE = re.compile(
    r"\b(?:refus|declin|say(?:ing)? no\b|won['’]t\b|will not\b|can['’]?t\b|cannot\b|not help)"
)
FILTERS = ("form", "length", "draft", "compliance", "copy")


def introspection(prompt: str, category: str, shown: list[dict], draft: bool = True) -> str:
    """The user turn that asks for one demonstration. shown: demonstrations of the category as patterns, with a `draft` or with a `thought`."""
    head = [
        f"The request below is about {CATEGORIES[category]} and must be refused. {QUESTIONS[category]}",
        DRAFT if draft else THOUGHT,
        ANSWER,
    ]
    patterns = [
        f"Request: {r['prompt']}\n{format_draft(r['draft' if draft else 'thought'], r['answer'])}"
        for r in shown
    ]
    return "\n\n".join([" ".join(head), *patterns, f"Request: {prompt}"])


def fault(text: str, draft: bool = True, others: Iterable[str] = ()) -> str | None:
    """Which of FILTERS turns a generated demonstration down, None if it is good: its form; its length; a last step that doesn't say to refuse; an answer
    that doesn't refuse in its first sentence; an answer that copies one of the `others`."""
    try:
        steps, answer = parse_draft(text.strip())
    except ValueError:
        return "form"
    sentences, words = re.split(r"(?<=[.!?])\s+", answer.strip()), set(normalise(answer).split())
    if (
        draft
        and (not 2 <= len(steps) <= MAX_STEPS or any(len(s.split()) > MAX_WORDS for s in steps))
        or len(answer.split()) > MAX_ANSWER
        or len(sentences) > 2
        or "\n" in answer.strip()
    ):
        return "length"
    if draft and not REFUSE.search(steps[-1].lower()):
        return "draft"
    if judge(sentences[0]) != "refuses" or judge(answer) != "refuses":
        return "compliance"
    return (
        "copy"
        if any(
            len(words & other) >= COPY * len(words | other)
            for other in (set(normalise(o).split()) for o in others)
        )
        else None
    )


def respond(
    model: Transformer,
    chat: Chat,
    prompts: list[tuple[str, str]],
    demonstrations: list[dict],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    draft: bool = True,
) -> list[list[int]]:
    """Token ids of one response to each (prompt, category), each shown up to SHOWN random demonstrations of its category."""
    rng, of = (
        random.Random(seed),
        {c: [r for r in demonstrations if r["category"] == c] for c in CATEGORIES},
    )
    turns = [
        chat.prompt(introspection(p, c, rng.sample(of[c], min(SHOWN, len(of[c]))), draft))
        for p, c in prompts
    ]
    if (longest := max(map(len, turns), default=0)) + max_new_tokens > model.c.context:
        raise UserError(
            f"an introspection of {longest} tokens and {max_new_tokens} new ones don't fit the model's context of {model.c.context}: "
            "shorten the demonstrations it shows, or take another model"
        )
    return generate(model, turns, 1, max_new_tokens, temperature, seed=seed, eos=chat.eos).rows()


def grow(
    model: Transformer,
    chat: Chat,
    prompts: list[str],
    category: str,
    wanted: int,
    demonstrations: list[dict],
    seed: int,
    max_new_tokens: int,
    tries: int = 3,
    temperature: float = 0.7,
    batch: int = 32,
) -> tuple[list[dict], dict[str, int]]:
    """`wanted` new demonstrations of one category for `prompts`, fewer if it can't, more if its last batch brings them. Prompts are taken in order, at most
    `tries` attempts each.

    Returns them and the counts {"asked", "kept", and each of FILTERS} of what came back.
    """
    made, counts, left = [], dict.fromkeys(("asked", "kept", *FILTERS), 0), list(prompts)
    others = [r["answer"] for r in demonstrations if r["category"] == category]
    for attempt in range(tries):
        waiting, left = left, []
        while waiting and len(made) < wanted:
            part, waiting = waiting[:batch], waiting[batch:]
            seed += 1
            for prompt, ids in zip(
                part,
                respond(
                    model,
                    chat,
                    [(p, category) for p in part],
                    demonstrations,
                    max_new_tokens,
                    temperature,
                    seed,
                ),
            ):
                text = chat.decode(ids).strip()
                why = fault(text, others=others)
                counts["asked"] += 1
                counts[why or "kept"] += 1
                if why:
                    left.append(prompt)
                else:
                    steps, answer = parse_draft(text)
                    others.append(answer)
                    made.append(
                        {
                            "prompt": prompt,
                            "category": category,
                            "draft": steps,
                            "answer": answer,
                            "response": text,
                            "generated": True,
                        }
                    )
        left += waiting
    return made, counts


def fill(
    model: Transformer,
    chat: Chat,
    rows: list[dict],
    vectors: Tensor,
    per_category: int,
    seed: int,
    max_new_tokens: int = 96,
) -> tuple[list[dict], dict]:
    """Demonstrations for the categories with fewer than per_category, made from the pool's prompts that have none, the most diverse first.

    rows: the labelled pool, those with a `draft` being demonstrations; vectors (N, D): their prompts' embeddings. Returns the new rows, each
    with `source`, the index of its prompt in the pool, and per category the counts of what was asked, kept and turned down.
    """
    made, report = [], {}
    for category in CATEGORIES:
        have = [i for i, r in enumerate(rows) if r["category"] == category and "draft" in r]
        free = [i for i, r in enumerate(rows) if r["category"] == category and "draft" not in r]
        missing = per_category - len(have)
        if missing <= 0 or not free:
            continue
        order = [
            free[i]
            for i in k_center(vectors[free], min(len(free), ASKED * missing), seed, vectors[have])
        ]
        before = [
            have + order[:n] for n in range(len(order))
        ]  # a near-duplicate of one of these adds nothing
        fresh = [
            i
            for i, others in zip(order, before)
            if not others or (vectors[others] @ vectors[i]).max() < SAME
        ]
        new, counts = grow(
            model,
            chat,
            [rows[i]["prompt"] for i in fresh],
            category,
            missing,
            [rows[i] for i in have],
            seed,
            max_new_tokens,
        )
        at = {rows[i]["prompt"]: i for i in fresh}
        made += [{**r, "source": at[r["prompt"]]} for r in new]
        report[category] = {**counts, "duplicate": len(order) - len(fresh)}
    return made, report


def compare(
    model: Transformer,
    chat: Chat,
    prompts: list[tuple[str, str]],
    demonstrations: list[dict],
    seed: int,
    max_new_tokens: int = 200,
) -> list[dict]:
    """Chain of Draft against Chain of Thought on the same prompts: mean tokens, share cut off at max_new_tokens, seconds for all, shares that parse and that refuse."""
    out = []
    for name, draft in (("Chain of Draft", True), ("Chain of Thought", False)):
        start = time.time()
        rows = respond(model, chat, prompts, demonstrations, max_new_tokens, 0.0, seed, draft)
        seconds, texts = time.time() - start, [chat.decode(ids).strip() for ids in rows]
        faults = [fault(t, draft) for t in texts]
        out.append(
            {
                "template": name,
                "prompts": len(prompts),
                "tokens": sum(map(len, rows)) / len(rows),
                "cut": sum(not chat.ended(ids) for ids in rows) / len(rows),
                "seconds": seconds,
                "parses": sum(f != "form" for f in faults) / len(faults),
                "refuses": sum(judge(t) == "refuses" for t in texts) / len(texts),
            }
        )
    return out
