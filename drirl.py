"""DR-IRL from the command line: the stages in order, their settings, and the run folder they share.

    python drirl.py all --run runs/mine              every stage, one after the other (what train.sh runs)
    python drirl.py eval --model FOLDER --prompts FILE.csv
    python drirl.py chat --run runs/mine
    torchrun --nproc_per_node=2 -- drirl.py grpo --run runs/mine         GRPO-S in several processes (parallel.py)
    python drirl.py explore --run runs/mine --prompt "..."

A run folder holds config.json, data/, sft/, rewards/, policy/ (the result, a Hugging Face folder), baseline/, metrics.jsonl,
report.md, results.json and pictures; explore.html if asked for; progress.json and unfinished-STAGE.safetensors, from which an
interrupted run goes on. A stage reads what the earlier ones wrote; flags override config.json.
"""

import dataclasses
import json
import math
import resource
import sys
import time
import traceback
from pathlib import Path

import torch

import ablate
import data
import dpo
import encoder
import evaluate
import explore
import groups
import grpo_s
import introspect
import loaders
import parallel
import reward
import settings
import sft
import tables
import tiny
from files import hold, read_records, release, write
from model import frozen_copy, save_model
from runfolder import ORDER, Run, as_json


# ------------------------------------------------------------------------------------------------ the stages, in order


def stage_data(run: Run) -> None:
    """Balances the pool's demonstrations over the seven categories; sorts unlabelled prompts into them, and generates what is missing, if asked."""
    c = run.c.run
    pool = loaders.load_rows(run.file("pool"), skip_bad=c.skip_bad)
    rows = data.distinct(harm := [r for r in pool if r["category"] != data.HELPFUL])
    if not rows:
        raise data.UserError(
            f"{run.file('pool')}: no harmful prompts: every row is of category {data.HELPFUL}"
        )
    drafted = [i for i, r in enumerate(rows) if "draft" in r]
    print(
        f"{run.file('pool')}: {len(pool)} rows, {len(pool) - len(harm)} helpful ones left out, {len(harm) - len(rows)} duplicates dropped; "
        f"{len(drafted)} demonstrations, {len(rows) - len(drafted)} prompts without a draft"
    )
    vectors, report = run.embedded([r["prompt"] for r in rows]), {}
    unlabelled = [i for i, r in enumerate(rows) if r["category"] is None]
    if unlabelled:
        for i, category in zip(unlabelled, data.route(vectors[unlabelled], run.centres())):
            rows[i]["category"] = category
        report["routed"] = len(unlabelled)
        print(f"{len(unlabelled)} prompts had no category and went to the nearest centroid")
    folder, fields = run.folder / "data", ("prompt", "category", "draft", "answer", "generated")
    as_lines = lambda rows: "".join(
        json.dumps({k: r[k] for k in fields if k in r}, ensure_ascii=False) + "\n" for r in rows
    )
    report["before"] = data.balance_report([rows[i] for i in drafted])
    if c.generate:
        hold(run.folder)
        made, report["generated"] = introspect.fill(
            run.load(run.base(), run.dtype), run.chat(), rows, vectors, c.per_category, c.seed
        )
        for category, n in report["generated"].items():
            print(
                f"generated for {category}: {n['kept']} of {n['asked']} kept; turned down: "
                + ", ".join(f"{why} {n[why]}" for why in introspect.FILTERS)
                + f"; {n['duplicate']} prompts were near-duplicates"
            )
        write(
            {
                folder / "generated.jsonl": as_lines(made),
                folder / "generated.json": as_json(report["generated"]),
            }
        )  # what was made must not be lost if it is too little
        rows, vectors = rows + made, torch.cat((vectors, vectors[[r["source"] for r in made]]))
        drafted += range(len(rows) - len(made), len(rows))
    among = [rows[i] for i in drafted], c.per_category
    balanced = (
        data.balance(*among, vectors[drafted], c.seed)
        if c.balance == "even"
        else data.imbalance(*among, c.balance, vectors[drafted], c.seed)
    )
    report["after"] = data.balance_report(balanced)
    run.begin("data")
    write({folder / "report.json": as_json(report), folder / "balanced.jsonl": as_lines(balanced)})
    evaluate.picture_of_balance(
        run.folder / "data/balance.png", report["before"]["counts"], report["after"]["counts"]
    )
    print(data.balance_table(report))


