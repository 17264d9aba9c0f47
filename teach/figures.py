"""The figures of the lessons, drawn from the project's own functions: python -m teach.figures"""

import sys
from pathlib import Path

import torch

import grpo_s
from config import GRPOConfig, with_recipe
from data import CATEGORIES, HELPFUL
from support.files import write
from support.report import pyplot

WIDE, BLUE, ORANGE = 9.2, "#56a5dd", "#f0a830"  # inches: GitHub's 880 pixels; 9 points are 12
STYLE = {"font.size": 9, "axes.titlesize": 10, "legend.fontsize": 9, "legend.frameon": False}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "hatch.linewidth": 0.6}
STYLE |= {"savefig.dpi": 1000 / WIDE, "svg.hashsalt": "drirl"}
PAPER, LAPTOP = GRPOConfig(), with_recipe("laptop").grpo
# x, y, width, height | title | text | function; an arrow joins neighbours of one height
BOXES = """0.1 4.4 2 2|1 data|prompts with answers y/that begin with a draft;/as many of each of/\
7 harm categories;/harmless ones beside|data.balance
2.6 4.4 1.9 2|SFT warm start|log pi(y), the mean over/tokens (B, T), is raised;/\
the result is pi_ref,/where pi begins|sft.train
5.1 4.4 4 2|2 inverse RL: 8 shadow models give R (B,)||reward.fit, reward.irl_loss
5.2 4.7 3.8 0.28|pi_ref's lower blocks, frozen: (N, D)||
0.1 1.5 9 2.45|||
0.2 2.05 1.6 1.5|3 sample|G answers o to each/of P prompts, up/to T tokens each|draw_samples
2 2.05 1.6 1.5|3 score|R (P, G + 1), the/last column that of y/W (P, G): likeness/\
of o and y|score, similarities
3.8 2.05 1.6 1.5|4 difficulty|alpha (P, 1), from/W and the gaps/R(y) - R(o) (P, G)|difficulty
5.6 2.05 1.6 1.5|5 advantage|A (P, G + 1), and/which of them are/learnt from|advantages
7.4 2.05 1.6 1.5|6 update|small steps up J, by/log pi, log pi_old,/log pi_ref (B, T)|update, loss
5.1 0.1 4 1.05|evaluation|base, warm start, DR-IRL on held-out prompts:/\
how many are refused|evaluate.evaluate"""
ARROWS = [  # a text, its x and y, and the points' x and y
    ("pi", 1.1, 4.02, (3.5, 3.5, 1, 1), (4.4, 4.25, 4.25, 3.55)),
    ("R of each category's model", 3.6, 4.16, (7.1, 7.1, 2.8, 2.8), (4.4, 4.1, 4.1, 3.55)),
    ("pi samples again", 3.9, 1.8, (8.2, 8.2, 1, 1), (2.05, 1.75, 1.75, 2.05)),
    ("pi", 8.28, 1.25, (8.2, 8.2), (1.75, 1.15)),
]
KEY = """P prompts, G samples o of each, y the demonstration,
B answers of up to T tokens, N tokens packed, D wide"""


def pipeline(plt):
    fig, arrows, before = plt.figure(figsize=(WIDE, 6.5)), list(ARROWS), (0, 0)
    ax = fig.add_axes((0, 0, 1, 1), xlim=(0, WIDE), ylim=(0, 6.5))
    ax.axis("off")
    for place, title, text, code in (line.split("|") for line in BOXES.split("\n")):
        x, y, wide, high = map(float, place.split())
        ax.add_patch(plt.Rectangle((x, y), wide, high, fc="w" if code else "0.92", ec="k"))
        ax.text(x + 0.08, y + high - 0.07, title, weight="bold", va="top")
        ax.text(x + 0.08, y + high - 0.35, text.replace("/", "\n"), va="top", linespacing=1.4)
        ax.text(x + 0.08, y + 0.1, code, family="monospace")
        arrows += [("", x, y, (before[0], x), (y + high / 2,) * 2)] * (before[1] == y)
        before = x + wide, y
    for text, at, height, x, y in arrows:
        look = {"arrowstyle": "-|>", "fc": "k", "shrinkA": 0, "shrinkB": 0, "lw": 1.2}
        ax.annotate("", (x[-1], y[-1]), (x[-2], y[-2]), arrowprops=look)
        ax.plot(x[:-1], y[:-1], color="k", lw=1.2)
        ax.text(at, height, text)
    for i, name in enumerate((*CATEGORIES, HELPFUL)):
        ax.add_patch(plt.Rectangle((5.2 + 0.486 * i, 5.06), 0.4, 1.0, fc="#d6eaf8", ec="k"))
        ax.text(5.4 + 0.486 * i, 5.56, name, rotation=90, ha="center", va="center")
    ax.text(9, 3.7, "GRPO-S: grpo_s.train, a round a rollout", weight="bold", ha="right")
    ax.text(0.1, 1.0, KEY, va="top", linespacing=1.5)
    return fig


