"""Files of prompts and demonstrations that people have, read into rows of one kind.

| format | known by | prompt | category | response |
|---|---|---|---|---|
| our JSON lines | draft and answer | prompt | category | draft and answer |
| Safety-Prompts JSON | a dict of lists | prompt | the list's key | response |
| XSTest CSV | type, focus, note | prompt | helpful if safe (a look-alike), else none | |
| StrongREJECT CSV | forbidden_prompt | forbidden_prompt | category | |
| AdvBench CSV | goal | goal | none (target complies: no demonstration) | |
| HarmBench CSV | Behavior | ContextString, Behavior | SemanticCategory | |
| Alpaca JSON | instruction | instruction, input | category | output |
| chat JSON lines | messages | first user turn | category | the assistant turn after it |
| any other CSV, JSON or JSON lines | | see PROMPTS | category | see RESPONSES |

The content tells the format, never the file's name. CSV may have commas, semicolons or tabs. A row
keeps its fields that are not null, and has prompt, category (one of ours or None) and, if there is
one, response. Errors name file and line: a record's first, or in JSON its item.
"""

import contextlib
import csv
import io
import re
from pathlib import Path

from config import UserError
from data import CATEGORIES, HELPFUL, format_draft, parse_draft
from support.files import MAX_TEXT, parse_json, read_text

PROMPTS = "prompt forbidden_prompt goal behavior question instruction query text".split()
RESPONSES = ("response", "completion", "output")
XSTEST = {"type", "focus", "note"}
MAX_LINE = 10**6  # characters of a JSON line
LABELS = {"safe": True, "benign": True, "harmless": True, "unsafe": False, "harmful": False}

# Our category: the names that Safety-Prompts, StrongREJECT, HarmBench and others have for it, in
# lower case with _ for anything that is no letter. None: harmful, but not how.
NAMES = {
    "insult": "insult harassment_bullying",
    "unfairness": "unfairness unfairness_and_discrimination hate_harassment_and_discrimination",
    "crime": "crime crimes_and_illegal_activities illegal_goods_and_services non_violent_crimes "
    "illegal cybercrime_intrusion",
    "physical_harm": "physical_harm violence chemical_biological",
    "mental_health": "mental_health",
    "privacy": "privacy privacy_and_property copyright",
    "ethics": "ethics ethics_and_morality ethics_morality disinformation_and_deception "
    "sexual_content misinformation_disinformation",
    HELPFUL: "helpful harmless benign safe",
    None: "harmful unsafe",
}
ALIASES = {name: ours for ours, names in NAMES.items() for name in names.split()}


class Bad(ValueError):
    """One row is wrong; the reader adds where it stands."""


def records_of(path: Path) -> list[tuple[str, dict | Bad]]:
    """(where, record) of every row; a line that is no JSON is a Bad."""
    text = read_text(path, MAX_TEXT)
    if text.lstrip()[:1] not in ("{", "["):
        return csv_records(path, text)
    whole = parse(text)
    if isinstance(whole, Bad):
        lines = enumerate(text.split("\n"), 1)
        rows = [(f"{path}:{n}", parse(line, MAX_LINE)) for n, line in lines if line.strip()]
        if text.lstrip()[0] == "{" and any(isinstance(row, dict) for _, row in rows):
            return rows  # JSON lines
        raise UserError(f"{path}: {whole}")
    lists = isinstance(whole, dict) and whole and all(isinstance(v, list) for v in whole.values())
    if not lists or "messages" in whole:
        items = whole if isinstance(whole, list) else [whole]
        return [(f"{path}, item {n}", row) for n, row in enumerate(items, 1)]
    rows = []
    for key, items in whole.items():
        for n, row in enumerate(items, 1):
            row = {"category": key, **row} if isinstance(row, dict) else row
            rows.append((f"{path}, {key!r} item {n}", row))
    return rows


def csv_records(path: Path, text: str) -> list[tuple[str, dict | Bad]]:
    mark, rows, end = max(",;\t", key=text.split("\n")[0].count), [], 0
    file = io.StringIO(text, newline="")
    reader = csv.DictReader(file, delimiter=mark, skipinitialspace=True, strict=True)
    try:
        for row in reader:
            end = reader.line_num
            first = end - "".join(map(str, row.values())).count("\n")
            if None in row or None in row.values():
                row = Bad("more or fewer fields than the header has columns")
            rows.append((f"{path}:{first}", row))
    except csv.Error as e:
        raise UserError(f"{path}:{end + 1}: not CSV: {e}") from None
    return rows


