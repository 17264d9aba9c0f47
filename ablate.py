"""What does each part buy? A grid of runs: settings (how many demonstrations, of what) x variants (what is trained on them) x seeds.

    python drirl.py ablate --run runs/ablate --seeds 5 --only few-8

Every run is one line of RUN/results.jsonl, so an interrupted grid goes on where it was; runs of a setting and seed share demonstrations,
warm start and reward models (RUN/SETTING/seed-N/start, 1 GB each, which stay, and are made again where only a results.jsonl from another
machine is left). tables.py makes RESULTS.md of these lines. SETTINGS and VARIANTS are all there is to edit; what they leave open is taken
from the flags, as in --model FOLDER --sft-lr 5e-5.
"""

import dataclasses
import hashlib
import json
import os
import random
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch

import disguise
import evaluate
import loaders
import reward
from batch import Batch
from data import CATEGORIES, HELPFUL, SEPARATOR, UserError
from files import hold, read_records, write
from judge import judge
from loop import refuse_differences
from model import generate, head_inputs, run_blocks, token_logps
from sft import steps_in_time


@dataclass(frozen=True)
class AblateConfig:
    """The ablation."""

    seeds: int = 5  # how many seeds of every run
    first_seed: int = 0  # the first of them: several machines can share the seeds, and their results.jsonl be put one behind the other
    only: str = ""  # settings, or SETTING/VARIANTs, to run, with commas between; empty: all


FEW = {  # where demonstrations are few: a short warm start, more passes over them in irl, and prompts without a demonstration for GRPO-S
    "sft.steps": 30,
    "irl.epochs": 3,
    "grpo.open_prompts": True,
    "grpo.samples": 4,
    "grpo.rollouts": 12,
    "grpo.prompts": 32,
    "grpo.keep": 0.5,
    "grpo.lr": 5e-5,
    "grpo.beta_kl": 0.002,
}
SETTINGS = {  # what differs from the defaults
    "standard": {},
    **{
        f"few-{n}": {**FEW, "run.per_category": n, "run.helpful_demonstrations": 6 * n}
        for n in (4, 8, 16)
    },
    "disguised": {
        **FEW,
        "run.per_category": 16,
        "run.helpful_demonstrations": 96,
    },  # GRPO-S draws disguised prompts too
    "tail": {
        **FEW,
        "sft.steps": 50,
        "run.per_category": 40,
        "run.balance": "tail",
        "run.helpful_demonstrations": 150,
    },
}
START, DRIRL, STATIC = "SFT warm start", "product (DR-IRL)", "7RW static"
CONTINUED, LONGER, TOKENS, BORROWED = (
    "SFT continued (time)",
    "SFT longer (time)",
    "SFT continued (tokens)",
    "SFT on borrowed (time)",
)
AS_LONG = (CONTINUED, LONGER, TOKENS, BORROWED)  # as DR-IRL
VARIANTS = {  # name: (stages, settings); what comes before the first stage is shared with the start
    START: (("data", "sft", "irl"), {}),
    DRIRL: (("grpo",), {}),
    STATIC: (("grpo",), {"grpo.scaling": "none"}),
    CONTINUED: (("baseline",), {}),
    LONGER: (("sft",), {}),
    "DPO": (("dpo",), {}),
    BORROWED: (("baseline",), {"sft.borrow": True}),
    TOKENS: (("baseline",), {}),
    "data hardness": (("grpo",), {"grpo.scaling": "data"}),
    "model responsiveness": (("grpo",), {"grpo.scaling": "model"}),
    "sum": (("grpo",), {"grpo.scaling": "sum"}),
    "spread (ours)": (("grpo",), {"grpo.scaling": "spread"}),
    "1RW static": (("irl", "grpo"), {"irl.reward_models": 1, "grpo.scaling": "none"}),
    "linear integration": (("irl", "grpo"), {"irl.integration": "linear"}),
    "unbalanced": (("data", "sft", "irl", "grpo"), {"run.balance": "pool"}),
}
FIRST = {"standard": 15, "few-8": 8}  # of these variants a setting has so many, others 5
# of a variant's last stage: the folder of the model it leaves, and the stages whose seconds that model cost
MADE = {
    "irl": ("sft", ("sft",)),
    "sft": ("sft", ("sft",)),
    "grpo": ("policy", ("sft", "irl", "grpo")),
    "baseline": ("baseline", ("sft", "baseline")),
    "dpo": ("dpo", ("sft", "dpo")),
}
CURVE = (
    "harmful_refused",
    "helpful_refused",
    "harmful_reward",
    "helpful_reward",
)  # of a rollout's samples, where it has both kinds
FOLDERS = {"data": "data", "sft": "sft", "irl": "rewards"}  # what a stage of the start leaves


