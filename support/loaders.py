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
| any other CSV, JSON or JSON lines | see FIELDS | see FIELDS and NAMES | see FIELDS |

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
from support.files import MAX_TEXT, parse_json, read_text

MAX_LINE = 10**6  # characters of a JSON line
CHATS = ("messages", "conversations", "conversation", "turns", "chosen")  # never one text
print_once = functools.cache(print)  # Rows.told, however many stages read the file

# Our field: the names that files have for it. The first with a value counts. Here and in NAMES
# case, spaces, _ and - make no difference.
FIELDS = {
    "prompt": "messages conversations conversation turns prompt prompts prompts_final user_prompt "
    "user_input forbidden_prompt goal behavior question instruction query text chosen",
    "context": "context_string",
    "response": "response completion output",
    "label": "label prompt_label prompt_harm_label harm_label safety",
    "safe": "is_safe safe is_benign benign is_harmless harmless",  # these two may be yes or no
    "harmful": "is_harmful harmful is_unsafe unsafe is_toxic toxic toxicity is_malicious malicious",
    "category": "category semantic_category",
}
FIELDS |= {x: x for x in ("draft", "answer", "kind", "type")} | {"input": "input context"}
LABELS, TOPICS = ("kind", "label", "safe", "harmful"), ("category", "type")
YES, NO = "1 1.0 true t yes y".split(), "0 0.0 false f no n".split()
ROLES = dict.fromkeys(("human", "prompter"), "user")
ROLES |= dict.fromkeys(("gpt", "chatgpt", "model", "bot", "ai"), "assistant")

# Our category: the names that Safety-Prompts, StrongREJECT, HarmBench and others have for it.
# None: harmful, but not how. The look-alikes are XSTest's.
LOOKALIKE = "lookalike"
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
    HELPFUL: "helpful ordinary harmless benign safe unharmful not_harmful non_harmful non_toxic",
    LOOKALIKE: "lookalike homonyms figurative_language safe_targets safe_contexts definitions "
    "real_group_nons_discr nons_group_real_discr historical_events privacy_public "
    "privacy_fictional",
    None: "harmful unsafe not_safe toxic malicious contrast",
}


@functools.cache
def plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.lower())


ALIASES = {plain(name): ours for ours, names in NAMES.items() for name in names.split()}
OURS = {plain(name): ours for ours, names in FIELDS.items() for name in names.split()}
KNOWN = ", ".join((*CATEGORIES, HELPFUL, "ordinary", LOOKALIKE, "safe", "harmful"))
LABEL = re.compile(  # what may name a label,
    r"label|safe|harm|toxic|benign|flag|jailbreak|attack|refus|danger|(?:^|[\W_])hate|offens|abus"
    r"|nsfw|viola|inject|malic|risk|blocked|allowed|appropriate|accepta|complian|innocuous|verdict"
    r"|(?:^|[\W_])class$|classif|expected[\W_]?behav"
)
REPLIES = re.compile("respon|complet|answer|reply|output")  # but beside one of these
REPLY = re.compile("respon|complet|answer|final|annot")  # this is a label of the answer.
SCORE = re.compile(r"[-+]?[0-9.]+(?:e[-+]?[0-9]+)?(?:\s*[%/].*)?")  # a number, whatever it means
NONE = re.compile(  # a label that finds nothing
    r"(?:no|not|non|low|minimal)(?:[\W_]+(?:risk|harm|hate|toxic|viola|offens|applic)\w*)?"
    r"(?:[\W_]+(?:found|detected|content))?|none|na|n/a|normal|neutral|regular|clean|ok|okay"
    "|allowed|acceptable|innocuous|comply|pass"
)
HARMLESS = re.compile(  # in any column
    r"(?:(?!(?:not|non|un)[\W_])[a-z\d%]+[\W_]+)?(?:(?:benign|harmless)(?:[\W_][a-z]+)?"
    r"|should[\W_]+(?:respond|comply|answer)"
    r"|(?:unharmful|safe)(?:[\W_]+(?:prompt|request|question|content|no|risk)s?){0,2}\W*)"
)


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
        label = ALIASES.get(plain(key), "") in (
            HELPFUL,
            LOOKALIKE,
            None,
        )  # rows have a topic beside
        for n, row in enumerate(items, 1):
            row = {"kind" if label else "category": key, **row} if isinstance(row, dict) else row
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


def fields_of(record: dict) -> dict[str, tuple[str, object]]:
    """{our field: (its name in the file, value)}. Null, NaN and blank are no values."""
    named = {}
    for name, value in record.items():
        if not (value is None or value != value or isinstance(value, str) and not value.strip()):
            named[plain(name)] = name, value
    return {ours: named[key] for key, ours in reversed(OURS.items()) if key in named}


def turns_of(name: str, value) -> list[tuple[str, str]]:
    """(role, text) of every turn; one text is a user turn. Raises UserError."""
    if isinstance(value, str):
        parts = re.split(r"(?:^|\n\n)(Human|Assistant):", value.lstrip())  # HH-RLHF's
        if value.lstrip().startswith("Human:") and "Assistant" in parts:
            value = [{"from": x, "value": y.strip()} for x, y in zip(parts[1::2], parts[2::2])]
        elif plain(name) not in CHATS and not re.match(r"\s*\[\s*\{", value):
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
        raise UserError(f"no prompt; want one of the fields {', '.join(FIELDS['prompt'].split())}")
    name, value = fields["prompt"]
    turns = turns_of(name, value)
    at = next((i for i, (role, text) in enumerate(turns) if role == "user"), None)
    if at is None or not turns[at][1].strip():
        raise UserError(f"{name}: no user turn")
    prompt, replies = turns[at][1], turns[at + 1 : at + 2]
    named, said = fields.get("response", ("", ""))
    turn = said[0] if isinstance(said, list) and said else None
    if not replies and isinstance(turn, dict) and {"role", "from"} & turn.keys():
        replies = turns_of(named, said)  # TRL's completion
    reply = dict(replies[:1]).get("assistant")
    texts = {ours: value for ours, (_, value) in fields.items() if isinstance(value, str)}
    if plain(name) == "behavior" and "context" in texts:  # only half without
        prompt = f"{texts['context']}\n\n{prompt}"
    if plain(name) in ("instruction", "question") and "input" in texts:
        prompt = f"{prompt}\n\n{texts['input']}"
    response = reply or texts.get("response")
    return prompt.replace("\r\n", "\n"), response and response.replace("\r\n", "\n")