def parse(text: str, limit: int = MAX_TEXT):
    if len(text) > limit:
        return Bad(f"a line of {len(text)} characters: want at most {limit}")
    try:
        return parse_json(text)
    except ValueError as e:
        return Bad(f"not JSON: {e}")


def texts_of(lower: dict) -> tuple[str, str | None]:
    """(prompt, response) of a record with lower-case keys. Raises Bad."""
    if "messages" in lower:
        turns = lower["messages"]
        objects = isinstance(turns, list) and all(isinstance(t, dict) for t in turns)
        if not objects or not all(isinstance(t.get("content"), str) for t in turns):
            raise Bad("messages: want a list of objects with role and content")
        roles = [t.get("role") for t in turns]
        at = roles.index("user") if "user" in roles else None
        if at is None or not turns[at]["content"].strip():
            raise Bad("messages: no user turn")
        answered = roles[at + 1 : at + 2] == ["assistant"]
        return turns[at]["content"], turns[at + 1]["content"] if answered else None
    text = {k: v for k, v in lower.items() if isinstance(v, str) and v.strip()}
    prompt = next((text[k] for k in PROMPTS if k in text), None)
    response = next((text[k] for k in RESPONSES if k in text), None)
    if prompt is None:
        raise Bad(f"no prompt; want one of the fields {', '.join(PROMPTS)}, messages")
    if "contextstring" in text and prompt == text.get("behavior"):  # only half without
        prompt = f"{text['contextstring']}\n\n{prompt}"
    if "input" in text and prompt == text.get("instruction"):
        prompt = f"{prompt}\n\n{text['input']}"
    return prompt, response


def row_of(record, strict: bool) -> dict:
    """One record as a row of ours. Raises Bad."""
    if isinstance(record, Bad):
        raise record
    if not isinstance(record, dict):
        raise Bad(f"want an object, found {type(record).__name__}")
    record = {k: v for k, v in record.items() if v is not None}
    lower = {k.strip().lower(): v for k, v in record.items()}
    prompt, response = (t and t.replace("\r\n", "\n") for t in texts_of(lower))
    row = {**record, "prompt": prompt, "category": category_of(lower, strict)}
    if XSTEST <= lower.keys() and row["category"] == HELPFUL:
        row["kind"] = "lookalike"  # XSTest's safe prompts
    if "draft" in record:
        try:
            response = format_draft(record["draft"], record.get("answer"))
        except (TypeError, ValueError) as e:
            raise Bad(f"want draft (a list of steps) and answer: {e}") from None
    elif response is not None:
        with contextlib.suppress(ValueError):  # a plain answer: no demonstration yet
            row["draft"], row["answer"] = parse_draft(response)
    if re.search("[\ud800-\udfff]", prompt + (response or "")):
        raise Bad("half a character (a lone surrogate)")
    return row if response is None else {**row, "response": response}


def category_of(lower: dict, strict: bool) -> str | None:
    """Ours, by label, category, SemanticCategory or type. strict: unknown names are errors."""
    label = str(lower.get("label") or "").lower()
    if XSTEST <= lower.keys() and not label:  # contrast_homonyms is unsafe, homonyms safe
        label = "unsafe" if str(lower.get("type")).startswith("contrast") else "safe"
    fields = ["category", "semanticcategory"] + ["type"] * (label not in LABELS)
    name = next((lower[k] for k in fields if lower.get(k, "") != ""), "")
    key = re.sub("[^a-z]+", "_", name.lower()).strip("_") if isinstance(name, str) else None
    found = ALIASES.get(key)
    if strict and label in LABELS and found and LABELS[label] != (found == HELPFUL):
        raise Bad(f"label {label!r} contradicts category {name!r}")
    if LABELS.get(label):
        return HELPFUL
    if strict and name != "" and key not in ALIASES:
        known = ", ".join((*CATEGORIES, HELPFUL))
        raise Bad(f"category {name!r}; known: {known}, and the names in support/loaders.py")
    return found


def load_rows(path: str | Path, strict: bool = True, drafted: bool = False) -> list[dict]:
    """All rows of a file; the first wrong one is an error. drafted: want category and draft."""
    rows = []
    for where, record in records_of(Path(path)):
        try:
            rows.append(row_of(record, strict))
            if drafted and (rows[-1]["category"] is None or "draft" not in rows[-1]):
                raise Bad("want category, draft (a list of steps) and answer")
        except Bad as e:
            raise UserError(f"{where}: {e}") from None
    if not rows:
        raise UserError(f"{path}: no rows")
    return rows


def load_demonstrations(path: str | Path) -> list[dict]:
    """Rows with a category and a Chain-of-Draft response; one without either is an error."""
    return load_rows(path, drafted=True)
