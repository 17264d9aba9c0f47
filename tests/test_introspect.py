"""introspect.py: the template, the filters, and filling categories with a model of which we know what it says."""

import math
import re
from types import SimpleNamespace

import pytest
import torch

import introspect
import loaders
import settings
from data import CATEGORIES, format_draft
from introspect import QUESTIONS, compare, fault, fill, grow, introspection

GOOD = "insult a colleague\nbullying, real hurt\nrefuse, calm talk\n#### I won't help mock him, since that hurts; a calm word in private works better."


def demo(prompt, category="crime", **more):
    draft, answer = ["steal it", "theft", "refuse"], "I won't help with theft."
    return {
        "prompt": prompt,
        "category": category,
        "draft": draft,
        "answer": answer,
        "response": format_draft(draft, answer),
        **more,
    }


def test_every_category_has_its_question():
    assert list(QUESTIONS) == list(CATEGORIES) and len(set(QUESTIONS.values())) == 7


def test_introspection():
    text = introspection("do it", "crime", [demo("first"), demo("second")])
    assert (
        text.startswith("The request below is about crimes and illegal activities")
        and QUESTIONS["crime"] in text
        and "five words at most" in text
    )
    assert (
        text.endswith("\n\nRequest: do it")
        and "Request: first\nsteal it\ntheft\nrefuse\n#### I won't help with theft.\n\nRequest: second"
        in text
    )
    thought = introspection(
        "do it",
        "crime",
        [demo("first", thought=["They want it.", "It is not theirs.", "So no."])],
        draft=False,
    )
    assert (
        "whole sentences" in thought
        and "Request: first\nThey want it.\nIt is not theirs.\nSo no.\n#### I won't" in thought
        and "steal it" not in thought
    )


def said(answer, *steps):
    return format_draft(list(steps) or ["asks for harm", "refuse"], answer)


@pytest.mark.parametrize(
    "text, why",
    [
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
        *[
            (said("I won't.", "wants harm", last), None)
            for last in (
                "decline, offer help",
                "Refuse",
                "say no",
                "I can't help",
                "I won’t do it",
                "will not help",
            )
        ],
        (said("Sure, here is how."), "compliance"),
        (said("Sure: pour A into B, heat it ... I won't say more."), "compliance"),
        (said("Pour A into B. I won't say more."), "compliance"),
        (said('I can offer "I won\'t. Not ever."'), "compliance"),
    ],
)
def test_fault(text, why):
    assert fault(text) == why


def test_copies_are_turned_down():
    """Answers are sets of words: 6 of 10 in common is a copy, 6 of 11 is not; case and punctuation don't count."""
    answer = "I refuse: one two three four."
    assert (
        fault(said(answer), others=["no", "i REFUSE one, two three four"]) == "copy"
        and fault(said(answer), others=["I won't help with that."]) is None
    )
    assert (
        fault(said(answer), others=[answer + " five six seven eight"]) == "copy"
        and fault(said(answer), others=[answer + " five six seven eight nine"]) is None
    )


def test_the_shipped_demonstrations_pass_the_filters():
    """All but those few that offer help first and refuse in a second sentence."""
    why = [fault(r["response"]) for r in loaders.load_demonstrations(settings.SHIPPED["pool"])]
    assert set(why) == {None, "compliance"} and why.count("compliance") <= 0.02 * len(why)


def test_templates_and_filters_agree():
    text = introspection("do it", "crime", [])
    assert (
        "two to four steps" in text
        and "five words at most in each" in text
        and "45 words in all" in text
    )
    assert (introspect.MAX_STEPS, introspect.MAX_WORDS, introspect.MAX_ANSWER) == (4, 5, 45)


def test_thoughts_may_be_long():
    assert (
        fault("This step is a whole sentence of many words.\nb\n#### I won't.", draft=False) is None
        and fault("a\n#### I won't.", draft=False) is None
    )


class Letters:
    """A chat whose tokens are letters."""

    eos = (0,)

    def ended(self, ids):
        return ids[-1:] == [0]

    def prompt(self, text):
        return [ord(c) for c in text]

    def decode(self, ids):
        return "".join(chr(i) for i in ids if i)


@pytest.fixture
def says(monkeypatch):
    """Replaces the model: what it says to each prompt, attempt by attempt."""

    def use(answers):
        asked = {}

        def respond(model, chat, prompts, *rest):
            out = []
            for prompt, _ in prompts:
                asked[prompt] = asked.get(prompt, 0) + 1
                out.append(
                    [ord(c) for c in answers[prompt][min(asked[prompt], len(answers[prompt])) - 1]]
                )
            return out

        monkeypatch.setattr(introspect, "respond", respond)
        return asked

    return use


