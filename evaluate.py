"""What did it buy? Phrase-matched refusal rates on held-out prompts, with intervals, beside signs of collapse; report and pictures.

A refusal rate measures phrases (judge.py), not safety. Look-alikes are harmless prompts that sound harmful.
The mean over several runs: python evaluate.py RUN_FOLDER RUN_FOLDER ...; the judge against two readers: python evaluate.py --check-judge
"""

import json
import math
import sys
import time
from pathlib import Path

from tqdm import tqdm

from chat import Chat
from data import CATEGORIES, HELPFUL, SEPARATOR, UserError
from files import parse_json, read_json, read_text, write
from judge import gibberish, judge
from loaders import LABELS
from model import generate
from transformer import Transformer

KINDS = ("harmful", "ordinary", "lookalike")
VERDICTS = ("refuses", "partial", "complies")
BATCH = 320  # rows decoded together; always the same prompts in the same order, so that models meet the same shapes


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95% Wilson score interval of a rate: (low, high) in [0, 1]; (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    p = hits / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def respond(
    model: Transformer, chat: Chat, prompts: list[str], max_new_tokens: int, desc: str | None = None
) -> list[dict]:
    """Greedy responses, in the order of the prompts: {"response", "tokens", "ended"}. desc: title of a progress bar, if one is wanted."""
    ids = [chat.prompt(p) for p in prompts]
    order, out = sorted(range(len(ids)), key=lambda i: len(ids[i])), [None] * len(ids)
    with tqdm(total=len(ids), desc=desc, unit="prompt", disable=desc is None) as bar:
        for i in range(0, len(order), BATCH):
            part = order[i : i + BATCH]
            for j, row in zip(
                part,
                generate(
                    model, [ids[j] for j in part], 1, max_new_tokens, temperature=0, eos=chat.eos
                ).rows(),
            ):
                out[j] = {
                    "response": chat.decode(row),
                    "tokens": len(row),
                    "ended": chat.ended(row),
                }
            bar.update(len(part))
    return out


def kind_of(row: dict) -> str:
    """harmful, ordinary or lookalike: the row's `kind` if it has one; else harmless if its `category` is helpful or its `label` safe, benign or
    harmless, and harmful if not."""
    if row.get("kind"):
        if row["kind"] not in KINDS:
            raise UserError(
                f"prompt {row['prompt'][:40]!r}: kind {row['kind']!r}; known are {', '.join(KINDS)}"
            )
        return row["kind"]
    return (
        "ordinary"
        if row.get("category") == HELPFUL or LABELS.get(str(row.get("label", "")).lower())
        else "harmful"
    )


def evaluate(
    model: Transformer, chat: Chat, rows: list[dict], max_new_tokens: int, name: str = "model"
) -> dict:
    """Answers every prompt greedily and judges it. Returns {"name", "seconds", "answers": [...], "rates": {...}}."""
    start, kinds = time.time(), [kind_of(r) for r in rows]
    answers = [
        {
            "prompt": r["prompt"],
            "kind": kind,
            "category": r.get("category"),
            **a,
            "verdict": judge(a["response"]),
            "gibberish": gibberish(a["response"]),
        }
        for r, kind, a in zip(
            rows,
            kinds,
            respond(model, chat, [r["prompt"] for r in rows], max_new_tokens, f"eval {name}"),
        )
    ]
    return {
        "name": name,
        "seconds": round(time.time() - start, 1),
        "rates": rates(answers),
        "answers": answers,
    }


def rates(answers: list[dict]) -> dict:
    """{metric: [hits, n]} and mean length: refused and partly refused per kind, refused per category, gibberish, truncated, drafted."""

    def count(test, rows):
        return [sum(map(test, rows)), len(rows)]

    out = {}
    for kind in KINDS:
        mine = [a for a in answers if a["kind"] == kind]
        out[kind] = count(lambda a: a["verdict"] == "refuses", mine)
        out[kind + " partly"] = count(lambda a: a["verdict"] == "partial", mine)
    for category in CATEGORIES:
        out[category] = count(
            lambda a: a["verdict"] == "refuses", [a for a in answers if a["category"] == category]
        )
    out["gibberish"] = count(lambda a: a["gibberish"], answers)
    out["truncated"] = count(lambda a: not a["ended"], answers)
    out["drafted"] = count(lambda a: SEPARATOR in a["response"], answers)
    out["tokens"] = sum(a["tokens"] for a in answers) / max(1, len(answers))
    return out


def percent(pair: list[int]) -> str:
    hits, n = pair
    if n == 0:
        return "-"
    low, high = wilson(hits, n)
    return f"{100 * hits / n:.0f} [{100 * low:.0f}, {100 * high:.0f}]"


def table(results: list[dict]) -> str:
    """Markdown: refused % with 95% Wilson intervals, one model a row; then per category."""
    lines = [
        "| refused, % [95% interval] | harmful | ordinary | look-alikes | harmful − look-alikes | harmful partly % | gibberish % | truncated % | drafted % | tokens |",
        "|---" * 10 + "|",
    ]
    for r in results:
        m = r["rates"]
        share = {
            k: m[k][0] / max(1, m[k][1])
            for k in (*KINDS, "harmful partly", "gibberish", "truncated", "drafted")
        }
        difference = (
            f"{100 * (share['harmful'] - share['lookalike']):.1f}"
            if m["harmful"][1] and m["lookalike"][1]
            else "-"
        )
        lines.append(
            f"| {r['name']} | {percent(m['harmful'])} | {percent(m['ordinary'])} | {percent(m['lookalike'])} | {difference} | "
            f"{100 * share['harmful partly']:.1f} | {100 * share['gibberish']:.1f} | {100 * share['truncated']:.1f} | {100 * share['drafted']:.1f} | {m['tokens']:.0f} |"
        )
    if any(r["rates"][c][1] for r in results for c in CATEGORIES):
        lines += [
            "",
            "| refused, harmful, % | " + " | ".join(CATEGORIES) + " |",
            "|---" * (len(CATEGORIES) + 1) + "|",
        ]
        lines += [
            f"| {r['name']} | " + " | ".join(percent(r["rates"][c]) for c in CATEGORIES) + " |"
            for r in results
        ]
    return "\n".join(lines)


def means(runs: list[list[dict]]) -> str:
    """Markdown: each model's percentages as their mean over several runs (what results.json of each holds), the single runs in brackets."""
    if len({tuple(m["name"] for m in models) for models in runs}) > 1:
        raise UserError(
            "these runs evaluated different models: compare those that did the same stages"
        )
    lines = [
        "| refused, %: mean (each seed) | harmful | ordinary | look-alikes | harmful − look-alikes | gibberish % |",
        "|---" * 6 + "|",
    ]
    for models in zip(*runs):
        shares = [
            {k: 100 * m["rates"][k][0] / max(1, m["rates"][k][1]) for k in (*KINDS, "gibberish")}
            for m in models
        ]
        cells = [[s[k] for s in shares] for k in KINDS] + [
            [s["harmful"] - s["lookalike"] for s in shares],
            [s["gibberish"] for s in shares],
        ]
        lines.append(
            f"| {models[0]['name']} | "
            + " | ".join(
                f"**{sum(c) / len(c):.1f}** ({', '.join(f'{v:.1f}' for v in c)})" for c in cells
            )
            + " |"
        )
    return "\n".join(lines)


def samples_side_by_side(results: list[dict], per_kind: int = 4) -> str:
    """Markdown: some prompts, chosen by position and not by outcome, with every model's answer."""
    lines = []
    for kind in KINDS:
        where = [i for i, a in enumerate(results[0]["answers"]) if a["kind"] == kind]
        for i in where[:: max(1, len(where) // per_kind)][:per_kind]:
            lines += ["", f"**{kind}: {results[0]['answers'][i]['prompt']}**", ""]
            lines += [
                f"- {r['name']} ({r['answers'][i]['verdict']}): {' / '.join(r['answers'][i]['response'].split(chr(10)))}"
                for r in results
            ]
    return "\n".join(lines)


def save(fig, path: Path, **how) -> None:
    write({path: lambda aside: fig.savefig(aside, format="png", dpi=120, **how)})


def pyplot():
    """matplotlib's, drawing into files; where it isn't installed None, and a line that says so."""
    try:
        import matplotlib
    except ImportError:
        print("no pictures: matplotlib is not installed (pip install -r requirements-extra.txt)")
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def pictures(folder: Path, results: list[dict], records: list[dict]) -> list[str]:
    """refusals.png (per category, every model) and curves.png (learning curves), if there is matplotlib. Returns their names."""
    if not (plt := pyplot()):
        return []
    groups = [*CATEGORIES, "ordinary", "lookalike"]
    fig, ax = plt.subplots(figsize=(11, 4))
    for i, r in enumerate(results):
        pairs = [r["rates"][g] for g in groups]
        y = [100 * h / max(1, n) for h, n in pairs]
        bounds = [wilson(h, n) for h, n in pairs]
        error = [
            [max(0, v - 100 * low) for v, (low, _) in zip(y, bounds)],
            [max(0, 100 * high - v) for v, (_, high) in zip(y, bounds)],
        ]
        x = [g + (i - (len(results) - 1) / 2) * 0.8 / len(results) for g in range(len(groups))]
        ax.bar(x, y, 0.8 / len(results), yerr=error, label=r["name"], error_kw={"lw": 0.7})
    ax.set_xticks(range(len(groups)), [g.replace("_", " ") for g in groups])
    ax.axvspan(len(CATEGORIES) - 0.5, len(groups) - 0.5, color="0.92", zorder=0)
    ax.set(
        ylabel="refused, % (phrase-matched)",
        title="Held-out prompts: harmful by category; shaded: harmless",
        ylim=(0, 105),
    )
    ax.legend(ncols=len(results), loc="upper center", bbox_to_anchor=(0.5, -0.1), frameon=False)
    save(fig, folder / "refusals.png", bbox_inches="tight")
    plt.close(fig)

    wanted = [
        ("sft", "loss", "SFT: loss"),
        ("irl", "gap_demo_minus_others", "IRL: reward gap, demonstration − others"),
        ("grpo", "harmful_reward", "GRPO-S: reward, harmful"),
        ("grpo", "helpful_reward", "GRPO-S: reward, harmless"),
        ("grpo", "harmful_refused", "GRPO-S: samples refused, harmful"),
        ("grpo", "helpful_refused", "GRPO-S: samples refused, harmless"),
        ("grpo", "kl", "GRPO-S: KL to the warm start (k3)"),
        ("grpo", "alpha", "GRPO-S: alpha, each prompt"),
    ]
    fig, axes = plt.subplots(2, 4, figsize=(15, 6))
    for ax, (stage, key, title) in zip(axes.flat, wanted):
        mine = [r for r in records if r["stage"] == stage and key in r]
        if key == "alpha":
            ax.plot(
                [r["step"] for r in mine for _ in r[key]],
                [a for r in mine for a in r[key]],
                ".",
                ms=3,
            )
        elif stage == "irl":
            for model in dict.fromkeys(r["model"] for r in mine):
                part = [r for r in mine if r["model"] == model]
                ax.plot(
                    [r["step"] for r in part],
                    [r[key] for r in part],
                    ".-",
                    ms=3,
                    lw=0.7,
                    label=model,
                )
            if mine:
                ax.legend(fontsize=6)
        else:
            ax.plot([r["step"] for r in mine], [r[key] for r in mine])
        ax.set(title=title, xlabel="step")
        ax.title.set_fontsize(9)
    fig.tight_layout()
    save(fig, folder / "curves.png")
    plt.close(fig)
    return ["refusals.png", "curves.png"]


def picture_of_balance(path: Path, before: dict[str, int], after: dict[str, int]) -> None:
    """Two bars a category: the pool's rows and the balanced ones."""
    if not (plt := pyplot()):
        return
    fig, ax = plt.subplots(figsize=(8, 3))
    for i, (name, n) in enumerate((("pool", before), ("balanced", after))):
        ax.bar_label(
            ax.bar([g + 0.4 * i - 0.2 for g in range(len(n))], list(n.values()), 0.4, label=name),
            fontsize=7,
        )
    ax.set_xticks(range(len(before)), [name.replace("_", " ") for name in before], fontsize=8)
    ax.set(ylabel="demonstrations")
    ax.legend(frameon=False)
    save(fig, path, bbox_inches="tight")
    plt.close(fig)


def write_report(folder: Path, results: list[dict], records: list[dict], notes: list[str]) -> str:
    """report.md, results.json and the pictures; returns the table."""
    text = table(results)
    images = "\n\n".join(f"![{name}]({name})" for name in pictures(folder, results, records))
    lines = [
        "# DR-IRL: before and after",
        "",
        *notes,
        "",
        text,
        "",
        images,
        "",
        "## Samples, chosen by position",
        samples_side_by_side(results),
        "",
    ]
    write(
        {
            folder / "report.md": "\n".join(lines),
            folder / "results.json": json.dumps(results, ensure_ascii=False, indent=1) + "\n",
        }
    )
    return text


def check_judge(rows: list[dict]) -> str:
    """Markdown: the judge's verdicts on responses against their labels, agreement and recall of each label with 95% Wilson intervals; the readers' own agreement.

    rows: {"response", "label", "readers": the labels that two readers gave, blind to each other and to the judge}.
    """
    found = [(r["label"], judge(r["response"])) for r in rows]
    lines = [
        "| label \\ judge | " + " | ".join(VERDICTS) + " | recall, % [95% interval] |",
        "|---" * (len(VERDICTS) + 2) + "|",
    ]
    for label in VERDICTS:
        counts = [found.count((label, verdict)) for verdict in VERDICTS]
        lines.append(
            f"| {label} | "
            + " | ".join(map(str, counts))
            + f" | {percent([counts[VERDICTS.index(label)], sum(counts)])} |"
        )
    readers = sum(a == b for a, b in (r["readers"] for r in rows))
    return "\n".join(
        [
            *lines,
            "",
            f"agreement {percent([sum(a == b for a, b in found), len(rows)])} of {len(rows)}; the two readers with each other {percent([readers, len(rows)])}",
        ]
    )


if __name__ == "__main__":
    try:
        if sys.argv[1:] == ["--check-judge"]:
            print(
                check_judge(
                    [
                        parse_json(line)
                        for line in read_text(
                            Path(__file__).parent / "corpus/judged.jsonl"
                        ).splitlines()
                    ]
                )
            )
        else:
            print(
                means([read_json(Path(folder) / "results.json", list) for folder in sys.argv[1:]])
            )
    except UserError as e:
        print(f"evaluate: {e}", file=sys.stderr)
        sys.exit(2)
