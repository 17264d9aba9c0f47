"""files.py: bounded reads with errors that name the file, whole writes, a lock."""

import errno
import fcntl
import gzip
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from config import UserError
from support import files
from support.files import append, as_json, hold, inside, number, read_json, release, write

# ---------------------------------------------------------------------------- faults

NASTY = [0, -1, 1, 2, 3, 7, 10**6, 10**12, 2**63, 1e308, -0.5, math.nan, math.inf, "", "x"]
NASTY += ["\ud800", None, True, [], {}, [[]], {"a": 1}, ["x"], "llama3", "default"]
PIECES = [b'"', b"{", b"[", b"]", b"}", b",", b"\n", b"\r", b"\0", b"\xff", b"\\", b"-", b"1e999"]
PIECES += [b"null", b"[" * 200, b'{"a":' * 200, b"9" * 5000]
NUMBERS = [0, 1, -1, 2**31, 2**63, 10**12, 10**30, 5, 63]


def mutate(raw, rng):
    """One to four random changes of bytes: flipped, cut out, doubled, put in, numbers replaced."""
    raw = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        at, n, how = rng.randrange(len(raw) + 1), rng.randint(1, 12), rng.randrange(6)
        if how == 0 and at < len(raw):
            raw[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            del raw[at : at + n]
        elif how == 2:
            raw[at:at] = raw[at : at + n]
        elif how == 3:
            raw[at:at] = rng.choice(PIECES)
        elif how == 4 and rng.random() < 0.3:
            del raw[at:]
        elif found := list(re.finditer(rb"\d+", raw)):
            place = rng.choice(found)
            raw[place.start() : place.end()] = str(rng.choice(NUMBERS)).encode()
    return bytes(raw)


def mutate_json(raw, rng):
    """A field gets a nasty value or is lost, or the text itself is mutated."""
    if rng.random() < 0.3:
        return mutate(raw, rng)
    value = json.loads(raw)
    part = rng.choice([value, *(v for v in value.values() if isinstance(v, dict) and v)])
    for _ in range(rng.randint(1, 2)):
        key = rng.choice(list(part) or ["a"])
        part[key] = rng.choice(NASTY)
        if rng.random() < 0.1:
            del part[key]
    return json.dumps(value).encode()


def mutate_tensors(raw, rng):
    """The header changes and its length is set right, or anything changes, the length too."""
    n = int.from_bytes(raw[:8], "little")
    if rng.random() < 0.6:
        text = mutate(raw[8 : 8 + n], rng)
        return struct.pack("<Q", len(text)) + text + raw[8 + n :]
    if rng.random() < 0.5:
        sizes = [0, 1, n - 1, n + 1, len(raw), 2**24, 2**32, 2**63, 2**64 - 1]
        return struct.pack("<Q", rng.choice(sizes)) + raw[8:]
    return mutate(raw, rng)


def die_at(monkeypatch, where, name, n):
    """From its n-th call on, where.name fails as on a full disk; a write leaves half its bytes.

    Returns the list whose only item is the number of calls.
    """
    real, calls = getattr(where, name), [0]

    def call(*args):
        calls[0] += 1
        if calls[0] < n:
            return real(*args)
        if name == "write_bytes":
            real(args[0], args[1][: len(args[1]) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(where, name, call)
    return calls


# ---------------------------------------------------------------------------- reading


def said(call, *args) -> str:
    with pytest.raises(UserError) as e:
        call(*args)
    assert "\n" not in str(e.value)
    return str(e.value)


def zipped() -> bytes:
    file = io.BytesIO()
    zipfile.ZipFile(file, "w").writestr("xl/workbook.xml", "a")
    return file.getvalue()


def test_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfa\r\nb\rc\n\xc3\xa4")
    assert files.read_text(path) == "a\nb\nc\nä"
    assert files.read_text(path, 12) and "larger than 11" in said(files.read_text, path, 11)
    for raw, words in (
        (b"\xffab", "line 1 is not UTF-8: save it as UTF-8"),
        (b"a,b\r\nc,caf\xe9\r\n", "line 2 is not UTF-8: save it as UTF-8"),
        ("ab".encode("utf-16-le"), "a NUL byte at 1: no text; export it as text in UTF-8"),
        ("ab".encode("utf-16"), "a text in UTF-16: save it as UTF-8"),
        (gzip.compress(b"a"), "a gzip file: unpack it"),
        (b"\xd0\xcf\x11\xe0\xa1", "an old Excel workbook: save it as CSV"),
        (zipped(), "a zip file or an Excel workbook: unpack it, or save it as CSV"),
        (b"PAR1\x15\x04\xff", "a Parquet file: export it as JSON lines"),
        (b"\n<!DOCTYPE html>\n", "a web page: fetch the file itself"),
        (b"<HTML lang=en>", "a web page: fetch the file itself"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a git-LFS pointer, not the file: run"),
    ):
        path.write_bytes(raw)
        assert said(files.read_text, path).startswith(f"cannot read {path}: {words}")
    assert said(files.read_text, tmp_path) == f"cannot read {tmp_path}: Is a directory"
    assert "No such file" in said(files.read_text, tmp_path / "none")
    assert "cannot read /dev/zero: larger than" in said(files.read_text, Path("/dev/zero"))


def test_json_is_bounded(tmp_path):
    for start, end in (("[", "]"), ('{"a": ', "}")):
        deep = lambda levels: start * levels + "1" + end * levels
        files.parse_json(deep(files.MAX_DEPTH - 1))
        with pytest.raises(ValueError, match="nested too deep, more than 64 levels"):
            files.parse_json(deep(files.MAX_DEPTH))
    path = tmp_path / "a.json"
    for content, words in (
        ("[" * 10**6, f"cannot read {path} as JSON: nested too deep"),
        ('{"a": ' + "9" * 5000 + "}", f"cannot read {path} as JSON"),
        ("{", f"cannot read {path} as JSON"),
        ("[1]", f"{path}: want an object, found list"),
        ("null", f"{path}: want an object, found NoneType"),
    ):
        path.write_text(content)
        assert said(read_json, path).startswith(words)
    path.write_text("[1]")
    assert read_json(path, list) == [1]
    path.write_text("{}")
    assert read_json(path) == {} and said(read_json, path, list).endswith("a list, found dict")
    os.truncate(path, files.MAX_JSON + 1)
    assert said(read_json, path).startswith(f"cannot read {path}: larger than")


def test_numbers():
    raw = {"a": 3, "b": 0.5, "c": None, "d": True, "e": "3", "f": math.nan, "g": math.inf}
    assert number(raw, "a", "F", 1, 9) == 3 and number(raw, "a", "F", 1.0, 9) == 3
    assert number(raw, "b", "F", 0.0, 1) == 0.5 and number(raw, "c", "F", 1, 9, 7) == 7
    assert said(number, raw, "c", "F", 1, 9) == said(number, {}, "c", "F", 1, 9) == "F lacks 'c'"
    for name, low, want in (
        ("a", 4, "F: a is 3: want a whole number from 4 to 9"),
        ("b", 0, "F: b is 0.5: want a whole number from 0 to 9"),
        ("d", 0, "F: d is True: want a whole number"),
        ("e", 0.0, "F: e is '3': want a number from 0.0 to 9"),
        ("f", 0.0, "F: f is nan: want a number"),
        ("g", 0.0, "F: g is inf: want a number"),
    ):
        assert said(number, raw, name, "F", low, 9).startswith(want)


def test_names_that_lead_out(tmp_path):
    """Names with / or control characters, and links, but for those of Hugging Face's cache."""
    folder, blobs = tmp_path / "models/snapshots/abc", tmp_path / "models/blobs"
    for made in (folder, blobs, tmp_path / "elsewhere"):
        made.mkdir(parents=True)
        (made / "a").write_text("a")
    (folder / "good").symlink_to("../../blobs/a")
    (folder / "bad").symlink_to(tmp_path / "elsewhere/a")
    (folder / "sub").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "linked").symlink_to(folder)
    for name in ("a", "good", "missing"):
        assert inside(folder, name) == folder / name
        assert inside(tmp_path / "linked", name) == tmp_path / "linked" / name
    for name in ("bad", "sub/a", "..", "../abc2/a", "/etc/passwd", "a\0", "a\n", "x" * 256):
        assert f"{name!r} leads out of the folder" in said(inside, folder, name)


def test_tensors(tmp_path):
    path, x = tmp_path / "x.safetensors", {"a": torch.arange(6.0).view(2, 3)}
    save_file(x, path, metadata={"state": "{}"})
    assert torch.equal(files.read_tensors(path)["a"], x["a"])
    good, rng, outcomes = path.read_bytes(), random.Random(0), [0, 0]
    for size in (0, 1, 2**24 + 1, 2**63):
        path.write_bytes(struct.pack("<Q", size) + good[8:])
        assert said(files.read_tensors, path).endswith("; fetch or make it again")
    for _ in range(300):
        path.write_bytes(mutate_tensors(good, rng))
        try:
            files.read_tensors(path)
            outcomes[0] += 1
        except UserError as e:
            outcomes[1] += 1
            assert str(e).startswith(f"cannot read {path}: ")
    assert outcomes[0] > 3 and outcomes[1] > 30


# ---------------------------------------------------------------------------- writing


def test_json_has_no_nan(tmp_path):
    value = {"a": [1.5, math.nan, (math.inf, {"b": -math.inf})], "ä": "NaN\n", 3: None}
    want = {"a": [1.5, None, [None, {"b": None}]], "ä": "NaN\n", "3": None}
    assert json.loads(as_json(value), parse_constant=pytest.fail) == want
    assert as_json({"ä": [1]}) == '{\n "ä": [\n  1\n ]\n}\n'
    assert as_json([1, 2], None) == "[1, 2]\n"
    for x in (0.1, 1e308, -5e-324, 2**70):
        assert json.loads(as_json(x)) == x
    for record in ({"stage": "a", "x": math.nan}, {"stage": "ü"}):
        append(tmp_path / "m.jsonl", record)
    assert (tmp_path / "m.jsonl").read_text() == '{"stage": "a", "x": null}\n{"stage": "ü"}\n'


def test_records(tmp_path):
    path = tmp_path / "m.jsonl"
    assert files.read_records(path) == []
    path.write_text('{"stage": "a"}\n{"stage": "b", "x": 1}\n{"stage": "c')  # cut off
    assert files.read_records(path) == [{"stage": "a"}, {"stage": "b", "x": 1}]
    for line in ("{", "3", "[]", '{"step": 1}', "", '{"stage": ' + "[" * 99 + "]" * 99 + "}"):
        path.write_text(f'{{"stage": "a"}}\n{line}\n')
        why = f"{path}:2: want an object with a stage; delete that line"
        assert said(files.read_records, path) == why
    path.write_text('{"key": 1}\n')
    assert files.read_records(path, "key") == [{"key": 1}]


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


NEW = {"a": b"new", "b": b"new weights", "last": b"neu"}


def new_set(folder):
    part = lambda path: path.write_bytes(b"new weights")  # what writes to the path it is given
    return {folder / "a": b"new", folder / "b": part, folder / "c": None, folder / "last": "neu"}


def test_a_set_is_written(tmp_path):
    write({tmp_path / "x/a": b"1", tmp_path / "x/c": "ä", tmp_path / "x/last": "l"})
    assert contents(tmp_path / "x") == {"a": b"1", "c": "ä".encode(), "last": b"l"}
    write(new_set(tmp_path / "x"))
    assert contents(tmp_path / "x") == NEW
    write({tmp_path / "x/last": None})
    write({tmp_path / "x/last": None})
    assert contents(tmp_path / "x") == {"a": b"new", "b": b"new weights"}
    (tmp_path / "file").write_text("")
    why = f"cannot write {tmp_path}/file/x/a: Not a directory"
    assert said(write, {tmp_path / "file/x/a": "1"}) == why
    assert "cannot write /proc/x/a" in said(write, {Path("/proc/x/a"): "1"})


FAULTS = {"write": (Path, "write_bytes"), "flush": (os, "fsync"), "rename": (os, "replace")}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("one", (True, False), ids=("one file", "a set"))
def test_a_full_disk(tmp_path, monkeypatch, fault, one):
    """At each write in turn: an error of one line, no temporary file, the old files as they were.

    Of a set whose renames were cut short the last file is missing: readers refuse it.
    """
    old = {"a": b"old", "b": b"old weights", "c": b"old", "last": b"alt"}
    for n in itertools.count(1):
        folder = tmp_path / str(n)
        write({folder / name: content for name, content in old.items()})
        wanted = {folder / "a": "new"} if one else new_set(folder)
        with monkeypatch.context() as m:
            calls = die_at(m, *FAULTS[fault], n)
            try:
                write(wanted)
                break
            except UserError as e:
                where = next(path for path in wanted if str(e).startswith(f"cannot write {path}: "))
                assert str(e).endswith("No space left on device") and where.parent == folder
        now = contents(folder)
        assert now == old or fault == "rename" and not one and "last" not in now
    assert calls[0] == n - 1 == (1 if one else 3)
    assert contents(folder) == ({**old, "a": b"new"} if one else NEW)


# ---------------------------------------------------------------------------- the lock


def test_one_process_holds_a_folder(tmp_path):
    folder = tmp_path / "runs/a"
    for _ in range(3):  # also when it was deleted and made again
        hold(folder)
        hold(folder)
        other = os.open(folder, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(other)
        shutil.rmtree(folder)
    hold(folder)
    release()
    other = os.open(folder, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    why = f"{folder}: another process is at work; choose another --run"
    assert said(hold, folder) == why == said(hold, folder)
    os.close(other)
    hold(folder)
    release()
    assert "cannot write /proc/x" in said(hold, Path("/proc/x"))