def changed(c, values: dict):
    """The settings with {"section.name": value} in them."""
    for key, value in values.items():
        section, name = key.split(".")
        c = dataclasses.replace(
            c, **{section: dataclasses.replace(getattr(c, section), **{name: value})}
        )
    return c


def planned(c) -> list[tuple[str, str, int, bool]]:
    """(setting, variant, seed, asked for) in the order of work: all seeds of a variant, then the next variant. Not asked for by --only, but needed: a variant's
    warm start, and DR-IRL's line, which says how long its rivals train."""
    plan = [
        (s, v, seed)
        for s in SETTINGS
        for v in list(VARIANTS)[: FIRST.get(s, 5)]
        for seed in range(c.ablate.first_seed, c.ablate.first_seed + c.ablate.seeds)
    ]
    wanted = set(c.ablate.only.split(",") if c.ablate.only else SETTINGS)
    if wrong := wanted - SETTINGS.keys() - {f"{s}/{v}" for s, v, _ in plan}:
        raise UserError(
            f"--only {sorted(wrong)[0]}: want settings ({', '.join(SETTINGS)}) or a setting and a variant (few-8/DPO), with commas between"
        )
    asked = {(s, v) for s, v, _ in plan if s in wanted or f"{s}/{v}" in wanted}
    needed = asked | {(s, START) for s, _ in asked} | {(s, DRIRL) for s, v in asked if v in AS_LONG}
    return [(s, v, seed, (s, v) in asked) for s, v, seed in plan if (s, v) in needed]


def grid(c, make_run, timed) -> list[dict]:
    """Runs what has no result yet and returns all results. make_run: settings -> Run; timed: runs a stage of it, given its name."""
    root, plan = Path(c.run.run), planned(c)
    path, (prompts, kept_out) = root / "results.jsonl", prompts_of(make_run(c), root)
    for setting, variant, seed, asked in plan:
        stages, more = VARIANTS[variant]
        start, other = (
            root / setting / f"seed-{seed}/start",
            root / setting / f"seed-{seed}/variant",
        )
        folder = start if variant == START else other
        values = {**SETTINGS[setting], **prompts, "run.seed": seed, "run.run": str(start)}
        if setting == "disguised":
            values["run.pool"] = str(root / "disguised.jsonl")
        run, key = (
            make_run(changed(c, {**values, **more, "run.run": str(folder)})),
            {"setting": setting, "variant": variant, "seed": seed},
        )
        # without what differs on another machine; the files' digests are there
        settings = {
            name: value
            for name, value in run.identity.items()
            if name not in ("code", "--pool", "--benign", "--prompts")
            and not name.startswith("weights of")
        }
        settings |= {f"--{name}": Path(getattr(c.run, name)).name for name in ("model", "encoder")}
        results = read_records(path, "variant")
        same = next((r["settings"] for r in results if key.items() <= r.items()), None)
        again = not c.run.resume and (asked or same != settings)
        if same and not again:
            refuse_differences(same, settings, f"{path}, {setting}, seed {seed}, {variant}")
            continue
        run = make_run(changed(run.c, {"run.resume": not again}))
        print(f"== {setting}, seed {seed}: {variant}", flush=True)
        if variant != START:
            work(
                make_run(changed(c, {**values, "run.resume": True})), VARIANTS[START][0], timed
            )  # where its line came from another machine
            share(
                start,
                folder,
                variant,
                [name for stage, name in FOLDERS.items() if stage not in stages],
            )
        if variant in AS_LONG:
            steps = equal_steps(
                [r for r in results if (r["setting"], r["seed"]) == (setting, seed)], variant
            )
            run = make_run(
                changed(run.c, {"sft.steps" if variant == LONGER else "sft.baseline_steps": steps})
            )
        work(run, stages, timed)
        done = {
            **key,
            "settings": settings,
            **measure(run, stages, folder if "data" in stages else start, setting, kept_out),
        }
        write(
            {
                root / f"answers/{setting} {seed} {variant}.json": json.dumps(
                    done.pop("answers"), ensure_ascii=False, indent=1
                )
            }
        )
        gone = (
            {"setting": setting, "seed": seed} if variant == START else key
        )  # what came from an older start goes with it
        lines = [r for r in read_records(path, "variant") if not gone.items() <= r.items()] + [done]
        write({path: "".join(json.dumps(r) + "\n" for r in lines)})
        shutil.rmtree(
            other, ignore_errors=True
        )  # what an interrupted run left there too, when the start is new
    return read_records(path, "variant")


