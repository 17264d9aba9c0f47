"""DR-IRL from the command line: the stages in order, and the run folder they share.

    python drirl.py all --recipe laptop              every stage, one after the other (train.sh)
    python drirl.py grpo --run runs/mine --grpo-scaling none        one stage again
    python drirl.py eval --model FOLDER --prompts FILE.csv          one model, no run
    torchrun --nproc_per_node=2 -- drirl.py grpo --run runs/mine    GRPO-S in several processes
    python drirl.py recipes                          how the recipes depart from the paper

A run folder holds the stages' results (policy/ is the aligned model, a Hugging Face folder),
config.json, metrics.jsonl, report.md, pictures, and what an interrupted run goes on from. Flags
override the recipe, and the recipe overrides the folder's config.json.
"""

import argparse
import ctypes
import dataclasses
import resource
import sys
import time
from pathlib import Path

import torch

import config
import data
import evaluate
import grpo_s
import introspect
import reward
import sft
from config import Config, UserError
from support import loaders, parallel
from support.files import as_json, hold, read_json, read_records, release, write
from support.hf import load_rewards, save_model, save_rewards
from support.judge import without_thought
from support.report import write_report
from support.run import ORDER, Run, machine


def as_lines(rows: list[dict]) -> str:
    fields = ("prompt", "category", "draft", "answer", "generated")
    return "".join(as_json({k: r[k] for k in fields if k in r}, None) for r in rows)


def stage_data(run: Run) -> None:
    """Step 1: balances the pool's demonstrations over the seven categories."""
    c, path = run.c.run, run.file("pool")
    pool = loaders.load_rows(path)
    harmful = [r for r in pool if r["category"] != data.HELPFUL]
    rows = data.distinct(harmful)
    if not rows:
        raise UserError(f"{path}: no harmful prompts: every row is of category {data.HELPFUL}")
    if c.pool:
        loaders.print_once(pool.told)
    drafted = [r for r in rows if "draft" in r]
    helpful, twice = len(pool) - len(harmful), len(harmful) - len(rows)
    print(f"{path}: {len(pool)} rows, {helpful} helpful ones left out, {twice} duplicates dropped")
    print(f"{len(drafted)} demonstrations, {len(rows) - len(drafted)} prompts without a draft")
    phi, report = run.encoder(), {}
    vectors = phi.embed([r["prompt"] for r in rows]).cpu()  # (N, D)
    if unlabelled := [i for i, r in enumerate(rows) if r["category"] is None]:
        known = loaders.load_rows(config.SHIPPED["pool"])
        known, names = phi.embed([r["prompt"] for r in known]), [r["category"] for r in known]
        for i, name in zip(unlabelled, data.route(vectors[unlabelled], known.cpu(), names)):
            rows[i]["category"] = name
        report["routed"] = len(unlabelled)
        print(f"{len(unlabelled)} prompts had no category and went to the nearest centroid")
    report["before"] = evaluate.balance_report(drafted)
    if c.generate:
        hold(run.folder)
        model, chat = run.load(run.base(), run.dtype), run.chat()
        made, counts = introspect.fill(model, chat, rows, vectors, c.per_category, c.seed)
        for category, n in counts.items():
            print(f"generated for {category}: " + ", ".join(f"{k} {v}" for k, v in n.items()))
        report["generated"] = counts
        write({run.folder / "data/generated.jsonl": as_lines(made)})  # even if it is too little
        rows, vectors = rows + made, torch.cat((vectors, vectors[[r["source"] for r in made]]))
    index = [i for i, r in enumerate(rows) if "draft" in r]  # those that were made too
    balanced = data.balance([rows[i] for i in index], c.per_category, vectors[index], c.seed)
    report["after"] = evaluate.balance_report(balanced)
    run.begin("data")
    folder = run.folder / "data"
    write({folder / "report.json": as_json(report), folder / "balanced.jsonl": as_lines(balanced)})
    print(evaluate.balance_table(report))


def stage_sft(run: Run) -> None:
    """Supervised warm start."""
    policy, chat = run.load(run.base()), run.chat()
    rows, c = run.rows(chat), run.c.sft
    if run.device.type == "cuda":  # a GPU's first steps load and compile: not to be timed
        sft.train(run.load(run.base()), chat, rows, dataclasses.replace(c, steps=3), run.dtype)
    with run.work("sft", rows) as loop:
        sft.train(policy, chat, rows, c, run.dtype, run.c.run.seed, loop)
    save_model(policy, run.folder / "sft")


