"""A run's report: the table of evaluate.py, pictures of refusals and of curves, samples."""

from itertools import product
from pathlib import Path

import numpy as np

from data import CATEGORIES
from evaluate import KINDS, noise_scale, samples_side_by_side, table, wilson
from support.files import as_json, write

MEANING = "Refused means phrase-matched refusal. It measures wording, not safety."
MEANING += " Gibberish: empty, a loop or mostly signs; invented words are not noticed."
MEANING += " Another processor's rounding alone can move a trained model's rates by some points."
CAPTION = "right: harmful prompts refused, harmless ones answered. held: nothing learns from them."
CAPTION += " margin: how far good samples rose above bad ones, in log pi, since the warm start."


def pyplot():
    """matplotlib's, drawing into files; None, and a line that says so, where it is missing."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print('no pictures: matplotlib is not installed: pip install ".[pictures]"')
        return None
    plt.switch_backend("Agg")
    return plt


def save_figure(fig, path: Path) -> None:
    write({path: lambda aside: fig.savefig(aside, format="png", dpi=120, bbox_inches="tight")})
    pyplot().close(fig)


HATCHES = ("", "///", "...", "\\\\\\", "xxx", "---")  # legible without colour
STYLES, MARKS = ("-", "--", ":", "-."), "osv^DXP*h"  # nine: with eight colours 72 looks
COLORS = [f"tab:{c}" for c in "blue orange green red purple brown pink cyan".split()]


def picture_of_refusals(path: Path, results: list[dict]) -> None:
    """Refused per category, every model, with Wilson intervals; harmless kinds on the right."""
    groups = [g for g in (*CATEGORIES, *KINDS) if results[0]["rates"][g][1]]  # that there are
    groups = [g for g in groups if g != "harmful" or g == groups[0]]
    width = 0.8 / len(results)
    pale = pyplot().get_cmap("tab20").colors[1::2]
    (fig, ax), x = pyplot().subplots(figsize=(9.2, 4)), np.arange(len(groups))
    for i, r in enumerate(results):
        pairs = np.array([r["rates"][g] for g in groups])  # (groups, 2): hits, n
        y = 100 * pairs[:, 0] / pairs[:, 1].clip(1)
        error = abs(100 * np.array([wilson(*pair) for pair in pairs]).T - y)  # (2, groups)
        look = {"fc": pale[i % 10], "ec": "k", "hatch": HATCHES[i % 6], "error_kw": {"lw": 0.9}}
        ax.bar(x + i * width, y, width, yerr=error.tolist(), label=r["name"], **look)
    ax.set_xticks(x + 0.4 - width / 2, [g.replace("_", "\n") for g in groups])
    title = "Held-out prompts: harmful by category, then harmless kinds"
    ax.set(ylabel="refused, % (phrase-matched)", title=title, ylim=(0, 105))
    ax.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
    save_figure(fig, path)


CURVES = ("sft loss", "irl gap_demo_minus_others")  # stage and fields of the records
CURVES += ("grpo harmful_right held_harmful_right", "grpo helpful_right held_helpful_right")
CURVES += ("grpo harmful_reward helpful_reward held_harmful_reward held_helpful_reward",)
CURVES += ("grpo margin", "grpo kl entropy")
CURVES += ("grpo clipped_low clipped_high", "grpo cosine", "grpo alpha")


def band(y: list[float], width: int = 9) -> tuple:
    """Moving mean and standard deviation, each as long as y, which is mirrored at its ends."""
    half = width // 2
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(y, half, "reflect"), 2 * half + 1)
    return windows.mean(1), windows.std(1)


def picture_of_curves(path: Path, records: list[dict]) -> None:
    """What every stage logged: a colour a "model" (a reward model or a run), or else a field."""
    fig, axes = pyplot().subplots(5, 2, figsize=(9.2, 12), layout="constrained")
    for ax, title in zip(axes.flat, CURVES):
        stage, *keys = title.split()
        rows = [r for r in records if r["stage"] == stage]
        models = [*dict.fromkeys(r.get("model") for r in rows)]
        for (i, model), (j, key) in product(enumerate(models), enumerate(keys)):
            part = [r for r in rows if r.get("model") == model and r.get(key) is not None]
            points = [(r["step"], y) for r in part for y in np.ravel(r[key])]
            k = i if len(models) > 1 else j
            look = dict(color=COLORS[k % 8], marker=MARKS[k % 9], ls=STYLES[j], lw=1, ms=4)
            look["label"] = model if ax in axes[0] else key if len(keys) > 1 and i == 0 else None
            x = sorted({step for step, _ in points})
            if key == "alpha":
                ax.plot(*np.array(points).reshape(-1, 2).T, **look | {"ls": ""})
            elif len(points) > 20:  # several seeds', by step
                x, y = zip(*sorted(points, key=lambda point: point[0]))
                mean, std = band(y, max(9, len(y) // 24))
                ax.plot(x, mean, markevery=len(x) // 8, **look)
                ax.fill_between(x, mean - std, mean + std, color=look["color"], alpha=0.2, lw=0)
            else:
                ax.plot(x, [np.mean([y for at, y in points if at == step]) for step in x], **look)
        if ax.get_legend_handles_labels()[0]:
            beside = {"loc": "upper left", "bbox_to_anchor": (1, 1)}
            legend = ax.legend(fontsize=9, handlelength=3, frameon=False, **beside)
            if len(models) > 1 and ax not in axes[0]:  # the line's style tells the field
                pyplot().setp(legend.get_lines(), color="k", marker="")
        ax.set_title(f"{stage}: {', '.join(keys[:2])}", fontsize=10)
        ax.set_xlabel("step")
    save_figure(fig, path)


def write_report(folder: Path, results: list[dict], records: list[dict], note: str) -> str:
    """report.md, results.json and the pictures; returns the table."""
    text, images = table(results), ""
    if pyplot():
        picture_of_refusals(folder / "refusals.png", results)
        picture_of_curves(folder / "curves.png", records)
        images = f"![refusals](refusals.png)\n\n![curves](curves.png)\n\n{CAPTION}"
    if any(r.get("cosine") is not None for r in records):
        c, n = noise_scale(records)
        text += f"\n\nGRPO-S: cosine of consecutive gradients {c:.3f}, "
        text += f"noise scale {n:.0f} sequences"
    lines = ["# DR-IRL: before and after", "", note, "", MEANING, "", text, "", images, ""]
    lines += ["## Samples, chosen by position", samples_side_by_side(results), ""]
    write({folder / "report.md": "\n".join(lines), folder / "results.json": as_json(results)})
    return text
