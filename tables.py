"""Tables, intervals and pictures of the ablation, from the lines that ablate.py left.

    python tables.py [runs/ablate/results.jsonl]     keeps these lines as results/ablate.jsonl, and makes RESULTS.md's tables and pictures of it

A difference between two variants is the mean over seeds of (harmful refused - look-alikes refused), in points. It has two 95% intervals: a bootstrap over seeds and
prompts, which stay paired; and Student's over the seeds' differences, as a bootstrap of five is too narrow. yes: both exclude zero, with three seeds at the least; if
Student's alone does, on these prompts. Reward models are compared by themselves too: by their AUC on harmful prompts, with Student's interval alone.
A rate's interval is Wilson's for one seed's number of prompts, as the same prompts come back with every seed.
"""

import math
import re
import statistics
import sys
from pathlib import Path

import numpy as np

from ablate import BORROWED, CONTINUED, DRIRL, LONGER, SETTINGS, START, STATIC, TOKENS, VARIANTS
from data import CATEGORIES, HELPFUL, UserError
from disguise import HELD_OUT, SEEN
from evaluate import pyplot, save, wilson
from files import read_records, write

ROOT = Path(__file__).resolve().parent
STUDENT = (
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
)  # 97.5% quantiles of Student's t for 2 to 9 degrees of freedom
CLAIMS = [  # what is claimed, the variant that should be better, the other
    ("DR-IRL beats its warm start", DRIRL, START),
    ("DR-IRL beats SFT continued for the same time", DRIRL, CONTINUED),
    ("static scaling beats SFT continued for the same time", STATIC, CONTINUED),
    ("the warm start beats SFT continued", START, CONTINUED),
    ("DR-IRL beats SFT trained longer by the same time", DRIRL, LONGER),
    ("DR-IRL beats SFT continued on as many tokens", DRIRL, TOKENS),
    ("DR-IRL beats SFT on borrowed demonstrations for the same time", DRIRL, BORROWED),
    ("DR-IRL beats DPO", DRIRL, "DPO"),
    ("dynamic scaling beats static", DRIRL, STATIC),
    ("data hardness beats static", "data hardness", STATIC),
    ("model responsiveness beats static", "model responsiveness", STATIC),
    ("product beats sum", DRIRL, "sum"),
    ("spread (ours) beats static", "spread (ours)", STATIC),
    ("7RW beats 1RW", STATIC, "1RW static"),
    ("categorized beats linear integration", DRIRL, "linear integration"),
    ("balanced beats unbalanced", DRIRL, "unbalanced"),
]
REWARD_CLAIMS = [
    ("7RW beats 1RW", "1RW static"),
    ("categorized beats linear integration", "linear integration"),
    ("balanced beats unbalanced, each on its own warm start's samples", "unbalanced"),
]
SINCE = {
    "disguised": 1,
    "few-16": 1,
}  # the first seed that a setting's claims count: those before suggested them
CURVES = {
    "harmful_refused": "harmful refused, %",
    "helpful_refused": "harmless refused, %",
    "harmful_reward": "reward, harmful",
    "helpful_reward": "reward, harmless",
}
CLAIM_HEAD, RULE = "| {} | seeds | points | bootstrap | by seed | |", "|---" * 6 + "|"


def grouped(results: list[dict]) -> dict:
    """{setting: {variant: {seed: result}}}, in the order of ablate.py."""
    out = {}
    for setting in SETTINGS:
        for variant in VARIANTS:
            for r in results:
                if (r["setting"], r["variant"]) == (setting, variant):
                    out.setdefault(setting, {}).setdefault(variant, {})[r["seed"]] = r
    return out


def refused(result: dict, kind: str, views=("plain",)) -> np.ndarray:
    """1 where a prompt of this kind was refused, else 0, over the views in turn."""
    return np.array(
        [v == "r" for view in views for v in result["verdicts"][view].get(kind, "")], float
    )


