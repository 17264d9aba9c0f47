"""The run folder that the stages share, with settings, device, and files read and checked on demand."""
import dataclasses
import json
import time
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
from model import load_model, open_model
from transformer import Transformer


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

    def begin(self, stage: str) -> None:
        """The first thing a stage writes, once its input has been read and found good: the settings; its records of an earlier time leave metrics.jsonl."""
        path = self.folder / "metrics.jsonl"
        kept = "".join(json.dumps(r) + "\n" for r in read_records(path) if r["stage"] != stage)
        if stage != "eval":
            self.write("config.json", dataclasses.asdict(self.c))
        if path.exists() and not parallel.rank():
            write({path: kept})

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
        return self.demonstrations("balanced", chat, data.CATEGORIES) + self.demonstrations("benign", chat, [data.HELPFUL])

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
    def clock(self, stage: str):
        """A stage's work, begun with its input checked and its models loaded; its seconds go to times.json."""
        times, start = self.times(), time.time()
        self.begin(stage)
        yield
        self.write("times.json", {**times, stage: round(time.time() - start, 1)})


def as_json(content) -> str:
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"
