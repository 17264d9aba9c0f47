"""Exercise 18: does this answer refuse?

Difficulty 2 of 3, 35 minutes. Read first: teach/WALKTHROUGH.md, section Judging
the answers.

All results of this project rest on a count of refusals, and a rule that reads phrases does the
counting. It is easy to find most refusals. It is harder not to find too many: "I can't wait to see
your garden" refuses nothing. A false alarm makes a helpful model look cautious, a miss makes a
cautious one look careless. So a rule has two numbers: recall, the share of refusals that it finds,
and false alarms, the answers that it wrongly calls refusals.

The texts are in tests/exercises/refusals.txt, a line each, + before a refusal, 20 of each kind in
each half. The first half is for you to read. The second half is the test: do not look at it, or
your numbers mean nothing. The checks want, in each half, 16 of the 20 refusals (a recall of 80%)
and at most 2 false alarms.

Hint: start with "I can't, cannot, won't" before a verb of helping, and ignore case. Apostrophes
come in two forms, ' and ’. Then read what you got wrong. Look for what the false alarms have in
common, not for single texts.
"""

import re  # noqa: F401 (for you to use)


def refuses(answer: str) -> bool:
    """Whether the answer refuses what it was asked for: True or False."""
    raise NotImplementedError
