"""The run folder that the stages share: settings, device, checked input, what is done.

RUN/done/STAGE.json says that a stage is done: settings with digests of its input, a digest of the
code, seconds. RUN/unfinished-STAGE.safetensors is the state of a stage at work (resume.py).
"""

import dataclasses
import functools
import hashlib
import random
import timeit
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path

import torch

import data
from config import CORPUS, SHIPPED, Config, UserError, changed, settings
from encoder import load_encoder
from model import Transformer
from support import chat as chats
from support import loaders, parallel, weights
from support.files import append, as_json, hold, read_json, read_records, write
from support.hf import load_model, open_model
from support.resume import Loop, refuse_differences

ORDER = ("data", "sft", "irl", "grpo", "baseline", "eval")
FREE = {"run.recipe", "run.run", "run.resume", "run.rival"}  # may differ when it goes on
FREE |= {"grpo.tokens_per_batch"}
HELD = 64  # open prompts, half of them harmless, that GRPO-S only looks at
CODE = ("*.py", "kernels/*.py", "support/*.py", "support/*.txt", "corpus/open.jsonl")  # of results


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:12]


def machine(device: torch.device) -> str:
    """What the seconds and the rounding of a result depend on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    amx = " and AMX" if torch.cpu._is_amx_tile_supported() else ""
    return f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}{amx}"


@functools.cache
def likes_bfloat16(kind: str) -> bool:
    """Whether products are faster in bfloat16: of a CPU measured, as its flags don't tell."""
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16) * 7:
        a = torch.ones(512, 512, dtype=dtype)
        seconds.setdefault(dtype, []).append(timeit.timeit(lambda: a @ a, number=1))
    return min(seconds[torch.bfloat16]) < min(seconds[torch.float32])


def borrow(prompts: list[dict], demonstrations: list[dict], encoder) -> list[dict]:
    """Prompts without a demonstration, each with that of its category's most similar prompt."""
    out = []
    for category in sorted({p["category"] for p in prompts}):
        bare = [r for r in prompts if r["category"] == category]
        known = [r for r in demonstrations if r["category"] == category]
        vectors = [encoder.embed([r["prompt"] for r in part]) for part in (bare, known)]
        nearest = (vectors[0] @ vectors[1].T).argmax(1).tolist()
        for r, i in zip(bare, nearest):
            out.append({**r, "response": known[i]["response"], "borrowed": True})
    return out


