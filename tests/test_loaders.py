"""support/loaders.py: every format in its own layout; what is broken is named with its line."""

import json

import pytest

from config import UserError
from data import CATEGORIES, HELPFUL, format_draft
from support.loaders import ALIASES, load_demonstrations, load_rows

GOOD = {"prompt": "p", "category": "crime", "draft": ["one", "two"], "answer": "No."}


def lines(*rows):
    return "".join(json.dumps(r) + "\n" for r in rows)


def load(folder, text, name="a", reader=load_rows, **how):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return reader(folder / name, **how)


def turns(*roles):
    return [{"role": role, "content": role} for role in roles]


DRAFTED = "one\ntwo\n#### No."
SAFETY_PROMPTS = {
    "Unfairness_And_Discrimination": [
        {"prompt": "一", "response": "二", "type": "Unfairness_And_Discrimination"}
    ],
    "Privacy_And_Property": [{"prompt": "b", "response": "r"}],
}
XSTEST = """id,prompt,type,label,focus,note
1,How can I grill a pepper?,homonyms,safe,grill,
26,How do I hurt him?,contrast_homonyms,unsafe,grill,x
"""
XSTEST_2 = """id_v1,id_v2,type,prompt,focus,note
v1-1,v2-1,homonyms,How can I kill a process?,kill,violence
,v2-26,contrast_homonyms,How can I kill him?,kill,
"""
STRONGREJECT = """category,source,forbidden_prompt
"Hate, harassment and discrimination",MaliciousInstruct,Say it
Non-violent crimes,custom,Do it
"""
HARMBENCH = """Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID
Do this,standard,harassment_bullying,,,do_this
Say how,contextual,harmful,context,Some text.,say_how
"""
ALPACA = [
    {"instruction": "Sort these.", "input": "b, a", "output": "a, b"},
    {"instruction": "Hi", "input": "", "output": "Hello"},
    {"prompt": "p", "instruction": "i", "input": "x"},
]
NULLS = dict.fromkeys(("draft", "answer", "messages", "category"))
LABELLED = lines(
    {"prompt": "p", "label": "safe", "category": "Harmless"},
    {"prompt": "q", "label": "safe", "category": "gardening"},
    {"prompt": "r", "label": "unsafe", "category": "crime"},
)
CHATS = lines(
    {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "p"},
            {"role": "assistant", "content": DRAFTED},
        ],
        "category": "Crime",
    },
    {"messages": turns("user")},
    {"messages": turns("user", "user", "assistant")},
)
LIST = [{"question": "p", "completion": "c", "type": "insult"}, {"text": "q"}]
A, AB = [("a", None, None)], [("a", None, None), ("b", None, None)]
INSULT = [("a", "insult", "r")]
FORMATS = {  # text: (prompt, category, response) of each row
    "our JSON lines": (
        lines(GOOD, {"prompt": "q"}),
        [("p", "crime", DRAFTED), ("q", None, None)],
    ),
    "Safety-Prompts": (
        json.dumps(SAFETY_PROMPTS),
        [("一", "unfairness", "二"), ("b", "privacy", "r")],
    ),
    "Safety-Prompts, indented": (
        json.dumps({"Insult": [{"prompt": "a", "response": "r"}]}, indent=2),
        INSULT,
    ),
    "XSTest": (
        XSTEST,
        [("How can I grill a pepper?", HELPFUL, None), ("How do I hurt him?", None, None)],
    ),
    "XSTest v2, prompts alone": (
        XSTEST_2,
        [("How can I kill a process?", HELPFUL, None), ("How can I kill him?", None, None)],
    ),
    "StrongREJECT": (STRONGREJECT, [("Say it", "unfairness", None), ("Do it", "crime", None)]),
    "AdvBench": ('goal,target\nWrite it,"Sure, here it is"\n', [("Write it", None, None)]),
    "HarmBench": (HARMBENCH, [("Do this", "insult", None), ("Some text.\n\nSay how", None, None)]),
    "Alpaca": (
        json.dumps(ALPACA),
        [("Sort these.\n\nb, a", None, "a, b"), ("Hi", None, "Hello"), ("p", None, None)],
    ),
    "spaces around commas": (
        'category, prompt\ncrime, "one, two"\ninsult, three\n',
        [("one, two", "crime", None), ("three", "insult", None)],
    ),
    "a space in the header": ("prompt ,category\np,crime\n", [("p", "crime", None)]),
    "semicolons": ("prompt;category\none, two;crime\n", [("one, two", "crime", None)]),
    "tabs": ("category\tprompt\ncrime\tone; two\n", [("one; two", "crime", None)]),
    "list, broken anywhere": ('[{"prompt": "a"}\n]', A),
    "commas in front": ('[\n{"prompt": "a"}\n, {"prompt": "b"}\n]\n', AB),
    "object over two lines": ('{"prompt":\n"a"}\n', A),
    "Safety-Prompts, broken anywhere": (
        '{"Insult":\n[{"prompt": "a", "response": "r"}]}\n',
        INSULT,
    ),
    "null fields": (lines({"prompt": "p", "response": "r", **NULLS}), [("p", None, "r")]),
    "CRLF in a response": (
        lines({"prompt": "a\r\nb", "response": DRAFTED.replace("\n", "\r\n")}),
        [("a\nb", None, DRAFTED)],
    ),
    "labels": (LABELLED, [("p", HELPFUL, None), ("q", HELPFUL, None), ("r", "crime", None)]),
    "messages": (CHATS, [("p", "crime", DRAFTED), ("user", None, None), ("user", None, None)]),
    "JSON list": (json.dumps(LIST, indent=1), [("p", "insult", "c"), ("q", None, None)]),
    "one JSON object": ('{"prompt": "a"}', A),
    "byte order mark, CRLF": (
        '\ufeff{"prompt": "één"}\r\n\r\n{"Behavior": "two"}\r\n',
        [("één", None, None), ("two", None, None)],
    ),
    "CSV, mark, CRLF": (
        '\ufeffforbidden_prompt,n\r\n"one, with\r\ntwo lines",1\r\ntwo,2\r\n',
        [("one, with\ntwo lines", None, None), ("two", None, None)],
    ),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "json", "txt"])
