"""Exercise 9: a reward out of demonstrations alone.

Difficulty 3 of 3, 35 minutes. Read first: teach/WALKTHROUGH.md, section Inverse RL.

Inverse RL asks which reward r makes the demonstrations likely for the best policy. With a KL
penalty of weight beta that policy is known, pi(y) = pi_ref(y) exp(r(y) / beta) / Z. The gradient of
the demonstrations' log-likelihood is (ML-IRL, arXiv 2405.17888)

    grad l = (1/beta) E_demo[ grad r(demo) - E_(y~pi) grad r(y) ].

Drawing from pi would mean training it anew for every r. On paper, with three responses:
(1) Write pi as softmax(r / beta + log pi_ref). Find a function of r whose derivative with respect
to r / beta is that softmax. (2) Now list K samples y_k of another policy q, not all responses.
What must be added to r_k / beta so that the sum over k estimates Z, up to the factor K? Both are
one line, and the same line.

Hint: rewards may be huge, of either sign. exp and then log overflows; torch has a function
that does not. The logistic form likewise.
"""

import torch  # noqa: F401 (for you to use)
from torch import Tensor


def irl_loss(
    r_demo: Tensor,
    r_samples: Tensor,
    beta: float = 1.0,
    estimator: str = "importance",
    log_ratio: Tensor | float = 0.0,
) -> Tensor:
    """A scalar to descend: the mean over P prompts. r_demo (P,), r_samples (P, K): K each.

    importance: log sum_k exp(r_k / beta + log_ratio_k) - r_demo / beta, where log_ratio is
        log pi_ref(y_k) - log q(y_k), (P, K), or 0 for samples of pi_ref. With all responses listed
        once, log_ratio = log pi_ref makes it exact. Over samples it has no lower bound.
    linear: (mean_k r_k - r_demo) / beta, for samples of a policy already improved against r.
    logistic: -mean_k log sigma((r_demo - r_k) / beta), the same pull, bounded below.
    Only importance uses log_ratio. ValueError for another estimator, and for other shapes
    of r_demo and r_samples: a r_demo (P, 1) or (1, P) would broadcast to something wrong.
    """
    raise NotImplementedError