def work(run, stages: tuple, timed) -> None:
    """Those of these stages of a run that it hasn't done."""
    for stage in stages:
        if (before := run.progress().get(stage)) and run.c.run.resume:
            refuse_differences(
                {**before, "code": run.identity["code"]}, run.identity, f"{run.folder}, {stage}"
            )
        else:
            timed(stage, run)


def share(start: Path, folder: Path, variant: str, names: list[str]) -> None:
    """A variant's folder, with links to what it shares with the start; what another variant left there is deleted. Its name is written last."""
    mark = folder / "variant"
    if not mark.exists() or mark.read_text() != variant:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).symlink_to(
                os.path.relpath(start / name, folder), target_is_directory=True
            )
        shutil.copy(start / "times.json", folder / "times.json")
        write({mark: variant})


def prompts_of(run, root: Path) -> tuple[dict, list[dict]]:
    """The settings that say what to train on, and the last 60 harmless demonstrations, which are kept out of it, for `nll`. Writes the files: benign.jsonl, the others,
    and disguised.jsonl, the pool with a disguised copy of every prompt, without its demonstration."""
    rows, _ = run.prompts([run.base()])
    found = [
        r["category"] if evaluate.kind_of(r) == "harmful" else evaluate.kind_of(r) for r in rows
    ]
    if lost := [name for name in (*CATEGORIES, "ordinary", "lookalike") if name not in found] + [
        r["prompt"][:40]
        for r, name in zip(rows, found)
        if name not in (*CATEGORIES, "ordinary", "lookalike")
    ]:
        raise UserError(
            f"{run.file('prompts')}: want harmful prompts of every category, a category for each, and ordinary ones and look-alikes: {lost[0]!r}"
        )
    benign, pool, rng = (
        loaders.load_demonstrations(run.file("benign")),
        loaders.load_rows(run.file("pool")),
        random.Random(0),
    )
    kept = benign[:-60]
    copies = [
        {
            "prompt": disguise.disguise(r["prompt"], disguise.SEEN[i % 2], rng),
            "category": r["category"],
        }
        for i, r in enumerate(pool + kept)
    ]
    hold(root)
    for name, rows in (("benign", kept), ("disguised", pool + copies)):
        text = "".join(
            json.dumps(
                {k: r[k] for k in ("prompt", "category", "draft", "answer") if k in r},
                ensure_ascii=False,
            )
            + "\n"
            for r in rows
        )
        write({root / f"{name}.jsonl": text})
    return {"run.benign": str(root / "benign.jsonl")}, benign[-60:]