CALM, SAFE = (
    said("Mocking him would hurt, so I decline; talk to him instead."),
    said("No one is helped by theft and I refuse to plan it. Ask for a loan."),
)


def test_grow(says):
    asked = says(
        {"p": [GOOD], "q": ["nothing", "a\nrefuse\n#### Sure.", CALM], "r": ["x"], "s": [SAFE]}
    )
    made, counts = grow(MODEL, Letters(), ["p", "q", "r"], "insult", 5, [], 0, 10, tries=3)
    assert [(r["prompt"], r["response"]) for r in made] == [("p", GOOD), ("q", CALM)] and all(
        r["category"] == "insult" and r["generated"] for r in made
    )
    assert counts == {
        "asked": 7,
        "kept": 2,
        "form": 4,
        "length": 0,
        "draft": 0,
        "compliance": 1,
        "copy": 0,
    } and asked == {"p": 1, "q": 3, "r": 3}
    made, counts = grow(MODEL, Letters(), ["p", "s"], "insult", 1, [], 0, 10, batch=1)
    assert [r["prompt"] for r in made] == ["p"] and counts["asked"] == 1
    made, counts = grow(
        MODEL, Letters(), ["p", "s"], "insult", 1, [], 0, 10
    )  # one batch: what it brings is not thrown away
    assert [r["prompt"] for r in made] == ["p", "s"] and counts["kept"] == 2


def test_grow_keeps_no_copies(says):
    """A model that repeats a demonstration it was shown, or itself."""
    shown = demo("shown", "insult")
    says({p: [shown["response"]] for p in "abcde"})
    made, counts = grow(MODEL, Letters(), list("abcde"), "insult", 5, [shown], 0, 10, tries=1)
    assert made == [] and counts["copy"] == 5
    says({p: [GOOD] for p in "abcde"})
    made, counts = grow(MODEL, Letters(), list("abcde"), "insult", 5, [shown], 0, 10, tries=1)
    assert [r["prompt"] for r in made] == ["a"] and counts["copy"] == 4
    made, counts = grow(
        MODEL,
        Letters(),
        ["a"],
        "insult",
        5,
        [{**demo("other", "crime"), "answer": made[0]["answer"]}],
        0,
        10,
    )
    assert len(made) == 1  # of another category: not shown


@pytest.fixture
def scripted(monkeypatch):
    """Replaces generate, one level below respond: it notes what it is asked and says the same to everyone, ended or not."""
    calls = []

    def use(*answers):
        def generate(model, turns, samples, max_new_tokens, temperature, seed=0, eos=()):
            calls.append(
                {
                    "turns": ["".join(map(chr, t)) for t in turns],
                    "samples": samples,
                    "max_new_tokens": max_new_tokens,
                    "temperature": temperature,
                    "seed": seed,
                    "eos": eos,
                }
            )
            return SimpleNamespace(
                rows=lambda: [list(map(ord, answers[i % len(answers)])) for i in range(len(turns))]
            )

        monkeypatch.setattr(introspect, "generate", generate)
        return calls

    return use


MODEL = SimpleNamespace(
    c=SimpleNamespace(context=10**6)
)  # of a model, respond itself looks at its context alone


def test_respond(scripted):
    """Each turn is the template with three demonstrations of the prompt's own category, all different; they vary with the seed, and drafts become thoughts."""
    calls = scripted("yes")
    pool = [demo(f"crime {i}", thought=[f"Thought {i}."]) for i in range(9)] + [
        demo("insult 0", "insult", thought=["Thought."])
    ]
    rows = introspect.respond(
        MODEL, Letters(), [("p", "crime"), ("q", "insult"), ("r", "ethics")], pool, 33, 0.4, 5
    )
    assert rows == [list(map(ord, "yes"))] * 3
    call = calls[0]
    assert {k: call[k] for k in ("samples", "max_new_tokens", "temperature", "seed", "eos")} == {
        "samples": 1,
        "max_new_tokens": 33,
        "temperature": 0.4,
        "seed": 5,
        "eos": (0,),
    }
    first, second, third = call["turns"]
    shown = re.findall(
        r"Request: (.+)\nsteal it\ntheft\nrefuse\n#### I won't help with theft\.\n", first
    )
    assert (
        len(set(shown)) == introspect.SHOWN == 3
        and all(s.startswith("crime") for s in shown)
        and first.endswith("\n\nRequest: p")
    )
    assert second == introspection("q", "insult", [pool[-1]]) and third == introspection(
        "r", "ethics", []
    )
    introspect.respond(MODEL, Letters(), [("p", "crime")], pool, 33, 0.4, 5)
    introspect.respond(MODEL, Letters(), [("p", "crime")], pool, 33, 0.4, 6)
    assert calls[1]["turns"] == [first] != calls[2]["turns"]
    introspect.respond(MODEL, Letters(), [("q", "insult")], pool, 33, 0.4, 5, False)
    assert calls[3]["turns"] == [introspection("q", "insult", [pool[-1]], draft=False)]


