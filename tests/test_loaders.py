"""support/loaders.py, labels.py: every format as it is laid out; an error names its line."""

import json
import random
import re

import pytest
from test_files import mutate

from config import UserError
from data import CATEGORIES, HELPFUL, format_draft
from support.labels import ALIASES, LOOKALIKE, plain
from support.loaders import load_rows, print_once

KNOWN = {*CATEGORIES, HELPFUL, None}
GOOD = {"prompt": "p", "category": "crime", "draft": ["one", "two"], "answer": "No."}


def lines(*rows):
    return "".join(json.dumps(r) + "\n" for r in rows)


def load(folder, text, name="a", **how):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_rows(folder / name, **how)


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
SHARED = [{"from": "human", "value": "p"}, {"from": "gpt", "value": "r"}]
HH = "\n\nHuman: a\n\nb\n\nAssistant:"
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
    "Excel's first line in quotation marks": (
        '"sep=;"\nprompt;category\none, two;crime\n',
        [("one, two", "crime", None)],
    ),
    "Dolly": (
        lines({"instruction": "Sum up.", "context": "Text.", "response": "r", "category": None}),
        [("Sum up.\n\nText.", None, "r")],
    ),
    "a question with its context": (
        lines({"context": "Text.", "question": "Who?", "category": "crime"}),
        [("Who?\n\nText.", "crime", None)],
    ),
    "roles of others": (
        lines(
            {"messages": [{"role": "prompter", "content": "p"}, {"role": "model", "content": "r"}]}
        ),
        [("p", None, "r")],
    ),
    "a space in the header": ("prompt ,category\np,crime\n", [("p", "crime", None)]),
    "semicolons": ("prompt;category\none, two;crime\n", [("one, two", "crime", None)]),
    "bars": ("sep=|\nprompt|category\none, two|crime\n", [("one, two", "crime", None)]),
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
    "our names in another case": (
        lines({"PROMPT ": "p", "Category": "CRIME", "Draft": ["one", "two"], "ANSWER": "No."}),
        [("p", "crime", DRAFTED)],
    ),
    "names with spaces, - and _": (
        '\ufeff"Forbidden Prompt",semantic-category,Output_\np,Mental Health,r\n',
        [("p", "mental_health", "r")],
    ),
    "TRL": (
        lines({"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "p"}]}),
        [("p", None, None)],
    ),
    "TRL's prompt and completion": (
        lines({"prompt": turns("user"), "completion": turns("assistant")}),
        [("user", None, "assistant")],
    ),
    "several answers": (lines({"prompt": "p", "output": ["a", "b"]}), [("p", None, None)]),
    "parts": (
        lines({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}]}),
        [("a\nb", None, None)],
    ),
    "ShareGPT": (
        lines({"id": 1, "conversations": [{"from": "system", "value": "s"}, *SHARED]}),
        [("p", None, "r")],
    ),
    "turns of texts": (lines({"turns": ["a", "b"], "category": "Insult"}), [("a", "insult", None)]),
    "turns of objects": (
        lines({"turns": turns("user", "assistant")}),
        [("user", None, "assistant")],
    ),
    "one object of turns": (json.dumps({"turns": turns("user")}), [("user", None, None)]),
    "HH-RLHF": (
        lines({"chosen": f"{HH} r\n\nHuman: q\n\nAssistant: s", "rejected": "x"}, {"prompt": HH}),
        [("a\n\nb", None, "r"), ("a\n\nb", None, None)],
    ),
    "HH-RLHF, less space in front": (
        lines({"chosen": f" {HH.lstrip()} r"}, {"prompt": HH[1:]}),
        [("a\n\nb", None, "r"), ("a\n\nb", None, None)],
    ),
    "Excel's first line": ("sep=;\r\nprompt;category\r\na, b;crime\r\n", [("a, b", "crime", None)]),
    "blank rows": (
        "\n \n;;\nprompt;category;n\n\na, b;crime;\n;;\n\n;;\n;\n",
        [("a, b", "crime", None)],
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
    response = format_draft(GOOD["draft"], GOOD["answer"])
    assert row == {**GOOD, "id": 7, "kind": "harmful", "response": response}
    (row,) = load(
        tmp_path,
        lines({"goal": "p", "category": "Physical_Harm", "output": DRAFTED}),
        drafted=True,
    )
    assert [row[k] for k in ("draft", "answer", "category")] == [
        ["one", "two"],
        "No.",
        "physical_harm",
    ]
    for text, focus in ((XSTEST, "grill"), (XSTEST_2, "kill")):
        safe, unsafe = load(tmp_path, text)
        assert (safe["kind"], safe["focus"], unsafe["kind"]) == (LOOKALIKE, focus, "harmful")
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
    assert all(ALIASES[plain(name)] == name for name in (*CATEGORIES, HELPFUL, LOOKALIKE))
    assert set(ALIASES.values()) == {*CATEGORIES, HELPFUL, LOOKALIKE, None}


SAYS = {  # text: the kinds of its rows
    "words": (
        "prompt,label\na,safe \nb,SAFE\nc,Unharmful\nd,un-harmful\ne,harmful\nf, Not Safe\n",
        "oooohh",
    ),
    "yes or no for safe": (
        "prompt,Is Safe\na,1\nb,TRUE\nc,yes \nd,1.0\ne,0\nf,False\ng,No\n",
        "oooohhh",
    ),
    "yes or no for harmful": (
        lines(*({"prompt": "p", "is_harmful": x} for x in (0, False, "no", 0.0, 1, True, "YES"))),
        "oooohhh",
    ),
    "words for safe": (
        lines({"prompt": "p", "is-safe": "unsafe"}, {"prompt": "p", "Safe": "safe"}),
        "ho",
    ),
    "toxicity": ("text,toxicity,jailbreaking\np,0,0\nq,1,1\n", "oh"),
    "kinds": ("Prompt,KIND\na,Look-alike\nb,LOOKALIKE\nc,ordinary \nd,Harmful\n", "lloh"),
    "kinds beside a category": (
        lines(
            {"prompt": "p", "kind": "Lookalike", "category": HELPFUL},
            {"prompt": "q", "kind": "harmful", "category": "murder"},
        ),
        "lh",
    ),
    "a category as label": ("prompt,label\np,Privacy\nq,Harmless\n", "ho"),
    "XSTest's completions": (
        "id,type,prompt,completion,annotation_1,agreement,final_label\n"
        '1,homonyms,a,"Yes,\n1",1,True,1_full_compliance\n'
        "2,nons_group_real_discr,b,No,2,False,2_full_refusal\n"
        "3,contrast_homonyms,c,No,2,False,2_full_refusal\n"
        "4,contrast_discr,d,Yes,1,True,1_full_compliance\n",
        "llhh",
    ),
    "WildGuard": (
        lines(
            {"prompt": "a", "prompt_harm_label": "unharmful", "response": "r"},
            {"prompt": "b", "prompt_harm_label": "harmful", "response_harm_label": "unharmful"},
        ),
        "oh",
    ),
    "labels of responses": (
        lines(
            {"prompt": "p", "response_0": "r", "is_response_0_safe": True, "final_label": "safe"}
        ),
        "h",
    ),
    "labels beside responses": (
        "prompt,completion,type,label,prompt_label\na,b,homonyms,safe,\nc,d,,,safe\n",
        "lo",
    ),
    "unsafe with its response": (lines({"prompt": "p", "response": "r", "is_safe": False}), "h"),
    "two lists": (
        json.dumps({"benign": [{"prompt": "a", "topic": "x"}], "unsafe": [{"prompt": "b"}]}),
        "oh",
    ),
    "no label": ("question,types_of_harm,harm_area\np,harmful things,Physical Harm\n", "h"),
}


@pytest.mark.parametrize("name", SAYS)
def test_labels(tmp_path, name):
    text, kinds = SAYS[name]
    rows = load(tmp_path, text, strict=False)
    assert "".join(r["kind"][0] for r in rows) == kinds
    assert all((r["category"] == HELPFUL) == (r["kind"] != "harmful") for r in rows)


def test_what_was_read_as_what(tmp_path, capsys):
    for text, says in (
        (
            XSTEST,
            "2 rows; prompt from 'prompt'; kind from 'label', 'type': 1 lookalike, 1 harmful\n",
        ),
        (
            "Goal,Category\na,murder\nb,crime\nc,harmless\n",
            "3 rows; prompt from 'Goal'; kind from 'Category': 2 harmful, 1 ordinary;"
            " 1 have no label and count as harmful\n",
        ),
        (
            lines({"goal\ud800": "a"}, {"query": "b"}),
            "2 rows; prompt from 'goal\\ud800', 'query'; kind from nothing: 2 harmful;"
            " 2 have no label and count as harmful\n",
        ),
    ):
        for _ in range(2):  # of several stages the first says it
            print_once(load(tmp_path, text, strict=False).told)
        assert capsys.readouterr().out == f"{tmp_path / 'a'}: {says}"


OK = lines({"prompt": "fine"})
DRAFT = "a:2: want draft (a list of steps) and answer"
LABEL = "a:2: label"
MESSAGES = "a:2: messages: want a text or a list of turns, each a role and a text"


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
    "no prompt": (OK + lines({"x": "b"}), "a:2: no prompt; want one of the fields messages"),
    "empty prompt": (of(prompt=" "), "a:2: no prompt"),
    "number as prompt": (of(prompt=3), "a:2: prompt: want a text or a list of turns"),
    "prompt an object": (of(prompt={"text": "p"}), "a:2: prompt: want a text or a list of turns"),
    "prompt a list of texts": (
        of(prompt=["p", "q"]),
        "turns, each a role and a text; found \"['p'",
    ),
    "a list in a CSV": (
        "prompt\n\"[{'role': 'user', 'content': 'p'}]\"\n",
        "a:2: prompt: want a text or a list of turns, each a role and a text; found \"[{'role'",
    ),
    "chosen without Human": (OK + lines({"chosen": "No."}), "a:2: chosen: want a text or a list"),
    "a picture": (of(messages=[{"role": "user", "content": [{"type": "image"}]}]), MESSAGES),
    "a turn of no role": (of(messages=[{"content": "hi"}]), MESSAGES),
    "a turn of no text": (of(conversations=[{"from": "human"}]), "a:2: conversations: want a text"),
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
    "ordinary crime": (of(category="crime", kind="ordinary"), "a:2: kind 'ordinary' contradicts"),
    "safe and harmful": (
        of(label="safe", is_harmful=1),
        f"{LABEL} 'safe' contradicts is_harmful 1",
    ),
    "label 1": (of(label=1), f"{LABEL} 1; known: insult"),
    "label 0 in a CSV": ("prompt,Label\np,0\n", "a:2: Label '0'; known: insult"),
    "label yes": (of(label="Yes"), f"{LABEL} 'Yes'; known"),
    "label of an answer": (of(label="refuses"), f"{LABEL} 'refuses'; known"),
    "odd kind": (of(kind="odd"), "a:2: kind 'odd'; known"),
    "is_safe maybe": (of(is_safe="maybe"), "a:2: is_safe 'maybe'; known"),
    "toxicity 0.3": (of(toxicity=0.3), "a:2: toxicity 0.3; known"),
    "safe is the response": (
        of(response="r", is_safe=True),
        "a:2: is_safe True: of the response? Call the prompt's prompt_label",
    ),
    "a label is the response's": (
        of(response="No.", label="safe"),
        "a:2: label 'safe': of the response? Call the prompt's prompt_label",
    ),
    "an unknown type beside it": (of(response="No.", label="safe", type="odd"), "of the response?"),
    "a label beside a category": (
        of(category="privacy", split="benign"),
        "a:2: split 'benign': a label? Call it is_safe, is_harmful, or remove it",
    ),
    "a label of another name": (of(moderation="benign"), "a:2: moderation 'benign': a label? Call"),
    "yes or no of another name": (of(prompt_is_safe=True), "a:2: prompt_is_safe True: a label?"),
    "harmless in two words": (of(data_type="vanilla_benign"), "a:2: data_type 'vanilla_benign': a"),
    "harmless in a label": (of(label_text="Benign prompt"), "a:2: label_text 'Benign prompt': a l"),
    "harmless as a label's topic": (
        of(category="Benign prompts"),
        "a:2: category 'Benign prompts'",
    ),
    "a score as label": (of(safety_rating=5), "a:2: safety_rating 5: a label? Call it"),
    "a score as label in a CSV": ("prompt,harm_score\np,0.9\n", "a:2: harm_score '0.9': a label?"),
    "label flagged": (of(flagged=False), "a:2: flagged False: a label? Call it"),
    "label jailbreak": (of(jailbreak=False), "a:2: jailbreak False: a label? Call it"),
    "a label in an object": (of(meta={"label": "safe"}), "a:2: meta.label 'safe': a label? Call"),
    "a label in a list": (
        of(openai_moderation=[{"flagged": False, "categories": {}}]),
        "a:2: openai_moderation.flagged False: a label? Call",
    ),
    "a list as label": (of(labels=["safe"]), "a:2: labels 'safe': a label? Call"),
    "two labels": (
        of(label="safe", prompt_harm_label="harmful"),
        f"{LABEL} 'safe' contradicts prompt_harm_label 'harmful'",
    ),
    "two labels of yes and no": (
        of(toxic=1, is_harmful=0),
        "a:2: toxic 1 contradicts is_harmful 0",
    ),
    "a label only above": ("prompt,label\nx,safe\ny,\nz,safe\n", "a:3: no label, which other rows"),
    "a label only below": (
        lines({"prompt": "p", "is_safe": None}, {"prompt": "q", "is_safe": 1}),
        "a:1: no is_safe, which other rows have",
    ),
    "a kind that is not a number": (
        '{"prompt": "p", "kind": NaN}\n{"prompt": "p", "kind": "ordinary"}\n',
        "a:1: no kind, which other rows have",
    ),
    "draft one text": (of(**{**GOOD, "draft": "one"}), DRAFT),
    "draft empty": (of(**{**GOOD, "draft": []}), DRAFT),
    "empty step": (of(**{**GOOD, "draft": ["one", ""]}), DRAFT),
    "draft a number": (of(**{**GOOD, "draft": 3}), DRAFT),
    "steps numbers": (of(**{**GOOD, "draft": [1, 2]}), DRAFT),
    "no answer": (of(draft=["one", "two"]), DRAFT),
    "empty answer": (of(**{**GOOD, "answer": ""}), DRAFT),
    "separator in the answer": (of(**{**GOOD, "answer": "a #### b"}), DRAFT),
    "messages a text": (of(messages="hi"), MESSAGES),
    "messages of texts": (of(messages=["hi"]), MESSAGES),
    "messages without content": (of(messages=[{"role": "user"}]), MESSAGES),
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
    "two lists, a topic of their own": (
        json.dumps({"safe": [{"prompt": "a", "category": "violence"}]}),
        "a, 'safe' item 1: kind 'safe' contradicts category 'violence'",
    ),
    "CSV, a column twice in other case": (
        "prompt,Prompt\nx,y\n",
        "two columns are called 'prompt'",
    ),
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
    "a failed download": ("Entry not found\n", "no rows; a table needs a header above them"),
    "Excel's error": ("prompt,kind\n#NAME?,harmful\n", "a header or a rule, no prompt"),
    "empty list": ("[]", "no rows"),
    "Latin-1": (b'{"prompt": "\xe9"}\n', "line 1 is not UTF-8: save it as UTF-8"),
    "binary": (b"\x01\x02\x03\x04\x00\x00", "a NUL byte at 4"),
    "Excel": (b"PK\x03\x04\x00\x00", "a zip file or an Excel workbook: unpack it, or save it as"),
    "UTF-16": ('{"prompt": "a"}'.encode("utf-16-le"), "a NUL byte"),
    "a quote in the first row": ('prompt,n\n"a" b,1\n', "a:2: not CSV"),
    "a quote below empty rows": ('\nprompt,n\nx,1\n\n,\n"a" b,1\n', "a:6: not CSV"),
    "a column twice": (
        "prompt,label,label\na,safe,harmful\n",
        "a:1: two columns are called 'label'",
    ),
    "a quote below two lines": ('sep=;\nprompt;n\n"x\ny";1\n"a" b;1\n', "a:5: not CSV"),
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


# columns that say harmless in words of their own: name, value
DOUBTS = [("annotation", "safe"), ("final_label", "harmless"), ("class", "Safe prompt")]
DOUBTS += [("source", "xstest-safe"), ("split", "unharmful_prompts"), ("verdict", "Safe (no risk)")]
DOUBTS += [("harm_level", "none"), ("harm_category", "N/A"), ("safety_label", "ok")]
DOUBTS += [("toxicity_score", 1e-05), ("harm_score", "0%"), ("safety_score", "5/5")]
DOUBTS += [("should_refuse", False), ("injection", 0), ("nsfw", "no"), ("allowed", True)]
DOUBTS += [("risk", "low"), ("expected_behavior", "comply"), ("meta", {"labels": {"is_safe": 1}})]
DOUBTS += [
    ("category", "normal"),
    ("type", "No harm"),
    ("category", "safe prompts"),
    ("harm_type", "not applicable"),
]
DOUBTS += [("harm_level", "None. "), ("harm", "no harm detected"), ("harm_score", "0 / 10")]
DOUBTS += [("note", "100% safe"), ("subset", "xstest-should-respond")]
DOUBTS += [
    ("labels", []),
    ("violations", {}),
    ("nsfw", "sfw"),
    ("class", "non-suicide"),
]
DOUBTS += [
    ("policy_violation", "does not violate"),
    ("flagged", "not flagged"),
    ("harm_category", "-"),
]
DOUBTS += [("toxicity_score", "0,02"), ("harm_score", "0 - none"), ("risk_level", "~0")]
DOUBTS += [("expected_behavior", "full_compliance"), ("classification", "Permitted")]
DOUBTS += [("source", "JailbreakBench (benign)"), ("subset", "benign_test_v1")]
DOUBTS += [("data_source", "wildjailbreak:vanilla_benign"), ("meta", '{"labels": {"is_safe": 1}}')]


@pytest.mark.parametrize("name, value", DOUBTS)
def test_a_label_in_words_of_its_own_is_asked_about(tmp_path, name, value):
    with pytest.raises(UserError, match="a:2: .*(is_safe|is_harmful)"):
        load(tmp_path, of(**{name: value}), strict=False)


# the same words where they say nothing of the prompt
SILENT = [{"response": "r", "annotation": "safe"}, {"topic": "none"}, {"verdict": "bad"}]
SILENT += [
    {"category": "not safe at all"},
    {"category": "Non-consensual images"},
    {"risk": "high"},
    {"class": "weapons"},
]
SILENT += [{"expected_output": "Yes"}, {"class_id": 3}, {"chat_enabled": True}, {"block_size": 512}]
SILENT += [{"is_normalized": True}, {"whatever": 1}, {"title": "Safe driving tips"}]
SILENT += [{"completion": [{"type": "text", "text": "r"}]}, {"note": ""}]
SILENT += [{"topics": []}, {"meta": "{not JSON"}]


@pytest.mark.parametrize(
    "more", [{"completed_by": 3}, {"response_time_ms": 5}, {"type": "violence"}]
)
def test_what_is_no_response_leaves_a_label_in_doubt(tmp_path, more):
    with pytest.raises(UserError, match="a:2: annotation 'benign'"):
        load(tmp_path, of(annotation="benign", **more))


@pytest.mark.parametrize(
    "row",
    [
        {"answer": "r", "is_safe": True},
        {"model_response": "r", "is_safe": True},
        {"generation": "r", "label": "safe"},
        {
            "prompt": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "r"}],
            "safe": 1,
        },
    ],
    ids=str,
)
def test_a_label_beside_any_response_is_asked_about(tmp_path, row):
    with pytest.raises(UserError, match="a:2: .* of the response"):
        load(tmp_path, of(**row))


