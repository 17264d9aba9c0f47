"""The run folder that the stages share, with settings, device, and files read and checked on demand."""
import dataclasses
import hashlib
import json
import random
from contextlib import contextmanager
from pathlib import Path

import torch

import chat as chats
import data
import encoder
import evaluate
import loaders
import parallel
import settings
import weights
from files import append, number, read_json, read_records, write
from loop import Loop
from model import load_model, open_model
from transformer import Transformer


ORDER = ("data", "sft", "irl", "grpo", "baseline", "eval")
FREE = ("--run", "--resume", "--save-every", "--max-skips", "--prompt", "--explore-samples")     # settings that may differ when a run goes on


class Run:
    """What the stages share: settings, folder, device, log, and models loaded on demand."""

    def __init__(self, c: settings.Config):
        self.c, self.folder = c, Path(c.run.run)
        try:
            self.device = torch.device(c.run.device)
        except RuntimeError:
            raise data.UserError(f"--device {c.run.device}: want cpu or cuda") from None
        if self.device.type not in ("cpu", "cuda"):
            raise data.UserError(f"--device {c.run.device}: want cpu or cuda")
        if self.device.type == "cuda" and (self.device.index or 0) >= torch.cuda.device_count():
            raise data.UserError(f"--device {c.run.device}: this torch sees {torch.cuda.device_count() or 'no'} GPU")
        self.unfinished = self.folder / "unfinished.safetensors"                 # state of the stage that is at work (loop.py)
        parallel.start(self.device.type)
        auto = torch.cuda.is_bf16_supported(including_emulation=False) if self.device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
        self.dtype = torch.bfloat16 if c.run.dtype == "bf16" or c.run.dtype == "auto" and auto else torch.float32

    def amp(self):
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def log(self, **record) -> None:
        if not parallel.rank():
            append(self.folder / "metrics.jsonl", record)

    def read(self, name: str, default):
        return read_json(self.folder / name, type(default)) if (self.folder / name).exists() else default

    def write(self, name: str, content) -> None:
        if not parallel.rank():
            write({self.folder / name: as_json(content)})

    def times(self) -> dict[str, float]:
        times = self.read("times.json", {})
        for stage in times:
            number(times, stage, self.folder / "times.json", 0.0, 1e9)
        return times

    def identity(self) -> dict:
        """What makes two runs the same: {flag: value} of the settings, and what is in the corpus files."""
        values = {flag: getattr(getattr(self.c, section), f.name) for section, f, flag, _ in settings.settings() if flag not in FREE}
        return values | {f"text of --{name}": hashlib.sha256(self.file(name).read_bytes()).hexdigest()[:12] for name in settings.SHIPPED if self.file(name).exists()}

    def progress(self) -> dict:
        """What `all` goes on from: {"begun": identity, "done": stages}."""
        found = self.read("progress.json", {})
        progress = {"begun": found.get("begun", {}), "done": found.get("done", [])}
        if not isinstance(progress["begun"], dict) or not isinstance(progress["done"], list) or any(stage not in ORDER for stage in progress["done"]):
            raise data.UserError(f"{self.folder / 'progress.json'}: want begun, an object, and done, a list of stages; delete it to start anew")
        return progress

    def begin(self, stage: str, steps: int = 0) -> None:
        """The first thing a stage writes, once its input has been read and found good: it and later ones are not done; the settings; metrics.jsonl keeps
        of this stage's records those of the first `steps` steps."""
        path, progress = self.folder / "metrics.jsonl", self.progress()
        kept = "".join(json.dumps(r) + "\n" for r in read_records(path) if r["stage"] != stage or r["step"] <= steps)
        if parallel.rank():
            return
        self.write("progress.json", {"begun": progress["begun"] if stage == "eval" else self.identity(), "done": [s for s in progress["done"] if ORDER.index(s) < ORDER.index(stage)]})
        if not steps:
            self.unfinished.unlink(missing_ok=True)
        if stage != "eval":
            self.write("config.json", dataclasses.asdict(dataclasses.replace(self.c, run=dataclasses.replace(self.c.run, resume=True))))
        if path.exists():
            write({path: kept})

    def finish(self, stage: str) -> None:
        """What a stage writes last."""
        progress = self.progress()
        if not parallel.rank() and progress["begun"] == self.identity():
            self.write("progress.json", {**progress, "done": [*progress["done"], stage]})
            self.unfinished.unlink(missing_ok=True)

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

    def demonstrations(self, name: str, chat: chats.Chat, categories) -> list[dict]:
        """The rows of a file of demonstrations: some of every category, none too long for the model."""
        path = self.folder / "data/balanced.jsonl" if name == "balanced" else self.file(name)
        rows = loaders.load_demonstrations(path)
        if lost := [c for c in categories if all(r["category"] != c for r in rows)]:
            raise data.UserError(f"{path}: no demonstrations of category {', '.join(lost)}; add some")
        if (n := sum(r["category"] in categories for r in rows)) < self.c.irl.contrast:
            raise data.UserError(f"{path}: {n} demonstrations of {', '.join(categories)}, --contrast asks for {self.c.irl.contrast} of them beside each sample")
        chat.check(rows, self.c.run.max_new_tokens, path)
        return rows

    def rows(self, chat: chats.Chat) -> list[dict]:
        """The balanced demonstrations of the data stage and the harmless ones."""
        harmless, n = self.demonstrations("benign", chat, [data.HELPFUL]), self.c.run.helpful_demonstrations
        return self.demonstrations("balanced", chat, data.CATEGORIES) + (random.Random(self.c.run.seed).sample(harmless, n) if 0 < n < len(harmless) else harmless)

    def open_prompts(self, chat: chats.Chat, rows: list[dict]) -> list[dict]:
        """The pool's and the harmless prompts that are not among these demonstrations."""
        known, found = {r["prompt"] for r in rows}, []
        for name, wanted in (("pool", data.CATEGORIES), ("benign", [data.HELPFUL])):
            found += [r for r in loaders.load_rows(self.file(name), skip_bad=self.c.run.skip_bad) if r["category"] in wanted and r["prompt"] not in known]
            chat.check(found, self.c.run.max_new_tokens, self.file(name))
        return found

    def prompts(self, folders: list[Path]) -> tuple[list[dict], list[chats.Chat]]:
        """The held-out prompts, of known kinds and none too long for the models in these folders, and the models' chats."""
        rows, found = loaders.load_rows(self.file("prompts"), strict=False), []
        for row in rows:
            evaluate.kind_of(row)
        for folder in folders:
            open_model(folder)
            found.append(self.chat(folder))
            found[-1].check(rows, self.c.run.max_new_tokens, self.file("prompts"))
        return rows, found

    @contextmanager
    def work(self, stage: str, rows: list[dict], resumable: bool = True):
        """A stage's work, begun with its input checked and its models loaded: the Loop to train in, where it was interrupted if it was; its seconds go to times.json."""
        times, c = self.times(), self.c.run
        if not c.resume and not parallel.rank():
            self.unfinished.unlink(missing_ok=True)
        belongs = {**self.identity(), "demonstrations": hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]}
        loop = Loop(stage, self.unfinished if resumable else None, belongs, c.save_every, c.max_skips, self.log)
        if loop.done:
            print(f"{stage} goes on after step {loop.done}")
        self.begin(stage, loop.done)
        with loop:
            yield loop
        self.write("times.json", {**times, stage: round(loop.seconds, 1)})


def as_json(content) -> str:
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"
