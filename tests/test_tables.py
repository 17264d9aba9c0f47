"""lab/tables.py and lab/check_judge.py: the statistics, the tables, RESULTS.md."""

import json
import math
import re
from contextlib import suppress
from statistics import NormalDist

import numpy as np
import pytest

from config import UserError
from data import CATEGORIES, HELPFUL
from lab import tables
from lab.check_judge import check_judge
from lab.tables import CONTINUED, DRIRL, START, claim, claim_row, difference, means
from support import report


def line(harmful, lookalike, seed=0, variant=START, **more):
    """A line of results with these verdicts."""
    verdicts = {"harmful": harmful, "ordinary": "c" * 4, "lookalike": lookalike}
    rates = {kind: [v.count("r"), len(v)] for kind, v in verdicts.items()}
    rates |= {**{c: [1, 2] for c in CATEGORIES}, "gibberish": [1, 10]}
    head = {"setting": "few-8", "variant": variant, "seed": seed, "settings": {"--model": "m"}}
    body = {"verdicts": verdicts, "rates": rates}
    return {**head, **body, "seconds": {"sft": 60, "grpo": 40}, **more}


def test_difference():
    """Two seeds by hand: +1 of 4 harmful, then 0; look-alikes -1 of 2, then 0."""
    a, b = [line("rrrc", "cc"), line("rpcc", "rc")], [line("rrcc", "rc"), line("rcpc", "rp")]
    mean, low, high, half = difference(a, b)
    assert mean == pytest.approx(25 / 2 + 50 / 2) and low <= mean <= high and half == math.inf
    three = difference(a + a[1:], b + b[1:])  # 75, 0 and 0: s = 25 sqrt 3
    assert three[3] == pytest.approx(4.303 * 25)
    assert difference(b, a)[0] == pytest.approx(-37.5) and difference(a, a)[:3] == (0, 0, 0)
    some, none = [line("r" * 60 + "c" * 40, "c")] * 5, [line("r" * 50 + "c" * 50, "c")] * 5
    mean, low, high, half = difference(some, none)
    assert (mean, half) == (pytest.approx(10), 0)
    assert (low, high) == pytest.approx((5, 16), abs=1)  # quantiles of a binomial of 100 and .1
    with pytest.raises(ValueError):
        difference(a, b[:1])


def test_seeds_widen_the_interval():
    """The same prompts gained by every seed, or all of them by one seed of four: perhaps luck."""
    none, every = line("c" * 80, "c"), line("r" * 80, "c")
    steady = difference([line("r" * 20 + "c" * 60, "c")] * 4, [none] * 4)
    lucky = difference([every, none, none, none], [none] * 4)
    assert steady[0] == lucky[0] == pytest.approx(25)
    assert lucky[1] == 0 < steady[1] and lucky[2] > steady[2]


def verdict(a, b):
    by_seed = [[{**r, "seed": i} for i, r in enumerate(x)] for x in (a, b)]
    return claim_row(claim(dict(zip("ab", by_seed)), "a", "b"))[-1]


def test_claim():
    """A clear gain in three seeds; in two, which say little; seeds that disagree; the reverse."""
    none, some, more = (line("r" * n + "c" * (40 - n), "c") for n in (0, 20, 22))
    assert verdict([some, more, some], [none] * 3) == "yes"
    assert verdict([some, more], [none] * 2) == "not shown"
    assert verdict([none] * 3, [some, more, some]) == "no: worse"
    assert verdict([some, none, none], [none] * 3) == "not shown"
    few = [line("rrr" + "c" * 97, "c")] * 3  # one bootstrap in twenty draws none of the three
    assert verdict(few, [line("c" * 100, "c")] * 3) == "yes, on these prompts"
    assert claim({"a": [some], "b": [{**some, "seed": 1}]}, "a", "b") == {}


def found():
    facts = lambda auc: {"auc": auc, "right": 0.5, "best_right": 0.8}
    auc = {"crime": facts(0.75), "insult": facts(None), HELPFUL: facts(1.0)}
    start = [line("r" * 10 + "c" * 10, "rrcc", s, auc=auc) for s in range(3)]
    answered = ("cccc", "rccc", "rccc")
    return start + [line("r" * 19 + "c", answered[s], s, DRIRL) for s in range(3)]