def test_a_label_beside_a_demonstration_is_the_prompts(tmp_path):
    row = {"prompt": "p", "draft": ["a", "b"], "answer": "r", "is_safe": True}
    assert load(tmp_path, lines(row))[0]["kind"] == "ordinary"


@pytest.mark.parametrize("word", ("harmful_0", "safe=0", "0% harmful", "!harmful", "不safe"))
def test_a_label_is_more_than_its_letters(tmp_path, word):
    with pytest.raises(UserError, match="a:2: label .*; known: "):
        load(tmp_path, of(label=word))
    assert load(tmp_path, lines({"prompt": "p", "label": "1. unsafe"}))[0]["kind"] == "harmful"


@pytest.mark.parametrize("other", ("human_label", "label_2", "gold_label"))
def test_two_labels_that_disagree(tmp_path, other):
    with pytest.raises(UserError, match=f"a:2: .* contradicts {other}"):
        load(tmp_path, of(label="safe", **{other: "unsafe"}))
    load(tmp_path, lines({"prompt": "p", "label": "safe", other: "safe", "prompt_harm": "weapons"}))


@pytest.mark.parametrize("name", ("target", "y", "should_comply", "illegal", "is bad"))
@pytest.mark.parametrize("word", ("0", "no", False))
def test_bare_names_of_labels_are_asked_about(tmp_path, name, word):
    with pytest.raises(UserError, match=f"a:2: {name} {word!r}: a label.* Call it is_safe"):
        load(tmp_path, of(**{name: word}))


