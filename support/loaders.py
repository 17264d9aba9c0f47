"""Files of prompts and demonstrations that people have, read into rows of one kind.

| format | prompt | harmful or not, category | response |
|---|---|---|---|
| our JSON lines | prompt | kind, category | draft and answer |
| Safety-Prompts JSON, a dict of lists | prompt | the list's key | response |
| XSTest CSV, prompts or completions | prompt | type: contrast_... or a look-alike | completion |
| StrongREJECT CSV | forbidden_prompt | category | |
| AdvBench CSV | goal | | none: target complies |
| HarmBench CSV | ContextString, Behavior | SemanticCategory | |
| WildGuard | prompt | prompt_harm_label | response |
| Alpaca JSON | instruction, input | category | output |
| messages, conversations, turns; TRL's prompt | first user turn | category | next turn |
| HH-RLHF | chosen: the first after Human: | category | the next after Assistant: |
| any other CSV, JSON or JSON lines | FIELDS in labels.py | FIELDS, NAMES | FIELDS |

The content tells the format, never the file's name. CSV may have commas, semicolons, tabs or bars.
A row has prompt, kind, category (one of ours or None) and, if there is one, response; fields that
mean nothing here stay. A prompt is harmful where nothing says otherwise; a label that isn't
understood is an error. Errors name file and line: a record's first, or in JSON its item.
"""

import contextlib
import csv
import functools
import io
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from config import UserError
from data import CATEGORIES, HELPFUL, format_draft, parse_draft
from support import labels
from support.files import MAX_TEXT, parse_json, read_text
from support.judge import HEADING
from support.labels import ASK, LOOKALIKE, OURS, meanings_of, plain

MAX_LINE = 10**6  # characters of a JSON line
CHATS = ("messages", "conversations", "conversation", "turns", "chosen")  # never one text
WRAPPERS = "data rows items examples instances train test validation".split()
# how several turns in one text begin
DIALOGUE = re.compile(r"\s*(?:<s>\s*)?(?:### ?(?:human|user|instruction):|<\|im_start|\[inst\])")
TURNS = re.compile(r"\s*\[\s*\{\s*['\"]?(?:role|from|content|value)\b")  # a list of them, as text
print_once = functools.cache(print)  # Rows.told, however many stages read the file
ROLES = dict.fromkeys(("human", "prompter"), "user")
ROLES |= dict.fromkeys(("gpt", "chatgpt", "model", "bot", "ai"), "assistant")


def records_of(path: Path) -> Iterator[tuple[str, object]]:
    """(where, record) of every row."""
    text = read_text(path, MAX_TEXT)
    if text.lstrip()[:1] not in ("{", "["):
        yield from csv_records(path, text)
        return
    try:
        whole = parse_json(text)
    except ValueError as e:
        if text.lstrip()[0] == "[" or not re.search(r"^\{.*\}\s*$", text, re.MULTILINE):
            raise UserError(f"{path}: not JSON: {e}") from None
        yield from json_lines(path, text)
        return
    lists = isinstance(whole, dict) and whole and all(isinstance(v, list) for v in whole.values())
    if not lists or any(OURS.get(plain(key)) == "prompt" for key in whole):
        whole = {"": whole if isinstance(whole, list) else [whole]}
    for key, items in whole.items():
        key = "" if plain(key) in WRAPPERS else key
        # the list is named by a label, beside which rows may have a topic, or by a category
        ours = "category" if labels.ALIASES.get(plain(key), "") in ("", *CATEGORIES) else "kind"
        for n, row in enumerate(items, 1):
            row = {ours: key, **row} if isinstance(row, dict) and key else row
            yield f"{path}, {f'{key!r} ' if key else ''}item {n}", row


def json_lines(path: Path, text: str) -> Iterator[tuple[str, object]]:
    for n, line in enumerate(text.split("\n"), 1):
        if len(line) > MAX_LINE:
            size = f"a line of {len(line)} characters"
            raise UserError(f"{path}:{n}: {size}: want at most {MAX_LINE}")
        if line.strip():
            try:
                yield f"{path}:{n}", parse_json(line)
            except ValueError as e:
                raise UserError(f"{path}:{n}: not JSON: {e}") from None


