"""A folder's own chat template, rendered as transformers does it.

It is code by strangers. Jinja's sandbox keeps it from Python's insides, and a process of its own
bounds its time and memory. That process reads lines of JSON, [template, variables], and answers
each with [text, what went wrong].
"""

import functools
import importlib.metadata
import json
import os
import re
import resource
import signal
import subprocess
import sys
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path

from config import UserError

SECONDS, MEMORY = 2, 2**29  # most of a processor's time for one text, of the process's bytes
OUTPUT = 2**20  # most bytes of a text beyond those of the request
# {% generation %} marks what is learnt of an answer: here it is a block like any other
GENERATION = r"(\{%[-+]?\s*(?:end)?)generation(\s*[-+]?%\})"


def installed() -> bool:
    """Whether there is a jinja2 without the known holes of its sandbox: 3.1.6 or newer."""
    version = importlib.metadata.version("jinja2") if find_spec("jinja2") else "0"
    return [int(n) for n in re.findall("[0-9]+", version)] >= [3, 1, 6]


@functools.cache
def renderer() -> subprocess.Popen:
    """The process that renders. A terminal's Ctrl-C doesn't reach it; it ends when we end."""
    command = [sys.executable, "-m", "support.template"]
    root, pipe = Path(__file__).resolve().parent.parent, subprocess.PIPE
    plain = {**os.environ, "GLIBC_TUNABLES": ""}  # train.sh's would use up the memory
    how = dict(cwd=root, env=plain, start_new_session=True, text=True)
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, **how)


def render(template: str, variables: dict, where: str | Path) -> str:
    """What a template makes of its variables. UserError if it fails or takes too much."""
    process = renderer()
    try:
        process.stdin.write(json.dumps([template, variables]) + "\n")
        process.stdin.flush()
        text, fault = json.loads(process.stdout.readline())
    except (BrokenPipeError, ValueError):  # it was ended; the next text gets a new one
        process.kill()
        process.communicate()
        renderer.cache_clear()
        fault = f"it takes more than {SECONDS} s or {MEMORY >> 20} MB"
    if fault:
        raise UserError(f"{where}: the chat template fails: {fault}: mend it or use --chat-format")
    return text


def main() -> None:
    """Jinja as transformers sets it up; all texts see one date."""
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(x, ensure_ascii=False, **how):
        return json.dumps(x, ensure_ascii=ensure_ascii, **how)

    loops, now = ["jinja2.ext.loopcontrols"], datetime.now()
    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=loops)
    jinja.filters["tojson"] = tojson
    jinja.globals |= {"raise_exception": raise_exception, "strftime_now": now.strftime}
    compiled = functools.lru_cache(jinja.from_string)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # its signal ends the process
        try:
            template, variables = json.loads(line)
            template = re.sub(GENERATION, r"\1with\2", template)
            text, fault = compiled(template).render(variables), ""
            if (size := len(text.encode())) > OUTPUT + len(line):
                raise ValueError(f"it writes {size} bytes")
        except Exception as e:  # whatever a stranger's program raises
            text, fault = "", " ".join(f"{type(e).__name__} {e}".split())[:300]
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps([text, fault]), flush=True)


if __name__ == "__main__":
    main()