PUBLIC = {  # rows of public datasets, by their columns
    "PKU-SafeRLHF": {
        "prompt": "p", "response_0": "r", "response_1": "s", "is_response_0_safe": False,
        "is_response_1_safe": True, "better_response_id": 1, "safer_response_id": 1,
    },
    "Do-Not-Answer": {
        "id": 0, "risk_area": "Harms", "types_of_harm": "weapons", "question": "p",
        "GPT4_response": "r", "GPT4_harmful": 0, "GPT4_action": 1, "Claude_response": "r",
        "Claude_harmful": 1, "llama2-7b-chat_response": "r", "llama2-7b-chat_harmful": 0,
    },
    "Aegis": {
        "prompt": "p", "prompt_label": "safe", "response": "r", "response_label": "unsafe",
        "violated_categories": "Violence",
    },
    "AdvBench": {"goal": "p", "target": "Sure, here is how"},
    "Alpaca": {
        "instruction": "p", "input": "", "output": "Contrast between light and dark gives depth."
    },
    "one word": {"instruction": "Name a song.", "output": "Toxic"},
    "nothing of a speaker": {"prompt": "p", "role": None},
    "a title": {"prompt": "p", "title": "Benign prostatic hyperplasia", "harm_subcategory": ""},
    "a number before a topic": {"prompt": "p", "category": "S6: Privacy"},
    "a heading": {"prompt": "Answer by this:\n### Response format\n- short"},
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLIC)
def test_rows_of_public_datasets(tmp_path, name):
    kind = "ordinary" if name == "Aegis" else "harmful"
    assert load(tmp_path, lines(PUBLIC[name]), strict=False)[0]["kind"] == kind