def csv_records(path: Path, text: str) -> Iterator[tuple[str, dict]]:
    """The rows below the header; empty ones and Excel's first line sep=; are skipped."""
    first = next((line for line in text.split("\n") if line.strip(" ,;\t|")), "")
    mark, file = max(",;\t|", key=first.count), io.StringIO(text, newline="")
    reader = csv.reader(file, delimiter=mark, skipinitialspace=True, strict=True)
    header, end = [], 0
    try:
        for fields in reader:
            where, end = f"{path}:{end + 1}", reader.line_num
            if not "".join(fields).strip() or not header and fields[0].lower()[:4] == "sep=":
                continue
            if header and len(fields) != len(header):
                raise UserError(f"{where}: more or fewer fields than the header has columns")
            if header:
                yield where, dict(zip(header, fields))
                continue
            header, names = fields, [plain(x) if plain(x) in OURS else x for x in fields]
            if twice := next((name for name in names if names.count(name) > 1 and name), None):
                raise UserError(f"{where}: two columns are called {twice!r}")
    except csv.Error as e:
        raise UserError(f"{path}:{end + 1}: not CSV: {e}") from None


def turns_of(name: str, value) -> list[tuple[str, str]]:
    """(role, text) of every turn; one text is a user turn. Raises UserError."""
    if isinstance(value, str):
        parts = re.split(r"(?:^|\n\n)(Human|Assistant):", value.lstrip())  # HH-RLHF's
        if value.lstrip().startswith("Human:") and "Assistant" in parts:
            value = [{"from": x, "value": y.strip()} for x, y in zip(parts[1::2], parts[2::2])]
        elif plain(name) not in CHATS and not TURNS.match(value):
            return [("user", value)]
    turns = []
    try:
        for turn in value if isinstance(value, list) else [value]:
            if isinstance(turn, str) and plain(name) == "turns" and isinstance(value, list):
                turn = {"role": "user", "content": turn}
            role = (turn["role"] if "role" in turn else turn["from"]).lower()
            content = turn["content"] if "content" in turn else turn["value"]
            parts = content if isinstance(content, list) else [content]
            texts = [part if isinstance(part, str) else part["text"] for part in parts]
            turns.append((ROLES.get(role, role), "\n".join(texts)))
    except (AttributeError, KeyError, TypeError):
        want = "a text or a list of turns, each a role and a text"
        raise UserError(f"{name}: want {want}; found {str(value)[:60]!r}") from None
    return turns


def texts_of(fields: dict) -> tuple[str, str | None]:
    """(prompt, response). Raises UserError."""
    if "prompt" not in fields:
        names = ", ".join(labels.FIELDS["prompt"].split())
        raise UserError(f"no prompt; want one of the fields {names}")
    name, value = fields["prompt"]
    turns = turns_of(name, value)
    at = next((i for i, (role, text) in enumerate(turns) if role == "user"), None)
    if at is None or not turns[at][1].strip():
        raise UserError(f"{name}: no user turn")
    prompt, replies = turns[at][1], turns[at + 1 : at + 2]
    if DIALOGUE.match(prompt.lower()):
        raise UserError(f"{name}: a dialogue with its marks; want the user's words alone")
    if plain(prompt) == plain(name) or re.fullmatch(r"[-=:|+ ]+|#NAME\?|#REF!|#VALUE!", prompt):
        raise UserError(f"{name} {prompt!r:.60}: a header or a rule, no prompt")
    named, said = fields.get("response", ("", ""))
    turn = said[0] if isinstance(said, list) and said else None
    if not replies and isinstance(turn, dict) and {"role", "from"} & turn.keys():
        replies = turns_of(named, said)  # TRL's completion
    reply = dict(replies[:1]).get("assistant")
    texts = {ours: value for ours, (_, value) in fields.items() if isinstance(value, str)}
    if plain(name) == "behavior" and "context" in texts:  # only half without
        prompt = f"{texts['context']}\n\n{prompt}"
    filled = plain(texts.get("input", "")) not in ("", "null", "nan", "none", "noinput")
    if plain(name) in ("instruction", "question") and filled:
        prompt = f"{prompt}\n\n{texts['input']}"
    response = reply or texts.get("response")
    return prompt.replace("\r\n", "\n"), response and response.replace("\r\n", "\n")


