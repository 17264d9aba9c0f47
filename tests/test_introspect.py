"""introspect.py: the template, the filters, and filling categories with a model of which we know what it says."""
import pytest
import torch

import introspect
from data import CATEGORIES, format_draft
from introspect import QUESTIONS, compare, fault, fill, grow, introspection

GOOD = "insult a colleague\nbullying, real hurt\nrefuse, calm talk\n#### I won't help mock him, since that hurts; a calm word in private works better."


def demo(prompt, category="crime", **more):
    draft, answer = ["steal it", "theft", "refuse"], "I won't help with theft."
    return {"prompt": prompt, "category": category, "draft": draft, "answer": answer, "response": format_draft(draft, answer), **more}


def test_every_category_has_its_question():
    assert list(QUESTIONS) == list(CATEGORIES) and len(set(QUESTIONS.values())) == 7


def test_introspection():
    text = introspection("do it", "crime", [demo("first"), demo("second")])
    assert text.startswith("The request below is about crimes and illegal activities") and QUESTIONS["crime"] in text and "five words at most" in text
    assert text.endswith("\n\nRequest: do it") and "Request: first\nsteal it\ntheft\nrefuse\n#### I won't help with theft.\n\nRequest: second" in text
    thought = introspection("do it", "crime", [demo("first", thought=["They want it.", "It is not theirs.", "So no."])], draft=False)
    assert "whole sentences" in thought and "Request: first\nThey want it.\nIt is not theirs.\nSo no.\n#### I won't" in thought and "steal it" not in thought


@pytest.mark.parametrize("text, why", [
    (GOOD, None), (" " + GOOD + "\n", None), ("no draft at all", "form"), ("a\nb\n####", "form"), ("a\n\n#### I won't.", "form"), ("", "form"), (GOOD + " #### again", "form"),
    ("one step\n#### I won't.", "length"), ("a\nb\nc\nd\ne\n#### I won't.", "length"), ("this step has six whole words\nb\n#### I won't.", "length"),
    ("a\nb\n#### I won't. " + "word " * 50, "length"), ("a\nb\n#### I won't.\nMore.", "length"), ("a\nb\n#### Sure, here is how.", "compliance")])
def test_fault(text, why):
    assert fault(text) == why


def test_thoughts_may_be_long():
    assert fault("This step is a whole sentence of many words.\nb\n#### I won't.", draft=False) is None and fault("a\n#### I won't.", draft=False) is None


class Letters:
    eos = (0,)

    def prompt(self, text):
        return [ord(c) for c in text]

    def decode(self, ids):
        return "".join(map(chr, ids))


@pytest.fixture
def says(monkeypatch):
    """Replaces the model: what it says to each prompt, attempt by attempt."""
    def use(answers):
        asked = {}

        def respond(model, chat, prompts, *rest):
            out = []
            for prompt, _ in prompts:
                asked[prompt] = asked.get(prompt, 0) + 1
                out.append([ord(c) for c in answers[prompt][min(asked[prompt], len(answers[prompt])) - 1]])
            return out
        monkeypatch.setattr(introspect, "respond", respond)
        return asked
    return use


def test_grow(says):
    asked = says({"p": [GOOD], "q": ["nothing", "a\nb\n#### Sure.", GOOD], "r": ["x"], "s": [GOOD]})
    made, counts = grow(None, Letters(), ["p", "q", "r"], "insult", 5, [], 0, 10, tries=3)
    assert [r["prompt"] for r in made] == ["p", "q"] and all(r["category"] == "insult" and r["response"] == GOOD and r["generated"] for r in made)
    assert counts == {"asked": 7, "kept": 2, "form": 4, "length": 0, "compliance": 1} and asked == {"p": 1, "q": 3, "r": 3}
    made, counts = grow(None, Letters(), ["p", "s"], "insult", 1, [], 0, 10, batch=1)
    assert [r["prompt"] for r in made] == ["p"] and counts["asked"] == 1


def test_fill(says):
    """Categories that are full, or have no free prompt, are left alone; near-duplicates are not asked; the furthest prompt comes first."""
    rows = [demo("c0"), demo("c1"), {"prompt": "far", "category": "crime"}, {"prompt": "near", "category": "crime"}, {"prompt": "twin", "category": "crime"},
            demo("i0", "insult"), {"prompt": "free", "category": "ethics"}, demo("p0", "privacy")]
    at = lambda degrees: [torch.tensor(degrees * torch.pi / 180).cos().item(), torch.tensor(degrees * torch.pi / 180).sin().item()]
    vectors = torch.tensor([at(0.0), at(90.0), at(180.0), at(45.0), at(1.0), at(0.0), at(0.0), at(0.0)])
    asked = says({"far": [GOOD], "near": [GOOD], "free": ["x"]})
    made, report = fill(None, Letters(), rows, vectors, 3, seed=0)
    assert [(r["prompt"], r["category"], r["source"]) for r in made] == [("far", "crime", 2)] and asked == {"far": 1, "near": 1, "free": 3}
    assert report["crime"]["duplicate"] == 1 and report["ethics"]["kept"] == 0 and set(report) == {"crime", "ethics"}


def test_compare(monkeypatch):
    monkeypatch.setattr(introspect, "respond", lambda *a: [[ord(c) for c in (GOOD if a[-1] else t)] for t in ("Long thought.\n#### I won't.", "no form")])
    short, long = compare(None, Letters(), [("p", "crime"), ("q", "insult")], [], 0)
    assert (short["tokens"], short["parses"], short["refuses"]) == (len(GOOD), 1.0, 1.0) and (long["parses"], long["refuses"]) == (0.5, 0.5)
    assert short["template"] == "Chain of Draft" and long["prompts"] == 2