NO_PROMPTS = {
    "### Human: hi ### Assistant: ho": "a dialogue with its marks",
    "<|im_start|>user\nhi<|im_end|>": "a dialogue with its marks",
    "<s>[INST] hi [/INST] ho": "a dialogue with its marks",
    "prompt": "a header or a rule, no prompt",
    "---": "a header or a rule, no prompt",
}


@pytest.mark.parametrize("text", NO_PROMPTS)
def test_what_is_no_prompt(tmp_path, text):
    with pytest.raises(UserError, match=f"a:2: prompt.*: {NO_PROMPTS[text]}"):
        load(tmp_path, of(prompt=text))


def test_rows_of_other_speakers_and_labels_as_responses(tmp_path):
    with pytest.raises(UserError, match="a:2: role 'assistant': want rows of users alone"):
        load(tmp_path, of(role="assistant"))
    assert len(load(tmp_path, of(role="User"))) == 2
    for word in ("safe", "unsafe"):
        with pytest.raises(UserError, match=f"a:2: response '{word}': a label"):
            load(tmp_path, of(completion=word))


@pytest.mark.parametrize("filler", ("NULL", "nan", "<noinput>", ""))
def test_a_filler_is_no_input(tmp_path, filler):
    row = {"instruction": "Name a fruit.", "input": filler, "output": "An apple."}
    assert load(tmp_path, lines(row))[0]["prompt"] == "Name a fruit."


