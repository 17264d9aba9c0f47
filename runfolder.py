"""The run folder that the stages share, with settings, device, and files read and checked on demand."""

import dataclasses
import functools
import hashlib
import json
import random
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

import chat as chats
import data
import encoder
import evaluate
import loaders
import parallel
import settings
import weights
from files import append, hold, number, read_json, read_records, read_tensors, write
from loop import Loop, refuse_differences
from model import load_model, open_model
from transformer import Transformer


ORDER = ("data", "sft", "irl", "grpo", "baseline", "eval")
FREE = (
    "--run",
    "--resume",
    "--save-every",
    "--max-skips",
    "--tokens-per-batch",
    "--recompute",
    "--prompt",
    "--explore-samples",
    "--seeds",
    "--first-seed",
    "--only",
)  # may differ when a run goes on


class Run:
    """What the stages share: settings, folder, device, log, and models loaded on demand."""

    def __init__(self, c: settings.Config):
        self.c, self.folder, self.interrupted = c, Path(c.run.run), False
        try:
            self.device = torch.device(c.run.device)
        except RuntimeError:
            raise data.UserError(f"--device {c.run.device}: want cpu or cuda") from None
        if self.device.type not in ("cpu", "cuda"):
            raise data.UserError(f"--device {c.run.device}: want cpu or cuda")
        if self.device.type == "cuda" and (self.device.index or 0) >= torch.cuda.device_count():
            raise data.UserError(
                f"--device {c.run.device}: this torch sees {torch.cuda.device_count() or 'no'} GPU"
            )
        parallel.start(self.device.type)
        auto = (
            torch.cuda.is_bf16_supported(including_emulation=False)
            if self.device.type == "cuda"
            else torch.cpu._is_avx512_bf16_supported()
        )
        self.dtype = (
            torch.bfloat16
            if c.run.dtype == "bf16" or c.run.dtype == "auto" and auto
            else torch.float32
        )

    def amp(self):
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16
        )

    def log(self, **record) -> None:
        if not parallel.rank():
            append(self.folder / "metrics.jsonl", record)

    def read(self, name: str, default):
        return (
            read_json(self.folder / name, type(default))
            if (self.folder / name).exists()
            else default
        )

    def write(self, name: str, content) -> None:
        if not parallel.rank():
            write({self.folder / name: as_json(content)})

    def times(self) -> dict[str, float]:
        times = self.read("times.json", {})
        for stage in times:
            number(times, stage, self.folder / "times.json", 0.0, 1e9)
        return times

    @functools.cached_property
    def identity(self) -> dict:
        """What makes two runs the same: {flag: value} of the settings, and digests of corpus, models and code."""

        def digest(parts):
            return hashlib.sha256(b"".join(parts)).hexdigest()[:12]

        def weights_of(folder):
            return (
                f"{p.name} {p.stat().st_size} {p.stat().st_mtime_ns}".encode()
                for p in sorted(Path(folder).glob("*.safetensors"))
            )

        values = {
            flag: getattr(getattr(self.c, section), f.name)
            for section, f, flag, _ in settings.settings()
            if flag not in FREE
        }
        values |= {
            f"text of --{name}": digest([self.file(name).read_bytes()])
            for name in settings.SHIPPED
            if self.file(name).exists()
        }
        values |= {
            f"weights of --{name}": digest(weights_of(getattr(self.c.run, name)))
            for name in ("model", "encoder")
            if getattr(self.c.run, name)
        }
        code = Path(__file__).parent
        return values | {
            "code": digest(
                p.read_bytes()
                for p in sorted([*code.glob("*.py"), *code.glob("kernels/*.py")])
                if p.name not in ("bench.py", "walkthrough.py")
            )
        }

    def progress(self) -> dict:
        """{stage that is done: identity of the run at the time}, what `all` goes on from."""
        progress = self.read("progress.json", {})
        if any(
            stage not in ORDER or not isinstance(identity, dict)
            for stage, identity in progress.items()
        ):
            raise data.UserError(
                f"{self.folder / 'progress.json'}: want an object for each of the stages {', '.join(ORDER)}; delete it to start anew"
            )
        return progress

    def refuse_others(self) -> None:
        """Raises UserError if stages of this run were done with other settings, corpus, models or code."""
        for stage, identity in self.progress().items() if self.c.run.resume else ():
            refuse_differences(identity, self.identity, f"{self.folder}, {stage}")

    def unfinished(self, stage: str) -> Path:
        """The state of a stage that is at work, or was interrupted (loop.py)."""
        return self.folder / f"unfinished-{stage}.safetensors"

    def begin(self, stage: str, steps: int = 0) -> None:
        """The first thing a stage writes, once its input has been read and found good. It and later ones are not done, nor half done, any more, and leave
        metrics.jsonl but for this stage's first `steps` steps; and the settings."""
        if not parallel.rank():
            hold(self.folder)
        path, progress = self.folder / "metrics.jsonl", self.progress()
        later = ORDER[ORDER.index(stage) :] if stage in ORDER else (stage,)
        kept = "".join(
            json.dumps(r) + "\n"
            for r in read_records(path)
            if r["stage"] not in later
            or r["stage"] == stage
            and type(r.get("step")) is int
            and r["step"] <= steps
        )
        if parallel.rank():
            return
        self.write(
            "progress.json", {s: identity for s, identity in progress.items() if s not in later}
        )
        for s in {*later, *progress} - (
            {stage} if steps else set()
        ):  # what a kill in `finish` left of earlier ones, too
            self.unfinished(s).unlink(missing_ok=True)
        if stage in ORDER[:-1]:
            self.write(
                "config.json",
                dataclasses.asdict(
                    dataclasses.replace(self.c, run=dataclasses.replace(self.c.run, resume=True))
                ),
            )
        if path.exists():
            write({path: kept})

    def finish(self, stage: str) -> None:
        """What a stage writes last."""
        if not parallel.rank():
            self.write("progress.json", {**self.progress(), stage: self.identity})
            self.unfinished(stage).unlink(missing_ok=True)

    def base(self) -> Path:
        return (
            Path(self.c.run.model) if self.c.run.model else weights.fetch("SmolLM2-135M-Instruct")
        )

    def file(self, name: str) -> Path:
        """The pool, benign or prompts file: the user's, or the one in corpus/."""
        return Path(getattr(self.c.run, name) or settings.SHIPPED[name])

    def stage_folder(self, name: str) -> Path:
        if not (self.folder / name / "config.json").exists():
            raise data.UserError(
                f"{self.folder / name} does not exist: run the stages in order (data, sft, irl, grpo, baseline, eval)"
            )
        return self.folder / name

    def chat(self, folder: Path | None = None) -> chats.Chat:
        c = self.c.run
        return chats.load_chat(
            folder or self.base(), c.chat_format, None if c.system == "default" else c.system
        )

    def load(self, folder: Path, dtype: torch.dtype = torch.float32) -> Transformer:
        return load_model(folder, dtype, self.device)

    def encoder(self):
        return encoder.load_encoder(
            self.c.run.encoder or weights.fetch("all-MiniLM-L6-v2"), self.device
        )

    def embedded(self, texts: list[str], name: str = "embeddings") -> torch.Tensor:
        """The texts' embeddings (N, D), kept in data/NAME.safetensors until texts or encoder change."""
        path = self.folder / f"data/{name}.safetensors"
        key = hashlib.sha256(
            json.dumps(
                [self.c.run.encoder, self.identity.get("weights of --encoder"), texts]
            ).encode()
        ).hexdigest()
        try:
            return read_tensors(path)[key]
        except (data.UserError, KeyError):  # none yet, cut off, or of others
            cache = {key: self.encoder().embed(texts).cpu()}
        write({path: lambda path: save_file(cache, path)})
        return cache[key]

    def centres(self) -> torch.Tensor:
        """The categories' centroids, of the shipped pool's prompts."""
        known = loaders.load_demonstrations(settings.SHIPPED["pool"])
        return data.centroids(
            self.embedded([r["prompt"] for r in known], "known"), [r["category"] for r in known]
        )

    def demonstrations(self, name: str, chat: chats.Chat, categories) -> list[dict]:
        """The rows of a file of demonstrations: some of every category, none too long for the model."""
        path = self.folder / "data/balanced.jsonl" if name == "balanced" else self.file(name)
        rows = loaders.load_demonstrations(path)
        if lost := [c for c in categories if all(r["category"] != c for r in rows)]:
            raise data.UserError(
                f"{path}: no demonstrations of category {', '.join(lost)}; add some"
            )
        if (n := sum(r["category"] in categories for r in rows)) < self.c.irl.contrast:
            raise data.UserError(
                f"{path}: {n} demonstrations of {', '.join(categories)}, --contrast asks for {self.c.irl.contrast} of them beside each sample"
            )
        chat.check(rows, self.c.run.max_new_tokens, path)
        return rows

    def rows(self, chat: chats.Chat) -> list[dict]:
        """The balanced demonstrations of the data stage and the harmless ones."""
        harmless, n = (
            self.demonstrations("benign", chat, [data.HELPFUL]),
            self.c.run.helpful_demonstrations,
        )
        if n and not max(2, self.c.irl.contrast) <= n <= len(harmless):
            raise data.UserError(
                f"--helpful-demonstrations {n}: want {max(2, self.c.irl.contrast)} to {len(harmless)}, or 0 for all"
            )
        return self.demonstrations("balanced", chat, data.CATEGORIES) + (
            random.Random(self.c.run.seed).sample(harmless, n) if n else harmless
        )

    def open_prompts(self, chat: chats.Chat, rows: list[dict]) -> list[dict]:
        """The pool's prompts that have a category (helpful is one), and the harmless ones, that are not among these demonstrations."""
        known, found = {r["prompt"] for r in rows}, []
        for name, wanted in (
            ("pool", (*data.CATEGORIES, data.HELPFUL)),
            ("benign", [data.HELPFUL]),
        ):
            listed = loaders.load_rows(self.file(name), skip_bad=self.c.run.skip_bad)
            chat.check(
                [{"prompt": r["prompt"]} for r in listed],
                self.c.run.max_new_tokens,
                self.file(name),
            )
            found += [
                r
                for r in data.distinct(listed)
                if r["category"] in wanted and r["prompt"] not in known
            ]
        return found

    def prompts(self, folders: list[Path]) -> tuple[list[dict], list[chats.Chat]]:
        """The held-out prompts, of known kinds and none too long for the models in these folders, and the models' chats."""
        rows, found = loaders.load_rows(self.file("prompts"), strict=False), []
        for row in rows:
            evaluate.kind_of(row)
        for folder in folders:
            open_model(folder)
            found.append(self.chat(folder))
            found[-1].check(
                [{"prompt": r["prompt"]} for r in rows],
                self.c.run.max_new_tokens,
                self.file("prompts"),
            )
        return rows, found

    def harmful(self) -> list[dict]:
        """The held-out prompts that have a harm category."""
        rows = [
            r for r in loaders.load_rows(self.file("prompts")) if r["category"] in data.CATEGORIES
        ]
        if not rows:
            raise data.UserError(f"{self.file('prompts')}: no prompt has a harm category")
        return rows

    @contextmanager
    def work(self, stage: str, rows: list[dict], resumable: bool = True):
        """A stage's work, begun with its input checked and its models loaded: the Loop to train in, where it was interrupted if it was; its seconds go to times.json."""
        times, c = self.times(), self.c.run
        belongs = {
            **self.identity,
            "processes": parallel.world(),
            "prompts and demonstrations": hashlib.sha256(json.dumps(rows).encode()).hexdigest()[
                :12
            ],
        }
        loop = Loop(
            stage,
            self.unfinished(stage) if resumable else None,
            c.resume,
            belongs,
            c.save_every,
            c.max_skips,
            self.log,
        )
        if loop.done:
            print(f"{stage} goes on after step {loop.done}")
        self.begin(stage, loop.done)
        with loop:
            yield loop
        self.interrupted = (
            loop.stop
        )  # after the last step: the stage ends as usual, then the run stops
        self.write("times.json", {**times, stage: round(loop.seconds, 1)})


def as_json(content) -> str:
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"
