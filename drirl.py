"""DR-IRL from the command line: the stages in order, their settings, and the run folder they share.

    python drirl.py all --run runs/mine              every stage, one after the other (what train.sh runs)
    python drirl.py eval --model FOLDER --prompts FILE.csv
    python drirl.py chat --run runs/mine

A run folder holds config.json, data/, sft/, rewards/, policy/ (the result, a Hugging Face folder), baseline/, metrics.jsonl,
report.md, results.json and pictures. A stage reads what the earlier ones wrote; flags override config.json.
"""
import dataclasses
import hashlib
import json
import math
import resource
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import chat as chats
import data
import encoder
import evaluate
import grpo_s
import introspect
import loaders
import parallel
import reward
import settings
import sft
import tiny
import weights
from model import frozen_copy, load_model, save_model
from transformer import Transformer


class Run:
    """What the stages share: settings, folder, device, log, and models loaded on demand."""

    def __init__(self, c: settings.Config):
        self.c, self.folder = c, Path(c.run.run)
        try:
            self.device = torch.device(c.run.device)
        except RuntimeError:
            raise data.UserError(f"--device {c.run.device}: want cpu or cuda") from None
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise data.UserError("--device cuda: this torch sees no GPU")
        parallel.start(self.device.type)
        auto = torch.cuda.is_bf16_supported(including_emulation=False) if self.device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
        self.dtype = torch.bfloat16 if c.run.dtype == "bf16" or c.run.dtype == "auto" and auto else torch.float32

    def amp(self):
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def log(self, **record) -> None:
        with open(self.folder / "metrics.jsonl", "a") as f:
            f.write(json.dumps(record) + "\n")

    def read(self, name: str, default):
        return json.loads((self.folder / name).read_text()) if (self.folder / name).exists() else default

    def write(self, name: str, content) -> None:
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(row, ensure_ascii=False) for row in content] if name.endswith(".jsonl") else [json.dumps(content, ensure_ascii=False, indent=1)]
        (self.folder / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")

    def base(self) -> Path:
        return Path(self.c.run.model) if self.c.run.model else weights.fetch("SmolLM2-135M-Instruct")

    def file(self, name: str) -> Path:
        """The pool, benign or prompts file: the user's, or the one in corpus/."""
        return Path(getattr(self.c.run, name) or settings.SHIPPED[name])

    def stage_folder(self, name: str) -> Path:
        if not (self.folder / name / "config.json").exists():
            raise data.UserError(f"{self.folder / name} does not exist: run the stages in order (data, sft, irl, grpo, baseline, eval)")
        return self.folder / name

    def chat(self, folder: Path | None = None) -> chats.Chat:
        c = self.c.run
        return chats.load_chat(folder or self.base(), c.chat_format, None if c.system == "default" else c.system)

    def load(self, folder: Path, dtype: torch.dtype = torch.float32) -> Transformer:
        return load_model(folder, dtype, self.device)

    def encoder(self):
        return encoder.load_encoder(self.c.run.encoder or weights.fetch("all-MiniLM-L6-v2"), self.device)

    def rows(self) -> list[dict]:
        """The balanced demonstrations of the data stage and the harmless ones."""
        return loaders.load_demonstrations(self.folder / "data/balanced.jsonl") + loaders.load_demonstrations(self.file("benign"))

    @contextmanager
    def clock(self, stage: str):
        """Adds the seconds of a stage's work, models loaded, to times.json."""
        start = time.time()
        yield
        self.write("times.json", {**self.read("times.json", {}), stage: round(time.time() - start, 1)})


# ------------------------------------------------------------------------------------------------ the stages, in order

def embedded(run: Run, texts: list[str], name: str = "embeddings") -> torch.Tensor:
    """The texts' embeddings (N, D), kept in data/NAME.safetensors until texts or encoder change."""
    path = run.folder / f"data/{name}.safetensors"
    key = hashlib.sha256(json.dumps([run.c.run.encoder, texts]).encode()).hexdigest()
    try:
        with safe_open(path, "pt") as f:
            if f.metadata().get("key") == key:
                return f.get_tensor("embeddings")
    except (FileNotFoundError, SafetensorError):             # none yet, or cut off: made anew
        pass
    vectors = run.encoder().embed(texts).cpu()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"embeddings": vectors}, path, {"key": key})
    return vectors