def test_each_attempt_and_batch_has_a_seed_of_its_own(scripted):
    calls = scripted("no form")
    grow(MODEL, Letters(), ["p", "q", "r"], "crime", 3, [], 7, 10, tries=3, batch=2)
    assert [(len(c["turns"]), c["seed"]) for c in calls] == [
        (2, 8),
        (1, 9),
        (2, 10),
        (1, 11),
        (2, 12),
        (1, 13),
    ] and {c["temperature"] for c in calls} == {0.7}


def at(degrees):
    return [math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]


def test_fill(says):
    """Categories that are full, or have no free prompt, are left alone; near-duplicates are not asked; the furthest prompt comes first."""
    rows = [
        demo("c0"),
        demo("c1"),
        {"prompt": "far", "category": "crime"},
        {"prompt": "near", "category": "crime"},
        {"prompt": "twin", "category": "crime"},
        demo("i0", "insult"),
        {"prompt": "free", "category": "ethics"},
        demo("p0", "privacy"),
    ]
    vectors = torch.tensor([at(0), at(90), at(180), at(45), at(1), at(0), at(0), at(0)])
    asked = says({"far": [GOOD], "near": ["x"], "free": ["x"]})
    made, report = fill(MODEL, Letters(), rows, vectors, 3, seed=0)
    assert [(r["prompt"], r["category"], r["source"]) for r in made] == [
        ("far", "crime", 2)
    ] and asked == {"far": 1, "near": 1, "free": 3}
    assert (
        report["crime"]["duplicate"] == 1
        and report["ethics"]["kept"] == 0
        and set(report) == {"crime", "ethics"}
    )


def test_near_duplicates_start_at_a_cosine_of_nine_tenths(says):
    """The one furthest from what there is, at 0 degrees, comes first: 108. Then 71, whose cosine to it is 0.80, but neither 90 nor -18: 0.95 to 108 and to 0."""
    rows = [
        demo("have"),
        *({"prompt": str(degrees), "category": "crime"} for degrees in (90, 71, 108, -18)),
    ]
    asked = says({r["prompt"]: ["x"] for r in rows})
    _, report = fill(
        MODEL,
        Letters(),
        rows,
        torch.tensor([at(0), at(90), at(71.3), at(108.2), at(-18.2)]),
        5,
        seed=0,
    )
    assert list(asked) == ["108", "71"] and report["crime"]["duplicate"] == 2


def test_fill_shows_the_categorys_demonstrations_only_and_bounds_its_prompts(monkeypatch):
    rows = [
        demo("crime"),
        demo("insult", "insult"),
        *({"prompt": f"free {i}", "category": "crime"} for i in range(30)),
    ]
    vectors = torch.nn.functional.normalize(
        torch.randn(32, 99, generator=torch.Generator().manual_seed(0)), dim=1
    )
    asked = []
    monkeypatch.setattr(
        introspect,
        "grow",
        lambda model, chat, prompts, category, wanted, demonstrations, *rest: (
            asked.append((prompts, category, wanted, demonstrations)) or ([], {})
        ),
    )
    fill(MODEL, Letters(), rows, vectors, 3, seed=0)
    ((prompts, category, wanted, demonstrations),) = asked
    assert (len(prompts), category, wanted, demonstrations) == (10 * 2, "crime", 2, rows[:1])


def test_compare(scripted):
    """Greedy, under either template; tokens are the mean of the three rows; a row without an end was cut off."""
    calls, long = scripted(GOOD + "\0", "no form", "no form"), demo("d", thought=["They want it."])
    short, thought = compare(
        MODEL, Letters(), [("p", "crime"), ("q", "insult"), ("r", "ethics")], [long], 3
    )
    assert (short["tokens"], short["cut"], short["parses"], short["refuses"]) == (
        (len(GOOD) + 1 + 7 + 7) / 3,
        2 / 3,
        1 / 3,
        1 / 3,
    ) and short["prompts"] == thought["prompts"] == 3
    assert [r["template"] for r in (short, thought)] == ["Chain of Draft", "Chain of Thought"]
    assert [(c["temperature"], c["max_new_tokens"], c["seed"]) for c in calls] == [
        (0.0, 200, 3)
    ] * 2
    assert [c["turns"][0] for c in calls] == [
        introspection("p", "crime", [long]),
        introspection("p", "crime", [long], draft=False),
    ]