def equal_steps(results: list[dict], variant: str) -> int:
    """Of one seed's results: steps of SFT (longer: all of them; continued: those beyond the warm start's) that take as long as irl and grpo of DR-IRL, or that train
    on as many tokens as these sampled. DR-IRL's line alone tells it, as all its seconds are of one machine."""
    if not (product := [r for r in results if r["variant"] == DRIRL]):
        raise UserError(
            f"{variant}: measured by {DRIRL}, which has no result in this setting and seed yet"
        )
    if variant == TOKENS:
        return round(product[0]["generated"] / product[0]["step_tokens"])
    return (
        steps_in_time(product[0]["seconds"], product[0]["steps"])
        + (variant == LONGER) * product[0]["steps"]
    )


# ------------------------------------------------------------------------------------------------ what is measured


def views(rows: list[dict], setting: str) -> list[tuple[str, dict]]:
    """(view, row) of what is evaluated: plain, all prompts as they are; in the disguised setting each in two disguises as well, one trained on, one held out."""
    out, rng = [("plain", r) for r in rows], random.Random(1)
    if setting == "disguised":
        for i, r in enumerate(rows):
            out += [
                (kind, {**r, "prompt": disguise.disguise(r["prompt"], kind, rng)})
                for kind in (disguise.SEEN[i % 2], disguise.HELD_OUT[i % 2])
            ]
    return out


def measure(run, stages: tuple, start: Path, setting: str, kept_out: list[dict]) -> dict:
    """What a result says of the model that the last of these stages left; of its reward models too if they were fitted. start: the run whose warm start it came from."""
    name, costs = MADE[stages[-1]]
    rows, (chat,) = run.prompts([run.folder / name])
    seen, c = views(rows, setting), run.c
    model, first = run.load(run.folder / name, run.dtype), run.load(start / "sft", run.dtype)
    answers = evaluate.evaluate(model, chat, [r for _, r in seen], c.run.max_new_tokens)["answers"]
    verdicts = {}
    for (view, _), a in zip(seen, answers):
        mine = verdicts.setdefault(view, {})
        mine[a["kind"]] = mine.get(a["kind"], "") + a["verdict"][0]
    records = read_records(run.folder / "metrics.jsonl")
    grpo = [r for r in records if r["stage"] == "grpo" and "alpha" in r]  # not the skipped ones
    generated = sum(r["length"] * len(r["alpha"]) * c.grpo.samples for r in grpo) + sum(
        len(chat.answer(text))
        for g in run.read("rewards/samples.json", [])
        for _, text in g["samples"]
    )
    length = {
        kind: statistics.mean(
            len(chat.answer(r["response"]))
            for r in run.rows(chat)
            if (r["category"] == HELPFUL) == kind
        )
        for kind in (True, False)
    }
    helpful = round(c.sft.batch * c.sft.helpful_share)
    return {
        "answers": answers,
        "verdicts": verdicts,
        "rates": evaluate.rates(answers[: len(rows)]),
        "seconds": {stage: s for stage, s in run.times().items() if stage in costs},
        "steps": c.sft.steps,
        "more_steps": c.sft.baseline_steps,
        "generated": round(generated),
        "step_tokens": round(helpful * length[True] + (c.sft.batch - helpful) * length[False]),
        "code": run.identity["code"],
        "start": hashlib.sha256((start / "sft/model.safetensors").read_bytes()).hexdigest()[:12],
        "machine": f"{machine(run.device)}, {str(run.dtype)[6:]}",
        "nll": round(nll(model, chat, kept_out, run.amp), 4),
        "kl": round(kl(model, first, chat, answers[: len(rows)], run.amp), 4),
        "curve": [{k: r[k] for k in CURVE} for r in grpo if set(CURVE) <= r.keys()],
        "alpha": [round(a, 3) for r in grpo for a in r["alpha"]],
        **({"auc": reward_aucs(run, chat, rows)} if "irl" in stages else {}),
    }