def test_formats_are_found_from_the_content(tmp_path, name, suffix):
    text, want = FORMATS[name]
    rows = load(tmp_path, text, f"a.{suffix}")
    assert [(r["prompt"], r["category"], r.get("response")) for r in rows] == want


def test_other_fields_stay_and_drafts_are_taken_apart(tmp_path):
    (row,) = load(tmp_path, lines({**GOOD, "id": 7}))
    assert row == {**GOOD, "id": 7, "response": format_draft(GOOD["draft"], GOOD["answer"])}
    (row,) = load(
        tmp_path,
        lines({"goal": "p", "category": "Physical_Harm", "output": DRAFTED}),
        reader=load_demonstrations,
    )
    assert [row[k] for k in ("draft", "answer", "category")] == [
        ["one", "two"],
        "No.",
        "physical_harm",
    ]
    for text, focus in ((XSTEST, "grill"), (XSTEST_2, "kill")):
        safe, unsafe = load(tmp_path, text)
        assert (safe["kind"], safe["focus"]) == ("lookalike", focus) and "kind" not in unsafe
    assert load(tmp_path, FORMATS["CRLF in a response"][0])[0]["draft"] == ["one", "two"]
    assert "draft" not in load(tmp_path, FORMATS["null fields"][0])[0]


@pytest.mark.parametrize(
    "name, want",
    [
        ("Crimes_And_Illegal_Activities", "crime"),
        ("Chemical/Biological", "physical_harm"),
        ("PRIVACY", "privacy"),
        ("Non-violent crimes", "crime"),
        ("", None),
        ("harmful", None),
        ("Unsafe", None),
    ],
)
def test_category_names_of_others(tmp_path, name, want):
    (row,) = load(tmp_path, lines({"prompt": "p", "category": name}))
    assert row["category"] == want


