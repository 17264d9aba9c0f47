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

The format is found from the content, never from the file's name; CSV may have commas, semicolons or tabs. A row keeps its other fields, but for null, and
has: prompt; category, one of ours or None (unlabelled; ALIASES maps other people's names); response, if there is one. Errors name file and line, a record's
first (in JSON that is no JSON lines: the item).
"""

import csv
import io
import re
from pathlib import Path

from data import CATEGORIES, HELPFUL, UserError, format_draft, parse_draft
from files import MAX_TEXT, parse_json, read_text

PROMPTS = (
    "prompt",
    "forbidden_prompt",
    "goal",
    "behavior",
    "question",
    "instruction",
    "query",
    "text",
)
RESPONSES = ("response", "completion", "output")
MAX_LINE = 10**6  # characters of a JSON line; of a field of CSV: 2^17
LABELS = {"safe": True, "benign": True, "harmless": True, "unsafe": False, "harmful": False}

# Other people's category names, in lower case with _ for anything that is no letter.
ALIASES = {
    **{name: name for name in (*CATEGORIES, HELPFUL)},
    "unfairness_and_discrimination": "unfairness",
    "crimes_and_illegal_activities": "crime",
    "privacy_and_property": "privacy",  # Safety-Prompts
    "ethics_and_morality": "ethics",
    "ethics_morality": "ethics",
    "illegal_goods_and_services": "crime",
    "non_violent_crimes": "crime",
    "hate_harassment_and_discrimination": "unfairness",  # StrongREJECT
    "disinformation_and_deception": "ethics",
    "violence": "physical_harm",
    "sexual_content": "ethics",
    "chemical_biological": "physical_harm",
    "illegal": "crime",
    "misinformation_disinformation": "ethics",  # HarmBench
    "harassment_bullying": "insult",
    "cybercrime_intrusion": "crime",
    "copyright": "privacy",
    "harmless": HELPFUL,
    "benign": HELPFUL,
    "safe": HELPFUL,
    "harmful": None,
    "unsafe": None,  # harmful, but not how: HarmBench's "harmful" too
}


class Bad(ValueError):
    """One row is wrong; the reader adds where it stands."""


def records_of(path: Path) -> list[tuple[str, dict | Bad]]:
    """(where, record) of every row; a line that is no JSON is a Bad."""
    text = read_text(path, MAX_TEXT)
    if text.lstrip()[:1] not in ("{", "["):
        reader = csv.DictReader(
            io.StringIO(text, newline=""),
            delimiter=max(",;\t", key=text.split("\n")[0].count),
            skipinitialspace=True,
            strict=True,
        )
        rows, end = [], 0
        try:
            for row in reader:
                end, first = (
                    reader.line_num,
                    reader.line_num - "".join(map(str, row.values())).count("\n"),
                )
                rows.append(
                    (
                        f"{path}:{first}",
                        Bad("more or fewer fields than the header has columns")
                        if None in row or None in row.values()
                        else row,
                    )
                )
        except csv.Error as e:
            raise UserError(f"{path}:{end + 1}: not CSV: {e}") from None
        return rows
    whole = parse(text)
    if isinstance(whole, Bad):
        lines = [
            (f"{path}:{n}", parse(line, MAX_LINE))
            for n, line in enumerate(text.split("\n"), 1)
            if line.strip()
        ]
        if text.lstrip()[0] == "{" and any(isinstance(row, dict) for _, row in lines):  # JSON lines
            return lines
        raise UserError(f"{path}: {whole}")
    if (
        isinstance(whole, dict)
        and whole
        and all(isinstance(v, list) for v in whole.values())
        and "messages" not in whole
    ):
        return [
            (
                f"{path}, {key!r} item {n}",
                {"category": key, **row} if isinstance(row, dict) else row,
            )
            for key, rows in whole.items()
            for n, row in enumerate(rows, 1)
        ]
    return [
        (f"{path}, item {n}", row)
        for n, row in enumerate(whole if isinstance(whole, list) else [whole], 1)
    ]


def parse(text: str, limit: int = MAX_TEXT):
    try:
        return (
            parse_json(text)
            if len(text) <= limit
            else Bad(f"a line of {len(text)} characters: want at most {limit}")
        )
    except ValueError as e:
        return Bad(f"not JSON: {e}")


def words(record: dict, names: tuple[str, ...]) -> str | None:
    """The first of the fields that holds text."""
    return next(
        (record[k] for k in names if isinstance(record.get(k), str) and record[k].strip()), None
    )


def row_of(record, strict: bool = True) -> dict:
    """One record as a row of ours. strict: an unknown category is an error, else it counts as none. Raises Bad."""
    if isinstance(record, Bad):
        raise record
    if not isinstance(record, dict):
        raise Bad(f"want an object, found {type(record).__name__}")
    record = {k: v for k, v in record.items() if v is not None}
    lower = {k.strip().lower(): v for k, v in record.items()}
    prompt, response = words(lower, PROMPTS), words(lower, RESPONSES)
    for field, more in (
        ("behavior", "contextstring"),
        ("instruction", "input"),
    ):  # the prompt is only half without
        if field in lower and prompt == lower[field] and words(lower, (more,)):
            prompt = (
                f"{lower[more]}\n\n{prompt}"
                if more == "contextstring"
                else f"{prompt}\n\n{lower[more]}"
            )
    if "messages" in lower:
        turns = lower["messages"]
        if not isinstance(turns, list) or not all(
            isinstance(t, dict) and isinstance(t.get("content"), str) for t in turns
        ):
            raise Bad("messages: want a list of objects with role and content")
        roles = [t.get("role") for t in turns]
        if "user" not in roles or not turns[roles.index("user")]["content"].strip():
            raise Bad("messages: no user turn")
        at = roles.index("user")
        prompt = turns[at]["content"]
        response = turns[at + 1]["content"] if roles[at + 1 : at + 2] == ["assistant"] else None
    if prompt is None:
        raise Bad(f"no prompt; want one of the fields {', '.join(PROMPTS)}, messages")
    prompt, response = prompt.replace("\r\n", "\n"), response and response.replace("\r\n", "\n")
    row = {**record, "prompt": prompt, "category": category_of(lower, strict)}
    if {"type", "focus", "note"} <= lower.keys() and row["category"] == HELPFUL:
        row["kind"] = "lookalike"  # XSTest's safe prompts
    if "draft" in record:
        try:
            response = format_draft(record["draft"], record.get("answer"))
        except (TypeError, ValueError) as e:
            raise Bad(f"want draft (a list of steps) and answer: {e}") from None
    elif response is not None:
        try:
            row["draft"], row["answer"] = parse_draft(response)
        except ValueError:
            pass  # a plain answer: no Chain of Draft, so no demonstration yet
    for text in (prompt, response or ""):
        if re.search("[\ud800-\udfff]", text):
            raise Bad("half a character (a lone surrogate)")
    return {**row, "response": response} if response is not None else row


def category_of(lower: dict, strict: bool) -> str | None:
    """Ours, from the fields label, category, SemanticCategory and type. What contradicts itself or is unknown is an error if strict."""
    label = str(lower.get("label") or "").lower()
    if {
        "type",
        "focus",
        "note",
    } <= lower.keys() and not label:  # XSTest v2: contrast_homonyms is unsafe, homonyms safe
        label = "unsafe" if str(lower.get("type")).startswith("contrast") else "safe"
    name = next(
        (
            lower[k]
            for k in ("category", "semanticcategory", "type")
            if lower.get(k, "") != "" and not (k == "type" and label in LABELS)
        ),
        "",
    )
    key = re.sub("[^a-z]+", "_", name.lower()).strip("_") if isinstance(name, str) else None
    found = ALIASES.get(key)
    if strict and label in LABELS and found and LABELS[label] != (found == HELPFUL):
        raise Bad(f"label {label!r} contradicts category {name!r}")
    if LABELS.get(label):
        return HELPFUL
    if strict and name != "" and key not in ALIASES:
        raise Bad(
            f"category {name!r}; known are {', '.join((*CATEGORIES, HELPFUL))}, and the names that loaders.py maps to them"
        )
    return found


def load_rows(
    path: str | Path, strict: bool = True, skip_bad: bool = False, drafted: bool = False
) -> list[dict]:
    """All rows of a file. skip_bad: rows that are wrong are dropped, counted and the first is shown; otherwise the first is an error.
    drafted: a row without category or draft is wrong."""
    rows, bad = [], []
    for where, record in records_of(Path(path)):
        try:
            row = row_of(record, strict)
            if drafted and (row["category"] is None or "draft" not in row):
                raise Bad("want category, draft (a list of steps) and answer")
            rows.append(row)
        except Bad as e:
            if not skip_bad:
                raise UserError(f"{where}: {e}") from None
            bad.append(f"{where}: {e}")
    if bad:
        print(f"{path}: {len(bad)} rows skipped, the first at {bad[0]}")
    if not rows:
        raise UserError(f"{path}: no rows")
    return rows


def load_demonstrations(path: str | Path) -> list[dict]:
    """Rows with a category and a Chain-of-Draft `response` to learn; one without either is an error."""
    return load_rows(path, drafted=True)