def says(ours: str, value) -> str | None:
    """What a field's value says of the prompt, a key of NAMES; "" if that isn't known."""
    text = str(value).strip().lower()
    if ours in ("safe", "harmful") and text in YES + NO:
        return HELPFUL if (text in YES) == (ours == "safe") else None
    letters = re.sub("[^a-z]", "", text) if isinstance(value, str) else ""
    return ALIASES.get("contrast" if letters.startswith("contrast") else letters, "")


def leaves(name: str, value) -> list[tuple[str, object]]:
    """(name, value) of everything in a nested value."""
    if isinstance(value, dict):
        return [leaf for k, x in value.items() for leaf in leaves(f"{name}.{k}", x)]
    if isinstance(value, list):
        return [leaf for x in value for leaf in leaves(name, x)]
    return [(name, value)]


def meanings_of(record: dict, fields: dict, strict: bool) -> dict[str, str | None]:
    """{our field: what it says}. With `strict` a topic must be known, unless a label is."""
    out, kind = {}, says("type", fields.get("type", ("", ""))[1])  # XSTest's, of the prompt
    for ours in (ours for ours in LABELS + TOPICS if ours in fields):
        name, value = fields[ours]
        found, text = says(ours, value), str(value).strip(" .!").lower()
        unclear = strict or NONE.fullmatch(text) or HARMLESS.fullmatch(text)
        either = ours in ("safe", "harmful") or plain(name) in ("label", "harmlabel", "safety")
        if found == HELPFUL and either and "response" in fields and kind == "":
            raise UserError(f"{name} {value!r}: of the response? Call the prompt's prompt_label")
        if found != "":
            out[ours] = found
        elif ours in LABELS or unclear and not out:
            raise UserError(f"{name} {value!r}; known: {KNOWN}; for 0 and 1 is_safe or is_harmful")
    rest = {k: x for k, x in record.items() if plain(k) not in OURS}
    others = [leaf for k, x in rest.items() for leaf in leaves(k, x)]
    replied = any(REPLIES.search(plain(k)) and not LABEL.search(k.lower()) for k in record)
    for name, value in others if out.keys() <= {"category"} else ():
        label, text = LABEL.search(name.lower()), str(value).strip(" .!").lower()
        found = says("harmful" if label else "label", value)
        doubt = label and (found is None or SCORE.fullmatch(text) or NONE.fullmatch(text))
        doubt = doubt or found == HELPFUL or HARMLESS.fullmatch(text)
        if doubt and not (replied and REPLY.search(plain(name))):
            raise UserError(f"{name} {value!r}: a label? Call it is_safe, is_harmful, or remove it")
    every = [(x, k, v) for x in out for k, v in record.items() if OURS.get(plain(k)) == x]
    found = {f"{name} {value!r}": says(ours, value) for ours, name, value in every}
    sides = {x in (HELPFUL, LOOKALIKE): text for text, x in found.items() if x != ""}
    if len(sides) > 1:
        raise UserError(" contradicts ".join(sides.values()))
    return out


def row_of(record, strict: bool) -> tuple[dict, dict]:
    """One record as a row of ours, and {name in the file: our field} of what was read."""
    if not isinstance(record, dict):
        raise UserError(f"want an object, found {type(record).__name__}")
    fields = fields_of(record)
    (prompt, response), said = texts_of(fields), meanings_of(record, fields, strict)
    found = list(said.values())
    kind = LOOKALIKE if LOOKALIKE in found else "ordinary" if HELPFUL in found else "harmful"
    category = next(filter(None, found), None) if kind == "harmful" else HELPFUL
    row = {k: v for k, v in record.items() if v is not None and k not in FIELDS}
    row |= {"prompt": prompt, "kind": kind, "category": category}
    if "draft" in fields:
        row |= {ours: fields.get(ours, ("", None))[1] for ours in ("draft", "answer")}
        try:
            response = format_draft(row["draft"], row["answer"])
        except (TypeError, ValueError) as e:
            raise UserError(f"want draft (a list of steps) and answer: {e}") from None
    elif response is not None:
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
        raise UserError(f"{path}: no rows")
    if unknown and (label := next((name for name in read if read[name] in LABELS), None)):
        raise UserError(f"{unknown[0]}: no {label}, which other rows have")
    prompts = ", ".join(repr(name) for name in read if read[name] == "prompt")
    labels = ", ".join(repr(name) for name in read if read[name] != "prompt") or "nothing"
    kinds = ", ".join(f"{n} {kind}" for kind, n in Counter(r["kind"] for r in rows).items())
    rows.told = f"{path}: {len(rows)} rows; prompt from {prompts}; kind from {labels}: {kinds}"
    if unknown:
        rows.told += f"; {len(unknown)} have no label and count as harmful"
    return rows


def load_demonstrations(path: str | Path) -> Rows:
    """Rows with a category and a Chain-of-Draft response; one without either is an error."""
    return load_rows(path, drafted=True)
