"""chat.py on small byte-level tokenizers: the exact prompt text, the end-of-text ids, errors."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from config import UserError
from support.chat import default_system, load_chat

CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # 256, 257, 258
LLAMA3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
LLAMA3 += ["<|eom_id|>", "<|eot_id|>"]
JINJA = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are small.<|im_end|>\n' }}"
    "{% endif %}{{ message }}"
)
USER = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
HI = "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
HI += "<|start_header_id|>assistant<|end_header_id|>\n\n"


def folder(path, special, eos=None, **files):
    """A model folder: 256 byte tokens, then the special ones.

    The tokenizer puts the first special token before every text, as Llama's does.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    t = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    t.add_special_tokens(special)
    first = [(special[0], t.token_to_id(special[0]))]
    t.post_processor = processors.TemplateProcessing(f"{special[0]} $A", special_tokens=first)
    t.save(str(path / "tokenizer.json"))
    for name, content in {"config": {"eos_token_id": eos}, **files}.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def prompt_of(chat, text="Hi"):
    return chat.tokenizer.decode(chat.prompt(text), skip_special_tokens=False)


def test_chatml(tmp_path):
    chat = load_chat(folder(tmp_path, CHATML, eos=256, tokenizer_config={"chat_template": JINJA}))
    said = "Hello, {system} — 12\n ok?"
    system = "<|im_start|>system\nYou are small.<|im_end|>\n"
    assert prompt_of(chat, said) == system + USER.replace("Hi", said)
    marks = [i for i in chat.prompt(said) if i >= 256]
    assert marks == [257, 258, 257, 258, 257]  # single tokens, and nothing is put in front
    assert chat.eos == (258, 256)  # what ends a turn comes first


def test_chatml_system_texts(tmp_path):
    folder(tmp_path, CHATML, eos=258, tokenizer_config={"chat_template": JINJA})
    for system, turn in (
        ("Be kind.", "<|im_start|>system\nBe kind.<|im_end|>\n"),
        ("", ""),
        (None, "<|im_start|>system\nYou are small.<|im_end|>\n"),
    ):
        assert prompt_of(load_chat(tmp_path, "auto", system)) == turn + USER
    jinja = tmp_path / "chat_template.jinja"  # this file wins
    jinja.write_text("{{ '<|im_start|>' + message }}")  # and has no system text
    assert prompt_of(load_chat(tmp_path)) == USER
    jinja.write_text("{%- if enable_thinking is defined %}")
    assert prompt_of(load_chat(tmp_path)) == USER + "<think>\n\n</think>\n\n"


def test_default_system():
    qwen = "{{- '<|im_start|>system\\nYou are Qwen. Be of help.<|im_end|>\\n' }}"
    none = "{{ '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    assert default_system(JINJA) == "You are small."
    assert default_system(qwen) == "You are Qwen. Be of help."
    assert default_system(none) == default_system("") == ""


def test_llama3(tmp_path):
    chat = load_chat(folder(tmp_path, LLAMA3, generation_config={"eos_token_id": [257, 260, 261]}))
    assert prompt_of(chat) == "<|begin_of_text|>" + HI
    assert chat.prompt("Hi").count(256) == 1  # though the tokenizer would add its own
    assert chat.eos == (261, 257, 260)
    system = "<|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
    chat = load_chat(tmp_path, system="Be kind.")
    assert prompt_of(chat) == "<|begin_of_text|>" + system + HI


def test_own_template(tmp_path):
    folder(tmp_path, ["<s>", "</s>"], eos=257)
    own = "{system}User: {prompt}\nBot: "
    assert prompt_of(load_chat(tmp_path, own, "Rules.\n")) == "Rules.\nUser: Hi\nBot: "
    chat = load_chat(tmp_path, own)
    assert prompt_of(chat) == "User: Hi\nBot: " and chat.eos == (257,)
    chat = load_chat(tmp_path, r"User: {prompt}\nBot: ")  # as a shell passes it
    assert prompt_of(chat) == "User: Hi\nBot: "


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
    """generation_config.json before config.json, a number or a list; a turn's end first, once."""
    folder(tmp_path, CHATML, eos, **({"generation_config": generation} if generation else {}))
    assert load_chat(tmp_path).eos == want


def test_answer_and_decode(tmp_path):
    chat, text = load_chat(folder(tmp_path, CHATML, eos=256)), "plan\n#### Näh, no."
    ids = chat.answer(text)
    assert ids == [*chat.encode(text), 258] and not {256, 258} & set(ids[:-1])
    assert chat.decode(ids) == text
    assert chat.ended(ids) and chat.ended([1, 256])
    assert not chat.ended(ids[:-1]) and not chat.ended([])


def test_the_context(tmp_path):
    """A prompt and the longer of response and new tokens must fit, to the token."""
    chat = load_chat(folder(tmp_path, CHATML, config={"max_position_embeddings": 40}))
    n = len(chat.prompt("Hi"))
    row = {"prompt": "Hi", "response": "x" * (40 - n - 1)}  # and the end-of-text token
    chat.check([row, {"prompt": "Hi"}], 40 - n, "F")
    for rows, new in (([{"prompt": "Hi"}] * 2, 41 - n), ([{**row, "response": "x" * 40}], 1)):
        with pytest.raises(UserError, match=f"F, row 1: a prompt of {n} tokens.*context of 40"):
            chat.check(rows, new, "F")


def test_errors(tmp_path):
    def refused(words, *args):
        with pytest.raises(UserError, match=words):
            load_chat(tmp_path, *args)

    refused("tokenizer.json: No such file")
    (tmp_path / "tokenizer.json").write_text("{}")
    refused("cannot read .*tokenizer.json")
    folder(tmp_path, ["<s>", "</s>"])
    refused("chat format 'auto' is unknown: want --chat-format")
    refused("'vicuna' is unknown: want --chat-format chatml, llama3 or your own", "vicuna")
    refused(r"eos_token_id is \[\]", "User: {prompt}")
    for eos in ("2", True, [257, 258], -1):
        folder(tmp_path, ["<s>", "</s>"], config={"eos_token_id": eos, "vocab_size": 258})
        refused(r"eos_token_id is \[.*want one or more ids below 258", "{prompt}")
    folder(tmp_path, ["<s>", "</s>"], config={"vocab_size": 257})
    refused("ids go up to 257, config.json's vocab_size is 257", "{prompt}")
    (tmp_path / "generation_config.json").write_text("{")
    refused("cannot read .*generation_config.json", "{prompt}")
    for name in ("tokenizer.json", "chat_template.jinja", "config.json"):
        (tmp_path / "generation_config.json").unlink(missing_ok=True)
        folder(tmp_path, ["<s>", "</s>"], eos=257)
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).symlink_to("/etc/passwd")
        refused(f"'{name}' leads out of the folder", "{prompt}")
        (tmp_path / name).unlink()