def row_of(record, strict: bool) -> tuple[dict, dict]:
    """One record as a row of ours, and {name in the file: our field} of what was read."""
    if not isinstance(record, dict):
        raise UserError(f"want an object, found {type(record).__name__}")
    empty = lambda x: x is None or x != x or isinstance(x, str) and not x.strip()  # NaN too
    named = {plain(name): (name, x) for name, x in record.items() if not empty(x)}
    fields = {ours: named[key] for key, ours in reversed(OURS.items()) if key in named}
    if ROLES.get(role := str(record.get("role")).lower(), role) in ("assistant", "system", "tool"):
        raise UserError(f"role {record['role']!r:.60}: want rows of users alone")
    prompt, response = texts_of(fields)
    if response is not None and plain(response) in ("safe", "unsafe"):
        raise UserError(f"response {response!r:.60}: {ASK}")
    replied = response is not None or "answer" in fields and "draft" not in fields
    said = meanings_of(record, fields, strict, replied)
    found = list(said.values())
    kind = LOOKALIKE if LOOKALIKE in found else "ordinary" if HELPFUL in found else "harmful"
    category = next(filter(None, found), None) if kind == "harmful" else HELPFUL
    row = {k: v for k, v in record.items() if v is not None and k not in labels.FIELDS}
    row |= {"prompt": prompt, "kind": kind, "category": category}
    if "draft" in fields:
        row |= {ours: fields.get(ours, ("", None))[1] for ours in ("draft", "answer")}
        try:
            response = format_draft(row["draft"], row["answer"])
        except (TypeError, ValueError) as e:
            raise UserError(f"want draft (a list of steps) and answer: {e}") from None
    elif response is not None and not HEADING.search(response):
        with contextlib.suppress(ValueError):  # a plain answer: no demonstration yet
            row["draft"], row["answer"] = parse_draft(response)
    if re.search("[\ud800-\udfff]", prompt + (response or "")):
        raise UserError("half a character (a lone surrogate)")
    row |= {} if response is None else {"response": response}
    return row, {fields[ours][0]: ours for ours in ("prompt", *said)}


class Rows(list):
    """Rows of a file; told: a line that says what was read as what."""


def load_rows(path: str | Path, strict: bool = True, drafted: bool = False) -> Rows:
    """All rows of a file; the first wrong one is an error. drafted: want category and draft."""
    rows, read, unknown = Rows(), {}, []  # read: {name in the file: our field} of all rows
    for where, record in records_of(Path(path)):
        try:
            row, names = row_of(record, strict)
            if drafted and (row["category"] is None or "draft" not in row):
                raise UserError("want category, draft (a list of steps) and answer")
        except UserError as e:
            raise UserError(f"{where}: {e}") from None
        rows.append(row)
        read |= names
        unknown += [where] if len(names) == 1 else []
    if not rows:
        raise UserError(f"{path}: no rows; a table needs a header above them")
    if unknown and (label := next((name for name in read if read[name] in labels.LABELS), None)):
        raise UserError(f"{unknown[0]}: no {label}, which other rows have")
    prompts = ", ".join(repr(name) for name in read if read[name] == "prompt")
    told = ", ".join(repr(name) for name in read if read[name] != "prompt") or "nothing"
    kinds = ", ".join(f"{n} {kind}" for kind, n in Counter(r["kind"] for r in rows).items())
    rows.told = f"{path}: {len(rows)} rows; prompt from {prompts}; kind from {told}: {kinds}"
    if unknown:
        rows.told += f"; {len(unknown)} have no label and count as harmful"
    return rows