def stage_route(run: Run) -> None:
    """How well prompts without a category find theirs: confusion table on the harmful held-out prompts."""
    rows = run.harmful()
    found = data.route(run.encoder().embed([r["prompt"] for r in rows]).cpu(), run.centres())
    print(data.confusion([r["category"] for r in rows], found))


def stage_drafts(run: Run) -> None:
    """Chain of Draft against Chain of Thought: what the base model writes for a quarter of the harmful held-out prompts under either template."""
    shown = [r for r in loaders.load_demonstrations(settings.SHIPPED["pool"]) if "thought" in r]
    prompts = [(r["prompt"], r["category"]) for r in run.harmful()][::4]
    results = introspect.compare(
        run.load(run.base(), run.dtype), run.chat(), prompts, shown, run.c.run.seed
    )
    run.write("data/drafts.json", results)
    print(
        "| template | prompts | tokens a response | cut off % | seconds | in form % | refuses % |\n"
        + "|---" * 7
        + "|"
    )
    for r in results:
        print(
            f"| {r['template']} | {r['prompts']} | {r['tokens']:.0f} | {100 * r['cut']:.0f} | {r['seconds']:.0f} | {100 * r['parses']:.0f} | {100 * r['refuses']:.0f} |"
        )


def stage_sft(run: Run) -> None:
    """Supervised warm start."""
    policy, chat = run.load(run.base()), run.chat()
    rows = run.rows(chat)
    if (
        run.device.type == "cuda"
    ):  # its first steps load and compile: not to be counted in the pace that the rivals' steps are told by
        sft.train(
            run.load(run.base()), chat, rows, dataclasses.replace(run.c.sft, steps=3), run.amp
        )
    with run.work("sft", rows) as loop:
        sft.train(policy, chat, rows, run.c.sft, run.amp, run.c.run.seed, loop)
    save_model(policy, run.folder / "sft")


def stage_irl(run: Run) -> None:
    """One shadow reward model per category, from demonstrations and the warm start's own samples."""
    c, seed = run.c.irl, run.c.run.seed
    folder = run.stage_folder("sft")
    trunk, chat = run.load(folder, run.dtype), run.chat(folder)
    rows = run.rows(chat)
    with run.work("irl", rows, resumable=c.rounds == 1) as loop:
        models, policy = reward.RewardModels(trunk, c), trunk
        for n in range(c.rounds):
            groups = reward.sample_groups(
                policy, chat, rows, c, run.c.run.max_new_tokens, run.c.run.temperature, seed + n
            )
            by_category = sorted(groups, key=lambda g: g["category"])
            held = by_category[::8]  # kept out of the fit, to see what the rewards are worth
            batches = reward.prepare(
                models, [g for i, g in enumerate(by_category) if i % 8], c.batch, run.amp
            )
            reward.fit(
                models,
                batches,
                c if n == 0 else dataclasses.replace(c, joint_epochs=0),
                run.amp,
                seed + n,
                loop,
            )
            if (
                n + 1 < c.rounds
            ):  # alternating, as Li et al. do: improve a throw-away policy against these rewards
                improved = run.load(folder)
                grpo = dataclasses.replace(run.c.grpo, rollouts=c.policy_steps, scaling="none")
                grpo_s.train(
                    improved,
                    chat,
                    models,
                    encoder.WordEncoder(),
                    rows,
                    grpo,
                    run.amp,
                    run.c.run.temperature,
                    run.c.run.max_new_tokens,
                    run.dtype,
                    seed + n,
                )
                policy = frozen_copy(improved, run.dtype)
        reward.score(models, batches + reward.prepare(models, held, c.batch, run.amp), run.amp)
    drawn = [
        {
            **{k: g[k] for k in ("prompt", "category", "response", "reward_demo")},
            "samples": [[round(r, 2), chat.decode(s)] for s, r in zip(g["samples"], g["rewards"])],
        }
        for g in groups
    ]
    report = reward.reward_report(held, chat)
    models.save(
        run.folder / "rewards", {"samples.json": as_json(drawn), "report.json": as_json(report)}
    )
    for kind, r in report.items():
        print(
            f"rewards, {kind} prompts kept out of their fit: AUC of {r['wanted']} samples {r['auc']:.2f} (by length alone {r['auc_length']:.2f}; {r['good']} : {r['bad']} samples)"
        )


