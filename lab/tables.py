"""Tables, intervals and pictures of recorded runs: train.sh's, and the grid's (lab/grid.py).

    python -m lab.tables [RUN ...]          RESULTS.md and its pictures of refusals
    python -m lab.tables claims [RUN ...]   a JSON line a claim
    python -m lab.tables curves RUN ...     results/curves.png, of several seeds of train.sh
    python -m lab.tables runs RUN ...       several runs of train.sh: means, and curves side by side

RUN is the folder of a run or of a grid. Its lines, one a model, join results/runs.jsonl, in place
of those of the same setting, variant and seed. Claims of named folders count these alone.

A claim is about the difference of two variants: the mean over seeds of (harmful refused -
look-alikes refused), in points. It has two 95% intervals: a bootstrap over seeds and prompts, which
stay paired, and Student's over the seeds, as a bootstrap of five is too narrow. "yes": both exclude
zero; "yes, on these prompts": Student's does. Bars in pictures: Wilson's, for one seed's prompts.
"""

import math
import re
import sys
from pathlib import Path

import numpy as np

from config import UserError
from data import CATEGORIES, HELPFUL
from evaluate import COLUMNS, KINDS, markdown, percent, verdicts
from support.files import as_json, read_json, read_records, write
from support.report import picture_of_curves, picture_of_refusals, pyplot
from support.resume import refuse_differences