def stage_irl(run: Run) -> None:
    """Step 2: one shadow reward model per category, from demonstrations and samples."""
    c, folder = run.c, run.stage_folder("sft")
    reference, chat = run.load(folder, run.dtype), run.chat(folder)
    rows = run.rows(chat)
    with run.work("irl", rows) as loop:
        models = reward.RewardModels(reference, c.irl)
        groups = reward.sample_groups(reference, chat, rows, c)
        by_category = sorted(groups, key=lambda g: g["category"])
        held = by_category[::8]  # kept out of the fit, to see what the rewards are worth
        fitted = [g for i, g in enumerate(by_category) if i % 8]
        batches = reward.pack_groups(models, reference, fitted, run.dtype)
        reward.fit(models, batches, c.irl, run.dtype, c.run.seed, loop)
        batches += reward.pack_groups(models, reference, held, run.dtype)
        reward.score_groups(models, batches, run.dtype)
    report = evaluate.reward_report(held, chat)
    drawn, fields = [], ("prompt", "category", "response", "reward_demo")
    for g in groups:
        samples = [[round(r, 2), chat.decode(ids)] for r, ids in zip(g["rewards"], g["samples"])]
        drawn.append({**{k: g[k] for k in fields}, "samples": samples})
    beside = {"samples.json": as_json(drawn), "report.json": as_json(report)}
    save_rewards(models, run.folder / "rewards", beside)
    for kind, r in report.items():
        told = "AUC {auc:.2f} ({good} good, {bad} bad samples; length alone: {auc_length:.2f})"
        print(f"rewards, held-out {kind} prompts:", told.format(**r).replace("nan", "none"))


def stage_grpo(run: Run, rewards=None, **own) -> None:
    """Steps 3 to 6: GRPO-S from the warm start, against the rewards. own: see grpo_s.train."""
    c, folder = run.c, run.stage_folder("sft")
    policy, reference = run.load(folder), run.load(folder, run.dtype).requires_grad_(False)
    models = rewards or reward.RewardModels(reference, c.irl)
    rewards = rewards or load_rewards(models, run.stage_folder("rewards"))
    phi, chat, history = run.encoder(), run.chat(folder), run.history()
    rows, held = run.grpo_rows(chat)
    if (size := c.grpo.batch or c.grpo.prompts) < parallel.world():
        raise UserError(f"{size} prompts in an update: fewer than {parallel.world()} processes")
    with run.work("grpo", rows, resumable=not c.grpo.shard) as loop:
        fixed = reference, rewards, chat, phi, rows, c, run.dtype, history, loop
        grpo_s.train(policy, *fixed, held=held, **own)
    save_model(policy, run.folder / "policy")


def stage_baseline(run: Run, seconds: dict | None = None) -> None:
    """The rival: more SFT, for as many seconds as irl and grpo took (seconds: those of a run)."""
    folder, times, c = run.stage_folder("sft"), seconds or run.times(), run.c.sft
    if not {"sft", "irl", "grpo"} <= times.keys():
        raise UserError(f"{run.folder}: run sft, irl and grpo first: their seconds are needed")
    steps = (times["irl"] + times["grpo"]) / max(times["sft"], 0.1) * c.steps
    policy, chat = run.load(folder), run.chat(folder)
    rows, c = run.rows(chat), dataclasses.replace(c, steps=max(1, round(steps)))
    with run.work("baseline", rows) as loop:
        sft.train(policy, chat, rows, c, run.dtype, run.c.run.seed + 1, loop)
    save_model(policy, run.folder / "baseline")