def centres_of(run: Run) -> torch.Tensor:
    """The categories' centroids, of the shipped pool's prompts."""
    known = loaders.load_demonstrations(settings.SHIPPED["pool"])
    return data.centroids(embedded(run, [r["prompt"] for r in known], "known"), [r["category"] for r in known])


def harmful(run: Run) -> list[dict]:
    """The held-out prompts that have a harm category."""
    rows = [r for r in loaders.load_rows(run.file("prompts")) if r["category"] in data.CATEGORIES]
    if not rows:
        raise data.UserError(f"{run.file('prompts')}: no prompt has a harm category")
    return rows


def stage_data(run: Run) -> None:
    """Balances the pool's demonstrations over the seven categories; sorts unlabelled prompts into them, and generates what is missing, if asked."""
    c = run.c.run
    pool = loaders.load_rows(run.file("pool"), skip_bad=c.skip_bad)
    rows = data.distinct(harm := [r for r in pool if r["category"] != data.HELPFUL])
    drafted = [i for i, r in enumerate(rows) if "draft" in r]
    print(f"{run.file('pool')}: {len(pool)} rows, {len(pool) - len(harm)} helpful ones left out, {len(harm) - len(rows)} duplicates dropped; "
          f"{len(drafted)} demonstrations, {len(rows) - len(drafted)} prompts without a draft")
    vectors, report = embedded(run, [r["prompt"] for r in rows]), {}
    unlabelled = [i for i, r in enumerate(rows) if r["category"] is None]
    if unlabelled:
        for i, category in zip(unlabelled, data.route(vectors[unlabelled], centres_of(run))):
            rows[i]["category"] = category
        report["routed"] = len(unlabelled)
        print(f"{len(unlabelled)} prompts had no category and went to the nearest centroid")
    plain = lambda rows: [{k: r[k] for k in ("prompt", "category", "draft", "answer", "generated") if k in r} for r in rows]
    report["before"] = data.balance_report([rows[i] for i in drafted])
    if c.generate:
        made, report["generated"] = introspect.fill(run.load(run.base(), run.dtype), run.chat(), rows, vectors, c.per_category, c.seed)
        for category, n in report["generated"].items():
            print(f"generated for {category}: {n['kept']} of {n['asked']} kept; turned down: " + ", ".join(f"{why} {n[why]}" for why in introspect.FILTERS) +
                  f"; {n['duplicate']} prompts were near-duplicates")
        run.write("data/generated.jsonl", plain(made))       # before balancing: what was made must not be lost if it is too little
        run.write("data/generated.json", report["generated"])
        rows, vectors = rows + made, torch.cat((vectors, vectors[[r["source"] for r in made]]))
        drafted += range(len(rows) - len(made), len(rows))
    balanced = data.balance([rows[i] for i in drafted], c.per_category, vectors[drafted], c.seed)
    report["after"] = data.balance_report(balanced)
    run.write("data/report.json", report)
    run.write("data/balanced.jsonl", plain(balanced))
    evaluate.picture_of_balance(run.folder / "data/balance.png", report["before"]["counts"], report["after"]["counts"])
    print(data.balance_table(report))


def stage_route(run: Run) -> None:
    """How well prompts without a category find theirs: confusion table on the harmful held-out prompts."""
    rows = harmful(run)
    found = data.route(run.encoder().embed([r["prompt"] for r in rows]).cpu(), centres_of(run))
    print(data.confusion([r["category"] for r in rows], found))


def stage_drafts(run: Run) -> None:
    """Chain of Draft against Chain of Thought: what the base model writes for a quarter of the harmful held-out prompts under either template."""
    shown = [r for r in loaders.load_demonstrations(settings.SHIPPED["pool"]) if "thought" in r]
    prompts = [(r["prompt"], r["category"]) for r in harmful(run)][::4]
    results = introspect.compare(run.load(run.base(), run.dtype), run.chat(), prompts, shown, run.c.run.seed)
    run.write("data/drafts.json", results)
    print("| template | prompts | tokens a response | cut off % | seconds | in form % | refuses % |\n" + "|---" * 7 + "|")
    for r in results:
        print(f"| {r['template']} | {r['prompts']} | {r['tokens']:.0f} | {100 * r['cut']:.0f} | {r['seconds']:.0f} | {100 * r['parses']:.0f} | {100 * r['refuses']:.0f} |")


