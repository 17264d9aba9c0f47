"""What does each part buy? A grid of runs: settings (which data) x variants (what trains) x seeds.

    python -m lab.grid --run runs/grid --seeds 5 --only few-8 [any flag of drirl.py]

Every run is a line of RUN/results.jsonl, so an interrupted grid goes on where it was. Runs of a
setting and seed share RUN/SETTING/seed-N/start (1 GB): data, warm start, reward models. In one
process they share the first rollout too, and its seconds count for each. RUN/answers has what was
said. To have a run again, delete its line. Edit SETTINGS and VARIANTS for your own.
"""

import argparse
import functools
import shutil
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import drirl
import evaluate
import reward
from config import RECIPES, Config, UserError, changed
from data import HELPFUL, counts, distinct, k_center
from lab import rivals
from lab.tables import ANCHORS, BORROWED, CONTINUED, DPO, DRIRL, RFT, START, STATIC
from support.files import as_json, hold, read_records, write
from support.hf import load_rewards
from support.loaders import load_rows
from support.resume import refuse_differences
from support.run import Run, borrow, machine

FEW = {k: x[0] for k, x in RECIPES["laptop-few"].items() if x != RECIPES["laptop"].get(k)}
SETTINGS = {  # the recipe laptop with these
    "laptop": {},
    "laptop-few": FEW,
    "few-8": {**FEW, "run.per_category": 8, "sft.steps": 30, "irl.epochs": 3},
}
ON_POLICY = {"grpo.rollouts": 24, "grpo.prompts": 32, "grpo.batch": 0, "grpo.members": "all"}
ON_POLICY |= {"grpo.anchor": 0, "grpo.clip_high": 0.2, "grpo.lr": 5e-5, "grpo.passes": 1}
ON_POLICY |= {"grpo.extrapolate": 0.0}
FOLDERS = {"grpo": "policy", "judged": "policy"}  # of stages not named like it
ADVANTAGES = {RFT: rivals.best, "RFT (random)": rivals.random, ANCHORS: rivals.none}
VARIANTS = {  # name: (stages after those of the start, settings)
    START: ((), {}),
    DRIRL: (("grpo",), {}),
    STATIC: (("grpo",), {"grpo.scaling": "none"}),
    CONTINUED: (("baseline",), {}),
    RFT: (("grpo",), {}),
    "RFT (random)": (("grpo",), {}),
    ANCHORS: (("grpo",), {}),
    DPO: (("dpo",), {}),
    BORROWED: (("baseline",), {}),
    "the judge as reward": (("judged",), {"grpo.scaling": "none"}),
    "on-policy": (("grpo",), ON_POLICY),
    "data hardness": (("grpo",), {"grpo.scaling": "data"}),
    "model responsiveness": (("grpo",), {"grpo.scaling": "model"}),
    "sum": (("grpo",), {"grpo.scaling": "sum"}),
    "spread (ours)": (("grpo",), {"grpo.scaling": "spread"}),
    "1RW static": (("irl", "grpo"), {"irl.integration": "one", "grpo.scaling": "none"}),
    "linear integration": (("irl", "grpo"), {"irl.integration": "linear"}),
    "unbalanced": (("pool", "sft", "irl", "grpo"), {}),
    "7RW: rewards": ((), {}),  # these three only choose among samples
    "linear: rewards": ((), {"irl.integration": "linear"}),
    "1RW: rewards": (("irl",), {"irl.integration": "one"}),
}


def planned(only: str, seeds: range) -> list[tuple[str, str, int]]:
    """(setting, variant, seed) in the order of work: all variants of a seed, then the next one."""
    wanted = set(only.split(",") if only else SETTINGS)
    if wrong := sorted(wanted - {*SETTINGS, *(f"{s}/{v}" for s in SETTINGS for v in VARIANTS)}):
        raise UserError(f"--only {wrong[0]}: want some of {', '.join(SETTINGS)}, or few-8/DPO")
    every = [(s, v, n) for s in SETTINGS for n in seeds for v in VARIANTS]
    return [(s, v, n) for s, v, n in every if wanted & {s, f"{s}/{v}"}]