def difference(
    a: list[dict], b: list[dict], views=("plain",), draws: int = 4000
) -> tuple[float, float, float, float]:
    """Mean over seeds of a's (harmful refused - look-alikes refused) minus b's, in points; the ends of its bootstrap interval; half of Student's.
    a, b: results of the same seeds on the same prompts."""
    rng, by_seed = np.random.default_rng(0), np.zeros(len(a))
    seeds = rng.integers(len(a), size=(draws, len(a)))
    drawn = np.zeros(draws)
    for sign, kind in ((100, "harmful"), (-100, "lookalike")):
        gain = np.stack(
            [refused(x, kind, views) - refused(y, kind, views) for x, y in zip(a, b, strict=True)]
        )  # (seeds, prompts)
        prompts = rng.integers(gain.shape[1], size=(draws, gain.shape[1]))
        drawn += sign * np.array([gain[s].mean(0)[p].mean() for s, p in zip(seeds, prompts)])
        by_seed += sign * gain.mean(1)
    return by_seed.mean(), *np.percentile(drawn, (2.5, 97.5)), student(by_seed)


def student(by_seed: np.ndarray) -> float:
    """Half of Student's 95% interval of the mean of these; infinite for fewer than three, which hardly tell their spread."""
    n = len(by_seed)
    return STUDENT[min(n, 10) - 3] * by_seed.std(ddof=1) / math.sqrt(n) if n > 2 else math.inf


def auc(result: dict, by: int = 1) -> float:
    """AUC of harmful prompts' samples by a result's rewards, in percent, or by being shorter (by=2): of all pairs within a prompt, whatever its category; nan without a pair."""
    found = [
        (cells[0], cells[by])
        for name, cells in result["auc"].items()
        if name != HELPFUL and cells[0]
    ]
    return (
        100 * sum(n * value for n, value in found) / sum(n for n, _ in found) if found else math.nan
    )


def percent(runs: list[dict], kind: str, views=("plain",)) -> str:
    hits = np.stack([refused(r, kind, views) for r in runs])
    low, high = wilson(hits.mean() * hits.shape[1], hits.shape[1])
    return f"{100 * hits.mean():.1f} [{100 * low:.0f}, {100 * high:.0f}]"


def claim(variants: dict, better: str, worse: str, views=("plain",)) -> str:
    """Cells of a claim's row: seeds, difference, its two intervals, verdict; empty if there are no results of both."""
    seeds = sorted(variants.get(better, {}).keys() & variants.get(worse, {}).keys())
    if not seeds:
        return ""
    mean, low, high, half = difference(
        [variants[better][s] for s in seeds], [variants[worse][s] for s in seeds], views
    )
    return f"{len(seeds)} | {mean:+.1f} | [{low:+.1f}, {high:+.1f}] | {verdict(len(seeds), mean, half, low > 0 or high < 0)}"


def reward_claims(variants: dict) -> list[str]:
    """Rows of what is claimed of the reward models' AUC alone."""
    fitted = variants.get(START, {})
    gains = {
        "rewards beat choosing the longer sample": [
            auc(r) - (100 - auc(r, by=2)) for r in fitted.values()
        ]
    }
    gains |= {
        text: [
            auc(fitted[s]) - auc(variants[other][s])
            for s in fitted.keys() & variants.get(other, {}).keys()
        ]
        for text, other in REWARD_CLAIMS
    }
    found = {
        text: x
        for text, gain in gains.items()
        if len(x := np.array([g for g in gain if not math.isnan(g)]))
    }
    return [
        f"| {text} | {len(x)} | {x.mean():+.1f} | - | {verdict(len(x), x.mean(), student(x))} |"
        for text, x in found.items()
    ]


def verdict(n: int, mean: float, half: float, elsewhere: bool = False) -> str:
    """Student's interval and what can be said; elsewhere: whether the interval over prompts excludes zero too."""
    interval = f"[{mean - half:+.1f}, {mean + half:+.1f}]" if n > 2 else "-"
    if abs(mean) <= half:
        return f"{interval} | not shown"
    return f"{interval} | {'yes' if mean > 0 else 'no: worse'}{'' if elsewhere else ', on these prompts'}"