def stage_eval(run: Run) -> None:
    """Every model of the run on the held-out prompts: table, report.md, pictures."""
    made = {"SFT warm start": ("sft", "sft"), "DR-IRL from it": ("grpo", "policy")}
    made |= {"SFT continued": ("baseline", "baseline")}
    folders = {"base": run.base()}
    folders |= {label: run.folder / name for label, (s, name) in made.items() if run.done(s)}
    (rows, chats), times = run.prompts(list(folders.values())), run.times()
    records = read_records(run.folder / "metrics.jsonl")
    listed = rows, read_records(run.folder / "data/balanced.jsonl", "prompt")
    held, learnt = ({data.normalise(r["prompt"]) for r in x} for x in listed)
    run.begin("eval")
    results = []
    for (label, folder), chat in zip(folders.items(), chats):
        model = run.load(folder, run.dtype)
        results.append(evaluate.evaluate(model, chat, rows, run.c.run.max_new_tokens, label))
    facts = [run.base().name, f"recipe {run.c.run.recipe or 'none'}", f"seed {run.c.run.seed}"]
    facts += [run.file("prompts").name, f"{len(held & learnt)} prompts are harmful demonstrations"]
    facts += [time.strftime("%Y-%m-%d"), machine(run.device)]
    facts += [str(run.dtype)[6:], "seconds: " + ", ".join(f"{k} {v}" for k, v in times.items())]
    print(write_report(run.folder, results, records, "; ".join(facts)))
    print(f"\n{run.folder / 'report.md'} has samples and pictures")


def eval_folder(run: Run) -> None:
    """One model folder on any file of prompts, apart from any run."""
    rows, (chat,) = run.prompts([run.base()])
    model, new = run.load(run.base(), run.dtype), run.c.run.max_new_tokens
    print(evaluate.table([evaluate.evaluate(model, chat, rows, new, run.base().name)]))


def stage_chat(run: Run) -> None:
    """Base and aligned model side by side; an empty line ends, ... marks an answer cut short."""
    folders = {"base": run.base(), "aligned": run.stage_folder("policy")}
    models = {name: (run.load(f, run.dtype), run.chat(f)) for name, f in folders.items()}
    while line := input("you> ").strip():
        for name, (model, chat) in models.items():
            try:
                chat.check([{"prompt": line}], run.c.run.max_new_tokens, "your prompt")
            except UserError as e:
                print(e)
                break
            answer = evaluate.respond(model, chat, [line], run.c.run.max_new_tokens)[0]
            text = without_thought(answer["response"]).replace("\n", "\n" + " " * 10)
            cut = "" if answer["ended"] else " ..." if text else "(still thinking)"
            print(f"{name:>8}> {text}{cut}")


def stage_all(run: Run) -> None:
    """data to eval, without stages already done. Checks all input before any stage writes."""
    _, (chat,) = run.prompts([run.base()])
    benign = run.demonstrations(run.file("benign"), chat, [data.HELPFUL])
    if run.c.run.benign:
        loaders.print_once(benign.told)
    if run.c.grpo.open_prompts:
        run.open_prompts(chat, [])
    run.encoder()
    run.refuse_others()
    print(f"{machine(run.device)}, {str(run.dtype)[6:]}", flush=True)
    before = run.c.run.resume
    for name in ORDER if run.c.run.rival else [n for n in ORDER if n != "baseline"]:
        before = before and run.done(name) is not None  # once one has run, later ones must
        print(f"[{name}] done before") if before else timed(name, run)
        if name == "sft" and not before and run.c.run.recipe in SFT_SHARE:
            minutes = run.seconds / SFT_SHARE[run.c.run.recipe] / 60
            print(f"[all] about {minutes:.0f} minutes in all on this machine", flush=True)
    if before:
        print(evaluate.table(run.read("results.json", [])))
        print("\nNothing was left to do; --resume false starts anew")


def stage_recipes(run: Run) -> None:
    """Prints how the recipes depart from the paper, and why."""
    paper = {key: (flag, f.default) for key, f, flag in config.settings()}
    for name, found in config.RECIPES.items():
        rows = [[*paper[k], x, why] for k, (x, why) in found.items() if x != paper[k][1]]
        print(evaluate.markdown([name, "paper", "recipe", "why"], rows), end="\n\n")


STAGES = dict(data=stage_data, sft=stage_sft, irl=stage_irl, grpo=stage_grpo)
STAGES |= dict(baseline=stage_baseline, eval=stage_eval, chat=stage_chat)
STAGES |= dict(all=stage_all, recipes=stage_recipes)
SFT_SHARE = {"laptop": 0.21, "laptop-few": 0.12}  # of a run's seconds (lab/RESULTS.md)
ALONE = "eval --model"  # without --run: eval_folder
FRESH = ("all", "recipes", "tiny")  # the last is teach/tiny.py's


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (all flags: python drirl.py --help)")