def stage_sft(run: Run) -> None:
    """Supervised warm start."""
    policy, chat = run.load(run.base()), run.chat()
    with run.clock("sft"):
        sft.train(policy, chat, run.rows(), run.c.sft, run.amp, run.c.run.seed, log=run.log)
    save_model(policy, run.folder / "sft")


def stage_irl(run: Run) -> None:
    """One shadow reward model per category, from demonstrations and the warm start's own samples."""
    c, seed = run.c.irl, run.c.run.seed
    folder = run.stage_folder("sft")
    trunk, chat = run.load(folder, run.dtype), run.chat(folder)
    with run.clock("irl"):
        models, policy = reward.RewardModels(trunk, c), trunk
        for n in range(c.rounds):
            groups = reward.sample_groups(policy, chat, run.rows(), c, run.c.run.max_new_tokens, run.c.run.temperature, seed + n)
            by_category = sorted(groups, key=lambda g: g["category"])
            held = by_category[::8]                          # kept out of the fit, to see what the rewards are worth
            batches = reward.prepare(models, [g for i, g in enumerate(by_category) if i % 8], c.batch, run.amp)
            reward.fit(models, batches, c if n == 0 else dataclasses.replace(c, joint_epochs=0), run.amp, seed + n, run.log)
            if n + 1 < c.rounds:                             # alternating, as Li et al. do: improve a throw-away policy against these rewards
                improved = run.load(folder)
                grpo = dataclasses.replace(run.c.grpo, rollouts=c.policy_steps, scaling="none")
                grpo_s.train(improved, chat, models, encoder.WordEncoder(), run.rows(), grpo, run.amp, run.c.run.temperature,
                             run.c.run.max_new_tokens, run.dtype, seed + n)
                policy = frozen_copy(improved, run.dtype)
        reward.score(models, batches + reward.prepare(models, held, c.batch, run.amp), run.amp)
    models.save(run.folder / "rewards")
    run.write("rewards/samples.json", [{**{k: g[k] for k in ("prompt", "category", "response", "reward_demo")},
                                        "samples": [[round(r, 2), chat.decode(s)] for s, r in zip(g["samples"], g["rewards"])]} for g in groups])
    run.write("rewards/report.json", report := reward.reward_report(held, chat))
    for kind, r in report.items():
        print(f"rewards, {kind} prompts kept out of their fit: AUC of {r['wanted']} samples {r['auc']:.2f} (by length alone {r['auc_length']:.2f}; {r['good']} : {r['bad']} samples)")


def stage_grpo(run: Run) -> None:
    """GRPO-S from the warm start against the shadow rewards."""
    folder = run.stage_folder("sft")
    if (folder / "model.safetensors").stat().st_mtime > max((f.stat().st_mtime for f in run.folder.glob("rewards/*.safetensors")), default=math.inf):
        raise data.UserError(f"{run.folder / 'rewards'} is older than the warm start it should stand on: run irl again")
    policy, reference, chat = run.load(folder), run.load(folder, run.dtype).requires_grad_(False), run.chat(folder)
    rewards = reward.RewardModels(reference, run.c.irl).load(run.folder / "rewards")
    phi, rows, history = run.encoder(), run.rows(), run.read("rewards/samples.json", [])
    with run.clock("grpo"):
        grpo_s.train(policy, chat, rewards, phi, rows, run.c.grpo, run.amp, run.c.run.temperature,
                     run.c.run.max_new_tokens, run.dtype, run.c.run.seed, history, run.log)
    save_model(policy, run.folder / "policy")


def stage_baseline(run: Run) -> None:
    """What SFT alone makes of the same warm start in the wall time that irl and grpo took."""
    times, folder = run.read("times.json", {}), run.stage_folder("sft")
    if not {"irl", "grpo"} <= times.keys():
        raise data.UserError(f"{run.folder / 'times.json'} has no times of irl and grpo yet: run them first")
    policy, chat = run.load(folder), run.chat(folder)
    with run.clock("baseline"):
        sft.train(policy, chat, run.rows(), run.c.sft, run.amp, run.c.run.seed + 1, seconds=times["irl"] + times["grpo"])
    save_model(policy, run.folder / "baseline")


