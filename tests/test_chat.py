"""chat.py on small byte-level tokenizers made here: the exact prompt text, the end-of-text list, the errors."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from chat import default_system, load_chat
from data import UserError

CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA3 = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
]
JINJA = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are small.<|im_end|>\n' }}{% endif %}{{ message }}"


def folder(path, special, eos=None, **files):
    """A model folder: 256 byte tokens, then the special ones; it puts the first special token before every text, as Llama does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    t = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    t.pre_tokenizer, t.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    t.add_special_tokens(special)
    if special:
        t.post_processor = processors.TemplateProcessing(
            single=f"{special[0]} $A", special_tokens=[(special[0], t.token_to_id(special[0]))]
        )
    t.save(str(path / "tokenizer.json"))
    (path / "config.json").write_text(json.dumps({"eos_token_id": eos}))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def text_of(chat, ids):
    return chat.tokenizer.decode(ids, skip_special_tokens=False)


def test_chatml(tmp_path):
    chat = load_chat(folder(tmp_path, CHATML, eos=256, tokenizer_config={"chat_template": JINJA}))
    ids = chat.prompt("Hello, {system} — 12\n ok?")
    assert text_of(chat, ids) == (
        "<|im_start|>system\nYou are small.<|im_end|>\n<|im_start|>user\nHello, {system} — 12\n ok?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert [i for i in ids if i >= 256] == [
        257,
        258,
        257,
        258,
        257,
    ]  # marks are single tokens, and nothing is put in front
    assert chat.eos == (258, 256)  # what ends a turn comes first


def test_chatml_system_texts(tmp_path):
    folder(tmp_path, CHATML, eos=258, tokenizer_config={"chat_template": JINJA})
    user = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    for system, head in (
        ("Be kind.", "<|im_start|>system\nBe kind.<|im_end|>\n"),
        ("", ""),
        (None, "<|im_start|>system\nYou are small.<|im_end|>\n"),
    ):
        chat = load_chat(tmp_path, system=system)
        assert text_of(chat, chat.prompt("Hi")) == head + user
    (tmp_path / "chat_template.jinja").write_text(
        "{{ '<|im_start|>' + message }}"
    )  # this file wins; it has no system text
    chat = load_chat(tmp_path)
    assert text_of(chat, chat.prompt("Hi")) == user
    (tmp_path / "chat_template.jinja").write_text("{%- if enable_thinking is defined %}")
    chat = load_chat(tmp_path)
    assert text_of(chat, chat.prompt("Hi")) == user + "<think>\n\n</think>\n\n"


def test_default_system():
    assert default_system(JINJA) == "You are small."
    assert (
        default_system("{{- '<|im_start|>system\\nYou are Qwen. Be of help.<|im_end|>\\n' }}")
        == "You are Qwen. Be of help."
    )
    assert (
        default_system("{{ '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}")
        == ""
    )
    assert default_system("") == ""


def test_llama3(tmp_path):
    chat = load_chat(folder(tmp_path, LLAMA3, generation_config={"eos_token_id": [257, 260, 261]}))
    ids = chat.prompt("Hi")
    assert text_of(chat, ids) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert ids.count(256) == 1  # one begin-of-text, though the tokenizer would add its own
    assert chat.eos == (261, 257, 260)
    chat = load_chat(tmp_path, system="Be kind.")
    assert text_of(chat, chat.prompt("Hi")) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_own_template(tmp_path):
    folder(tmp_path, ["<s>", "</s>"], eos=257)
    chat = load_chat(tmp_path, "{system}User: {prompt}\nBot: ", system="Rules.\n")
    assert text_of(chat, chat.prompt("Hi")) == "Rules.\nUser: Hi\nBot: "
    chat = load_chat(tmp_path, "{system}User: {prompt}\nBot: ")
    assert text_of(chat, chat.prompt("Hi")) == "User: Hi\nBot: "
    assert chat.eos == (257,)
    chat = load_chat(tmp_path, r"User: {prompt}\nBot: ")  # as a shell passes it
    assert text_of(chat, chat.prompt("Hi")) == "User: Hi\nBot: "


@pytest.mark.parametrize(
    "eos, generation, want",
    [
        (256, None, (258, 256)),
        (258, None, (258,)),
        ([256, 258], None, (258, 256)),
        (None, None, (258,)),
        (256, {"eos_token_id": 7}, (258, 7)),
        (256, {"eos_token_id": [7, 258, 256]}, (258, 7, 256)),
        (256, {"bos_token_id": 0}, (258, 256)),
    ],
)
def test_eos_list(eos, generation, want, tmp_path):
    """generation_config.json before config.json, a number or a list; the end of a turn first and only once."""
    folder(
        tmp_path, CHATML, eos, **({} if generation is None else {"generation_config": generation})
    )
    assert load_chat(tmp_path).eos == want


def test_answer_and_decode(tmp_path):
    chat = load_chat(folder(tmp_path, CHATML, eos=256))
    ids = chat.answer("plan\n#### Näh, no.")
    assert ids[-1] == 258 == chat.eos[0] and ids.count(258) == 1 and 256 not in ids
    assert ids[:-1] == chat.encode("plan\n#### Näh, no.")
    assert chat.decode(ids) == "plan\n#### Näh, no."
    assert (
        chat.ended(ids) and chat.ended([1, 256]) and not chat.ended(ids[:-1]) and not chat.ended([])
    )


def test_errors(tmp_path):
    with pytest.raises(UserError, match="has no tokenizer.json"):
        load_chat(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot read .*tokenizer.json"):
        load_chat(tmp_path)
    folder(tmp_path, ["<s>", "</s>"])
    with pytest.raises(UserError, match="unknown chat format.*--chat-format"):
        load_chat(tmp_path)
    with pytest.raises(UserError, match="'vicuna': want auto, chatml, llama3, or a template"):
        load_chat(tmp_path, "vicuna")
    with pytest.raises(UserError, match="no eos_token_id"):
        load_chat(tmp_path, "User: {prompt}")
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match="cannot read .*generation_config.json"):
        load_chat(tmp_path, "User: {prompt}")