def write(path, records):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def test_tables_and_picture(tmp_path, monkeypatch):
    """From made-up lines: numbers by hand, a page that is filled, a picture."""
    monkeypatch.setattr(tables, "LAB", tmp_path)
    (tmp_path / "results").mkdir()
    text = (
        "Before\n<!-- few-8 -->\nold\n<!-- end -->\n<!-- tail -->\nNot run.\n<!-- end -->\nafter\n"
    )
    (tmp_path / "RESULTS.md").write_text(text)
    with pytest.raises(UserError, match="no results yet"):
        tables.main([])
    of_some = {"--model": "m", "--eval-prompts": 328}  # they may be fewer
    alone = line("", "", variant="1RW: rewards", auc=found()[0]["auc"], settings=of_some)
    alone = {k: x for k, x in alone.items() if k not in ("verdicts", "rates")}
    write(tmp_path / "grid/results.jsonl", [*found(), alone])
    tables.main([str(tmp_path / "grid")])
    page = (tmp_path / "RESULTS.md").read_text()
    # 45 + (50 + 25 + 25) / 3
    assert "| DR-IRL over its start | 3 | +78.3 | [" in page and "| yes |" in page
    cells = "50 [30, 70] | 0 [0, 49] | 50 [15, 85] | 0.0 | 10.0 | 100"
    assert f"| {START} | 3 | {cells} |" in page  # the same in all seeds
    assert f"| {DRIRL} | 3 | 95 [76, 99] | 0 [0, 49] | 17 ± 36 | 78.3 |" in page
    assert f"| {START} | - | - | - | 0.75 ± 0.00 | - | - | - | - | 1.00 ± 0.00 |" in page
    assert "| 1RW: rewards | - | - | - | 0.75 | - | - | - | - | 1.00 |" in page
    assert page.count("1RW: rewards") == 2  # no rates
    assert page.endswith("<!-- tail -->\nNot run.\n<!-- end -->\nafter\n") and "old" not in page
    assert {p.name for p in (tmp_path / "results").iterdir()} == {"runs.jsonl", "few-8.png"}
    tables.main([])
    assert (tmp_path / "RESULTS.md").read_text() == page
    again = line("r" * 20, "cccc", 0, DRIRL)  # 5 points more in seed 0, in place of its line
    write(tmp_path / "later/results.jsonl", [again])
    tables.main([str(tmp_path / "later")])
    assert "| DR-IRL over its start | 3 | +80.0 | [" in (tmp_path / "RESULTS.md").read_text()
    assert len((tmp_path / "results/runs.jsonl").read_text().splitlines()) == 7
    write(tmp_path / "other/results.jsonl", [{**again, "settings": {"--model": "another"}}])
    with pytest.raises(UserError, match="several values of --model: 'another', 'm'"):
        tables.main([str(tmp_path / "other")])
    before = (tmp_path / "results/runs.jsonl").read_text()
    settings = {
        "--model": "m",
        "--seed": 5,
        "--grpo-lr": 9.0,
    }  # of the first, --grpo-lr alone counts
    write(tmp_path / "other/results.jsonl", [{**again, "settings": settings}])
    with pytest.raises(
        UserError, match="few-8, product .DR-IRL.: .*--grpo-lr 9.0 there, None here"
    ):
        tables.main([str(tmp_path / "other")])
    write(tmp_path / "other/results.jsonl", [{**again, "setting": "few-9"}])
    with pytest.raises(UserError, match="RESULTS.md: want <!-- few-9 --> and <!-- end -->"):
        tables.main([str(tmp_path / "other")])
    assert (tmp_path / "results/runs.jsonl").read_text() == before


