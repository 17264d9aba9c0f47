"""Exercise 2, on written lists and on texts put together at random."""

import random

import pytest

from exercises.grading import refuses, same

MIRRORS, SECTION = ("data.parse_draft",), "Demonstrations"


@pytest.mark.parametrize(
    "steps, answer",
    [
        (["a"], "b"),
        (["two words", "b"], "Yes."),
        (["  indented", "trailing  "], "x"),
        (["#", "###"], "## no"),
        (["a"], " b "),
        (["a\u2028b", "c\r"], "x"),
        (["é 中"], "line\n\nend\n"),
    ],
)
def test_well_formed(my, steps, answer):
    same(my.parse_draft("\n".join(steps) + "\n#### " + answer), (steps, answer), "steps and answer")


@pytest.mark.parametrize("seed", range(5))
def test_random(my, seed):
    r = random.Random(seed)
    steps = ["".join(r.choice("ab .") for _ in range(4)) + "x" for _ in range(r.randint(1, 5))]
    answer = "".join(r.choice("yz \n") for _ in range(9)) + "!"
    same(my.parse_draft("\n".join(steps) + "\n#### " + answer), (steps, answer), "steps and answer")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no separator",
        "####",
        "a\n#### b\n#### c",
        "a\n#### b #### c",
        "a #### x\n#### b",
        "a\n#### b\nx####",
        "a\n####b",
        "a\n####",
        "a\n#### ",
        "a\n####  \n",
        "#### b",
        "\n#### b",
        " \n#### b",
        "a\n\n#### b",
        "a\n\nb\n#### c",
        "a #### b",
        "a\n  #### b",
        "a\n##### b",
        "a\n####\nb",
    ],
)
def test_malformed(my, text):
    refuses(my.parse_draft, text)