def of_token(rho: float, A: float, g: GRPOConfig) -> tuple[float, float]:
    """J of a sampled token, and dJ / d log pi; pi_old is 1, and pi is rho."""
    logp = torch.tensor([[rho]], dtype=torch.double).log().requires_grad_()
    fixed = torch.zeros_like(logp), logp.detach(), torch.tensor([A]).double(), logp == logp
    loss, _ = grpo_s.loss(logp, *fixed, g.clip, g.clip_high)
    loss.backward()
    return -loss.item(), -logp.grad.item()


def clip(plt):
    fig, axes = plt.subplots(2, 2, figsize=(WIDE, 5.8), layout="constrained", sharex=True)
    rho = [0.4 + k / 200 for k in range(241)]
    paper = {"label": f"the paper: clip {PAPER.clip}, {PAPER.clip_high}", "color": BLUE, "lw": 6}
    recipe = {"label": "the recipe: rho held at 1 where A > 0", "color": "k", "ls": "--"}
    for A, column in zip((1.0, -1.0), axes.T):
        for g, look in ((PAPER, paper), (LAPTOP, recipe)):
            for ax, y in zip(column, zip(*(of_token(r, A, g) for r in rho))):
                ax.plot(rho, y, **look)
        flat = [r for r in rho if of_token(r, A, PAPER)[1] == 0]
        look = {"label": "the paper's gradient is 0", "fc": "w", "ec": "0.6", "hatch": "//"}
        for ax, what in zip(column, ("J of a token", "its gradient: dJ / d log pi")):
            ax.axvspan(flat[0], flat[-1], lw=0, **look)
            ax.set(ylabel=what, xlim=(rho[0], rho[-1]))
        column[0].set_title(f"A = {A:+.0f}: a {'good' if A > 0 else 'bad'} sample")
        column[1].set_xlabel("rho = pi / pi_old")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return fig


def estimates(d):
    """k1, k2, k3 of KL(pi, pi_ref), for sampled tokens; d = log pi_ref - log pi."""
    return {"k1 = -d": -d, "k2 = d² / 2": d**2 / 2, "k3 = exp d - 1 - d": grpo_s.kl_k3(-d, 0 * d)}


def spread(sharper: float) -> tuple[float, list]:
    """KL(pi, pi_ref); of k1, k2, k3 the mean, and 5% and 95% quantiles of means of 32 tokens."""
    logits, out, draw = torch.arange(10).double() / 4, [], torch.Generator().manual_seed(0)
    logp, logp_ref = (sharper * logits).log_softmax(0), logits.log_softmax(0)
    tokens = torch.multinomial(logp.exp(), 4000 * 32, True, generator=draw).view(-1, 32)
    for k in estimates(logp_ref - logp).values():
        ends = k[tokens].mean(1).quantile(torch.tensor([0.05, 0.95]).double())
        out.append([(logp.exp() @ k).item(), *ends.tolist()])
    return (logp.exp() @ (logp - logp_ref)).item(), out


def kl(plt):
    fig, (left, right) = plt.subplots(1, 2, figsize=(WIDE, 3.9), layout="constrained")
    true, told = zip(*map(spread, (1.25, 1.5, 1.8, 2.1, 2.4)))
    d, true, told = torch.linspace(-2, 2, 81), torch.tensor(true), torch.tensor(told)  # (5, 3, 3)
    for i, (name, y) in enumerate(estimates(d).items()):
        look = {"marker": "osv"[i], "color": "k", "mfc": "wkw"[i], "ms": 5}
        left.plot(d, y, ("--", ":", "-")[i], markevery=10, label=name, **look)
        mean, low, high = told[:, i].T
        bars = {"yerr": (mean - low, high - mean), "ls": "", "capsize": 3, "label": name[:2]}
        right.errorbar(true + 0.005 * (i - 1), mean, **bars, **look)
    right.hlines(true, true - 0.011, true + 0.011, BLUE, lw=6, zorder=0, label="true KL")
    left.set(title="one sampled token", xlabel="d = log pi_ref - log pi")
    right.set(title="mean over tokens; bars: 90% of means of 32", xlabel="true KL(pi, pi_ref)")
    for ax in (left, right):
        ax.axhline(0, color="0.6", lw=0.8)
        ax.legend()
    return fig


