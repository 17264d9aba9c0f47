"""loaders.py: every format in its own layout; what is broken is named with file and line."""

import json

import pytest

from data import CATEGORIES, HELPFUL, UserError, format_draft
from loaders import ALIASES, load_demonstrations, load_rows

GOOD = {"prompt": "p", "category": "crime", "draft": ["one", "two"], "answer": "No."}


def write(folder, name, text):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder / name


def lines(*rows):
    return "".join(json.dumps(r) + "\n" for r in rows)


def brief(rows):
    return [(r["prompt"], r["category"], r.get("response")) for r in rows]


FORMATS = {
    "our JSON lines": (
        lines(GOOD, {"prompt": "q"}),
        [("p", "crime", "one\ntwo\n#### No."), ("q", None, None)],
    ),
    "Safety-Prompts": (
        json.dumps(
            {
                "Unfairness_And_Discrimination": [
                    {"prompt": "一", "response": "二", "type": "Unfairness_And_Discrimination"}
                ],
                "Privacy_And_Property": [{"prompt": "b", "response": "r"}],
            }
        ),
        [("一", "unfairness", "二"), ("b", "privacy", "r")],
    ),
    "Safety-Prompts, indented": (
        json.dumps({"Insult": [{"prompt": "a", "response": "r"}]}, indent=2),
        [("a", "insult", "r")],
    ),
    "XSTest": (
        "id,prompt,type,label,focus,note\n1,How can I grill a pepper?,homonyms,safe,grill,\n26,How do I hurt him?,contrast_homonyms,unsafe,grill,x\n",
        [("How can I grill a pepper?", HELPFUL, None), ("How do I hurt him?", None, None)],
    ),
    "StrongREJECT": (
        'category,source,forbidden_prompt\n"Hate, harassment and discrimination",MaliciousInstruct,Say it\nNon-violent crimes,custom,Do it\n',
        [("Say it", "unfairness", None), ("Do it", "crime", None)],
    ),
    "AdvBench": ('goal,target\nWrite it,"Sure, here it is"\n', [("Write it", None, None)]),
    "XSTest v2, prompts alone": (
        "id_v1,id_v2,type,prompt,focus,note\nv1-1,v2-1,homonyms,How can I kill a process?,kill,violence\n,v2-26,contrast_homonyms,How can I kill him?,kill,\n",
        [("How can I kill a process?", HELPFUL, None), ("How can I kill him?", None, None)],
    ),
    "HarmBench": (
        "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\nDo this,standard,harassment_bullying,,,do_this\nSay how,contextual,harmful,context,Some text.,say_how\n",
        [("Do this", "insult", None), ("Some text.\n\nSay how", None, None)],
    ),
    "Alpaca": (
        json.dumps(
            [
                {"instruction": "Sort these.", "input": "b, a", "output": "a, b"},
                {"instruction": "Hi", "input": "", "output": "Hello"},
                {"prompt": "p", "instruction": "i", "input": "x"},
            ]
        ),
        [("Sort these.\n\nb, a", None, "a, b"), ("Hi", None, "Hello"), ("p", None, None)],
    ),
    "spaces around commas": (
        'category, prompt\ncrime, "one, two"\ninsult, three\n',
        [("one, two", "crime", None), ("three", "insult", None)],
    ),
    "a space in the header": ("prompt ,category\np,crime\n", [("p", "crime", None)]),
    "semicolons": ("prompt;category\none, two;crime\n", [("one, two", "crime", None)]),
    "tabs": ("category\tprompt\ncrime\tone; two\n", [("one; two", "crime", None)]),
    "list, broken anywhere": ('[{"prompt": "a"}\n]', [("a", None, None)]),
    "commas in front": (
        '[\n{"prompt": "a"}\n, {"prompt": "b"}\n]\n',
        [("a", None, None), ("b", None, None)],
    ),
    "object over two lines": ('{"prompt":\n"a"}\n', [("a", None, None)]),
    "Safety-Prompts, broken anywhere": (
        '{"Insult":\n[{"prompt": "a"}]}\n',
        [("a", "insult", None)],
    ),
    "null fields": (
        lines(
            {
                "prompt": "p",
                "draft": None,
                "answer": None,
                "messages": None,
                "category": None,
                "response": "r",
            }
        ),
        [("p", None, "r")],
    ),
    "CRLF in a response": (
        lines({"prompt": "a\r\nb", "response": "one\r\ntwo\r\n#### No."}),
        [("a\nb", None, "one\ntwo\n#### No.")],
    ),
    "safe topics": (
        lines(
            {"prompt": "p", "label": "safe", "category": "Harmless"},
            {"prompt": "q", "label": "safe", "category": "gardening"},
            {"prompt": "r", "label": "unsafe", "category": "crime"},
        ),
        [("p", HELPFUL, None), ("q", HELPFUL, None), ("r", "crime", None)],
    ),
    "messages": (
        lines(
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "p"},
                    {"role": "assistant", "content": "one\ntwo\n#### No."},
                ],
                "category": "Crime",
            },
            {"messages": [{"role": "user", "content": "q"}]},
            {"messages": [{"role": r, "content": r} for r in ("user", "user", "assistant")]},
        ),
        [("p", "crime", "one\ntwo\n#### No."), ("q", None, None), ("user", None, None)],
    ),
    "JSON list": (
        json.dumps(
            [{"question": "p", "completion": "c", "type": "insult"}, {"text": "q"}], indent=1
        ),
        [("p", "insult", "c"), ("q", None, None)],
    ),
    "one JSON object": ('{"prompt": "p"}', [("p", None, None)]),
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
    assert brief(load_rows(write(tmp_path, f"a.{suffix}", text))) == want