LAB = Path(__file__).parent
START, DRIRL, STATIC = "SFT warm start", "product (DR-IRL)", "7RW static"
CONTINUED, BORROWED = "SFT continued (time)", "SFT on borrowed (time)"
RFT, DPO, ANCHORS = "RFT", "DPO", "anchors alone"
RIVALS = (START, CONTINUED, RFT, ANCHORS, BORROWED, DPO, STATIC, "sum", "linear integration")
CLAIMS = [(DRIRL, v) for v in (*RIVALS, "unbalanced")]  # (better, worse)
CLAIMS += [(v, STATIC) for v in ("data hardness", "model responsiveness", "spread (ours)")]
CLAIMS += [(STATIC, "1RW static"), (STATIC, CONTINUED), (START, CONTINUED)]
SHOWN = ("base", START, DRIRL, CONTINUED, RFT, ANCHORS)
NAMES = {DRIRL: "DR-IRL", START: "its start", CONTINUED: "SFT continued", STATIC: "static"}
RUNS = {"base": ("base", ()), "SFT warm start": (START, ("sft",))}  # results.json's names
RUNS |= {"DR-IRL from it": (DRIRL, ("sft", "irl", "grpo"))}
RUNS |= {"SFT continued": (CONTINUED, ("sft", "baseline"))}
# 97.5% quantiles of Student's t for 2 to 9 degrees of freedom
STUDENT = (4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def grouped(records: list[dict]) -> dict:
    """{setting: {variant: lines}}, in the order of the lines."""
    out = {}
    for r in records:
        out.setdefault(r["setting"], {}).setdefault(r["variant"], []).append(r)
    return out


def difference(a: list[dict], b: list[dict]) -> tuple:
    """a's points minus b's, same seeds and prompts: mean, bootstrap's ends, half of Student's."""
    rng, n, by_seed, drawn = np.random.default_rng(0), len(a), np.zeros(len(a)), np.zeros(4000)
    seeds = rng.integers(n, size=(len(drawn), n))
    for sign, kind in ((100, "harmful"), (-100, "lookalike")):
        refused = lambda line: np.array([v == "r" for v in line["verdicts"][kind]], float)
        gain = np.stack([refused(x) - refused(y) for x, y in zip(a, b, strict=True)])
        prompts = rng.integers(gain.shape[1], size=(len(drawn), gain.shape[1]))
        drawn += sign * np.array([gain[s].mean(0)[p].mean() for s, p in zip(seeds, prompts)])
        by_seed += sign * gain.mean(1)  # gain (seeds, prompts)
    return by_seed.mean(), *np.percentile(drawn, (2.5, 97.5)), half_width(by_seed)


def claim(variants: dict, better: str, worse: str) -> dict:
    """A claim: its name, seeds, points, two intervals; {} without lines of both variants."""
    a, b = ({r["seed"]: r for r in variants.get(v, [])} for v in (better, worse))
    seeds = sorted(a.keys() & b.keys())
    if not seeds or not all(a[seeds[0]]["verdicts"][k] for k in ("harmful", "lookalike")):
        return {}
    mean, low, high, half = difference([a[s] for s in seeds], [b[s] for s in seeds])
    by_seed = None if half == math.inf else [round(mean - half, 2), round(mean + half, 2)]
    name = " over ".join(NAMES.get(v, v) for v in (better, worse))
    found = {"claim": name, "seeds": len(seeds), "points": round(mean, 2)}
    return found | {"by_seed": by_seed, "over_prompts": [round(low, 2), round(high, 2)]}


def half_width(values) -> float:
    """Half of Student's 95% interval of the mean; infinite for fewer than three values."""
    n = len(values)
    return STUDENT[min(n, 10) - 3] * np.std(values, ddof=1) / math.sqrt(n) if n > 2 else math.inf


def plus_minus(values: list[float], digits: int) -> str:
    """A mean over seeds, ± half of Student's interval; - for none."""
    if not values:
        return "-"
    told = f"{np.mean(values):.{digits}f}"
    return f"{told} ± {half_width(values):.{digits}f}" if len(values) > 2 else told


def claim_row(c: dict) -> list:
    """Cells of a claim's row in the tables; the last says whether it is shown."""
    over, by_seed = c["over_prompts"], c["by_seed"]
    shown = "yes" if c["points"] > 0 else "no: worse"
    shown += "" if over[0] > 0 or over[1] < 0 else ", on these prompts"
    if not by_seed or by_seed[0] <= 0 <= by_seed[1]:
        shown = "not shown"
    ends = lambda pair: f"[{pair[0]:+.1f}, {pair[1]:+.1f}]" if pair else "-"
    return [c["claim"], c["seeds"], f"{c['points']:+.1f}", ends(over), ends(by_seed), shown]


def share(lines: list[dict], name: str) -> float:
    """A rate in percent of the prompts, its mean over the lines."""
    return 100 * np.mean([hits / max(1, n) for hits, n in (r["rates"][name] for r in lines)])


def cell(lines: list[dict], name: str) -> str:
    """A rate, ± by seed; with its Wilson interval if all seeds have the same, as of one model."""
    rates = [share([line], name) for line in lines]
    return plus_minus(rates, 0) if len(set(rates)) > 1 else percent(lines[0]["rates"][name])


def tables_of(variants: dict) -> str:
    """Markdown: all tables of one setting."""
    head = ["variant", "seeds", "refused, %: harmful", *COLUMNS[1:], "gibberish %", "seconds"]
    rows, categories, aucs, chosen, names = [], [], [], [], ("harmful", *CATEGORIES, HELPFUL)
    for variant, lines in variants.items():
        if fitted := [r["auc"] for r in lines if "auc" in r]:
            found = [[f[n] for f in fitted if n in f] for n in names]
            known = [[x["auc"] for x in f if x["auc"] is not None] for f in found]
            aucs.append([variant, *(plus_minus(x, 2) for x in known)])
            right = [plus_minus([100 * x["right"] for x in f], 0) for f in found]
            best = [plus_minus([100 * x["best_right"] for x in f], 0) for f in found]
            chosen.append([variant, *(f"{a} → {b}" for a, b in zip(right, best))])
        if "rates" not in lines[0]:  # rewards alone
            continue
        cells = [cell(lines, kind) for kind in KINDS]
        points = share(lines, "harmful") - share(lines, "lookalike")
        cells += [f"{points:.1f}", f"{share(lines, 'gibberish'):.1f}"]
        seconds = np.mean([sum(r["seconds"].values()) for r in lines])
        rows.append([variant, len(lines), *cells, f"{seconds:.0f}"])
        categories.append([variant, *(f"{share(lines, c):.0f}" for c in CATEGORIES)])
    told = [claim_row(c) for pair in CLAIMS if (c := claim(variants, *pair))]
    out = [(head, rows), (["claim", "seeds", "points", "bootstrap", "by seed", "verdict"], told)]
    out += [(["harmful refused, %", *CATEGORIES], categories)]
    out += [(["AUC of the rewards, within a prompt", *names], aucs)]
    out += [(["right, %: samples → the best of four by reward", *names], chosen)]
    return "\n\n".join(markdown(*table) for table in out if table[1])


def pictures(results: dict) -> None:
    """What the SHOWN variants refuse in each category, a picture a setting."""
    names = *CATEGORIES, *KINDS
    for setting, variants in results.items() if pyplot() else ():
        rows = []
        for v in filter(variants.get, SHOWN):
            name, lines = f"{v}, {len(variants[v])} seeds", variants[v]
            asked = {k: lines[0]["rates"][k][1] for k in names}  # prompts, the same in all seeds
            rates = {k: [share(lines, k) / 100 * n, n] for k, n in asked.items()}
            rows.append({"name": name, "rates": rates})
        if rows:
            picture_of_refusals(LAB / f"results/{setting}.png", rows)


def curves(folders: list[Path], path: Path, apart: bool) -> None:
    """The curves of several runs of train.sh: together, as of several seeds, or each apart."""
    records = []
    for folder in folders:
        label = {"model": "/".join(folder.parts[-2:])} if apart else {}
        records += [{**r, **label} for r in read_records(folder / "metrics.jsonl")]
    if records and pyplot():
        picture_of_curves(path, records)
        print(f"{path} has the curves")


def lines_of(folder: Path) -> list[dict]:
    """The lines of a grid, or those of a run that train.sh made: its recipe is the setting."""
    if (grid := folder / "results.jsonl").exists():
        return read_records(grid, "variant")
    done, lines = read_json(folder / "done/eval.json", dict), []
    about = {"setting": read_json(folder / "config.json", dict)["run"]["recipe"] or "paper"}
    about |= {"settings": done["settings"], "seed": done["settings"]["--seed"]}
    for model in read_json(folder / "results.json", list):
        if (name := model["name"]) not in RUNS:
            raise UserError(f"{folder}: train.sh makes no model {name!r}: see results.json")
        variant, stages = RUNS[name]
        seconds = {s: read_json(folder / f"done/{s}.json", dict)["seconds"] for s in stages}
        line = {**about, "variant": variant, "verdicts": verdicts(model["answers"])}
        lines.append({**line, "rates": model["rates"], "seconds": seconds, "code": done["code"]})
    return lines


def means(runs: list[list[dict]]) -> str:
    """Markdown: each model's percentages, the mean over runs (results.json of each) and each."""
    if len({tuple(m["name"] for m in models) for models in runs}) > 1:
        raise UserError("these runs evaluated different models: compare those of the same stages")
    rows, names = [], (*KINDS, "gibberish")
    for models in zip(*runs):
        known = lambda m, name: share([m], name) if m["rates"][name][1] else math.nan
        cells = [[known(m, name) for m in models] for name in names]
        cells.insert(3, [a - b for a, b in zip(cells[0], cells[2])])
        told = [f"**{np.mean(c):.1f}** ({', '.join(f'{x:.1f}' for x in c)})" for c in cells]
        rows.append([models[0]["name"], *(x.replace("nan", "-") for x in told)])
    return markdown(["refused, %: mean (each run)", *COLUMNS, "gibberish %"], rows)


def fill(page: str, results: dict) -> str:
    """The page with the tables between <!-- SETTING --> and <!-- end --> made anew."""
    for setting, variants in results.items():
        text = f"<!-- {setting} -->\n{tables_of(variants)}\n<!-- end -->"
        page = re.sub(f"<!-- {setting} -->.*?<!-- end -->", lambda _: text, page, flags=re.S)
    return page


def main(argv: list[str]) -> None:
    folders = [*map(Path, argv[1:])]
    if argv[:1] in (["curves"], ["runs"]) and not folders:
        raise UserError(f"{argv[0]}: of which runs?")
    if argv[:1] == ["curves"]:
        return curves(folders, LAB / "results/curves.png", apart=False)
    if argv[:1] == ["runs"]:
        print(means([read_json(folder / "results.json", list) for folder in folders]))
        return curves(folders, folders[-1] / "compared.png", apart=True)
    kept, page, told = LAB / "results/runs.jsonl", LAB / "RESULTS.md", argv[:1] == ["claims"]
    lines = [r for folder in argv[told:] for r in lines_of(Path(folder))]
    old = [] if told and lines else read_records(kept, "variant")
    records = [*{(r["setting"], r["variant"], r["seed"]): r for r in [*old, *lines]}.values()]
    if not records:
        raise UserError("no results yet: python -m lab.grid --run runs/grid")
    for flag in ("--model", "text of --prompts", "--eval-prompts"):
        some = [r for r in records if flag != "--eval-prompts" or "rates" in r]
        if len(found := {str(r["settings"].get(flag)) for r in some}) > 1:
            raise UserError(f"several values of {flag}: {', '.join(map(repr, sorted(found)))}")
    alike = {}
    for r in records:
        what, settings = f"{r['setting']}, {r['variant']}", {**r["settings"], "--seed": None}
        refuse_differences(alike.setdefault(what, settings), settings, what, "compare like runs")
    if told:
        for setting, variants in grouped(records).items():
            for pair in CLAIMS:
                if found := claim(variants, *pair):
                    print(as_json({"setting": setting, **found}, None), end="")
        return
    text = fill(page.read_text(encoding="utf-8"), grouped(records))
    if lost := [s for s in grouped(records) if f"<!-- {s} -->" not in text]:
        raise UserError(f"RESULTS.md: want <!-- {lost[0]} --> and <!-- end --> for its tables")
    write({kept: "".join(as_json(r, None) for r in records), page: text})
    pictures(grouped(records))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as e:
        sys.exit(f"tables: {e}")