def test_runs_of_train_sh(tmp_path, capsys):
    """Lines of run folders: 20 points of harmful prompts, 25 of look-alikes, in both seeds."""
    answers = lambda kinds: [
        {"kind": kind, "verdict": "refuses" if v == "r" else "complies"}
        for kind, told in kinds.items()
        for v in told
    ]
    for seed in (0, 1):
        rates = line("c", "c")["rates"]
        told = {"base": ("ccccc", "cccc"), "SFT warm start": ("rcccc", "rrcc")}
        told |= {"DR-IRL from it": ("rrccc", "rccc"), "SFT continued": ("rcccc", "rrcc")}
        results = [
            {"name": name, "rates": rates, "answers": answers({"harmful": h, "lookalike": x})}
            for name, (h, x) in told.items()
        ]
        folder = tmp_path / f"run-{seed}"
        (folder / "done").mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(results))
        (folder / "config.json").write_text(json.dumps({"run": {"recipe": "laptop-few"}}))
        for n, stage in enumerate(("sft", "irl", "grpo", "baseline", "eval")):
            done = {"settings": {"--seed": seed, "--model": "m"}, "code": "c", "seconds": 10**n}
            (folder / f"done/{stage}.json").write_text(json.dumps(done))
    made = {(r["variant"], r["seed"]): r for r in tables.lines_of(tmp_path / "run-1")}
    assert set(made) == {(v, 1) for v in ("base", START, DRIRL, CONTINUED)}
    assert made[DRIRL, 1]["verdicts"] == {"harmful": "rrccc", "ordinary": "", "lookalike": "rccc"}
    assert sum(made[DRIRL, 1]["seconds"].values()) == 111
    assert sum(made[CONTINUED, 1]["seconds"].values()) == 1001 and not made["base", 1]["seconds"]
    (tmp_path / "run-1/config.json").write_text(json.dumps({"run": {"recipe": ""}}))
    assert {r["setting"] for r in tables.lines_of(tmp_path / "run-1")} == {"paper"}
    (tmp_path / "run-1/config.json").write_text(json.dumps({"run": {"recipe": "laptop-few"}}))
    tables.main(["claims", *(str(tmp_path / f"run-{n}") for n in (0, 1))])
    first = json.loads(capsys.readouterr().out.splitlines()[0])
    assert (first["claim"], first["points"]) == ("DR-IRL over its start", 45)
    assert (first["setting"], first["seeds"], first["by_seed"]) == ("laptop-few", 2, None)
    assert "AUC" not in tables.tables_of({START: [made[START, 1]]})  # without rewards
    (tmp_path / "run-0/results.json").write_text(json.dumps([{"name": "mine"}]))
    with pytest.raises(UserError, match="run-0: train.sh makes no model 'mine'"):
        tables.lines_of(tmp_path / "run-0")


def test_best_of_four(tmp_path):
    """Samples right .5, the best of four .7, .8 and .9 by seed: 80 and 4.303 * 10 / sqrt(3)."""
    records = [r for r in found() if r["variant"] == START]
    for r, best in zip(records, (0.7, 0.8, 0.9)):
        facts = {"auc": None, "right": 0.5, "best_right": best}
        r["auc"] = {k: facts for k in ("harmful", *CATEGORIES, HELPFUL) if k != "insult"}
    page = tables.tables_of({START: records})
    even = "50 ± 0 → 80 ± 25"
    cells = [even, "- → -", *[even] * 7]  # a category without prompts keeps its place
    assert f"| {START} | " + " | ".join(cells) + " |" in page
    assert tables.plus_minus([0.5, 0.7], 2) == "0.60" and tables.plus_minus([], 1) == "-"


def test_claims_as_lines(tmp_path, capsys):
    """Three seeds by hand: +45 points of harmful prompts, +50, +25, +25 of look-alikes."""
    write(tmp_path / "some/results.jsonl", found())
    tables.main(["claims", str(tmp_path / "some")])
    (said,) = map(json.loads, capsys.readouterr().out.splitlines())
    low, high = said.pop("by_seed")
    half = 4.303 * (25**2 / 3) ** 0.5 / 3**0.5  # s of 50, 25, 25 is 25 / sqrt 3
    assert (low, high) == pytest.approx((78.33 - half, 78.33 + half), abs=0.02)
    low, high = said.pop("over_prompts")
    assert 30 < low < 78.33 < high < 145
    wanted = {"setting": "few-8", "claim": "DR-IRL over its start", "seeds": 3, "points": 78.33}
    assert said == wanted


def test_results_are_up_to_date():
    """RESULTS.md holds the tables of results/runs.jsonl, and shows the pictures there are.

    It has at most 2,000 words beside its tables.
    """
    page = (tables.LAB / "RESULTS.md").read_text(encoding="utf-8")
    records = tables.read_records(tables.LAB / "results/runs.jsonl", "variant")
    assert tables.fill(page, tables.grouped(records)) == page
    marked = set(re.findall(r"<!-- ([\w-]+) -->", page)) - {"end"}
    assert {r["setting"] for r in records} == marked
    shown = {f"results/{p.name}" for p in (tables.LAB / "results").glob("*.png")}
    assert shown == set(re.findall(r"\]\((results/[\w-]+\.png)\)", page))
    prose = re.sub(r"(?s)<!-- (?!end)[\w-]+ -->.*?<!-- end -->", "", page)
    assert len(prose.split()) <= 2000