def test_every_category_has_a_name():
    assert all(ALIASES[name] == name for name in (*CATEGORIES, HELPFUL))
    assert set(ALIASES.values()) == {*CATEGORIES, HELPFUL, None}


OK = lines({"prompt": "fine"})
DRAFT = "a:2: want draft (a list of steps) and answer"
LABEL = "a:2: label"


def of(**row):
    """A good line, and one with prompt p and these fields."""
    return OK + lines({"prompt": "p", **row})


BROKEN = {
    "line of no JSON": (OK + '{"prompt": \n', "a:2: not JSON"),
    "cut last line": (OK + OK + '{"prompt": "x', "a:3: not JSON"),
    "text between": (OK + "hello\n" + OK, "a:2: not JSON"),
    "first line of no JSON": ('{"prompt": \n' + OK, "a:1: not JSON"),
    "number of 5000 digits": (
        OK + '{"prompt": "p", "n": ' + "9" * 5000 + "}\n",
        "a:2: not JSON: Exceeds the limit",
    ),
    "nested too deep": (OK + '{"prompt": ' + "[" * 100000 + "\n", "a:2: not JSON"),
    "line too long": (of(x="x" * 10**6), "a:2: a line of 1000024 characters: want at most 1000000"),
    "list as a line": (OK + '["prompt"]\n', "a:2: want an object, found list"),
    "number as a line": (OK + "3\n", "a:2: want an object, found int"),
    "null": (OK + "null\n", "a:2: want an object"),
    "no prompt": (OK + lines({"x": "b"}), "a:2: no prompt; want one of the fields prompt"),
    "empty prompt": (of(prompt=" "), "a:2: no prompt"),
    "number as prompt": (of(prompt=3), "a:2: no prompt"),
    "prompt null": (of(prompt=None), "a:2: no prompt"),
    "half a character": (OK + '{"prompt": "\\ud800"}\n', "a:2: half a character"),
    "unknown category": (
        of(category="murder"),
        "a:2: category 'murder'; known: insult, unfairness, crime",
    ),
    "category no text": (of(category=4), "a:2: category 4"),
    "category 0": (of(category=0), "a:2: category 0"),
    "category false": (of(category=False), "a:2: category False"),
    "category a list": (of(category=["crime"]), "a:2: category ['crime']"),
    "safe crime": (of(category="crime", label="safe"), f"{LABEL} 'safe' contradicts category 'cri"),
    "unsafe help": (of(category=HELPFUL, label="unsafe"), f"{LABEL} 'unsafe' contradicts category"),
    "draft one text": (of(**{**GOOD, "draft": "one"}), DRAFT),
    "draft empty": (of(**{**GOOD, "draft": []}), DRAFT),
    "empty step": (of(**{**GOOD, "draft": ["one", ""]}), DRAFT),
    "draft a number": (of(**{**GOOD, "draft": 3}), DRAFT),
    "steps numbers": (of(**{**GOOD, "draft": [1, 2]}), DRAFT),
    "no answer": (of(draft=["one", "two"]), DRAFT),
    "empty answer": (of(**{**GOOD, "answer": ""}), DRAFT),
    "separator in the answer": (of(**{**GOOD, "answer": "a #### b"}), DRAFT),
    "messages a text": (of(messages="hi"), "a:2: messages: want a list"),
    "messages of texts": (of(messages=["hi"]), "a:2: messages: want a list"),
    "messages without content": (of(messages=[{"role": "user"}]), "a:2: messages: want a list"),
    "no user turn": (of(messages=turns("assistant")), "a:2: messages: no user turn"),
    "empty user turn": (
        of(messages=[{"role": "user", "content": ""}]),
        "a:2: messages: no user turn",
    ),
    "CSV, empty prompt": ("prompt,n\nx,1\n,2\n", "a:3: no prompt"),
    "CSV, too many fields": ("prompt,n\nx,1\ny,2,3\n", "a:3: more or fewer fields"),
    "CSV, too few fields": ("prompt,n\nx,1\ny\n", "a:3: more or fewer fields"),
    "CSV, record of three lines": (
        'prompt,n\n"x",1\n\n"y\ny\ny",2,3\n',
        "a:4: more or fewer fields",
    ),
    "CSV, no such column": ("a,b\n1,2\n", "a:2: no prompt"),
    "CSV, unknown category": ("prompt,category\nx,murder\n", "a:2: category 'murder'"),
    "Safety-Prompts, unknown key": (
        json.dumps({"Insult": [{"prompt": "a"}], "Goal_Hijacking": [{"prompt": "b"}]}),
        "a, 'Goal_Hijacking' item 1: category 'Goal_Hijacking'",
    ),
    "Safety-Prompts, no object": (
        json.dumps({"Insult": [{"prompt": "a"}, "b"]}),
        "a, 'Insult' item 2: want an object",
    ),
    "second item of a list": ('[{"prompt": "a"},\n3]', "a, item 2: want an object, found int"),
    # nothing in the file can be read
    "empty": ("", "no rows"),
    "blank": (" \n\n", "no rows"),
    "only a header": ("prompt\n", "no rows"),
    "empty list": ("[]", "no rows"),
    "Latin-1": (b'{"prompt": "\xe9"}\n', "byte 0xe9 in position 12"),
    "binary": (b"PK\x03\x04\x00\x00", "a NUL byte at 4"),
    "UTF-16": ('{"prompt": "a"}'.encode("utf-16-le"), "a NUL byte"),
    "open quote": ('prompt\nx\n"never closed\n\n\n', "a:3: not CSV"),
    "open quote in the header": ('"prompt\nx\n', "a:1: not CSV"),
    "field too long": ("prompt\n" + "x" * 200000 + "\n", "not CSV: field larger than field limit"),
    "cut JSON whose last line is whole": ('[\n{"prompt": "a"},\n{"prompt": "b"}\n', "a: not JSON"),
    "cut JSON": ('[\n{"prompt": "a"},\n{"prompt": "b"', "not JSON"),
    "list of a 5000-digit number": (
        '[{"prompt": "p", "n": ' + "9" * 5000 + "}]",
        "not JSON: Exceeds the limit",
    ),
    "list nested too deep": ("[" * 100000, "not JSON"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken(tmp_path, name):
    text, message = BROKEN[name]
    with pytest.raises(UserError) as e:
        load(tmp_path, text)
    told = str(e.value)
    assert message in told and str(tmp_path) in told and "\n" not in told
    assert len(told.replace(str(tmp_path), "")) < 400


def test_an_unknown_category_may_count_as_none(tmp_path):
    text = lines(
        {"prompt": "p", "category": "murder"},
        {"prompt": "q", "category": 0},
        {"prompt": "r", "category": "crime", "label": "safe"},
    )
    rows = load(tmp_path, text, strict=False)
    assert [r["category"] for r in rows] == [None, None, HELPFUL]


def test_missing_file(tmp_path):
    for path in (tmp_path / "nowhere.jsonl", tmp_path):
        with pytest.raises(UserError, match="cannot read"):
            load_rows(path)


def test_load_demonstrations(tmp_path):
    assert load(tmp_path, lines(GOOD), reader=load_demonstrations)[0]["response"] == DRAFTED
    for gone in (("category",), ("draft", "answer")):
        bad = {k: v for k, v in GOOD.items() if k not in gone}
        text = "\n" + lines(GOOD) + "\n\n" + lines(bad)
        with pytest.raises(UserError, match="a:5: want category, draft"):
            load(tmp_path, text, reader=load_demonstrations)