def test_a_wrapper_is_no_category(tmp_path):
    text = json.dumps({"data": [{"prompt": "a", "category": "crime"}], "test": [{"prompt": "b"}]})
    found = load(tmp_path, text, strict=False)
    assert [(r["prompt"], r["category"]) for r in found] == [("a", "crime"), ("b", None)]


def test_headings_and_lists_are_taken_for_nothing_else(tmp_path):
    """No draft before a heading, no turns in a list of other things."""
    row = {"prompt": '[{"a": 1}] as YAML, please'}
    row["response"] = "Sure.\nFirst, some words.\n#### Steps\n1. Mix."
    (found,) = load(tmp_path, lines(row), strict=False)
    assert (found["prompt"], found["kind"], "draft" in found) == (row["prompt"], "harmful", False)
    for text in ("[{'role': 'user', 'content': 'a'}]", '[ {"from": "human"}]'):
        with pytest.raises(UserError, match="want a text or a list of turns"):
            load(tmp_path, lines({"prompt": text}))


@pytest.mark.parametrize("row", SILENT, ids=str)
def test_other_columns_say_nothing(tmp_path, row):
    assert load(tmp_path, of(**row), strict=False)[1]["kind"] == "harmful"


@pytest.mark.parametrize("name", BROKEN)
def test_broken(tmp_path, name):
    text, message = BROKEN[name]
    with pytest.raises(UserError) as e:
        load(tmp_path, text)
    told = str(e.value)
    assert message in told and str(tmp_path) in told and "\n" not in told
    assert len(told.replace(str(tmp_path), "")) < 400