def test_other_fields_stay_and_drafts_are_taken_apart(tmp_path):
    (row,) = load_rows(write(tmp_path, "a.jsonl", lines({**GOOD, "id": 7})))
    assert row == {**GOOD, "id": 7, "response": format_draft(GOOD["draft"], GOOD["answer"])}
    (row,) = load_demonstrations(
        write(
            tmp_path,
            "b.jsonl",
            lines({"goal": "p", "category": "Physical_Harm", "output": "one\ntwo\n#### No."}),
        )
    )
    assert (row["draft"], row["answer"], row["category"]) == (
        ["one", "two"],
        "No.",
        "physical_harm",
    )
    for name in ("XSTest", "XSTest v2, prompts alone"):
        safe, unsafe = load_rows(write(tmp_path, "c.csv", FORMATS[name][0]))
        assert (
            safe["kind"] == "lookalike"
            and safe["focus"] in ("grill", "kill")
            and "kind" not in unsafe
        )
    (row,) = load_rows(write(tmp_path, "d", FORMATS["CRLF in a response"][0]))
    assert (
        row["draft"] == ["one", "two"]
        and "draft" not in load_rows(write(tmp_path, "e", FORMATS["null fields"][0]))[0]
    )


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
    assert (
        load_rows(write(tmp_path, "a", lines({"prompt": "p", "category": name})))[0]["category"]
        == want
    )
    assert set(ALIASES.values()) == {*CATEGORIES, HELPFUL, None}