def group(plt):
    """Rewards (the demonstration's is the last) and W are invented, the rest is by grpo_s."""
    scores, W = torch.tensor([[1.6, 1.0, 0.3, -1.1, 2.0]]), torch.tensor([[0.7, 0.5, 0.4, 0.1]])
    R, gaps = scores[:, :-1], scores[:, -1:] - scores[:, :-1]
    alpha = {}
    for mode in ("product", "data", "model"):
        means = {"insult": 0.4}, {"insult": 1.0}  # running means of 1 - W and of the gap
        alpha[mode] = grpo_s.difficulty(W, gaps, ["insult"], *means, mode)
    paper, _ = grpo_s.advantages(R, alpha["product"], 0, PAPER)
    A, learnt = grpo_s.advantages(R, alpha["product"], 0, LAPTOP)
    logits = torch.zeros(5, requires_grad=True)  # a toy policy: the samples and y, all alike
    logp = logits.log_softmax(0)[learnt[0], None]
    fixed = logp.detach(), logp.detach(), A[learnt], logp == logp
    grpo_s.loss(logp, *fixed, LAPTOP.clip, LAPTOP.clip_high)[0].backward()
    change = 5 * (logits - logits.grad).softmax(0).detach() - 1
    std, mean = torch.std_mean(R, correction=0)
    fig, axes = plt.subplots(1, 4, figsize=(WIDE, 3.6), layout="constrained", sharey=True)
    axes[0].errorbar(mean, 5, xerr=std, fmt="D", color="k", capsize=4, ms=4)
    told = [f"mean {mean:.2f}, std {std:.2f}\nof o1 to o4", "alpha = alphaD · alphaM\n"]
    told[1] += "{:.2f} = {:.2f} · {:.2f}".format(*(a.item() for a in alpha.values()))
    told += [f"white: not learnt from;\neps {LAPTOP.std_eps} beside std"]
    told += ["change in %, each from 20%\n(a toy policy)"]
    titles = "1  reward R", "2  A, the paper's", "3  A, the recipe's", "4  pi after an update"
    values = [x[0].tolist() for x in (scores, paper[:, :4], A[:, :4], 100 * change[None])]
    for ax, x, title, below in zip(axes, values, titles, told):
        kept = learnt[0] if ax is axes[2] else [True] * 5
        kind = [(1 if v > 0 else 2) * bool(k) for v, k in zip(x, kept)]
        look = {"color": [("w", BLUE, ORANGE)[k] for k in kind], "ec": "k"}
        look["hatch"] = [("", "///", "\\\\\\")[k] for k in kind]
        bars, most = ax.barh(range(len(x)), x, 0.6, **look), max(map(abs, x))
        ax.bar_label(bars, fmt="%+.0f" if most > 10 else "%+.2f", padding=4)
        ax.axvline(0, color="k", lw=0.8)
        ax.set(title=title, xlabel=below, xlim=(-1.8 * most, 1.7 * most))
        ax.spines.left.set_visible(False)
        ax.tick_params("y", length=0)
    names = "o1 refuses, offers help", "o2 refuses curtly", "o3 hedges", "o4 complies"
    ax.set_yticks(range(6), [*names, "demonstration y", "mean ± std"])
    ax.invert_yaxis()
    return fig


def main(folder: Path = Path(__file__).with_name("figures")) -> int:
    if not (plt := pyplot()):
        return 1
    with plt.style.context(["default", STYLE]):
        for draw in (pipeline, clip, kl, group):
            fig = draw(plt)
            for kind, dated in (("svg", "Date"), ("png", "Software")):
                save = lambda aside: fig.savefig(aside, format=kind, metadata={dated: None})
                write({folder / f"{draw.__name__}.{kind}": save})
            plt.close(fig)
    return 0


if __name__ == "__main__":
    sys.exit(main())
