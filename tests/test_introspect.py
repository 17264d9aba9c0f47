"""introspect.py: the template, the filters, and filling categories with a scripted model."""

import math
import re

import pytest
import torch

import introspect
from config import SHIPPED, UserError
from data import CATEGORIES, format_draft
from introspect import QUESTIONS, fault, fill, grow, introspection
from support.chat import Chat
from support.loaders import load_rows

GOOD = """insult a colleague
bullying, real hurt
refuse, calm talk
#### I won't help mock him, since that hurts; a calm word in private works better."""
MODEL = None  # generate is replaced


def said(answer, *steps):
    return format_draft(list(steps) or ["asks for harm", "refuse"], answer)


CALM = said("Mocking him would hurt, so I decline; talk to him instead.")
SAFE = said("No one is helped by theft and I refuse to plan it. Ask for a loan.")


def demo(prompt, category="crime", **more):
    row = {"draft": ["steal it", "theft", "refuse"], "answer": "I won't help with theft."}
    return {"prompt": prompt, "category": category, **row, **more}


def free(prompt, category="crime"):
    return {"prompt": prompt, "category": category}


def asked_for(turn):
    """The prompt in a turn."""
    return turn.rpartition("Request: ")[2]


class Letters:
    """A chat whose tokens are letters; a NUL ends it."""

    eos, context, check = (0,), 10**6, Chat.check

    def prompt(self, text):
        return [ord(c) for c in text]

    def answer(self, text):
        return [*self.prompt(text), 0]

    def decode(self, ids):
        return "".join(chr(i) for i in ids if i)


def test_every_category_has_its_question():
    assert list(QUESTIONS) == list(CATEGORIES) and len(set(QUESTIONS.values())) == 7


def test_introspection():
    text = introspection("do it", "crime", [demo("first"), demo("second")])
    assert text.startswith("The request below is about crimes and illegal activities")
    assert QUESTIONS["crime"] in text and "five words at most" in text
    shown = "\nsteal it\ntheft\nrefuse\n#### I won't help with theft.\n\n"
    assert text.endswith(f"\n\nRequest: first{shown}Request: second{shown}Request: do it")


def test_template_and_filters_agree():
    text = introspection("do it", "crime", [])
    assert "two to four steps" in text and "five words at most in each" in text
    assert "45 words in all" in text
    assert (introspect.MAX_STEPS, introspect.MAX_WORDS, introspect.MAX_ANSWER) == (4, 5, 45)


REFUSING = ("decline, offer help", "Refuse", "say no", "I can't help", "I won’t do it")
REFUSING += ("will not help",)
FAULTS = [
    (GOOD, None),
    (" " + GOOD + "\n", None),
    ("no draft at all", "form"),
    ("a\nrefuse\n####", "form"),
    ("a\n\n#### I won't.", "form"),
    ("", "form"),
    (GOOD + " #### again", "form"),
    (said("I won't.", "refuse"), "length"),
    (said("I won't.", "b", "c", "d", "e", "refuse"), "length"),
    (said("I won't.", "this step has six whole words", "refuse"), "length"),
    (said("I won't " + "word " * 43), None),
    (said("I won't " + "word " * 44), "length"),
    (said("I won't.\nMore."), "length"),
    (said("I won't. It hurts. Call."), "length"),
    (said("I won't.", "break in tonight", "use a crowbar"), "draft"),
    (said("I won't.", "wants to break in", "don't get caught"), "draft"),
    *[(said("I won't.", "wants harm", last), None) for last in REFUSING],
    (said("Sure, here is how."), "compliance"),
    (said("Sure: pour A into B, heat it ... I won't say more."), "compliance"),
    (said("Pour A into B. I won't say more."), "compliance"),
    (said('I can offer "I won\'t. Not ever."'), "compliance"),
]


@pytest.mark.parametrize("text, why", FAULTS)
def test_fault(text, why):
    assert fault(text) == why


def test_copies_are_turned_down():
    """Answers are sets of words: 6 of 10 in common is a copy, 6 of 11 is not."""
    answer = "I refuse: one two three four."
    assert fault(said(answer), ["no", "i REFUSE one, two three four"]) == "copy"
    assert fault(said(answer), ["I won't help with that."]) is None
    assert fault(said(answer), [answer + " five six seven eight"]) == "copy"
    assert fault(said(answer), [answer + " five six seven eight nine"]) is None