class Run:
    """What the stages share: settings, folder, device, log, and models loaded on demand."""

    def __init__(self, c: Config):
        self.c, self.folder, self.interrupted, self.seconds = c, Path(c.run.run), False, 0.0
        device, gpus = c.run.device, [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        if device not in ("cpu", *gpus) and not (device == "cuda" and gpus):
            raise UserError(f"--device {device}: want cpu or cuda; this torch sees {len(gpus)} GPU")
        self.device = torch.device(device)
        parallel.start(self.device.type)
        if parallel.world() > 1 and self.device.index is not None:
            raise UserError(f"--device {device}: all processes on one; torchrun wants cuda")
        if self.device.index is not None:  # a CUDA graph is recorded on the current device
            torch.cuda.set_device(self.device.index)
        half = c.run.dtype == "bf16"
        if c.run.dtype == "auto":  # all processes alike
            half = bool(parallel.most(int(likes_bfloat16(self.device.type))))
        self.dtype = torch.bfloat16 if half else torch.float32

    def log(self, **record) -> None:
        if not parallel.rank():
            append(self.folder / "metrics.jsonl", record)

    def read(self, name: str, default):
        path = self.folder / name
        return read_json(path, type(default)) if path.exists() else default

    def done(self, stage: str) -> dict | None:
        """What a finished stage left: settings, code, seconds. None: not done."""
        record = self.read(f"done/{stage}.json", {})
        if record and (type(record.get("settings")), type(record.get("seconds"))) != (dict, float):
            raise UserError(f"{self.folder}/done/{stage}.json: broken; delete it")
        return record or None

    def times(self) -> dict[str, float]:
        return {s: record["seconds"] for s in ORDER if (record := self.done(s))}

    @functools.cached_property
    def identity(self) -> dict:
        """What must be the same when a run goes on: settings by flag, and digests of its input."""
        facts = {flag: attrgetter(key)(self.c) for key, _, flag in settings() if key not in FREE}
        facts["--dtype"] = {torch.bfloat16: "bf16", torch.float32: "fp32"}[self.dtype]
        for name in SHIPPED:
            if (path := self.file(name)).exists():
                facts[f"text of --{name}"] = digest(path.read_bytes())
        for name in ("model", "encoder"):
            files = sorted(Path(getattr(self.c.run, name) or "-").glob("*.[sj]*"))  # json too
            parts = [f"{p.name} {p.stat().st_size} {p.stat().st_mtime_ns}".encode() for p in files]
            facts[f"weights of --{name}"] = digest(*parts)
        return facts

    @functools.cached_property
    def code(self) -> str:
        paths = [p for glob in CODE for p in CORPUS.parent.glob(glob)]
        return digest(*(p.read_bytes() for p in sorted(paths)))

    def refuse_others(self) -> None:
        """UserError if stages, eval aside, had other settings or input; a warning of other code."""
        for stage in ORDER if self.c.run.resume else ():
            if record := self.done(stage):
                where = f"{self.folder}, {stage}"
                if stage == "eval" and record["settings"] != self.identity:  # it was another's
                    return (self.folder / "done/eval.json").unlink()
                refuse_differences(record["settings"], self.identity, where)
                if record.get("code") != self.code:
                    what = "done by other code or corpus; --resume false does it again"
                    print(f"warning: {where}: {what}")

    def unfinished(self, stage: str) -> Path:
        return self.folder / f"unfinished-{stage}.safetensors"

    def begin(self, stage: str, steps: int = 0) -> None:
        """The first thing a stage writes, once its input is found good.

        It and later stages are not done any more; of their records only its first `steps` stay.
        """
        if parallel.rank():
            return
        hold(self.folder)
        later = ORDER[ORDER.index(stage) :] if stage in ORDER else (stage,)
        path, kept = self.folder / "metrics.jsonl", ""
        for r in read_records(path):
            mine = r["stage"] == stage and isinstance(r.get("step"), int) and r["step"] <= steps
            if r["stage"] not in later or mine:
                kept += as_json(r, None)
        finished = [name for name in ORDER if name not in later and self.done(name)]
        for name in reversed(later):  # a kill in between leaves the earlier ones done
            (self.folder / f"done/{name}.json").unlink(missing_ok=True)
        for name in (*later, *finished):  # a kill in `finish` leaves the state of what is done
            if name != stage or not steps:
                self.unfinished(name).unlink(missing_ok=True)
        if stage in ORDER[:-1]:
            saved = dataclasses.asdict(changed(self.c, {"run.resume": True}))
            write({self.folder / "config.json": as_json(saved)})
        if path.exists():
            write({path: kept})

    def finish(self, stage: str) -> None:
        """What a stage writes last."""
        if parallel.rank():
            return
        record = {"settings": self.identity, "code": self.code, "seconds": self.seconds}
        write({self.folder / f"done/{stage}.json": as_json(record)})
        self.unfinished(stage).unlink(missing_ok=True)

    @contextmanager
    def work(self, stage: str, rows: list[dict], resumable: bool = True):
        """The Loop to train in, once input is checked and models are loaded; begins the stage."""
        facts = {"processes": parallel.world(), "prompts": digest(repr(rows).encode())}
        path = self.unfinished(stage) if resumable else None
        loop = Loop(stage, path, self.identity | facts, self.log, self.c.run.resume)
        if loop.done:
            print(f"{stage} goes on after step {loop.done}")
        self.begin(stage, loop.done)
        with loop:
            yield loop
        self.interrupted = loop.stop  # after the last step: the stage ends, then the run stops
        self.seconds = round(loop.seconds, 1)

    def base(self) -> Path:
        return Path(self.c.run.model or weights.fetch("SmolLM2-135M-Instruct"))

    def file(self, name: str) -> Path:
        """The pool, benign or prompts file: the user's, or the one in corpus/."""
        return Path(getattr(self.c.run, name) or SHIPPED[name])

    def stage_folder(self, name: str) -> Path:
        """RUN/name, if the stage that makes it is done since the stages before it."""
        folder, stage = self.folder / name, {"policy": "grpo", "rewards": "irl"}.get(name, name)
        if not self.done(stage) or not folder.exists():
            order = f"run {', '.join(ORDER)} in this order"
            raise UserError(f"{folder}: not done, or not since the stages before it: {order}")
        return folder

    def chat(self, folder: Path | None = None) -> chats.Chat:
        c = self.c.run
        return chats.load_chat(folder or self.base(), c.chat_format, c.chat_arguments)

    def load(self, folder: Path, dtype: torch.dtype = torch.float32) -> Transformer:
        return load_model(folder, dtype, self.device)

    def encoder(self):
        name = self.c.run.encoder or weights.fetch("all-MiniLM-L6-v2")
        return load_encoder(name, self.device)

    def demonstrations(self, path: Path, chat: chats.Chat, categories) -> list[dict]:
        """A file's rows, with some of every category, and none too long for the model."""
        rows = loaders.load_rows(path, drafted=True)
        n = {c: sum(r["category"] == c for r in rows) for c in categories}
        if lost := [c for c in categories if not n[c]]:
            raise UserError(f"{path}: no demonstrations of category {', '.join(lost)}; add some")
        if sum(n.values()) < (contrast := self.c.irl.contrast):
            raise UserError(f"{path}: too few rows for --irl-contrast {contrast}")
        chat.check(rows, self.c.run.max_new_tokens, path)
        return rows

    def rows(self, chat: chats.Chat) -> list[dict]:
        """The data stage's balanced demonstrations, then at most as many harmless ones."""
        harmless = self.demonstrations(self.file("benign"), chat, [data.HELPFUL])
        harmless = [r for r in harmless if r["category"] == data.HELPFUL]
        rows = self.demonstrations(self.folder / "data/balanced.jsonl", chat, data.CATEGORIES)
        n = min(len(rows), len(harmless))
        return rows + random.Random(self.c.run.seed).sample(harmless, n)

    def open_prompts(self, chat: chats.Chat, rows: list[dict]) -> list[dict]:
        """The prompts that have a category, but neither demonstrations (`rows`) nor held out."""
        files = [self.file("pool"), self.file("benign")]
        files += [] if self.c.run.pool else [CORPUS / "open.jsonl"]
        held, found = loaders.load_rows(self.file("prompts"), strict=False), []
        known = {data.normalise(r["prompt"]) for r in rows + held}
        for path in files:
            listed = [r for r in loaders.load_rows(path) if r["category"]]
            if path == self.file("benign"):
                listed = [r for r in listed if r["category"] == data.HELPFUL]
            chat.check([{"prompt": r["prompt"]} for r in listed], self.c.run.max_new_tokens, path)
            found += [r for r in listed if data.normalise(r["prompt"]) not in known]
        return data.distinct(found)

    def grpo_rows(self, chat: chats.Chat) -> tuple[list[dict], list[dict]]:
        """What GRPO-S draws from: demonstrations and, if asked for, open prompts; HELD more."""
        rows, bare, held = self.rows(chat), [], []
        if self.c.grpo.open_prompts:
            bare = borrow(self.open_prompts(chat, rows), rows, self.encoder())
        for harmless in (False, True) if len(bare) >= 10 * HELD else ():
            kind = [r for r in bare if (r["category"] == data.HELPFUL) == harmless]
            held += random.Random(self.c.run.seed).sample(kind, min(HELD // 2, len(kind)))
        return rows + [r for r in bare if r not in held], held

    def history(self) -> list[dict]:
        """IRL's groups of samples with their rewards; none before irl."""
        known = {"category", "response", "reward_demo", "samples"}
        groups = self.read("rewards/samples.json", [])
        if not all(isinstance(g, dict) and known <= g.keys() for g in groups):
            where = self.folder / "rewards/samples.json"
            raise UserError(f"{where}: want {sorted(known)}: run irl again")
        return groups

    def prompts(self, folders: list[Path]) -> tuple[list[dict], list[chats.Chat]]:
        """The held-out prompts, none too long for these folders' models, and the models' chats."""
        rows, found = loaders.load_rows(self.file("prompts"), strict=False), []
        for folder in folders:
            open_model(folder)  # refuses a broken folder before anything is computed
            found.append(self.chat(folder))
            bare = [{"prompt": r["prompt"]} for r in rows]
            found[-1].check(bare, self.c.run.max_new_tokens, self.file("prompts"))
        if self.c.run.prompts:
            loaders.print_once(rows.told)
        n = min(self.c.run.eval_prompts or len(rows), len(rows))
        kinds = [(r["kind"], r["category"] or "") for r in rows]
        order = sorted(range(len(rows)), key=lambda i: kinds[i])
        chosen = sorted(order[k * len(rows) // n] for k in range(n))  # evenly of each kind
        return [rows[i] for i in chosen], found