def test_numbers_of_the_text():
    """The figures that RESULTS.md, and attempts.md of its claims, tell beside the tables."""
    read = lambda name: tables.read_records(tables.LAB / f"results/{name}.jsonl", "variant")
    records = read("runs") + read("earlier")
    text, attempts = (
        " ".join((tables.LAB / name).read_text(encoding="utf-8").split())
        for name in ("RESULTS.md", "attempts.md")
    )
    by = {(r["setting"], r["variant"], r["seed"]): r for r in records}
    tried = []  # told in attempts.md: of the recipes without extrapolation
    rate = lambda r, kind: 100 * r["rates"][kind][0] / r["rates"][kind][1]
    gap = lambda r: rate(r, "harmful") - rate(r, "lookalike")
    measured = lambda of: (
        lambda *key: [of(by[(*key, seed)]) for seed in range(5) if (*key, seed) in by]
    )
    gaps, ordinary = measured(gap), measured(lambda r: rate(r, "ordinary"))
    harmful, lookalike = (measured(lambda r, k=k: rate(r, k)) for k in ("harmful", "lookalike"))
    minus = lambda x, y: [a - b for a, b in zip(x, y, strict=True)]
    mean = lambda x: sum(x) / len(x)
    each = lambda values: ", ".join(f"{x:+.1f}" for x in values)
    # claimed: at least this in each seed, and this on the mean
    claimed = {"laptop-first": (0, 0), "laptop-few-first": (5, 10)}
    claimed |= {"laptop": (0, 3), "laptop-few": (0, 8)}
    gain, told = {k: minus(gaps(k, DRIRL)[:3], gaps(k, START)[:3]) for k in claimed}, []
    for (least, on_the_mean), x in zip(claimed.values(), gain.values()):
        met = "met" if min(x) >= least and mean(x) >= on_the_mean else "not met"
        (told if on_the_mean in (3, 8) else tried).append(f"**{met}**: {mean(x):+.1f} ({each(x)})")
    percent = measured(lambda r: rate(r, "gibberish"))
    first = [mean(percent(k, DRIRL)[:3]) for k in ("laptop-first", "laptop-few-first")]
    tried.append("laptop {:.1f}%, laptop-few {:.1f}%, base ".format(*first))
    assert {round(x) for k in claimed for x in percent(k, "base")} == {8}
    tried.append("base 8% (readers")
    asked = "laptop-few gained {:.1f} points (asked: 10), laptop {:.1f}, and lost in one seed"
    told.append(asked.format(mean(gain["laptop-few-first"]), mean(gain["laptop-first"])))
    x = percent("laptop", DRIRL)
    told.append(f"in seed {x.index(max(x))}: {max(x):.1f}% (mean {mean(x):.1f}%)")
    for k, page in (("laptop-first", tried), ("laptop", told)):
        page.append("ordinary met: " + ", ".join(f"{x:.1f}" for x in ordinary(k, DRIRL)) + "%")
    for rival in (START, CONTINUED, tables.RFT):
        x = minus(gaps("laptop-few-first", DRIRL), gaps("laptop-few-first", rival))
        assert len(x) == 5
        tried.append(f"{mean(x):+.1f} ({each(x)})")
        ends = claim(tables.grouped(records)["laptop-few-first"], DRIRL, rival)["by_seed"]
        tried.append("[{:+.1f}, {:+.1f}] over ".format(*ends))
    lead = gaps("laptop-few-first", DRIRL)[1] - gaps("laptop-few-first", tables.STATIC)[0]
    told.append(f"(*7RW static*) is {lead:+.1f} in one seed, without extrapolation")
    lead = minus(gaps("laptop", DRIRL), gaps("six-updates", DRIRL))
    old = mean(minus(gaps("six-updates", DRIRL), gaps("six-updates", START)))
    told.append(f"**not met**: {mean(lead):+.1f} ({each(lead)}); that recipe gained {old:+.1f}")
    change = lambda of, key: minus(of(key, DRIRL), of(key, START))
    moved = [change(of, "laptop") for of in (harmful, ordinary, lookalike)]
    words = "refused {:+.1f} points, ordinary {:+.1f}, look-alikes {:+.1f}"
    told.append(words.format(*map(mean, moved)))
    lost, *moved = (change(of, "laptop-few") for of in (harmful, ordinary, lookalike))
    assert max(lost) < 0 and len(lost) == 5
    half = tables.half_width(lost)
    words = "refused {:+.1f} points (fewer in each seed; [{:+.1f}, {:+.1f}]), ordinary {:+.1f}"
    words = words.format(mean(lost), mean(lost) - half, mean(lost) + half, mean(moved[0]))
    told.append(f"{words}, look-alikes {mean(moved[1]):+.1f}")
    again = minus(gaps("laptop-few-again", DRIRL), gaps("laptop-few-again", START))
    tried.append("code, gained {:+.1f}, {:+.1f} and {:+.1f}.".format(*again))
    mixed = {  # the repeats in place of seeds 0 to 2
        v: [by["laptop-few-again" if n < 3 else "laptop-few-first", v, n] for n in range(5)]
        for v in (DRIRL, START)
    }
    x = claim(mixed, DRIRL, START)
    tried.append(
        "not shown: {:+.1f}, by seed [{:+.1f}, {:+.1f}]".format(x["points"], *x["by_seed"])
    )
    five = claim(tables.grouped(records)["laptop-few"], DRIRL, START)
    last = minus(gaps("laptop-few", DRIRL), gaps("laptop-few", START))[3:]
    told.append(f"**met**: {five['points']:+.1f} (seeds 3 and 4: {each(last)})")
    told.append(f"five seeds, {five['points']:+.1f} points over its start and")
    assert five["over_prompts"][0] > 0 and five["by_seed"][0] > 0 and five["seeds"] == 5
    known = lambda v: [n for n in range(5) if ("laptop-few", v, n) in by]
    lead = lambda a, b: [
        gap(by["laptop-few", a, n]) - gap(by["laptop-few", b, n]) for n in known(a) if n in known(b)
    ]
    for rival in (CONTINUED, tables.RFT, tables.ANCHORS):
        x, (seeds, least) = lead(DRIRL, rival), (4, 3) if rival == tables.ANCHORS else (5, 0)
        told.append(f"**met**: {mean(x):+.1f} ({each(x)})")
        assert len(x) == seeds and mean(x) > least
    for rival, seeds in ((START, "0 to 2"), (CONTINUED, "0 and 1"), (tables.RFT, "0 and 1")):
        runs = [[by.get(("few-8", v, n)) for n in range(5)] for v in (DRIRL, rival)]
        x = [gap(a) - gap(b) for a, b in zip(*runs) if a and b]
        told.append(f"seeds {seeds} so far: {each(x)} |")
    x = claim(tables.grouped(records)["laptop-few"], DRIRL, CONTINUED)
    assert x["seeds"] == 5 and x["by_seed"][0] > 0 < x["over_prompts"][0]
    told.append(f"and {x['points']:+.1f} over SFT continued, both shown")
    told.append(f"It ends {mean(lead(START, CONTINUED)):.1f} points below its start (not shown)")
    steps = [
        50 * (s["irl"] + s["grpo"]) / s["sft"]
        for s in (by["laptop-few", DRIRL, n]["seconds"] for n in (0, 1, 2, 3))
    ]
    told.append(f", not {min(steps):.0f} to {max(steps):.0f})")
    more = []
    for n in range(5):
        ours, theirs = (by["laptop-few", v, n]["seconds"] for v in (DRIRL, CONTINUED))
        more.append(100 * (theirs["baseline"] / (ours["irl"] + ours["grpo"]) - 1))
    longer = "took {:.0f} to {:.0f}% longer than IRL and GRPO-S; seed 4, beside tests, {:.0f}%"
    told.append(longer.format(min(more[:4]), max(more[:4]), more[4]))
    moved = [f"{x:+.1f}" for x in lead(tables.ANCHORS, START)]
    told.append(f"moves its start by {', '.join(moved[:-1])} and {moved[-1]} points")
    means = mean(lead(tables.ANCHORS, START)), mean(lead(DRIRL, START)[:4])
    told.append("{:.1f} on the mean, DR-IRL by {:.1f}.".format(*means))
    z = lambda r, kind: NormalDist().inv_cdf(
        (r["rates"][kind][0] + 0.5) / (r["rates"][kind][1] + 1)
    )
    d = measured(lambda r: z(r, "harmful") - z(r, "lookalike"))
    more = tables.plus_minus(minus(d("laptop-few", DRIRL), d("laptop-few", START)), 2)
    told.append(f"of the threshold leaves alone, the gain is +{more}.")
    more = mean(gain["laptop"]) - mean(gain["laptop-first"])
    told.append(f"the gain was {more:.1f} less")
    ahead = mean(minus(gaps("laptop-few-first", START), gaps("laptop-few-first", CONTINUED)))
    tried.append(f"SFT continued ended {ahead:.1f} points below its start")
    logged = tables.read_records(tables.LAB / "results/metrics.jsonl")
    held = [r for r in logged if "held_harmful_right" in r]  # before and after, a seed
    assert abs(mean([r["margin"] for r in logged if "margin" in r])) < 0.002
    right = lambda kind: [100 * mean([r[f"held_{kind}_right"] for r in held[i::2]]) for i in (0, 1)]
    assert len(held) == 6 and [r["step"] for r in held] == [1, 192] * 3
    told.append("samples are right in {:.0f}, then {:.0f}% (harmful), ".format(*right("harmful")))
    told.append("{:.0f}, then {:.0f}% (harmless)".format(*right("helpful")))
    alphas = [r["alpha"] for r in logged if r.get("alpha")]
    spread = [np.std(a) for a in alphas]
    told.append(f"alpha goes from {min(map(min, alphas)):.2f} to {max(map(max, alphas)):.2f}")
    told.append(f"deviation of {min(spread):.2f} to {max(spread):.2f} in a seed")
    turns = [math.degrees(math.atan(np.std(a) / np.mean(a))) for a in alphas]
    told.append(f"by {min(turns):.0f} to {max(turns):.0f} degrees")
    zen4 = [by[k, DRIRL, n]["seconds"]["grpo"] for k in gain for n in range(3)]
    few, most = ([f"{k}-first", k] for k in ("laptop-few", "laptop"))
    ends = lambda keys, s: "{:.0f} to {:.0f}".format(
        *(f(by[k, DRIRL, n]["seconds"][s] for k in keys for n in range(3)) for f in (min, max))
    )
    told.append(
        f"SFT {ends(few, 'sft')} s (laptop: {ends(most, 'sft')}), IRL {ends(few + most, 'irl')},"
    )
    told.append(f"GRPO-S {min(zen4):.0f} to {max(zen4):.0f}, of which")
    zen5 = [
        ("laptop-few-first", 3),
        ("laptop-few-first", 4),
        *(("laptop-few-again", n) for n in range(3)),
    ]
    x = [by[k, DRIRL, n]["seconds"]["grpo"] for k, n in zen5]
    told.append(f"GRPO-S {min(x):.0f} to {max(x):.0f}.")
    gains = minus(gaps("laptop-fp32", DRIRL), gaps("laptop-fp32", START)) + gain["laptop-first"]
    tried.append("two AVX2 cores, gained {:.1f} points.".format(*gains))
    s = by["laptop-fp32", DRIRL, 0]["seconds"]
    told.append(f"SFT {s['sft']:.0f} s, IRL {s['irl']:.0f}, GRPO-S {s['grpo']:.0f}")
    facts = lambda v, kind, what, of="laptop-few": [
        100 * by[of, f"{v}: rewards", n]["auc"][kind][what] for n in range(3)
    ]
    untold = lambda kind: facts("1RW", kind, "best_right", "laptop-few-untold")
    seven, linear, one = (facts(v, "harmful", "best_right") for v in ("7RW", "linear", "1RW"))
    chance, last = facts("1RW", "harmful", "right"), untold("harmful")
    rates = "{:.1f}% by seven models, {:.1f}% by their mean, {:.1f}% by one (a random sample: "
    rates += "{:.1f}%), and {:.1f}% by one for harmless prompts too"
    told.append(rates.format(*map(mean, (seven, linear, one, chance, last))))
    more, gap = minus(seven, last), mean(seven) - mean(linear)
    told.append(f"each seed: met ({each(more)}); by 10 points: **not met** ({mean(more):+.1f})")
    told.append(f"linear: met ({gap:+.1f})")
    less = minus(one, seven)
    told.append(f"**met**: {mean(less):+.1f} ({each(less)})")
    assert abs(mean(less)) < 2
    best, last = mean(facts("7RW", HELPFUL, "best_right")), mean(untold(HELPFUL))
    chance = mean(facts("1RW", HELPFUL, "right"))
    told.append(f"best is right for {best:.1f}%, that last one's for {last:.1f}%, less than")
    told.append(f"a random sample ({chance:.1f}%)")
    marks = tables.read_records(tables.LAB / "results/sense.jsonl", "readers")
    models = "base", "SFT warm start", "DR-IRL from it"
    for k in ("laptop", "laptop-few", "few-8"):
        mine, found = [r for r in marks if r["setting"] == k], []
        for mark, model in ((mark, model) for mark in ("nonsense", "sense") for model in models):
            some = [r["readers"] for r in mine if r["model"] == model]
            found.append(" and ".join(str(sum(x[n] == mark for x in some)) for n in (0, 1)))
        told.append("base {}, warm start {}, DR-IRL {}. Sense: {}, {}, {}".format(*found))
        told.append(f"agree on {sum(len(set(r['readers'])) == 1 for r in mine)} of {len(mine)}")
    eight = [r for r in marks if r["setting"] == "few-8"]
    counts = [
        sum(r["readers"][n] == "nonsense" for r in eight if r["model"] == model)
        for model in ("RFT", "SFT continued")
        for n in (0, 1)
    ]
    times = "RFT writes nonsense {} and {} times, SFT continued {} and {} times."
    told.append(times.format(*counts))
    assert [x for x in told if x not in text] == []
    assert [x for x in tried if x not in attempts] == []


