"""template.py: a stranger's template ends in a text or in one line, within bounds."""

import random
import time

import pytest

from config import UserError
from support import template
from support.template import render

HI = {"messages": [{"role": "user", "content": "hi"}]}
DOUBLE = (
    "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
)
# template: words of the message
BAD = {
    "{{ ''.__class__.__mro__ }}": "SecurityError .*'__class__'",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}": "SecurityError .*'__init__'",
    "{{ messages.append(1) }}": "SecurityError .*'append'",
    "{{ messages[0].update(x=1) }}": "SecurityError .*'update'",
    "{% include '/etc/passwd' %}": "no loader",
    "{% for i in range(10**9) %}{% endfor %}": "Range too big",
    "{{ 'x' * 10**9 }}": "MemoryError",
    "{% set n = 10**9 %}{{ messages[0].content * n }}": "MemoryError",
    "{{ 'x' | center(10**9) }}": "MemoryError",
    "{{ 'a\nb' | indent(10**9) }}": "MemoryError",
    "{{ '%999999999d' % 1 }}": "MemoryError",
    "{{ '{:>999999999}'.format(1) }}": "MemoryError",
    "{{ 'x'.ljust(10**9) }}": "MemoryError",
    "{{ range(99999) | join('y' * 99999) }}": "MemoryError",
    "{{ ([1] * 99999) * 10**5 }}": "MemoryError",
    DOUBLE + "{{ n.x }}": "MemoryError",
    "{{ 'x' * (2**20 + 500) }}": "it writes 1049076 bytes",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}": "RecursionError",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}": "RecursionError",
    "{{ raise_exception('only users, please') }}": "TemplateError only users, please",
    "{% if %}": "TemplateSyntaxError",
    "{% for m in messages %}": "TemplateSyntaxError",
    "{{ nothing.more }}": "'nothing' is undefined",
    "{{ nothing() }}": "'nothing' is undefined",
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{{ '\\ud800' }}": "UnicodeEncodeError",
    "{{ raise_exception('two\nlines ' + 'x' * 9999) }}": "TemplateError two lines x{200,300}: mend",
}
ENDLESS = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% set n = messages | length + 8 %}{{ n ** (n ** n) }}",
    "{{ [1] | slice(10**9) | list }}",
)


@pytest.mark.parametrize("text", BAD)
def test_one_line(text):
    with pytest.raises(UserError, match=f"^F: the chat template fails: .*{BAD[text]}") as e:
        render(text, HI, "F")
    assert "\n" not in str(e.value) and len(str(e.value)) < 400


@pytest.mark.parametrize("text", ENDLESS)
def test_endless(text):
    """The process is ended, and the next text gets a new one."""
    begun, old = time.time(), template.renderer()
    with pytest.raises(UserError, match="^F: .*: it takes more than 2 s or 512 MB: mend"):
        render(text, HI, "F")
    assert time.time() - begun < 30 and old.returncode < 0  # 2 s of a processor: more where shared
    assert render("{{ messages[0].content }}", HI, "F") == "hi"
    assert template.renderer() is not old


def test_what_is_harmless():
    for text, want in (
        ("{{ ''.__class__ }}{{ ''|attr('__class__') }}{{ '{0.__class__}'.format(1) }}{{ no }}", ""),
        ("{{ {'a': '<é>'} | tojson }}", '{"a": "<é>"}'),
        ("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "012"),
        ("{{ 'x' * 10**6 }}", "x" * 10**6),
        ("{% set a = 1 %}{% generation %}{% set a = 2 %}{{ a }}{% endgeneration %}{{ a }}", "21"),
    ):
        assert render(text, HI, "F") == want


def test_only_a_sound_jinja2_counts(monkeypatch):
    for version, sound in (("3.1.6", True), ("3.1.10", True), ("4.0.0rc1", True), ("3.1.5", False)):
        monkeypatch.setattr(template.importlib.metadata, "version", lambda name: version)
        assert template.installed() == sound
    monkeypatch.setitem(template.sys.modules, "jinja2", None)
    assert not template.installed()


def mutated(text: str, draw: random.Random) -> str:
    """Once or twice a piece is deleted, doubled, moved, or replaced by one of Jinja's."""
    for _ in range(draw.randint(1, 2)):
        a, size, to = draw.randrange(len(text)), draw.randint(1, 9), draw.randrange(len(text))
        piece, rest = text[a : a + size], text[:a] + text[a + size :]
        odd = draw.choice(("{%", "%}", "{{", "}}", "'", "\\", "**", "*9", "|", "(", "]", "~m"))
        moved = rest[:to] + piece + rest[to:]
        text = draw.choice((rest, text[:to] + piece + text[to:], moved, text[:a] + odd + text[a:]))
    return text


def test_mutated_templates():
    from test_chat import TEMPLATES

    draw, known, texts = random.Random(0), [t for t, *_ in TEMPLATES.values()], 0
    given = {**HI, "add_generation_prompt": True, "bos_token": "<s>", "eos_token": "</s>"}
    for _ in range(2000):
        try:
            texts += type(render(mutated(draw.choice(known), draw), given, "F")) is str
        except UserError as e:
            assert str(e).startswith("F: the chat template fails: ") and "\n" not in str(e)
    assert 400 < texts < 1600