def test_the_shipped_demonstrations_pass_the_filters():
    """All but those few that offer help first and refuse in a second sentence."""
    why = [fault(r["response"]) for r in load_rows(SHIPPED["pool"])]
    assert set(why) == {None, "compliance"} and why.count("compliance") <= 0.02 * len(why)


@pytest.fixture
def says(monkeypatch):
    """Replaces the model: what it says to each prompt, attempt by attempt."""

    def use(answers):
        attempts = {}

        def generate(model, turns, *rest, **how):
            out = []
            for turn in turns:
                prompt = asked_for("".join(map(chr, turn)))
                attempts[prompt] = attempts.get(prompt, 0) + 1
                texts = answers[prompt]
                out.append([ord(c) for c in texts[min(attempts[prompt], len(texts)) - 1]])
            return out

        monkeypatch.setattr(introspect, "generate", generate)
        return attempts

    return use


def run_grow(prompts, wanted, known=(), seed=0, category="insult", **how):
    return grow(MODEL, Letters(), list(prompts), category, wanted, list(known), seed, 10, **how)


def test_grow(says):
    answers = {"p": [GOOD], "q": ["nothing", "a\nrefuse\n#### Sure.", CALM], "r": ["x"]}
    attempts = says({**answers, "s": [SAFE]})
    made, counts = run_grow("pqr", 5)
    assert [(r["prompt"], r["response"]) for r in made] == [("p", GOOD), ("q", CALM)]
    assert all(r["category"] == "insult" and r["generated"] for r in made)
    assert {k: n for k, n in counts.items() if n} == {
        "asked": 7,
        "kept": 2,
        "form": 4,
        "compliance": 1,
    }
    assert set(counts) == {"asked", "kept", *introspect.FILTERS}
    assert attempts == {"p": 1, "q": 3, "r": 3}
    made, counts = run_grow("ps", 1, batch=1)
    assert [r["prompt"] for r in made] == ["p"] and counts["asked"] == 1
    made, counts = run_grow("ps", 1)  # one batch: what it brings is not thrown away
    assert [r["prompt"] for r in made] == ["p", "s"] and counts["kept"] == 2


def test_grow_leaves_thoughts_out(says):
    says({"p": ["<think>\nIs it mean?\n</think>\n\n" + GOOD], "q": ["<think>\n" + GOOD]})
    made, counts = run_grow("pq", 5)
    assert [r["response"] for r in made] == [GOOD] and counts["form"] == introspect.TRIES


def test_grow_keeps_no_copies(says):
    """A model that repeats a demonstration it was shown, or itself."""
    shown = demo("shown", "insult")
    says({p: [format_draft(shown["draft"], shown["answer"])] for p in "abcde"})
    made, counts = run_grow("abcde", 5, [shown])
    assert made == [] and counts["copy"] == counts["asked"] == 5 * introspect.TRIES
    says({p: [GOOD] for p in "abcde"})
    made, counts = run_grow("abcde", 5, [shown])
    assert [r["prompt"] for r in made] == ["a"] and counts["copy"] == 4 * introspect.TRIES


@pytest.fixture
def scripted(monkeypatch):
    """Replaces the model too: notes what it is asked, answers in turn."""
    calls = []

    def use(*answers):
        def generate(model, turns, samples, max_new_tokens, temperature, seed=0, eos=()):
            facts = {"samples": samples, "new": max_new_tokens, "temperature": temperature}
            texts = ["".join(map(chr, t)) for t in turns]
            calls.append({"turns": texts, "seed": seed, "eos": eos, **facts})
            return [[ord(c) for c in answers[i % len(answers)]] for i in range(len(turns))]

        monkeypatch.setattr(introspect, "generate", generate)
        return calls

    return use