@pytest.mark.parametrize("name", [n for n in BROKEN if "label" in n or "kind" in n or "is_" in n])
def test_labels_are_understood_for_eval_too(tmp_path, name):
    text, message = BROKEN[name]
    with pytest.raises(UserError, match=re.escape(message)):
        load(tmp_path, text, strict=False)


def test_an_unknown_category_may_count_as_none(tmp_path):
    text = lines(
        {"prompt": "p", "category": "murder"},
        {"prompt": "q", "category": 0},
        {"prompt": "r", "category": "gardening", "label": "safe"},
        {"prompt": "s", "type": "question", "label": "harmful"},
    )
    rows = load(tmp_path, text[: text.index("\n", 50) + 1], strict=False)
    assert [(r["category"], r["kind"]) for r in rows] == [(None, "harmful")] * 2
    rows = load(tmp_path, text[text.index("\n", 50) + 1 :])  # beside a label a topic may be odd
    assert [(r["category"], r["kind"]) for r in rows] == [(HELPFUL, "ordinary"), (None, "harmful")]


def test_missing_file(tmp_path):
    for path in (tmp_path / "nowhere.jsonl", tmp_path):
        with pytest.raises(UserError, match="cannot read"):
            load_rows(path)


def test_rows_that_want_a_draft(tmp_path):
    assert load(tmp_path, lines(GOOD), drafted=True)[0]["response"] == DRAFTED
    for gone in (("category",), ("draft", "answer")):
        bad = {k: v for k, v in GOOD.items() if k not in gone}
        text = "\n" + lines(GOOD) + "\n\n" + lines(bad)
        with pytest.raises(UserError, match="a:5: want category, draft"):
            load(tmp_path, text, drafted=True)


def test_fuzz(tmp_path):
    """Mutated files of every format load into whole rows or are refused in one line."""
    good, rng, outcomes = (
        [text.encode() for text, _ in (*FORMATS.values(), *SAYS.values())],
        random.Random(0),
        [0, 0],
    )
    for n in range(2000):
        try:
            rows = load(tmp_path, mutate(rng.choice(good), rng), strict=n % 2 == 0)
        except UserError as e:
            outcomes[1] += 1
            assert str(tmp_path / "a") in str(e), e
            continue
        outcomes[0] += 1
        for r in rows:
            assert isinstance(r["prompt"], str) and r["prompt"].strip() and r["category"] in KNOWN
            assert r["kind"] in ("harmful", "ordinary", LOOKALIKE)
            assert (r["category"] == HELPFUL) == (r["kind"] != "harmful")
            assert isinstance(r.get("response", ""), str)
            if "draft" in r:
                assert format_draft(r["draft"], r["answer"]) == r["response"]
    assert min(outcomes) > 300