def stage_eval(run: Run, standalone: bool = False) -> None:
    """Every model of the run on the held-out prompts (base, sft, policy, baseline), or one folder on any file of prompts."""
    rows = loaders.load_rows(run.file("prompts"), strict=False)
    if standalone:
        folders = [(run.base().name, run.base())]
    else:
        folders = [("base", run.base())] + [(label, run.folder / name) for label, name in (("SFT warm start", "sft"), ("DR-IRL from it", "policy"), ("SFT continued", "baseline"))
                                            if (run.folder / name / "config.json").exists()]
    results = []
    for label, folder in folders:
        results.append(evaluate.evaluate(run.load(folder, run.dtype), run.chat(folder), rows, run.c.run.max_new_tokens, label))
    if standalone:
        print(evaluate.table(results))
        return
    path, times = run.folder / "metrics.jsonl", run.read("times.json", {})
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    notes = [f"Model {run.base().name}, prompts {run.file('prompts').name}, seed {run.c.run.seed}, {time.strftime('%Y-%m-%d')}, {torch.get_num_threads()} threads, {str(run.dtype)[6:]}; "
             "training seconds: " + ", ".join(f"{k} {v:.0f}" for k, v in times.items()) + ". Refused = phrase-matched refusal; it measures wording, not safety."]
    print(evaluate.write_report(run.folder, results, records, notes))
    print(f"\n{run.folder / 'report.md'} has samples and pictures")


def stage_chat(run: Run) -> None:
    """Base and aligned model side by side; an empty line ends. ... marks an answer cut at --max-new-tokens."""
    folders = {"base": run.base(), "aligned": run.stage_folder("policy")}
    models = {name: (run.load(f, run.dtype), run.chat(f)) for name, f in folders.items()}
    while line := input("you> ").strip():
        for name, (model, chat) in models.items():
            answer = evaluate.respond(model, chat, [line], run.c.run.max_new_tokens)[0]
            print(f"{name:>8}> " + answer["response"].replace("\n", "\n" + " " * 10) + ("" if answer["ended"] else " ..."))


def stage_all(run: Run) -> None:
    """data, sft, irl, grpo, baseline, eval."""
    for name in ("data", "sft", "irl", "grpo", "baseline", "eval"):
        timed(name, run)


def stage_tiny(run: Run) -> None:
    """Makes a 1M-parameter Llama and its tokenizer from the corpus, at --model."""
    if not run.c.run.model:
        raise data.UserError("tiny: say where to put the model with --model FOLDER")
    tiny.make(Path(run.c.run.model), loaders.load_demonstrations(run.file("pool")), loaders.load_demonstrations(run.file("benign")), run.c.run.seed)


STAGES = {name: globals()[f"stage_{name}"] for name in ("data", "route", "drafts", "sft", "irl", "grpo", "baseline", "eval", "chat", "all", "tiny")}


# ------------------------------------------------------------------------------------------------ command line

def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20


def timed(stage: str, run: Run) -> None:
    """Runs a stage and prints its time. Its records of an earlier time leave metrics.jsonl."""
    start, path = time.time(), run.folder / "metrics.jsonl"
    if path.exists():
        path.write_text("".join(line + "\n" for line in path.read_text().splitlines() if json.loads(line)["stage"] != stage))
    STAGES[stage](run)
    if stage not in ("chat", "tiny", "eval", "drafts", "route"):                # what the run was made with; a stage that failed leaves no trace
        run.write("config.json", dataclasses.asdict(run.c))
    if stage != "chat":
        print(f"[{stage}] {time.time() - start:.0f} s, peak memory {peak_gb():.1f} GB", flush=True)


def main(argv: list[str]) -> int:
    try:
        stage, c, given = settings.parse(argv, STAGES)
        run = Run(c)
        standalone = settings.alone(stage, given)
        stage_eval(run, standalone=True) if standalone else timed(stage, run)
        return 0
    except (EOFError, KeyboardInterrupt):
        print("", file=sys.stderr)
        return 130
    except data.UserError as e:
        print(f"drirl: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