def stage_grpo(run: Run) -> None:
    """GRPO-S from the warm start against the shadow rewards."""
    folder = run.stage_folder("sft")
    if (folder / "model.safetensors").stat().st_mtime > max(
        (f.stat().st_mtime for f in run.folder.glob("rewards/*.safetensors")), default=math.inf
    ):
        raise data.UserError(
            f"{run.folder / 'rewards'} is older than the warm start it should stand on: run irl again"
        )
    policy, reference, chat = (
        run.load(folder),
        run.load(folder, run.dtype).requires_grad_(False),
        run.chat(folder),
    )
    rewards = reward.RewardModels(reference, run.c.irl).load(run.folder / "rewards")
    phi, rows, history = run.encoder(), run.rows(chat), run.read("rewards/samples.json", [])
    if not all(
        isinstance(g, dict) and {"category", "response", "reward_demo", "samples"} <= g.keys()
        for g in history
    ):
        raise data.UserError(
            f"{run.folder / 'rewards/samples.json'}: want category, response, reward_demo and samples of every prompt: of another version, run irl again"
        )
    bare = run.open_prompts(chat, rows) if run.c.grpo.open_prompts else []
    if run.c.grpo.prompts < parallel.world():
        raise data.UserError(
            f"--grpo-prompts {run.c.grpo.prompts}: fewer than the {parallel.world()} processes"
        )
    with run.work("grpo", rows + bare, resumable=not run.c.grpo.shard) as loop:
        grpo_s.train(
            policy,
            chat,
            rewards,
            phi,
            rows + groups.borrow(bare, rows, phi),
            run.c.grpo,
            run.amp,
            run.c.run.temperature,
            run.c.run.max_new_tokens,
            run.dtype,
            run.c.run.seed,
            history,
            loop,
        )
    save_model(policy, run.folder / "policy")


def stage_baseline(run: Run) -> None:
    """What SFT alone makes of the same warm start in the wall time that irl and grpo took, at the pace of its own."""
    times, folder, c = run.times(), run.stage_folder("sft"), run.c.sft
    if not c.baseline_steps and not {"sft", "irl", "grpo"} <= times.keys():
        raise data.UserError(
            f"{run.folder / 'times.json'} has no times of sft, irl and grpo yet: run them first"
        )
    steps = c.baseline_steps or sft.steps_in_time(times, c.steps)
    policy, chat = run.load(folder), run.chat(folder)
    rows = run.rows(chat)
    if c.borrow:
        rows += groups.borrow(run.open_prompts(chat, rows), rows, run.encoder())
    with run.work("baseline", rows) as loop:
        sft.train(
            policy,
            chat,
            rows,
            dataclasses.replace(c, steps=steps),
            run.amp,
            run.c.run.seed + 1,
            loop,
        )
    save_model(policy, run.folder / "baseline")