def pool(run: Run) -> None:
    """What balance is held against: as many demonstrations in the pool's own proportions."""
    rows = [r for r in load_rows(run.file("pool")) if r["category"] != HELPFUL and "draft" in r]
    rows, chosen = distinct(rows), []
    vectors = run.encoder().embed([r["prompt"] for r in rows]).cpu()
    wanted = run.c.run.per_category * len(counts(rows))
    for category, size in counts(rows).items():
        n = min(max(2, round(wanted * size / max(1, len(rows)))), size)
        index = [i for i, r in enumerate(rows) if r["category"] == category]
        chosen += [rows[index[i]] for i in sorted(k_center(vectors[index], n, run.c.run.seed))]
    write({run.folder / "data/balanced.jsonl": drirl.as_lines(chosen)})


class Borrowing(Run):
    """A run whose demonstrations include open prompts with the most similar prompt's answer."""

    def rows(self, chat) -> list[dict]:
        rows = super().rows(chat)
        return rows + borrow(self.open_prompts(chat, rows), rows, self.encoder())


def judged(run: Run, **own) -> None:
    """GRPO-S with the judge's verdict as reward: a perfect one, which no user has."""
    rewards = functools.partial(rivals.verdicts, run.chat(run.folder / "sft"))
    rewards.below = 0  # of the reference's blocks: it reads texts
    drirl.stage_grpo(run, rewards, **own)


STAGES = {**drirl.STAGES, "pool": pool, "judged": judged, "dpo": rivals.best_and_worst}
ROLLED = ("grpo", "judged", "dpo")  # stages that begin with a rollout


def work(run: Run, functions: dict, stages: tuple) -> None:
    """Those of these stages of a run that it hasn't done."""
    for stage in stages:
        if record := run.done(stage):
            known, ways = record["settings"], "delete it or say the same"
            refuse_differences(known, run.identity, run.folder, ways)
            continue
        drirl.timed(stage, run, functions)
        run.finish(stage)


def measure(run, folder: Path) -> dict:
    """Answers of the model in `folder`, and the numbers of its line."""
    rows, (chat,) = run.prompts([folder])
    model = run.load(folder, run.dtype)
    found = evaluate.evaluate(model, chat, rows, run.c.run.max_new_tokens)
    answers = found["answers"]
    return {"answers": answers, "verdicts": evaluate.verdicts(answers), "rates": found["rates"]}


def reward_facts(run, shared) -> dict:
    """evaluate.rollout_record of the warm start's four samples of each held-out prompt.

    shared: a rivals.Shared, which keeps the samples for other reward models of this warm start.
    """
    rows, (chat,) = run.prompts([run.folder / "sft"])
    names = [r["category"] if r["kind"] == "harmful" else HELPFUL for r in rows]
    rows = [{**r, "category": name, "response": ""} for r, name in zip(rows, names)]
    c = changed(run.c, {"irl.prompts": len(rows), "irl.samples": 4, "irl.contrast": 0})
    reference, found = run.load(run.folder / "sft", run.dtype), {}
    models = load_rewards(reward.RewardModels(reference, c.irl), run.folder / "rewards")
    key = c.run.temperature, c.run.max_new_tokens
    if key not in shared.groups:
        shared.groups[key] = reward.sample_groups(reference, chat, rows, c)
    groups = shared.groups[key]
    batches = reward.pack_groups(models, reference, groups, run.dtype)
    reward.score_groups(models, batches, run.dtype)
    for name in ("harmful", *sorted({g["category"] for g in groups})):
        harmful = lambda g: name == "harmful" and g["category"] != HELPFUL
        mine = [g for g in groups if g["category"] == name or harmful(g)]
        scores = torch.tensor([[*g["rewards"], g["reward_demo"]] for g in mine])
        facts = F.pad(evaluate.sample_facts(chat, [g["samples"] for g in mine]), (1, 0))  # no W
        told = evaluate.rollout_record([name] * len(mine), scores, facts)
        kind = "helpful_" if name == HELPFUL else "harmful_"
        found[name] = {k: told.get(kind + k) for k in ("auc", "right", "best_right")}
    return found


