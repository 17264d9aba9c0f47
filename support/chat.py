"""Text to tokens and back: the tokenizer of a model folder and its chat format."""

import re
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from config import UserError
from support.files import inside, number, read_json, read_text

FORMATS = {  # what begins a text; the head of a turn, with its role; its end
    "chatml": ("", "<|im_start|>{}\n", "<|im_end|>\n"),
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>"),
}


@dataclass
class Chat:
    """A tokenizer with a chat format, the ids that end a text, and the model's context."""

    tokenizer: Tokenizer
    template: str  # {prompt} is filled in
    eos: tuple[int, ...]  # the one that ends an answer first
    context: int = 10**9  # most tokens of a sequence

    def prompt(self, text: str) -> list[int]:
        """Token ids of one user turn, ready for the model to answer."""
        return self.encode(self.template.replace("{prompt}", text))

    def answer(self, text: str) -> list[int]:
        """Token ids of an answer and the end-of-text token, which has to be learnt too."""
        return self.encode(text) + [self.eos[0]]

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        kept = [i for i in ids if i not in self.eos]
        return self.tokenizer.decode(kept, skip_special_tokens=True)

    def ended(self, ids: list[int]) -> bool:
        return bool(ids) and ids[-1] in self.eos

    def check(self, rows: list[dict], new: int, where: str | Path) -> None:
        """Raises UserError for a row that, with `new` sampled tokens, exceeds the context."""
        for n, row in enumerate(rows, 1):
            prompt = len(self.prompt(row["prompt"]))
            answer = max(new, len(self.answer(row.get("response", ""))))
            if not 0 < prompt <= self.context - answer:
                sizes = f"a prompt of {prompt} tokens and {answer} more don't fit"
                how = f"the context of {self.context}: shorten it or lower --max-new-tokens"
                raise UserError(f"{where}, row {n}: {sizes} {how}")


def default_system(template: str) -> str:
    """The system text that a chat template spells out (SmolLM2's and Qwen2's do)."""
    found = re.search(r"<\|im_start\|>system(?:\n|\\n)([^'{}|]+?)<\|im_end\|>", template)
    return found.group(1) if found else ""


def load_tokenizer(folder: Path, vocabulary: int) -> Tokenizer:
    """tokenizer.json, of ids below `vocabulary`; it neither pads nor truncates."""
    text = read_text(path := inside(folder, "tokenizer.json"))
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as e:  # the library raises nothing more precise
        raise UserError(f"cannot read {path}: {e}") from e
    last = max(tokenizer.get_vocab().values(), default=-1)
    if not 0 <= last < vocabulary:
        raise UserError(f"{path}: ids go up to {last}, config.json's vocab_size is {vocabulary}")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def load_chat(folder: str | Path, chat_format: str = "auto", system: str | None = None) -> Chat:
    """The tokenizer, chat format and end-of-text ids of a folder.

    chat_format: auto (by the special tokens), chatml, llama3, or a template with {prompt} and maybe
    {system} in it. system: None takes the model's own default; "" sends no system turn.
    """
    folder = Path(folder)
    names = ("config.json", "tokenizer_config.json", "generation_config.json")
    paths = [inside(folder, name) for name in names]
    config, its, generation = (read_json(path) if path.exists() else {} for path in paths)
    vocabulary = number(config, "vocab_size", paths[0], 1, 10**7, 10**7)
    context = number(config, "max_position_embeddings", paths[0], 1, 10**9, 10**9)
    tokenizer = load_tokenizer(folder, vocabulary)
    path = inside(folder, "chat_template.jinja")
    jinja = read_text(path) if path.exists() else str(its.get("chat_template") or "")
    system = default_system(jinja) if system is None else system
    known = {name: tokenizer.token_to_id(end.strip()) for name, (_, _, end) in FORMATS.items()}
    if chat_format == "auto":
        chat_format = next((name for name, end in known.items() if end is not None), "auto")
    if chat_format in FORMATS:
        begin, head, end = FORMATS[chat_format]
        template = begin + (head.format("system") + system + end if system else "")
        template += head.format("user") + "{prompt}" + end + head.format("assistant")
        if "enable_thinking" in jinja:  # Qwen3: after an empty thought it answers at once
            template += "<think>\n\n</think>\n\n"
    elif "{prompt}" in chat_format:  # a shell's quotes pass \n as two characters
        template = chat_format.replace("\\n", "\n").replace("{system}", system)
    else:
        want = "want --chat-format chatml, llama3 or your own, 'User: {prompt}\\nAssistant: '"
        raise UserError(f"{folder}: chat format {chat_format!r} is unknown: {want}")
    found = [x["eos_token_id"] for x in (generation, config) if x.get("eos_token_id") is not None]
    eos = found[0] if found and isinstance(found[0], list) else found[:1]
    if (end := known.get(chat_format)) is not None:  # what ends a turn comes first: it is learnt
        eos = [end] + [i for i in eos if i != end]
    if not eos or not all(type(i) is int and 0 <= i < vocabulary for i in eos):
        raise UserError(f"{folder}: eos_token_id is {eos}: want one or more ids below {vocabulary}")
    return Chat(tokenizer, template, tuple(eos), context)