def stage_dpo(run: Run) -> None:
    """A rival without rewards: DPO on what the reward models were fitted on."""
    folder = run.stage_folder("sft")
    policy, reference, chat = (
        run.load(folder),
        run.load(folder, run.dtype).requires_grad_(False),
        run.chat(folder),
    )
    rows, drawn = run.rows(chat), run.read("rewards/samples.json", [])
    if not drawn:
        raise data.UserError(
            f"{run.folder / 'rewards/samples.json'}: no samples to compare demonstrations with: run irl first"
        )
    pairs = dpo.pairs(drawn, rows, run.c.irl.contrast, run.c.run.seed)
    with run.work("dpo", pairs, resumable=False) as loop:
        dpo.train(policy, reference, chat, pairs, run.c.dpo, run.amp, run.c.run.seed, loop)
    save_model(policy, run.folder / "dpo")


def stage_eval(run: Run, standalone: bool = False) -> None:
    """Every model of the run on the held-out prompts (base, sft, policy, baseline), or one folder on any file of prompts."""
    if standalone:
        folders = [(run.base().name, run.base())]
    else:
        made = (
            ("SFT warm start", "sft", "sft"),
            ("DR-IRL from it", "policy", "grpo"),
            ("SFT continued", "baseline", "baseline"),
        )
        folders = [("base", run.base())] + [
            (label, run.folder / name) for label, name, stage in made if stage in run.progress()
        ]
    (rows, found), results = run.prompts([folder for _, folder in folders]), []
    if not standalone:
        times, records = run.times(), read_records(run.folder / "metrics.jsonl")
        run.begin("eval")
    for (label, folder), chat in zip(folders, found):
        results.append(
            evaluate.evaluate(
                run.load(folder, run.dtype), chat, rows, run.c.run.max_new_tokens, label
            )
        )
    if standalone:
        print(evaluate.table(results))
        return
    notes = [
        f"Model {run.base().name}, prompts {run.file('prompts').name}, seed {run.c.run.seed}, {time.strftime('%Y-%m-%d')}, {ablate.machine(run.device)}, {str(run.dtype)[6:]}; "
        "training seconds: "
        + ", ".join(f"{k} {v:.0f}" for k, v in times.items())
        + ". Refused = phrase-matched refusal; it measures wording, not safety."
    ]
    print(evaluate.write_report(run.folder, results, records, notes))
    print(f"\n{run.folder / 'report.md'} has samples and pictures")


def stage_chat(run: Run) -> None:
    """Base and aligned model side by side; an empty line ends. ... marks an answer cut at --max-new-tokens."""
    folders = {"base": run.base(), "aligned": run.stage_folder("policy")}
    models = {name: (run.load(f, run.dtype), run.chat(f)) for name, f in folders.items()}
    while line := input("you> ").strip():
        for name, (model, chat) in models.items():
            chat.check([{"prompt": line}], run.c.run.max_new_tokens, "your prompt")
            answer = evaluate.respond(model, chat, [line], run.c.run.max_new_tokens)[0]
            print(
                f"{name:>8}> "
                + answer["response"].replace("\n", "\n" + " " * 10)
                + ("" if answer["ended"] else " ...")
            )


def stage_explore(run: Run) -> None:
    """One group from the inside: --prompt's samples, rewards, similarities, advantages and log-ratios, here and in explore.html."""
    c, phi = run.c, run.encoder()
    held_out, (chat,) = run.prompts([run.stage_folder("policy")])
    rows, prompt = run.rows(chat), c.explore.prompt or held_out[0]["prompt"]
    chat.check([{"prompt": prompt}], c.run.max_new_tokens, "--prompt")
    rewards = reward.RewardModels(
        run.load(run.stage_folder("sft"), run.dtype).requires_grad_(False), c.irl
    ).load(run.folder / "rewards")
    g = explore.group(
        run.load(run.stage_folder("policy"), run.dtype),
        rewards,
        chat,
        phi,
        prompt,
        explore.closest(prompt, rows, held_out, phi),
        run.read("rewards/samples.json", []),
        c.grpo,
        c.explore.samples,
        c.run.max_new_tokens,
        c.run.temperature,
        c.run.seed,
        run.amp,
    )
    print(explore.text(g))
    write({run.folder / "explore.html": explore.page(g)})
    print(
        f"\n{run.folder / 'explore.html'} shows the same with every cosine and the tokens coloured"
    )