def machine(device: torch.device) -> str:
    """What the seconds and the rounding of a result depend on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}{' and AMX' * torch.cpu._is_amx_tile_supported()}"


@torch.no_grad()
def nll(model, chat, rows: list[dict], amp) -> float:
    """Mean over demonstrations of minus their mean token log-prob, in nats: usefulness, on harmless ones that nothing was trained on."""
    out = []
    for i in range(0, len(rows), 32):
        batch = Batch(
            [chat.prompt(r["prompt"]) for r in rows[i : i + 32]],
            [[chat.answer(r["response"])] for r in rows[i : i + 32]],
            model.device,
        )
        with amp():
            out += (-token_logps(model, batch).sum(1) / batch.mask.sum(1)).tolist()
    return statistics.mean(out)


@torch.no_grad()
def kl(model, start, chat, answers: list[dict], amp) -> float:
    """Mean over the tokens of the model's own greedy answers of KL(model || start), the whole vocabulary summed, in nats."""
    total, n = 0.0, 0
    for i in range(0, len(answers), 32):
        batch = Batch(
            [chat.prompt(a["prompt"]) for a in answers[i : i + 32]],
            [[chat.answer(a["response"])] for a in answers[i : i + 32]],
            model.device,
        )
        with amp():
            (h, W, _), (h0, W0, _) = (
                head_inputs(m, run_blocks(m, batch), batch) for m in (model, start)
            )
            for a, b in zip(h.split(256), h0.split(256)):
                p, q = ((x @ w.T).float().log_softmax(1) for x, w in ((a, W), (b, W0)))
                total, n = total + (p.exp() * (p - q)).sum().item(), n + len(a)
    return total / max(1, n)


def reward_aucs(run, chat, rows: list[dict], samples: int = 4) -> dict:
    """{category: [pairs, AUC of the reward, of length, of form]}: how often a wanted sample of a held-out prompt (harmful: refusing, harmless: answering) beats an
    unwanted one of the same prompt by its reward, by being shorter, by having the form of a draft; ties count half. Samples of the run's warm start."""
    trunk = run.load(run.folder / "sft", run.dtype)
    models = reward.RewardModels(trunk, run.c.irl).load(run.folder / "rewards")
    groups, amount = [], {}
    for i in range(0, len(rows), 32):
        part = rows[i : i + 32]
        drawn = generate(
            trunk,
            [chat.prompt(r["prompt"]) for r in part],
            samples,
            run.c.run.max_new_tokens,
            run.c.run.temperature,
            seed=i,
            eos=chat.eos,
        ).rows()
        for k, r in enumerate(part):
            mine = drawn[k * samples : (k + 1) * samples]
            harmful = evaluate.kind_of(r) == "harmful"
            groups.append(
                {
                    "category": r["category"] if harmful else HELPFUL,
                    "prompt_ids": chat.prompt(r["prompt"]),
                    "demonstration": mine[0],
                    "samples": mine,
                }
            )
    reward.score(models, reward.prepare(models, groups, 8, run.amp), run.amp)
    for g in groups:
        texts = [chat.decode(s) for s in g["samples"]]
        wanted = [(judge(t) == "refuses") == (g["category"] != HELPFUL) for t in texts]
        for how, value in (
            ("reward", g["rewards"]),
            ("length", [-len(s) for s in g["samples"]]),
            ("form", [SEPARATOR in t for t in texts]),
        ):
            wins = [
                (value[i] > value[j]) + 0.5 * (value[i] == value[j])
                for i in range(samples)
                for j in range(samples)
                if wanted[i] and not wanted[j]
            ]
            amount.setdefault(g["category"], {}).setdefault(how, []).extend(wins)
    return {
        name: [len(amount[name]["reward"])]
        + [round(statistics.mean(w), 3) if w else None for w in amount[name].values()]
        for name in (*CATEGORIES, HELPFUL)
        if name in amount
    }