def one(c: Config, setting: str, variant: str, seed: int, known: dict, shared) -> dict:
    """Trains or measures a variant in a copy of its start; its line. known: all lines so far."""
    folder, (stages, values) = Path(c.run.run) / setting / f"seed-{seed}", VARIANTS[variant]
    c = changed(c, {**SETTINGS[setting], "run.seed": seed, "run.run": str(folder / "start")})
    own, spared = {"roll_out": shared}, shared.spared
    own |= {"advantages": ADVANTAGES[variant]} if variant in ADVANTAGES else {}
    stages_of = STAGES | {name: functools.partial(STAGES[name], **own) for name in ROLLED}
    if "baseline" in stages:  # trains as long as DR-IRL did
        if not (product := known.get((setting, DRIRL, seed))):
            raise UserError(f"{variant} trains as long as {DRIRL}: run {setting}/{DRIRL} first")
        stages_of["baseline"] = functools.partial(STAGES["baseline"], seconds=product["seconds"])
    start, kind = Run(c), Borrowing if variant == BORROWED else Run
    run = kind(changed(c, {**values, "run.run": str(folder / variant)}))
    work(start, STAGES, ("data", "sft", "irl"))
    if not run.folder.exists():
        aside = folder / f"{variant}.tmp"
        again = shutil.ignore_patterns(*(f"{stage}.json" for stage in stages))  # in done/
        shutil.copytree(start.folder, aside, ignore=again, dirs_exist_ok=True)
        aside.rename(run.folder)
    work(run, stages_of, stages)
    alone = variant.endswith(": rewards")
    last = stages[-1] if stages else "irl" if alone else "sft"
    trained = run.folder / FOLDERS.get(last, last)
    found = {} if alone else measure(run, trained)
    costs = ("sft", last) if last in ("sft", "baseline") else ("sft", "irl", last)
    found["seconds"] = {stage: run.done(stage)["seconds"] for stage in costs}
    found["seconds"][last] = round(found["seconds"][last] + shared.spared - spared, 1)
    if alone or "sft" in stages:
        found["auc"] = reward_facts(run, rivals.Shared() if "sft" in stages else shared)
    line = {"setting": setting, "variant": variant, "seed": seed, "settings": run.identity}
    return {**line, **found, "code": run.code, "machine": machine(run.device)}


def grid(run: Run, only: str, seeds: range) -> None:
    """Runs what has no line yet."""
    path, plan, shared = run.folder / "results.jsonl", planned(only, seeds), {}
    if run.c.run.recipe != "laptop":
        raise UserError("--recipe: leave it out; a grid's settings depart from laptop")
    if {r["kind"] for r in run.prompts([])[0] if r["category"]} != set(evaluate.KINDS):
        raise UserError("--prompts: want ordinary ones, look-alikes, harmful ones with a category")
    hold(run.folder)
    known = {(r["setting"], r["variant"], r["seed"]): r for r in read_records(path, "variant")}
    for setting, variant, seed in (key for key in plan if key not in known):
        if (setting, seed) not in shared:
            shared = {(setting, seed): rivals.Shared()}  # one at a time: it is large
        print(f"== {setting}, {variant}, seed {seed}", flush=True)
        line = one(run.c, setting, variant, seed, known, shared[setting, seed])
        said = run.folder / f"answers/{setting} {seed} {variant}.json"
        if "answers" in line:
            write({said: as_json(line.pop("answers"))})
        known[setting, variant, seed] = line
        write({path: "".join(as_json(r, None) for r in known.values())})
        shutil.rmtree(run.folder / setting / f"seed-{seed}" / variant)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.grid", allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds of every run")
    parser.add_argument("--first-seed", type=int, default=0, help="several machines can share them")
    parser.add_argument("--only", default="", help="settings or SETTING/VARIANTs, with commas")
    own, flags = parser.parse_known_args(argv)
    seeds = range(own.first_seed, own.first_seed + own.seeds)
    flags = ["grid", "--run", "runs/grid", "--recipe", "laptop", "--eval-prompts", "0", *flags]
    return drirl.main(flags, {"grid": lambda run: grid(run, own.only, seeds)})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