def stage_all(run: Run) -> None:
    """data, sft, irl, grpo, baseline, eval, less those done before with the same settings. What they read is looked at before the first one writes."""
    _, (chat,) = run.prompts([run.base()])
    run.demonstrations("benign", chat, [data.HELPFUL])
    run.encoder()
    run.refuse_others()
    before = run.c.run.resume
    for name in ORDER:
        before = (
            before and name in run.progress()
        )  # once a stage has run, later ones are not done any more
        print(f"[{name}] done before") if before else timed(name, run)
    if before:
        print(
            f"{evaluate.table(run.read('results.json', []))}\n\nNothing was left to do; --resume false starts anew"
        )


def stage_ablate(run: Run) -> None:
    """A grid of runs that differ in their demonstrations, parts and seeds (ablate.py), and its tables."""
    print(tables.text(ablate.grid(run.c, Run, timed)))


def stage_tiny(run: Run) -> None:
    """Makes a 1M-parameter Llama and its tokenizer from the corpus, at --model."""
    if not run.c.run.model:
        raise data.UserError("tiny: say where to put the model with --model FOLDER")
    run.refuse_others()  # before their base model is made anew
    tiny.make(
        Path(run.c.run.model),
        loaders.load_demonstrations(run.file("pool")),
        loaders.load_demonstrations(run.file("benign")),
        run.c.run.seed,
    )


STAGES = {
    name: globals()[f"stage_{name}"]
    for name in (
        "data",
        "route",
        "drafts",
        "sft",
        "irl",
        "grpo",
        "baseline",
        "eval",
        "dpo",
        "explore",
        "chat",
        "all",
        "ablate",
        "tiny",
    )
}


# ------------------------------------------------------------------------------------------------ command line


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (
        30 if sys.platform == "darwin" else 20
    )  # bytes there, KiB elsewhere


def timed(stage: str, run: Run) -> None:
    """Runs a stage and prints its time."""
    start = time.time()
    if parallel.world() > 1 and stage != "grpo":
        raise data.UserError(f"{stage} runs in one process: torchrun is for grpo")
    STAGES[stage](run)
    if stage in ORDER:
        run.finish(stage)
        if run.interrupted:
            raise KeyboardInterrupt
    if stage != "chat" and not parallel.rank():
        on_gpu = (
            f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GB on the GPU"
            if run.device.type == "cuda"
            else ""
        )
        print(
            f"[{stage}] {time.time() - start:.0f} s, peak memory {peak_gb():.1f} GB{on_gpu}",
            flush=True,
        )


def main(argv: list[str]) -> int:
    stage = argv[0] if argv else ""
    try:
        stage, c, given = settings.parse(argv, STAGES)
        run = Run(c)
        standalone = settings.alone(stage, given)
        stage_eval(run, standalone=True) if standalone else timed(stage, run)
        return 0
    except KeyboardInterrupt:
        print(
            "\ndrirl: interrupted; the same command goes on from what is saved (without --resume false)"
            if stage in (*ORDER, "all", "ablate")
            else "",
            file=sys.stderr,
        )
        return 130
    except EOFError:  # the end of a chat
        return 0
    except (data.UserError, OSError) as e:
        if "--debug" in argv:
            traceback.print_exc()
        print(
            "drirl:", "".join(c if c.isprintable() else " " for c in str(e))[:1000], file=sys.stderr
        )  # one line, whatever a file put into it
        return 2
    finally:
        release()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
