"""Exercise 2: take a Chain of Draft apart.

Difficulty 1 of 3, 20 minutes. Read first: teach/WALKTHROUGH.md, section Demonstrations.

A demonstration thinks in a few terse lines, writes ####, and answers. DR-IRL takes this form from
Chain of Draft (arXiv 2502.18600); the user is shown the answer alone. Whatever reads demonstrations
calls this function, so text that is not of the form must be an error. A parser that guesses would
train the model on broken examples, and nobody would notice.

Hint: cut at the separator first and count the pieces. Leave spaces alone, except for the one after
####: joining the parts must give the text back.
"""

SEPARATOR = "####"


def parse_draft(text: str) -> tuple[list[str], str]:
    """The steps and the answer of a text such as

        first step
        second step
        #### the answer

    that is (["first step", "second step"], "the answer"). There are one or more steps, a line
    each (only a newline ends a line), none blank. Then come ####, at the start of a line and
    nowhere else, a space, and the answer. The answer is all that follows, line ends included, and
    not blank.
    ValueError for any other text.
    """
    raise NotImplementedError
