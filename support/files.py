"""Files in, bounded, and out, whole. What is wrong with one is a UserError that names it."""

import fcntl
import json
import os
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from config import UserError

MAX_TEXT, MAX_JSON, MAX_DEPTH = 2**29, 2**26, 64  # bytes of data, of other JSON; JSON's levels
SIZES = {"vocab_size": 10**7, "hidden_size": 10**6, "intermediate_size": 10**7}
SIZES |= {"num_hidden_layers": 1000, "num_attention_heads": 10**4}  # most that a config.json has
MAGIC = {  # how a file begins that is not what is wanted: what it is, and what to do
    b"\x1f\x8b": "a gzip file: unpack it",
    b"PK\x03\x04": "a zip file or an Excel workbook: unpack it, or save it as CSV",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook: save it as CSV",
    b"PAR1": "a Parquet file: export it as JSON lines",
    (b"\xff\xfe", b"\xfe\xff"): "a text in UTF-16: save it as UTF-8",
    (b"<!doctype html", b"<html"): "a web page: fetch the file itself",
    b"version https://git-lfs": "a git-LFS pointer, not the file: run git lfs pull",
}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
OTHERS = {"*.gguf": "GGUF", "*model*.bin": "pickled", "consolidated*.pth": "pickled"}  # weights
LOCKS = []  # descriptors of folders


@contextmanager
def doing(what: str):
    """An error of a file in here becomes one line: cannot read FILE: why."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as e:
        raise UserError(f"cannot {what}: {getattr(e, 'strerror', None) or e}") from e


def hold(folder: Path) -> None:
    """Locks a folder until `release` or this process's end. UserError if another holds it."""
    with doing(f"write {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        if any(os.path.samestat(os.stat(folder), os.fstat(other)) for other in LOCKS):
            return  # ours already
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"{folder}: another process is at work; choose another --run") from None
    except OSError:  # a disk without locks
        pass
    LOCKS.append(descriptor)


def release() -> None:
    while LOCKS:
        os.close(LOCKS.pop())


def inside(folder: Path, name: str) -> Path:
    """The file `name` of a folder, or in its Hugging Face cache; UserError if it is elsewhere."""
    path, root = folder / name, Path(os.path.realpath(folder))
    plain = name.isprintable() and len(name.encode()) < 256
    allowed = root, *(parent / "blobs" for parent in root.parents[1:3])
    if not plain or Path(os.path.realpath(path)).parent not in allowed:
        raise UserError(f"{folder}: {name!r} leads out of the folder; put the file itself there")
    return path


def check_start(head: bytes) -> None:
    """ValueError for a file that begins as one of MAGIC."""
    for start, what in MAGIC.items():
        if head.lstrip().startswith(start) or head.lstrip().lower().startswith(start):
            raise ValueError(what)


def read_text(path: Path, limit: int = MAX_JSON) -> str:
    with doing(f"read {path}"), open(path, "rb") as f:
        raw = f.read(limit + 1)
        if len(raw) > limit:
            raise ValueError(f"larger than {limit} bytes: not the file meant, or one to split")
        check_start(raw[:99])
        if b"\0" in raw:
            raise ValueError(f"a NUL byte at {raw.index(0)}: no text; export it as text in UTF-8")
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as e:
            line = raw.count(b"\n", 0, e.start) + 1
            raise ValueError(f"line {line} is not UTF-8: save it as UTF-8") from None
        return text.replace("\r\n", "\n").replace("\r", "\n")


def depth(value) -> int:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(depth, parts), default=0)


def parse_json(text: str):
    """json.loads, at most MAX_DEPTH levels deep. Raises ValueError."""
    with suppress(RecursionError):
        value = json.loads(text)
        if depth(value) <= MAX_DEPTH:
            return value
    raise ValueError(f"nested too deep, more than {MAX_DEPTH} levels")


def read_json(path: Path, kind: type = dict):
    """A JSON file that holds an object, or a list where kind says so."""
    text = read_text(path)
    with doing(f"read {path} as JSON"):
        value = parse_json(text)
    if not isinstance(value, kind):
        want = "an object" if kind is dict else "a list"
        raise UserError(f"{path}: want {want}, found {type(value).__name__}")
    return value


def number(raw: dict, name: str, where: str | Path, low: float, high: float, default=None):
    """raw[name], or the default for null: from low to high, and a whole number if low is one."""
    value = default if raw.get(name) is None else raw[name]
    if value is None:
        raise UserError(f"{where} lacks {name!r}")
    kinds, want = ((int,), "whole number") if type(low) is int else ((int, float), "number")
    if type(value) not in kinds or not low <= value <= high:
        raise UserError(f"{where}: {name} is {value!r}: want a {want} from {low} to {high}")
    return value