def true_or_false(text: str) -> bool:
    return ("false", "true").index(text.lower()) == 1  # else a ValueError, as of int("x")


def build_parser(stages: dict) -> argparse.ArgumentParser:
    parser = Parser(prog="drirl.py", description="DR-IRL, stage by stage", allow_abbrev=False)
    about = "; ".join(f"{name}: {(f.__doc__ or '').split('.')[0]}" for name, f in stages.items())
    parser.add_argument("stage", choices=stages, help=about)
    groups = {f.name: parser.add_argument_group(f.type.__doc__) for f in dataclasses.fields(Config)}
    for key, f, flag in config.settings():
        kind = true_or_false if f.type is bool else f.type
        text = f"{f.metadata['help']} (default: {f.default!r})".replace("%", "%%")
        group = groups[key.split(".")[0]]
        group.add_argument(flag, type=kind, dest=key, metavar=f.type.__name__.upper(), help=text)
    return parser


def parse(argv: list[str], stages: dict) -> tuple[str, Config]:
    """(stage, settings). FRESH and ALONE take no settings from config.json."""
    given = {k: v for k, v in vars(build_parser(stages).parse_args(argv)).items() if v is not None}
    stage, path = given.pop("stage"), Path(given.get("run.run", Config().run.run)) / "config.json"
    if stage == "eval" and "run.model" in given and "run.run" not in given:
        stage = ALONE
    c, saved = Config(), read_json(path) if path.exists() and stage != ALONE else {}
    if not all(isinstance(values, dict) for values in saved.values()):
        raise UserError(f"{path}: not the settings of a run; choose another --run")
    for section, values in saved.items() if stage not in FRESH else ():
        try:
            c = config.changed(c, {f"{section}.{name}": v for name, v in values.items()})
        except UserError as e:
            raise UserError(f"{path}: {e}: remove it there, or start anew with all") from None
    if "run.recipe" in given:
        had = None if stage in FRESH else saved.get("run", {}).get("recipe")
        if had not in (None, given["run.recipe"]):
            raise UserError(f"{path}: begun with recipe {had or 'none'}: choose another --run")
        c = config.with_recipe(given["run.recipe"], c)
    c = config.changed(c, {**given, "run.run": str(path.parent)})  # also where a run was moved
    config.check(c, lambda key, flag: flag if key in given else f"{path}: {key} (or {flag})")
    return stage, c


def timed(stage: str, run: Run, stages: dict = STAGES) -> None:
    """Runs a stage and prints its time and memory."""
    start, run.seconds = time.time(), 0.0
    if parallel.world() > 1 and stage != "grpo":
        raise UserError(f"{stage} runs in one process: torchrun is for grpo")
    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # glibc keeps what earlier stages freed
    stages[stage](run)
    if stage in ORDER:
        run.finish(stage)
        if run.interrupted:
            raise KeyboardInterrupt
    if stage not in ("chat", "recipes") and not parallel.rank():
        used = torch.cuda.max_memory_allocated() / 2**30  # 0 without a GPU
        gpu = f", {used:.1f} GB on the GPU" if used else ""
        unit = 2 ** (30 if sys.platform == "darwin" else 20)  # bytes there, KiB elsewhere
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        print(f"[{stage}] {time.time() - start:.0f} s, peak memory {peak:.1f} GB{gpu}", flush=True)


def main(argv: list[str], stages: dict = STAGES) -> int:
    """Runs one stage; returns the exit status. A mistake is one line and status 2."""
    try:
        stage, c = parse(argv, stages)
        run = Run(c)
        if stage in (*ORDER, "all") and not c.run.recipe and run.device.type == "cpu":
            print("the paper's setting takes hours on a CPU, --recipe laptop minutes", flush=True)
        timed(stage, run, stages | {ALONE: eval_folder})
        return 0
    except KeyboardInterrupt:
        print("\ndrirl: interrupted; the same command, without --resume false, goes on")
        return 130
    except EOFError:  # the end of a chat
        return 0
    except (UserError, OSError) as e:
        line = "".join(ch if ch.isprintable() else " " for ch in str(e))  # whatever a file put in
        print("drirl:", line[:1000], file=sys.stderr)
        return 2
    finally:
        release()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