def spread(alpha: list[float]) -> str:
    """5, 50 and 95% of alpha; cosine between equal advantages and the same times alpha, mean / root mean square: how little scaling turns an update."""
    return f"{', '.join(f'{x:.2f}' for x in np.percentile(alpha, (5, 50, 95)))}; {np.mean(alpha) / np.sqrt(np.mean(np.square(alpha))):.3f}"


def thirds(curves: list[list[dict]], key: str) -> str:
    """Of one curve a seed: what it has under key, the mean of its first and of its last third, its gain; from three seeds on, half of Student's interval of it."""
    unit, digits = (100, 1) if key.endswith("refused") else (1, 2)
    first, last = (
        np.array(
            [
                unit * np.mean([step[key] for step in c[::order][: max(1, len(c) // 3)]])
                for c in curves
            ]
        )
        for order in (1, -1)
    )
    half = f" ± {student(last - first):.{digits}f}" if len(curves) > 2 else ""
    return f"{first.mean():.{digits}f} → {last.mean():.{digits}f} ({(last - first).mean():+.{digits}f}{half})"


def tables_of(variants: dict, since: int = 0) -> str:
    """Markdown: everything about one setting, and the claims on its refusals, which count seeds from `since` on."""
    fresh = {
        v: {seed: r for seed, r in by_seed.items() if seed >= since}
        for v, by_seed in variants.items()
    }

    def claims(title, views=("plain",)):
        rows = [
            f"| {text} | {cells} |"
            for text, better, worse in CLAIMS
            if (cells := claim(fresh, better, worse, views))
        ]
        return (
            ["", CLAIM_HEAD.format(title + f", seeds from {since} on" * (since > 0)), RULE, *rows]
            if rows
            else []
        )

    lines = [
        "| variant | seeds | refused, %: harmful | ordinary | look-alikes | harmful − look-alikes | gibberish % | truncated % | tokens | NLL | KL | alpha: 5, 50, 95%; cosine | seconds |",
        "|---" * 13 + "|",
    ]
    mean = lambda runs, key: statistics.mean(map(key, runs))
    for variant, by_seed in variants.items():
        runs = list(by_seed.values())
        points = mean(
            runs, lambda r: 100 * (refused(r, "harmful").mean() - refused(r, "lookalike").mean())
        )
        share = [
            f"{mean(runs, lambda r: 100 * r['rates'][k][0] / r['rates'][k][1]):.1f}"
            for k in ("gibberish", "truncated")
        ]
        alpha = [a for r in runs for a in r["alpha"]]
        lines.append(
            f"| {variant} | {len(runs)} | {percent(runs, 'harmful')} | {percent(runs, 'ordinary')} | {percent(runs, 'lookalike')} | {points:.1f} | {' | '.join(share)} | "
            f"{mean(runs, lambda r: r['rates']['tokens']):.0f} | {mean(runs, lambda r: r['nll']):.3f} | {mean(runs, lambda r: r['kl']):.3f} | "
            f"{spread(alpha) if alpha else '-'} | {mean(runs, lambda r: sum(r['seconds'].values())):.0f} |"
        )
    if (n := len({r["code"] for by_seed in variants.values() for r in by_seed.values()})) > 1:
        lines += ["", f"Made by {n} versions of the code (`code` of the lines)."]
    lines += claims("claim")
    views = next(iter(next(iter(variants.values())).values()))["verdicts"]
    if len(views) > 1:
        lines += [
            "",
            "| in disguise | harmful: "
            + " | harmful: ".join((*SEEN, *HELD_OUT))
            + " | harmful − look-alikes, kinds trained on | kinds held out |",
            "|---" * (len(SEEN + HELD_OUT) + 3) + "|",
        ]
        for variant, by_seed in variants.items():
            runs = list(by_seed.values())
            both = [
                f"{mean(runs, lambda r: 100 * (refused(r, 'harmful', kinds).mean() - refused(r, 'lookalike', kinds).mean())):.1f}"
                for kinds in (SEEN, HELD_OUT)
            ]
            lines.append(
                f"| {variant} | "
                + " | ".join(percent(runs, "harmful", (view,)) for view in (*SEEN, *HELD_OUT))
                + f" | {both[0]} | {both[1]} |"
            )
        for name, kinds in (("kinds trained on", SEEN), ("kinds held out", HELD_OUT)):
            lines += claims(f"claim, {name}", kinds)
    learnt = {
        v: [r["curve"] for r in by_seed.values() if len(r["curve"]) > 1]
        for v, by_seed in variants.items()
    }
    if any(learnt.values()):
        lines += [
            "",
            "| samples in GRPO-S, first → last third of the rollouts | "
            + " | ".join(CURVES.values())
            + " |",
            "|---" * (len(CURVES) + 1) + "|",
        ]
        lines += [
            f"| {variant} | " + " | ".join(thirds(curves, key) for key in CURVES) + " |"
            for variant, curves in learnt.items()
            if curves
        ]
    lines += [
        "",
        "| harmful refused, % | " + " | ".join(CATEGORIES) + " |",
        "|---" * (len(CATEGORIES) + 1) + "|",
    ]
    for variant, by_seed in variants.items():
        lines.append(
            f"| {variant} | "
            + " | ".join(
                f"{mean(by_seed.values(), lambda r: 100 * r['rates'][c][0] / r['rates'][c][1]):.0f}"
                for c in CATEGORIES
            )
            + " |"
        )
    fitted = {
        v: [r["auc"] for r in by_seed.values() if "auc" in r] for v, by_seed in variants.items()
    }
    names = (*CATEGORIES, HELPFUL)
    lines += [
        "",
        "| AUC of wanted over unwanted samples of a prompt | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for variant, found in fitted.items():
        for i, label in enumerate(
            ("pairs a seed", f"rewards of {variant}", "being shorter alone", "form alone")
        ):
            if found and (variant == START or i == 1):  # the others don't depend on the rewards
                cells = [
                    [a[n][i] for a in found if a.get(n, [None] * 4)[i] is not None] for n in names
                ]
                lines.append(
                    f"| {label} | "
                    + " | ".join(
                        f"{statistics.mean(x):.{2 if i else 0}f}" if x else "-" for x in cells
                    )
                    + " |"
                )
    if rows := reward_claims(variants):
        lines += [
            "",
            CLAIM_HEAD.format("claim, of the rewards' AUC on harmful prompts"),
            RULE,
            *rows,
        ]
    return "\n".join(lines)


def text(results: list[dict]) -> str:
    return "\n\n".join(
        f"### {setting}\n\n{tables_of(variants, SINCE.get(setting, 0))}"
        for setting, variants in grouped(results).items()
    )


# ------------------------------------------------------------------------------------------------ RESULTS.md and its pictures


def pictures(results: dict, folder: Path) -> None:
    """plane.png: every variant by what it refuses of harmful prompts and answers of look-alikes; categories.png: harmful refused before and after;
    curves.png: GRPO-S's samples over its rollouts, mean and range over the seeds; alpha.png: histograms."""
    if not (plt := pyplot()):
        return
    look = {
        v: {"color": plt.get_cmap("tab20")(2 * i % 20 + i // 10), "label": v}
        for i, v in enumerate(VARIANTS)
    }

    def figure(name, draw):
        columns, rows = min(3, len(results)), math.ceil(len(results) / 3)
        fig, axes = plt.subplots(
            rows, columns, figsize=(4.2 * columns + 2, 3.8 * rows), squeeze=False
        )
        for ax, (setting, variants) in zip(axes.flat, results.items()):
            draw(ax, variants)
            ax.set_title(setting)
        for ax in axes.flat[len(results) :]:
            ax.remove()
        shown = {
            label: handle
            for ax in axes.flat
            for handle, label in zip(*ax.get_legend_handles_labels())
        }
        fig.legend(shown.values(), shown, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
        fig.tight_layout()
        save(fig, folder / f"{name}.png", bbox_inches="tight")
        plt.close(fig)

    def plane(ax, variants):
        for variant, runs in variants.items():
            x, y = (
                [100 * (1 - refused(r, "lookalike").mean()) for r in runs.values()],
                [100 * refused(r, "harmful").mean() for r in runs.values()],
            )
            ax.errorbar(
                np.mean(x),
                np.mean(y),
                np.std(y),
                np.std(x),
                "os^v"[list(VARIANTS).index(variant) % 4],
                ms=5,
                lw=0.6,
                **look[variant],
            )
        ax.set(xlabel="look-alikes not refused, %", ylabel="harmful refused, %")

    def categories(ax, variants):
        for i, variant in enumerate(v for v in (START, DRIRL, CONTINUED) if v in variants):
            y = [
                [100 * r["rates"][c][0] / r["rates"][c][1] for r in variants[variant].values()]
                for c in CATEGORIES
            ]
            ax.bar(
                np.arange(len(CATEGORIES)) + 0.27 * i,
                np.mean(y, 1),
                0.27,
                yerr=np.std(y, 1),
                error_kw={"lw": 0.6},
                **look[variant],
            )
        ax.set_xticks(
            np.arange(len(CATEGORIES)) + 0.27,
            [c.replace("_", "\n") for c in CATEGORIES],
            fontsize=5,
        )
        ax.set(ylabel="harmful refused, %")

    def curves(ax, variants):
        for variant, runs in variants.items():
            length = min(len(r["curve"]) for r in runs.values())  # a skipped rollout is missing
            for key, style in (
                (("harmful_refused", "-"), ("helpful_refused", ":")) if length else ()
            ):
                y = np.array(
                    [[100 * step[key] for step in r["curve"][:length]] for r in runs.values()]
                )
                ax.plot(
                    range(1, length + 1),
                    y.mean(0),
                    style,
                    lw=1,
                    color=look[variant]["color"],
                    label=variant if style == "-" else None,
                )
                ax.fill_between(
                    range(1, length + 1),
                    y.min(0),
                    y.max(0),
                    color=look[variant]["color"],
                    alpha=0.07,
                )
        ax.set(xlabel="rollout", ylabel="samples refused, %\n(solid: harmful, dotted: harmless)")

    def alpha(ax, variants):
        for variant, runs in variants.items():
            values = [a for r in runs.values() for a in r["alpha"] if "static" not in variant]
            if values:
                ax.hist(
                    values,
                    np.geomspace(0.1, 10, 101),
                    density=True,
                    histtype="step",
                    **look[variant],
                )
        ax.set(xlabel="alpha", ylabel="density", xscale="log")

    for draw in (plane, categories, curves, alpha):
        figure(draw.__name__, draw)


def fill(page: str, results: dict) -> str:
    """RESULTS.md with the tables between <!-- SETTING --> and <!-- end --> made anew."""

    def block(m):
        return f"<!-- {m[1]} -->\n{tables_of(results[m[1]], SINCE.get(m[1], 0)) if m[1] in results else 'Not run yet.'}\n<!-- end -->"

    return re.sub(r"<!-- ([\w-]+) -->\n.*?\n<!-- end -->", block, page, flags=re.S)


def main(source: Path = ROOT / "results/ablate.jsonl") -> None:
    records = read_records(source, "variant")
    if not records:
        raise UserError(f"{source}: no results yet: python drirl.py ablate --run runs/ablate")
    for key in ("--model", "text of --prompts"):
        if len(found := {str(r["settings"].get(key)) for r in records}) > 1:
            raise UserError(
                f"{source}: results of several values of {key}: {', '.join(sorted(found))}: keep those of one"
            )
    starts = {
        (r["setting"], r["seed"], r["start"]) for r in records if r["variant"] != "unbalanced"
    }  # which has a start of its own
    if n := len(starts) - len({s[:2] for s in starts}):
        print(
            f"{n} warm starts were made again and differ, by machine or code: {', '.join(sorted({r['machine'] for r in records}))}"
        )
    write({ROOT / "results/ablate.jsonl": source.read_bytes()})
    write(
        {
            ROOT / "RESULTS.md": fill(
                (ROOT / "RESULTS.md").read_text(encoding="utf-8"), grouped(records)
            )
        }
    )
    pictures(grouped(records), ROOT / "results")


if __name__ == "__main__":
    try:
        main(*map(Path, sys.argv[1:2]))
    except UserError as e:
        print(f"tables: {e}", file=sys.stderr)
        sys.exit(2)