def read_folder(folder: Path, kind: str, *names: str) -> dict:
    """The config.json of a folder of weights. UserError says what else it is, or what it lacks."""
    no = f"{folder} is no {kind} folder:"
    if not folder.is_dir():
        raise UserError(f"{no} no such folder; download it first: hf download NAME --local-dir DIR")
    if (adapter := inside(folder, "adapter_config.json")).exists():
        kind, base = map(read_json(adapter).get, ("peft_type", "base_model_name_or_path"))
        raise UserError(f"{no} an adapter ({kind!s:.20}): merge it into {base!r:.80}, or use that")
    if not any(inside(folder, name).exists() for name in (WEIGHTS, INDEX)):
        for pattern, what in OTHERS.items():
            for path in folder.glob(pattern):
                raise UserError(f"{no} {path.name!r} is {what}; convert it to safetensors")
    for name in ("config.json", *names):
        if not inside(folder, name).exists():
            raise UserError(f"{no} it has no {name}")
    return read_json(inside(folder, "config.json"))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file; the library checks the length of its header before it reads it."""
    with doing(f"read {path}"), open(path, "rb") as f:
        check_start(f.read(99))
    try:
        return load_file(path)
    except Exception as e:  # of several kinds, by what is wrong with the header
        raise UserError(f"cannot read {path}: {e}; fetch or make it again") from e


def load_tensors(folder: Path, config: dict) -> dict[str, Tensor]:
    """All tensors of a folder, none quantised: model.safetensors, else the shards of its index."""
    index, names, tensors = inside(folder, INDEX), {WEIGHTS}, {}
    if index.exists() and not inside(folder, WEIGHTS).exists():
        shards = read_json(index).get("weight_map")
        names = set(map(str, shards.values())) if isinstance(shards, dict) else ()
        if not names:
            raise UserError(f"{index}: weight_map: want an object, {{tensor: file}}")
    for name in sorted(names):
        tensors |= read_tensors(inside(folder, name))
    for name, x in tensors.items():
        floats = x.is_floating_point() and x.dtype.itemsize > 1  # of more than 8 bits
        if not name.endswith(("_ids", "logit_scale")) and (not floats or "scale" in name):
            its = config.get("quantization_config")
            method = its.get("quant_method", x.dtype) if isinstance(its, dict) else x.dtype
            how = "take the folder with the original weights, in bf16 or fp32"
            raise UserError(f"{folder}: these weights are quantised ({method!r:.99}): {how}")
    return tensors


def as_json(value, indent: int | None = 1) -> str:
    """JSON text, a line if indent is None. NaN and the infinities become null."""
    plain = json.loads(json.dumps(value), parse_constant=lambda name: None)
    return json.dumps(plain, indent=indent, ensure_ascii=False) + "\n"


def write(files: dict) -> None:
    """{path: content}: text, bytes, a function that writes to its path, or None: the file goes.

    All are written aside and flushed before one is replaced: a full disk leaves the old files.
    Of several the last, which readers look for (a model's config.json), is removed first and
    comes back last: a crash in between leaves a set without it, never a mixture of two.
    """
    aside, last = {}, list(files)[-1]
    try:
        for path, content in files.items():
            if content is None:
                continue
            with doing(f"write {path}"):
                path.parent.mkdir(parents=True, exist_ok=True)
                new = aside[path] = path.with_name(path.name + ".tmp")
                content = content.encode() if isinstance(content, str) else content
                content(new) if callable(content) else new.write_bytes(content)
                with open(new, "rb+") as f:
                    os.fsync(f.fileno())
        removed = [(last, None)] if len(files) > 1 else []
        for path, new in removed + [(path, aside.get(path)) for path in files]:
            with doing(f"write {path}"):
                os.replace(new, path) if new else path.unlink(missing_ok=True)
    finally:
        for new in aside.values():
            new.unlink(missing_ok=True)


def append(path: Path, record: dict) -> None:
    """One more line of JSON."""
    with doing(f"write {path}"), open(path, "a", encoding="utf-8") as f:
        f.write(as_json(record, None))


def read_records(path: Path, key: str = "stage") -> list[dict]:
    """What `append` wrote: objects with a `key`. A last line that was cut off is left out."""
    text, records = read_text(path, MAX_TEXT) if path.exists() else "", []
    for n, line in enumerate(text.split("\n")[:-1], 1):
        try:
            records.append(parse_json(line))
            records[-1][key]
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{path}:{n}: want an object with a {key}; delete that line") from None
    return records
