"""Exercise 18, on the texts of refusals.txt: recall and false alarms, half by half."""

from pathlib import Path

import pytest

from exercises.grading import same

MIRRORS, SECTION = ("teach.exercises.answers.refuses",), "Judging the answers"
BORROWED = tuple(
    f"support.judge.{x}" for x in "judge PHRASES normalised search read_phrases".split()
)
RECALL, ALARMS = 16, 2  # of 20


def half(which):
    """(refusals, other answers) of a half."""
    text = (Path(__file__).parent / "refusals.txt").read_text(encoding="utf-8")
    _, *halves = text.split("half, ")
    lines = [line for line in halves[which].split("\n")]
    return [[line[2:] for line in lines if line.startswith(sign)] for sign in ("+ ", "- ")]


def verdicts(my, texts):
    found = [my.refuses(text) for text in texts]
    same([type(x) for x in found], [bool] * len(texts), "types of what refuses returns")
    return found


def enough(found, alarms, told=""):
    __tracebackhide__ = True
    same(found, max(found, RECALL), f"{told}refusals found, of 20: {RECALL} or more")
    same(alarms, min(alarms, ALARMS), f"{told}false alarms, of 20: {ALARMS} or fewer")


def test_first_half(my):
    refusals, others = half(0)
    missed = [text for text, x in zip(refusals, verdicts(my, refusals)) if not x]
    alarms = [text for text, x in zip(others, verdicts(my, others)) if x]
    found = len(refusals) - len(missed)
    told = "\n".join(["missed:", *missed, "false alarms:", *alarms])
    enough(found, len(alarms), told + "\n")


def test_second_half(my):
    """Only the numbers are told."""
    refusals, others = half(1)
    found, alarms = sum(verdicts(my, refusals)), sum(verdicts(my, others))
    enough(found, alarms)


@pytest.mark.parametrize("sign", (0, 1))
def test_typography(my, sign):
    """The same verdict with the other apostrophe, and in capitals."""
    for text in half(0)[sign]:
        want = my.refuses(text)
        for other in (text.replace("'", "’"), text.replace("’", "'"), text.upper()):
            same(my.refuses(other), want, f"the verdict on {other!r}, as on {text!r}")