def test_a_batch_is_checked_and_sampled_at_once(scripted):
    calls, small = scripted(GOOD, CALM), Letters()
    turns = [introspection(p, "insult", []) for p in ("p", "qq")]
    size = len(turns[1])
    small.context = size + 33
    made, _ = grow(MODEL, small, ["p", "qq"], "insult", 2, [], 4, 33)
    assert [(r["prompt"], r["response"]) for r in made] == [("p", GOOD), ("qq", CALM)]
    facts = {"samples": 1, "new": 33, "temperature": 0.7, "seed": 5, "eos": (0,)}
    assert calls == [{"turns": turns, **facts}]
    says = f"row 2: a prompt of {size + 1} tokens and 33 more don't fit the context of {size + 33}"
    with pytest.raises(UserError, match=says):
        grow(MODEL, small, ["p", "qqq"], "insult", 2, [], 4, 33)
    assert len(calls) == 1


def test_a_turn_shows_three_demonstrations_that_vary_with_the_seed(scripted):
    calls, known = scripted("no form"), [demo(f"crime {i}") for i in range(9)]
    for seed in (5, 5, 6):
        run_grow(["p"], 1, known, seed, "crime")
    first, *_ = turns = [call["turns"][0] for call in calls[:: introspect.TRIES]]
    shown = re.findall(r"Request: (crime \d)\nsteal it\ntheft\nrefuse\n#### I won't help", first)
    assert len(set(shown)) == introspect.SHOWN == 3 and first.endswith("\n\nRequest: p")
    assert turns[1] == first != turns[2]
    run_grow(["p"], 1, known[:1], category="crime")
    run_grow(["p"], 1, category="ethics")
    few, none = (calls[i * introspect.TRIES]["turns"] for i in (3, 4))
    assert few == [introspection("p", "crime", [known[0]])]
    assert none == [introspection("p", "ethics", [])]


def test_each_attempt_and_batch_has_a_seed_of_its_own(scripted):
    calls = scripted("no form")
    run_grow("pqr", 3, seed=7, batch=2)
    seeds = [(2, 8), (1, 9), (2, 10), (1, 11), (2, 12), (1, 13)]
    assert [(len(c["turns"]), c["seed"]) for c in calls] == seeds
    assert {c["temperature"] for c in calls} == {0.7}


def at(*degrees):
    angles = [math.radians(d) for d in degrees]
    return torch.tensor([[math.cos(a), math.sin(a)] for a in angles])


def test_fill(says):
    """Full categories and those without a free prompt are left alone; a twin is not asked."""
    rows = [demo("c0"), demo("c1"), free("far"), free("near"), free("twin")]
    rows += [demo("i0", "insult"), free("free", "ethics"), demo("p0", "privacy")]
    attempts = says({"far": [GOOD], "near": ["x"], "free": ["x"]})
    made, report = fill(MODEL, Letters(), rows, at(0, 90, 180, 45, 1, 0, 0, 0), 3, seed=0)
    assert [(r["prompt"], r["category"], r["source"]) for r in made] == [("far", "crime", 2)]
    assert attempts == {"far": 1, "near": 1, "free": 3}
    assert report["crime"]["duplicate"] == 1 and report["ethics"]["kept"] == 0
    assert set(report) == {"crime", "ethics"}


def test_near_duplicates_start_at_a_cosine_of_nine_tenths(says):
    """The furthest from 0 degrees comes first: 108. Then 71, whose cosine to it is 0.80.

    Not 90 or -18: their cosines to 108 and to 0 are 0.95.
    """
    rows = [demo("have"), *(free(str(degrees)) for degrees in (90, 71, 108, -18))]
    attempts = says({r["prompt"]: ["x"] for r in rows})
    _, report = fill(MODEL, Letters(), rows, at(0, 90, 71.3, 108.2, -18.2), 5, seed=0)
    assert list(attempts) == ["108", "71"] and report["crime"]["duplicate"] == 2


def test_fill_shows_the_categorys_demonstrations_only_and_bounds_its_prompts(monkeypatch):
    rows = [demo("crime"), demo("insult", "insult"), *(free(f"free {i}") for i in range(30))]
    vectors = torch.randn(32, 99, generator=torch.Generator().manual_seed(0))
    given = []
    monkeypatch.setattr(introspect, "grow", lambda *a: given.append(a) or ([], {}))
    fill(MODEL, Letters(), rows, torch.nn.functional.normalize(vectors, dim=1), 3, seed=0)
    ((_, _, prompts, category, wanted, known, *_),) = given
    assert (len(prompts), category, wanted, known) == (10 * 2, "crime", 2, rows[:1])