def test_pictures_of_recorded_runs(tmp_path, monkeypatch):
    """The bars: of each shown variant the mean share of its seeds, of one seed's prompts."""
    seen = []
    monkeypatch.setattr(tables, "picture_of_refusals", lambda path, rows: seen.append(rows))
    monkeypatch.setattr(tables, "pyplot", lambda: True)
    some, more = line("rrcc", "rrrr"), line("rrrr", "cccc", 1)
    other = line("rrrr", "cccc", variant="sum")
    tables.pictures(tables.grouped([some, more, other]))
    ((row,),) = seen
    assert row["name"] == f"{START}, 2 seeds" and row["rates"]["lookalike"] == [2, 4]
    assert row["rates"]["crime"] == [1, 2] and set(row["rates"]) >= {*CATEGORIES, "ordinary"}


def test_kinds_without_prompts():
    """They have no share, and a claim that needs them isn't made."""
    some = {"name": "a", "rates": line("rr", "")["rates"]}
    assert "| **100.0** (100.0) | **0.0** (0.0) | **-** (-) | **-** (-) |" in tables.means([[some]])
    assert claim({"a": [line("rr", "")], "b": [line("rc", "")]}, "a", "b") == {}


def test_curves_of_several_runs(tmp_path, capsys):
    """runs: a line a run; curves: all seeds in one line, sorted by step."""
    pytest.importorskip("matplotlib")
    for name in ("one", "two"):
        rates = line("r", "c")["rates"]
        records = [{"stage": "grpo", "step": n, "kl": 0.1 * n} for n in range(1, 31)]
        write(tmp_path / name / "metrics.jsonl", records)
        (tmp_path / name / "results.json").write_text(json.dumps([{"name": "a", "rates": rates}]))
    folders, drawn, real = [tmp_path / "one", tmp_path / "two"], [], tables.picture_of_curves
    tables.main(["runs", *map(str, folders)])
    assert (tmp_path / "two/compared.png").read_bytes()[:4] == b"\x89PNG"
    assert "compared.png has the curves" in capsys.readouterr().out
    spy = lambda path, records: drawn.append(records) or real(path, records)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "picture_of_curves", spy)
        patch.setattr(tables, "LAB", tmp_path)
        tables.curves(folders, tmp_path / "apart.png", apart=True)
        tables.main(["curves", *map(str, folders)])
    assert [r["model"] for r in drawn[0]] == [
        f"{tmp_path.name}/{x}" for x in ("one", "two") for _ in range(30)
    ]
    assert len(drawn[1]) == 60 and not any("model" in r for r in drawn[1])
    assert (tmp_path / "results/curves.png").exists()
    with pytest.raises(UserError, match="runs: of which runs"):
        tables.main(["runs"])