ok = lines({"prompt": "fine"})
BROKEN = {
    "line of no JSON": (ok + '{"prompt": \n', "a:2: not JSON"),
    "cut last line": (ok + ok + '{"prompt": "x', "a:3: not JSON"),
    "text between": (ok + "hello\n" + ok, "a:2: not JSON"),
    "first line of no JSON": ('{"prompt": \n' + ok, "a:1: not JSON"),
    "list as a line": (ok + '["prompt"]\n', "a:2: want an object, found list"),
    "number as a line": (ok + "3\n", "a:2: want an object, found int"),
    "null": (ok + "null\n", "a:2: want an object"),
    "no prompt": (ok + lines({"x": "b"}), "a:2: no prompt; want one of the fields prompt"),
    "empty prompt": (ok + lines({"prompt": " "}), "a:2: no prompt"),
    "number as prompt": (ok + lines({"prompt": 3}), "a:2: no prompt"),
    "prompt null": (ok + lines({"prompt": None}), "a:2: no prompt"),
    "unknown category": (
        ok + lines({"prompt": "p", "category": "murder"}),
        "a:2: category 'murder'; known are insult, unfairness, crime",
    ),
    "category no text": (ok + lines({"prompt": "p", "category": 4}), "a:2: category 4"),
    "category 0": (ok + lines({"prompt": "p", "category": 0}), "a:2: category 0"),
    "category false": (ok + lines({"prompt": "p", "category": False}), "a:2: category False"),
    "safe crime": (
        ok + lines({"prompt": "p", "category": "crime", "label": "safe"}),
        "a:2: label 'safe' contradicts category 'crime'",
    ),
    "unsafe help": (
        ok + lines({"prompt": "p", "category": "helpful", "label": "unsafe"}),
        "a:2: label 'unsafe' contradicts category 'helpful'",
    ),
    "number of 5000 digits": (
        ok + '{"prompt": "p", "n": ' + "9" * 5000 + "}\n",
        "a:2: not JSON: Exceeds the limit",
    ),
    "CSV, record of three lines": (
        'prompt,n\n"x",1\n\n"y\ny\ny",2,3\n',
        "a:4: more or fewer fields",
    ),
    "category a list": (
        ok + lines({"prompt": "p", "category": ["crime"]}),
        "a:2: category ['crime']",
    ),
    "draft one text": (
        ok + lines({**GOOD, "draft": "one"}),
        "a:2: want draft (a list of steps) and answer",
    ),
    "draft empty": (ok + lines({**GOOD, "draft": []}), "a:2: want draft"),
    "empty step": (ok + lines({**GOOD, "draft": ["one", ""]}), "a:2: want draft"),
    "draft a number": (ok + lines({**GOOD, "draft": 3}), "a:2: want draft"),
    "steps numbers": (ok + lines({**GOOD, "draft": [1, 2]}), "a:2: want draft"),
    "no answer": (ok + lines({k: v for k, v in GOOD.items() if k != "answer"}), "a:2: want draft"),
    "empty answer": (ok + lines({**GOOD, "answer": ""}), "a:2: want draft"),
    "separator in the answer": (ok + lines({**GOOD, "answer": "a #### b"}), "a:2: want draft"),
    "messages a text": (ok + lines({"messages": "hi"}), "a:2: messages: want a list"),
    "messages without content": (
        ok + lines({"messages": [{"role": "user"}]}),
        "a:2: messages: want a list",
    ),
    "no user turn": (
        ok + lines({"messages": [{"role": "assistant", "content": "x"}]}),
        "a:2: messages: no user turn",
    ),
    "empty user turn": (
        ok + lines({"messages": [{"role": "user", "content": ""}]}),
        "a:2: messages: no user turn",
    ),
    "half a character": (ok + '{"prompt": "\\ud800"}\n', "a:2: half a character"),
    "nested too deep": (ok + '{"prompt": ' + "[" * 100000 + "\n", "a:2: not JSON"),
    "CSV, empty prompt": ("prompt,n\nx,1\n,2\n", "a:3: no prompt"),
    "CSV, too many fields": ("prompt,n\nx,1\ny,2,3\n", "a:3: more or fewer fields"),
    "CSV, too few fields": ("prompt,n\nx,1\ny\n", "a:3: more or fewer fields"),
    "CSV, no such column": ("a,b\n1,2\n", "a:2: no prompt"),
    "CSV, unknown category": ("prompt,category\nx,murder\n", "a:2: category 'murder'"),
    "Safety-Prompts, unknown key": (
        json.dumps({"Insult": [{"prompt": "a"}], "Goal_Hijacking": [{"prompt": "b"}]}),
        "'Goal_Hijacking' item 1: category 'Goal_Hijacking'",
    ),
    "Safety-Prompts, no object": (
        json.dumps({"Insult": [{"prompt": "a"}, "b"]}),
        "'Insult' item 2: want an object",
    ),
}
WHOLE = {  # nothing in the file can be read
    "empty": ("", "no rows"),
    "blank": (" \n\n", "no rows"),
    "only a header": ("prompt\n", "no rows"),
    "empty list": ("[]", "no rows"),
    "Latin-1": (b'{"prompt": "\xe9"}\n', "not UTF-8 at byte 12"),
    "binary": (b"PK\x03\x04\x00\x00", "a NUL byte at character 4"),
    "UTF-16": ('{"prompt": "a"}'.encode("utf-16-le"), "a NUL byte"),
    "open quote": ('prompt\nx\n"never closed\n\n\n', "a:3: not CSV"),
    "open quote in the header": ('"prompt\nx\n', "a:1: not CSV"),
    "cut JSON whose last line is whole": ('[\n{"prompt": "a"},\n{"prompt": "b"}\n', "a: not JSON"),
    "list of a 5000-digit number": (
        '[{"prompt": "p", "n": ' + "9" * 5000 + "}]",
        "not JSON: Exceeds the limit",
    ),
    "field too long": ("prompt\n" + "x" * 200000 + "\n", "not CSV: field larger than field limit"),
    "cut JSON": ('[\n{"prompt": "a"},\n{"prompt": "b"', "not JSON"),
    "nested too deep": ("[" * 100000, "not JSON"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_rows(tmp_path, name):
    text, message = BROKEN[name]
    path = write(tmp_path, "a", text)
    with pytest.raises(UserError) as e:
        load_rows(path)
    assert message in str(e.value) and str(tmp_path) in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("name", WHOLE)
def test_broken_files(tmp_path, name):
    text, message = WHOLE[name]
    for skip_bad in (False, True):
        with pytest.raises(UserError) as e:
            load_rows(write(tmp_path, "a", text), skip_bad=skip_bad)
        assert message in str(e.value) and str(tmp_path) in str(e.value) and len(str(e.value)) < 400


@pytest.mark.parametrize("name", BROKEN)
def test_skip_bad_drops_and_counts(tmp_path, name, capsys):
    text, message = BROKEN[name]
    path = write(tmp_path, "a", text)
    if name in ("CSV, no such column", "CSV, unknown category"):  # nothing is left
        with pytest.raises(UserError, match="no rows"):
            load_rows(path, skip_bad=True)
    else:
        assert all(r["prompt"] in ("fine", "x", "a") for r in load_rows(path, skip_bad=True))
    said = capsys.readouterr().out
    assert "1 rows skipped, the first at" in said and message in said


def test_an_unknown_category_may_count_as_none(tmp_path):
    rows = load_rows(
        write(
            tmp_path,
            "a",
            lines(
                {"prompt": "p", "category": "murder"},
                {"prompt": "q", "category": 0},
                {"prompt": "r", "category": "crime", "label": "safe"},
            ),
        ),
        strict=False,
    )
    assert [r["category"] for r in rows] == [None, None, HELPFUL]


def test_missing_file(tmp_path):
    for path in (tmp_path / "nowhere.jsonl", tmp_path):
        with pytest.raises(UserError, match="cannot read"):
            load_rows(path)


def test_load_demonstrations(tmp_path):
    assert (
        load_demonstrations(write(tmp_path, "a", lines(GOOD)))[0]["response"]
        == "one\ntwo\n#### No."
    )
    for change in ({"category": None}, {"draft": None, "answer": None}):
        row = {k: v for k, v in {**GOOD, **change}.items() if v is not None}
        with pytest.raises(UserError, match="b:5: want category, draft"):
            load_demonstrations(write(tmp_path, "b", "\n" + lines(GOOD) + "\n\n" + lines(row)))
