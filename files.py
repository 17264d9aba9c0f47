"""Files as they come and go. What is read may be a stranger's: size, depth and header are bounded, and whatever is wrong is a UserError that names the file.
What is written appears whole or not at all."""

import fcntl
import json
import os
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data import UserError

MAX_TEXT, MAX_JSON, MAX_HEADER, MAX_DEPTH = (
    2**29,
    2**26,
    2**24,
    64,
)  # bytes of a data file, of any other JSON, of a safetensors header; levels of JSON


@contextmanager
def doing(what: str):
    """An error of the disk in here becomes one line: cannot read FILE: why."""
    try:
        yield
    except (OSError, SafetensorError) as e:
        raise UserError(f"cannot {what}: {getattr(e, 'strerror', None) or e}") from e


HELD = {}  # {folder: descriptor}


def hold(folder: Path) -> None:
    """Keeps other processes from work in a folder, until `release` or the end of this process, be it by SIGKILL. Raises UserError if one is at work there."""
    with doing(f"write {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    if folder in HELD:  # by us, unless it was deleted and made again
        here = os.path.samestat(os.fstat(HELD[folder]), os.fstat(descriptor))
        os.close(descriptor if here else HELD.pop(folder))
        if here:
            return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(
            f"{folder}: another process is at work there; let it end, or choose another --run"
        ) from None
    except OSError:  # a disk without locks
        pass
    HELD[folder] = descriptor


def release() -> None:
    while HELD:
        os.close(HELD.popitem()[1])


# ------------------------------------------------------------------------------------------------ reading


def inside(folder: Path, name: str) -> Path:
    """The file `name` of a model folder. Raises UserError if it lies elsewhere, by its name or as a link; Hugging Face's cache may link to its blobs/."""
    path, root = folder / name, Path(os.path.realpath(folder))
    if (
        not name.isprintable()
        or len(name.encode()) > 255
        or Path(os.path.realpath(path)).parent not in (root, root.parent.parent / "blobs")
    ):
        raise UserError(f"{folder}: {name!r} leads out of the folder; put the file itself there")
    return path


def read_text(path: Path, limit: int = MAX_JSON) -> str:
    with doing(f"read {path}"), open(path, "rb") as f:
        raw = f.read(limit + 1)
    if len(raw) > limit:
        raise UserError(f"{path}: larger than {limit} bytes: not the file meant, or one to split")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 at byte {e.start}; save it as UTF-8") from None
    if "\0" in text:
        raise UserError(f"{path}: a NUL byte at character {text.index(chr(0))}: not a text file")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse_json(text: str):
    """json.loads, at most MAX_DEPTH levels deep. Raises ValueError."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            v
            for x in level
            if isinstance(x, (dict, list))
            for v in (x.values() if isinstance(x, dict) else x)
        ]
    if level:
        raise ValueError(f"nested too deep, more than {MAX_DEPTH} levels")
    return value


def read_json(path: Path, kind: type = dict):
    """A JSON file that holds an object, or a list where kind says so."""
    text = read_text(path)
    try:
        value = parse_json(text)
    except ValueError as e:
        raise UserError(f"cannot read {path}: no JSON: {e}") from None
    if not isinstance(value, kind):
        raise UserError(
            f"{path}: want {'an object' if kind is dict else 'a list'}, found {type(value).__name__}"
        )
    return value


def number(raw: dict, name: str, where: str | Path, low: float, high: float, default=None):
    """raw[name], or the default where it is missing or null: a whole number from low to high, any number if low is a float."""
    value = default if raw.get(name) is None else raw[name]
    if value is None:
        raise UserError(f"{where} lacks {name!r}")
    if (
        type(value) not in ((int, float) if isinstance(low, float) else (int,))
        or not low <= value <= high
    ):
        raise UserError(
            f"{where}: {name} is {value!r}: want a {'' if isinstance(low, float) else 'whole '}number from {low} to {high}"
        )
    return value


def read_header(path: Path) -> bytes:
    """The header of a safetensors file, JSON, whose length is checked before anything is made from it."""
    with doing(f"read {path}"), open(path, "rb") as f:
        size, header = os.fstat(f.fileno()).st_size, int.from_bytes(f.read(8), "little")
        if not 2 <= header <= min(size - 8, MAX_HEADER):
            raise UserError(
                f"cannot read {path}: a header of {header} bytes in a file of {size}: cut off, or no safetensors file; fetch or make it again"
            )
        return f.read(header)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file."""
    read_header(path)
    try:
        return load_file(path)
    except Exception as e:  # of several kinds, by what is wrong with the header
        raise UserError(f"cannot read {path}: {e}; fetch or make it again") from e


def fitting(
    state: dict[str, Tensor], tensors: dict[str, Tensor], where: str | Path
) -> dict[str, Tensor]:
    """The tensors, which are to fill a network's state. Raises UserError for the first that is missing, unknown, of another shape or of whole numbers."""
    want, got = (
        {k: tuple(v.shape) for k, v in state.items()},
        {k: tuple(v.shape) for k, v in tensors.items()},
    )
    wrong = sorted(k for k in want.keys() | got.keys() if want.get(k) != got.get(k))
    if wrong:
        raise UserError(
            f"{where}: tensor {wrong[0]} has shape {got.get(wrong[0])}, config.json asks for {want.get(wrong[0])} ({len(wrong)} such tensors)"
        )
    whole = [k for k, v in tensors.items() if not v.is_floating_point()]
    if whole:
        raise UserError(
            f"{where}: tensor {whole[0]} is {tensors[whole[0]].dtype}: quantised weights are not read, only floating point"
        )
    return tensors


# ------------------------------------------------------------------------------------------------ writing


def same(path: Path, content) -> bool:
    return not callable(content) and content == (path.read_bytes() if path.is_file() else None)


def write(files: dict) -> None:
    """{path: content}: text, bytes, a function that writes to the path it is given, or None for a file that has to go.

    Every file is written aside and flushed to the disk before the first takes its place, so a full disk leaves the old ones as they are.
    Several files are a set whose last is the one that readers look for (config.json of a model). If at most one of them changes, only that is renamed.
    Else the last is removed, then the others change, then it comes back: a crash in between leaves a set that is refused as unfinished,
    never one mixed from two.
    """
    files = {
        path: content.encode() if isinstance(content, str) else content
        for path, content in files.items()
    }
    changed, aside = (
        {path: content for path, content in files.items() if not same(path, content)},
        {},
    )
    files = changed if len(changed) < 2 else files
    try:
        for path, content in files.items():
            with doing(f"write {path}"):
                if content is None:
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                aside[path] = path.with_name(path.name + ".tmp")
                content(aside[path]) if callable(content) else aside[path].write_bytes(content)
                with open(aside[path], "rb+") as f:
                    os.fsync(f.fileno())
        if len(files) > 1:
            with doing(f"write {path}"):
                path.unlink(missing_ok=True)
        for path in files:
            with doing(f"write {path}"):
                os.replace(aside[path], path) if path in aside else path.unlink(missing_ok=True)
    finally:
        for path in aside.values():
            path.unlink(missing_ok=True)


def append(path: Path, record: dict) -> None:
    """One more line of JSON."""
    with doing(f"write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as f:
            f.write(json.dumps(record) + "\n")


def read_records(path: Path, key: str = "stage") -> list[dict]:
    """What append wrote, objects with a `key`: none if there is no file. A last line without its end was cut off while it was written, and is left out."""
    text, records = read_text(path, MAX_TEXT) if path.exists() else "", []
    for n, line in enumerate(text.split("\n")[:-1], 1):
        try:
            records.append(parse_json(line))
        except ValueError:
            records.append(None)
        if not isinstance(records[-1], dict) or key not in records[-1]:
            raise UserError(f"{path}:{n}: want an object with a {key}; delete that line")
    return records