@pytest.mark.parametrize("runs", (1, 2, 9))
def test_legends_of_curves(tmp_path, monkeypatch, runs):
    """The first panels name the runs, or one run's reward models; others the fields, by style."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(
        report, "CURVES", ("sft loss", "irl gap_demo_minus_others", "grpo kl entropy")
    )
    names, records, found = [f"runs/{n}" for n in range(runs)], [], []
    for name in names:
        mine = [{"stage": "sft", "step": n, "loss": 1.0} for n in (1, 2)]
        mine += [{"stage": "grpo", "step": n, "kl": 1.0, "entropy": 2.0} for n in (1, 2)]
        irl = {"stage": "irl", "step": 1, "gap_demo_minus_others": 1.0}
        mine += [irl | {"model": model} for model in ("crime", "ethics")]
        records += mine if runs == 1 else [{**r, "model": name} for r in mine]
    monkeypatch.setattr(report, "save_figure", lambda fig, path: found.extend(fig.axes))
    report.picture_of_curves(tmp_path / "a.png", records)
    said = [
        [t.get_text() for t in ax.get_legend().texts] if ax.get_legend() else [] for ax in found
    ]
    several = names if runs > 1 else []
    assert said[:3] == [several, several or ["crime", "ethics"], ["kl", "entropy"]]
    looks = [{(x.get_color(), x.get_marker()) for x in ax.lines} for ax in found[:3]]
    assert [len(x) for x in looks] == ([1, 2, 2] if runs == 1 else [runs] * 3)
    styles = [line.get_linestyle() for line in found[2].lines]
    assert styles == ["-", "--"] * runs
    keys = {(x.get_color(), x.get_marker()) for x in found[2].get_legend().get_lines()}
    assert (keys == {("k", "")}) == (runs > 1)  # of several runs it tells the fields alone


def test_curves_of_several_seeds_are_in_order(tmp_path, monkeypatch):
    """By step, and within a step as the runs were named: not by value."""
    pytest.importorskip("matplotlib")
    seen = []
    monkeypatch.setattr(report, "band", lambda y, width: seen.append(y) or (y, y))
    records = [{"stage": "grpo", "step": n, "kl": x + n} for x in (9.0, 1.0) for n in range(1, 16)]
    monkeypatch.setattr(report, "CURVES", ("grpo kl",))
    with suppress(ValueError, TypeError):  # no arrays
        report.picture_of_curves(tmp_path / "a.png", records)
    assert list(seen[0][:4]) == [10, 2, 11, 3]


def test_means(tmp_path, capsys):
    """The mean over runs, and each run; runs of other stages are refused."""
    model = lambda name, hits: {**line("r" * hits + "c" * (40 - hits), "rccc"), "name": name}
    runs = [[model("a", 12), model("b", 20)], [model("a", 16), model("b", 20)]]
    for i, models in enumerate(runs):
        (tmp_path / f"{i}").mkdir()
        (tmp_path / f"{i}/results.json").write_text(json.dumps(models))
    tables.main(["runs", *(str(tmp_path / f"{i}") for i in range(2))])
    rows = capsys.readouterr().out.split("\n")
    assert rows[2].startswith("| a | **35.0** (30.0, 40.0) | **0.0** (0.0, 0.0) | **25.0** (25.0")
    assert "| **10.0** (5.0, 15.0) |" in rows[2] and rows[3].startswith("| b | **50.0**")
    with pytest.raises(UserError, match="different models"):
        means([runs[0], runs[1][:1]])


def test_check_judge():
    """Rows are labels, columns verdicts; of four labelled refuses it takes one for complying."""
    told = [("I can't help with that.", "refuses", ["refuses", "refuses"])] * 3
    told += [("Sure, gladly.", "refuses", ["refuses", "complies"])]
    told += [("Sure, gladly.", "complies", ["complies", "complies"])]
    rows = [dict(zip(("response", "label", "readers"), r)) for r in told]
    text = check_judge(rows)
    assert "| refuses | 3 | 0 | 1 | 75 [30, 95] |" in text and "| partial | 0 | 0 | 0 | - |" in text
    assert "agreement 80 [38, 96] of 5; the two readers with each other 80 [38, 96]" in text
