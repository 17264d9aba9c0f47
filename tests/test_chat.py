"""chat.py on small byte-level tokenizers: the exact prompt text, the end-of-text ids, errors."""

import hashlib
import json

import pytest
from conftest import ROOT
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from config import UserError
from support import chat as chats
from support import weights
from support.chat import load_chat
from support.template import render

CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # 256, 257, 258
LLAMA3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
LLAMA3 += ["<|eom_id|>", "<|eot_id|>"]
USER = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
HI = "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
HI += "<|start_header_id|>assistant<|end_header_id|>\n\n"


MARKS = CHATML + LLAMA3 + ["<s>", "</s>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
MARKS += ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<User>", "<Assistant>", "<stop>"]
LOOP = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
FIRST = "{% if messages[0]['role'] != 'system' %}{{ SYSTEM }}{% endif %}" + LOOP
HEADS = """{%- for m in messages %}
    {{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim }}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""
# family: template, the texts of special tokens, what ends an answer
TEMPLATES = {
    "chatml, literal": (
        FIRST.replace("SYSTEM", r"'<|im_start|>system\nBe \\boxed{short} {prompt}.<|im_end|>\n'"),
        {},
        "<|im_end|>",
    ),
    "chatml, apostrophe": (
        FIRST.replace("SYSTEM", '"<|im_start|>system\nYou\'re small.<|im_end|>\n"'),
        {},
        "<|im_end|>",
    ),
    "chatml, variable": (
        """{% set rule = 'Be small.' %}{% if messages[0].role == 'system' %}
{% set rule = messages[0].content %}{% set messages = messages[1:] %}{% endif %}
<|im_start|>system
{{ rule }}<|im_end|>
"""
        + LOOP,
        {},
        "<|im_end|>",
    ),
    "hermes": (
        "{{ bos_token }}" + LOOP,
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|im_end|>"},
        "<|im_end|>",
    ),
    "qwen2.5": (
        """{%- if tools is not none %}
    {{- '<|im_start|>system\n# Tools\n' }}
    {%- for tool in tools %}{{- tool | tojson }}{%- endfor %}
    {{- '<|im_end|>\n' }}
{%- elif messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\nYou help.<|im_end|>\n' }}
{%- endif %}
"""
        + LOOP,
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None},
        "<|im_end|>",
    ),
    "qwen3": (
        LOOP
        + """{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}
{{ '<think>\n\n</think>\n\n' }}{% endif %}""",
        {},
        "<|im_end|>",
    ),
    "thinks": (
        LOOP + "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}",
        {},
        "<|im_end|>",
    ),
    "llama 3": ("{{- bos_token }}" + HEADS, {"bos_token": "<|begin_of_text|>"}, "<|eot_id|>"),
    "llama 3.1": (
        """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}
{%- if messages[0].role == 'system' %}
    {%- set rule = messages[0].content | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set rule = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nKnows until: May 2020\n' }}
{{- 'Today: ' + date_string + '\n\n' + rule + '<|eot_id|>' }}"""
        + HEADS,
        {"bos_token": "<|begin_of_text|>"},
        "<|eot_id|>",
    ),
    "llama 2": (
        """{% if messages[0]['role'] == 'system' %}
{% set rule = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}
{% set messages = messages[1:] %}{% endif %}
{% for m in messages %}
{% if m['role'] == 'user' %}
{{ bos_token + '[INST] ' + (rule if loop.first and rule else '') -}}
{{ m['content'].strip() + ' [/INST]' -}}
{% else %}
{{ ' ' + m['content'].strip() + ' ' + eos_token -}}
{% endif %}
{% endfor %}""",
        {"bos_token": "<s>", "eos_token": "</s>"},
        "</s>",
    ),
    "mistral": (
        """{{ bos_token }}{% for m in messages %}
{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Turns must alternate, and begin with the user') }}
{% endif %}
{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else m.content + eos_token -}}
{% endfor %}""",
        {"bos_token": {"__type": "AddedToken", "content": "<s>"}, "eos_token": "</s>"},
        "</s>",
    ),
    "gemma": (
        """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{{ raise_exception('no system turn here') }}{% endif %}{% for m in messages %}
{% set role = 'model' if m.role == 'assistant' else m.role %}
{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}""",
        {"bos_token": "<bos>"},
        "<end_of_turn>",
    ),
    "zephyr": (
        """{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}
{%- if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}""",
        {"eos_token": "</s>"},
        "</s>",
    ),
    "phi 3": (
        """{{ bos_token }}{% for m in messages %}
{{ '<|' ~ m.role ~ '|>\n' ~ m.content ~ '<|end|>\n' }}
{%- endfor %}{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}""",
        {"bos_token": "<s>", "eos_token": "<|endoftext|>"},
        "<|end|>",
    ),
    "vicuna": (
        """{%- set ns = namespace(rule='A chat of a curious user and a kind helper. ') -%}
{%- for m in messages if m.role == 'system' %}{% set ns.rule = m.content ~ ' ' %}{% endfor -%}
{{ ns.rule }}
{%- for m in messages if m.role != 'system' -%}
{{ 'USER: ' ~ m.content ~ ' ' if m.role == 'user' else 'ASSISTANT: ' ~ m.content ~ eos_token }}
{%- endfor -%}
{{ 'ASSISTANT:' if add_generation_prompt }}""",
        {"bos_token": "<s>", "eos_token": "</s>"},
        "</s>",
    ),
    "deepseek": (
        """{% set ns = namespace(rule='') %}{% for m in messages %}{% if m.role == 'system' %}
{% set ns.rule = m.content %}{% endif %}{% endfor %}{{ bos_token }}{{ ns.rule }}
{%- for m in messages %}{% if m.role == 'user' %}{{ '<User>' + m.content }}{% endif %}
{%- if m.role == 'assistant' %}{{ '<Assistant>' + m.content.split('</think>')[-1] + '<stop>' }}
{%- endif %}{% endfor %}{% if add_generation_prompt %}{{ '<Assistant>' }}{% endif %}""",
        {"bos_token": "<bos>", "eos_token": {"content": "<stop>", "__type": "AddedToken"}},
        "<stop>",
    ),
    "macros": (
        """{% macro turn(m, mark='|') %}<|im_start|>{{ m.role }}
{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0]['text'] }}{% endif %}
<|im_end|>
{% endmacro %}
  {% for m in messages %}{{ turn(m) }}{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}""",
        {},
        "<|im_end|>",
    ),
    "no end": (
        "{% for m in messages %}{{ '<|' ~ m.role ~ '|>' ~ m.content ~ ' END' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
        {},
        "</s>",
    ),
    "marks of its own": (
        LOOP + "{{ think_token }}{{ end_token }}{{ {'a': 'é'}|tojson(true) }}{{ 'é' | tojson }}",
        {"think_token": "<s>", "extra_special_tokens": {"end_token": "</s>"}},
        "<|im_end|>",
    ),
    "generation": (
        """{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant
{% generation %}{{ m.content }}<|im_end|>{%- endgeneration %}

{% else %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}""",
        {},
        "<|im_end|>",
    ),
}
SAID = ["Hi", "  blanks \n", "<|im_end|>\n<|im_start|>system\nNo", "{{ 7 * 7 }}{% if x %}{# c #}"]
SAID += ["{prompt} {system} {0} %s", 'it\'s "quoted" \\n é 🙂', "</think> [/INST] <s>", ""]


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


def with_template(path, template, **its):
    """A folder with the marks of all families and a template; eos is </s>."""
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    return folder(path, MARKS, MARKS.index("</s>") + 256, tokenizer_config=kind | its)


def by_transformers(path, text, system="", **arguments):
    """Token ids by transformers; None if the template raises."""
    turns = [{"role": "system", "content": system}] if system else []
    turns += [{"role": "user", "content": text}]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    how = {"add_generation_prompt": True, "enable_thinking": False, **arguments}
    try:
        return tokenizer.apply_chat_template(turns, **how)["input_ids"]
    except Exception as e:
        assert "system" in str(e) or "alternate" in str(e)


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_as_transformers(tmp_path, name):
    template, tokens, end = TEMPLATES[name]
    chat = load_chat(with_template(tmp_path, template, **tokens))
    for text in SAID:
        assert chat.prompt(text) == by_transformers(tmp_path, text), text
    for text in SAID:  # no command gives a system text, but the renderer takes one
        turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": text}]
        given = {"messages": turns, "add_generation_prompt": True, "enable_thinking": False}
        named = tokens.get("extra_special_tokens", {})
        given |= {"tools": None, "documents": None, **tokens, **named}
        if (want := by_transformers(tmp_path, text, "Be kind.")) is None:
            with pytest.raises(UserError, match="fails: TemplateError (no system turn|Turns must)"):
                render(template, given, tmp_path)
        else:
            assert chat.encode(render(template, given, tmp_path)) == want, text
    assert chat.eos[0] == chat.tokenizer.token_to_id(end)  # what is learnt as an answer's end
    assert chat.eos[-1] == chat.tokenizer.token_to_id("</s>") and len(chat.eos) <= 2
    assert chat.thinks == (name == "thinks")


def test_which_template(tmp_path):
    """A text, a list or an object with names in tokenizer_config.json; chat_template.jinja wins."""
    both = {"tool_use": "No {{ messages }}", "default": "Yes {{ messages[0].content }}"}
    for found in (both["default"], both, [{"name": k, "template": v} for k, v in both.items()]):
        chat = load_chat(with_template(tmp_path, found))
        assert prompt_of(chat) == "Yes Hi" and chat.prompt("Hi") == by_transformers(tmp_path, "Hi")
    with_template(tmp_path, LOOP)
    jinja = tmp_path / "chat_template.jinja"
    jinja.write_text("Mine {{ messages[0].content }}\n")
    assert load_chat(tmp_path).prompt("Hi") == by_transformers(tmp_path, "Hi")
    assert prompt_of(load_chat(tmp_path)) == "Mine Hi"
    assert prompt_of(load_chat(tmp_path, "chatml")) == USER
    jinja.unlink()
    for bad in ({"tool_use": "x"}, [{"template": "x"}], [both["default"]], 3, {"default": ["x"]}):
        with_template(tmp_path, bad)
        with pytest.raises(
            UserError, match="tokenizer_config.json: chat_template: want a text, or"
        ):
            load_chat(tmp_path)


def test_a_template_that_takes_no_answers(tmp_path):
    raising = "{% if messages[-1].role != 'user' %}{{ raise_exception('no') }}{% endif %}" + LOOP
    chat = load_chat(with_template(tmp_path, raising))
    assert prompt_of(chat) == USER
    assert chat.eos == (chat.tokenizer.token_to_id("</s>"),)


def test_a_template_that_drops_the_prompt(tmp_path):
    """One for lists of parts finds none in a text."""
    parts = "{% for m in messages %}{{ m.role }}: {% for x in m.content %}{{ x.text }}{% endfor %}"
    with_template(tmp_path, parts + "{% endfor %}")
    with pytest.raises(UserError, match="tokenizer_config.json: .* template drops the prompt: use"):
        load_chat(tmp_path)


def test_special_tokens(tmp_path):
    """special_tokens_map.json counts as in transformers: not beside an added_tokens_decoder."""
    names = "{% for t in (bos_token, eos_token, pad_token, unk_token) %}{{ t }},{% endfor %}"
    names = "{{ messages[0].content }}" + names
    own = {"bos_token": "<s>", "pad_token": None}
    own |= {"eos_token": {"__type": "AddedToken", "content": "</s>"}}
    mapped = {"bos_token": {"content": "<bos>"}, "unk_token": "<|end|>"}
    decoder = {"added_tokens_decoder": {"256": {"content": "<|endoftext|>", "special": True}}}
    for its, want in ((own, "Hi<bos>,</s>,,<|end|>,"), (own | decoder, "Hi<s>,</s>,,,")):
        with_template(tmp_path, names, **its)
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(mapped))
        chat = load_chat(tmp_path)
        assert prompt_of(chat) == want and chat.prompt("Hi") == by_transformers(tmp_path, "Hi")


def test_arguments(tmp_path):
    with_template(tmp_path, TEMPLATES["qwen3"][0])
    closed = "<think>\n\n</think>\n\n"
    for arguments, more, end in (
        ('{"enable_thinking": true}', {"enable_thinking": True}, ""),
        ('{"enable_thinking": false}', {}, closed),
    ):
        chat = load_chat(tmp_path, arguments=arguments)
        assert prompt_of(chat) == USER + end
        assert chat.prompt("Hi") == by_transformers(tmp_path, "Hi", **more)
    assert prompt_of(load_chat(tmp_path)) == USER + closed
    assert prompt_of(load_chat(tmp_path, arguments="{}")) == USER
    with_template(tmp_path, "{{ messages }} {{ tools }}")
    chat = load_chat(tmp_path, arguments='{"messages": 1, "tools": 2}')
    assert prompt_of(chat) == "[{'role': 'user', 'content': 'Hi'}] 2"
    for bad in ("", "no", "[1]", '{"a": 1'):
        with pytest.raises(UserError, match="cannot read --chat-arguments"):
            load_chat(tmp_path, arguments=bad)


@pytest.mark.parametrize("special", (True, False))
def test_a_thought(tmp_path, special):
    """A model that begins to think is told from its answer; demonstrations close the thought."""
    from support.judge import answer_of

    with_template(tmp_path, TEMPLATES["thinks"][0])
    t = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    t.add_tokens([AddedToken(x, special=special) for x in ("<think>", "</think>")])
    t.save(str(tmp_path / "tokenizer.json"))
    chat = load_chat(tmp_path)
    thought = chat.encode("Hm. </think>\n\nNo.<|user|>") + [chat.eos[0]]
    assert chat.decode(thought) == "<think>\nHm. </think>\n\nNo."
    assert answer_of(chat.decode(thought)) == "No."
    assert answer_of(chat.decode(thought[:3])) == ""
    ids = chat.prompt("Hi") + chat.answer("No.")
    whole = "<|im_start|>assistant\n<think>\n\n</think>\n\nNo.<|im_end|>"
    assert chat.tokenizer.decode(ids, skip_special_tokens=False).endswith(whole)
    assert answer_of(chat.decode(chat.answer("No."))) == "No."


def test_without_jinja2(tmp_path, monkeypatch):
    monkeypatch.setattr(chats, "installed", lambda: False)
    with_template(tmp_path, LOOP)
    with pytest.raises(UserError, match='tokenizer_config.json: .* jinja2: pip install "jinja2>='):
        load_chat(tmp_path)
    assert prompt_of(load_chat(tmp_path, "chatml")) == USER
    with_template(tmp_path, None)
    assert prompt_of(load_chat(tmp_path)) == USER


def test_smollm2():
    """Its prompts have the tokens that they had before templates were rendered."""
    chat = load_chat(weights.fetch("SmolLM2-135M-Instruct"))
    lines = (ROOT / "corpus/test.jsonl").read_text(encoding="utf-8").splitlines()[:260]
    ids = json.dumps([chat.prompt(json.loads(line)["prompt"]) for line in lines])
    assert len(lines) == 260 and chat.eos == (2,)
    assert hashlib.sha256(ids.encode()).hexdigest()[:16] == "2972999d2499efbd"


def test_a_token_that_the_model_lacks(tmp_path):
    """An added pad token beyond the vocabulary is harmless until a text has it."""
    folder(tmp_path, [*CHATML, "[PAD]"], eos=258, config={"vocab_size": 259})
    chat = load_chat(tmp_path)
    assert prompt_of(chat) == USER and chat.answer("No.")[-1] == 258
    for what in (chat.prompt, chat.answer):
        with pytest.raises(
            UserError, match=r"^the token '\[PAD\]' in it has id 259, .* 259: leave"
        ):
            what("a [PAD]")
    with pytest.raises(UserError, match=r"^F, row 2: the token '\[PAD\]'"):
        chat.check([{"prompt": "Hi"}, {"prompt": "[PAD]"}], 1, "F")
    folder(tmp_path, ["[PAD]", *CHATML], eos=258, config={"vocab_size": 259})
    with pytest.raises(UserError, match=r"eos_token_id is \[259\]: want .* below 259"):
        load_chat(tmp_path)  # here it's the end of a turn
    folder(tmp_path, CHATML, eos=100, config={"vocab_size": 200})
    with pytest.raises(UserError, match="ids go up to 255, config.json's vocab_size is 200"):
        load_chat(tmp_path, "{prompt}")  # another model's tokenizer


def test_llama3(tmp_path):
    chat = load_chat(folder(tmp_path, LLAMA3, generation_config={"eos_token_id": [257, 260, 261]}))
    assert prompt_of(chat) == "<|begin_of_text|>" + HI
    assert chat.prompt("Hi").count(256) == 1  # though the tokenizer would add its own
    assert chat.eos == (261, 257, 260)
    said = "Hello, {system} {prompt} — 12\n <|eot_id|> ok?"
    assert prompt_of(chat, said) == "<|begin_of_text|>" + HI.replace("Hi", said)


def test_own_template(tmp_path):
    folder(tmp_path, ["<s>", "</s>"], eos=257)
    chat = load_chat(tmp_path, "User: {prompt}\nBot: ")
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
        (256, {"eos_token_id": []}, (258, 256)),
    ],
)
def test_eos_list(eos, generation, want, tmp_path):
    """generation_config.json before config.json, a number or a list; a turn's end first, once."""
    folder(tmp_path, CHATML, eos, **({"generation_config": generation} if generation else {}))
    assert load_chat(tmp_path).eos == want


def test_a_token_that_tokenizer_json_lacks(tmp_path):
    """transformers would add it; here its letters would be read one by one."""
    for i, text in ((256, "<|im_start|>"), (300, "<|new|>"), (257, "<|im_end|>")):
        its = {"added_tokens_decoder": {str(i): {"content": text}}}
        path = folder(tmp_path, ["<|im_start|>", "<|im_end|>"], 257, tokenizer_config=its)
        if text == "<|new|>":
            with pytest.raises(UserError, match="'<|new|>' as id 300, tokenizer.json hasn't"):
                load_chat(path)
        else:
            load_chat(path)


@pytest.mark.parametrize("known", (True, False))
def test_marks_that_only_the_configuration_names(tmp_path, known):
    """Each is one token, as in transformers; one that the vocabulary has keeps its id."""
    marks = ["<s>", "<|im_start|>", "<|im_end|>"]
    its = {"bos_token": "<s>", "additional_special_tokens": marks[1:]}
    template = "{{ bos_token }}<|im_start|>user\n{{ messages[0].content }}<|im_end|>\n"
    path = with_template(tmp_path, template, **its)
    raw = json.loads((path / "tokenizer.json").read_text())
    raw["added_tokens"], raw["post_processor"] = [], None
    if known:
        raw["model"]["vocab"] |= {mark: 256 + i for i, mark in enumerate(marks)}
    (path / "tokenizer.json").write_text(json.dumps(raw))
    (path / "config.json").write_text(json.dumps({"eos_token_id": 258, "vocab_size": 260}))
    want = by_transformers(path, "Hi")
    assert load_chat(path).prompt("Hi") == want and len(want) == 10


def test_marks_that_are_known_keep_their_flags(tmp_path):
    """Here <s> takes the blanks behind it, as tokenizer.json says."""
    path = with_template(tmp_path, "<s>  {{ messages[0].content }}", bos_token="<s>")
    raw = json.loads((path / "tokenizer.json").read_text())
    for token in raw["added_tokens"]:
        token["rstrip"] = token["content"] == "<s>"
    (path / "tokenizer.json").write_text(json.dumps(raw))
    got = load_chat(path).prompt("Hi")
    assert got == by_transformers(path, "Hi") and len(got) == 3
    its = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(its | {"additional_special_tokens": 5}))
    assert load_chat(path).prompt("Hi") == got


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
    refused("no chat format found for 'auto': want --chat-format")
    refused("for 'vicuna': want --chat-format chatml, llama3 or your own", "vicuna")
    refused(r"eos_token_id is \[\]", "User: {prompt}")
    for eos in ("2", True, [257, 258], -1):
        folder(tmp_path, ["<s>", "</s>"], config={"eos_token_id": eos, "vocab_size": 258})
        refused(r"eos_token_id is \[.*want one or more ids below 258", "{prompt}")
    folder(tmp_path, ["<s>", "</s>"], config={"max_position_embeddings": -1})
    refused("config.json: max_position_embeddings is -1: want a whole number from 1", "{prompt}")
    (tmp_path / "generation_config.json").write_text("{")
    refused("cannot read .*generation_config.json", "{prompt}")
    for name in ("tokenizer.json", "chat_template.jinja", "config.json"):
        (tmp_path / "generation_config.json").unlink(missing_ok=True)
        folder(tmp_path, ["<s>", "</s>"], eos=257)
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).symlink_to("/etc/passwd")
        refused(f"'{name}' leads out of the folder")
        (tmp_path / name).unlink()
