"""Text to tokens and back: the tokenizer of a model folder and its chat format."""

import functools
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from config import RunConfig, UserError
from support.files import doing, inside, number, parse_json, read_json, read_text
from support.template import installed, render

CHATML = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
LLAMA3 = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{prompt}<|eot_id|>"
LLAMA3 += "<|start_header_id|>assistant<|end_header_id|>\n\n"
FORMATS = {"chatml": (CHATML, "<|im_end|>"), "llama3": (LLAMA3, "<|eot_id|>")}  # text, its end


@dataclass
class Chat:
    """A tokenizer with a chat format, the ids that end a text, and the model's context."""

    tokenizer: Tokenizer
    write: Callable[[str], str]  # the text of a prompt, from the user's
    thinks: bool  # a prompt ends with <think>, so that a thought comes before the answer
    eos: tuple[int, ...]  # the one that ends an answer first
    vocabulary: int  # ids that the model has
    context: int  # most tokens of a sequence

    def prompt(self, text: str) -> list[int]:
        """Token ids of one user turn, ready for the model to answer."""
        return self.encode(self.write(text))

    def answer(self, text: str) -> list[int]:
        """Token ids of an answer and the end-of-text token, which has to be learnt too."""
        return self.encode("\n</think>\n\n" * self.thinks + text) + [self.eos[0]]

    def encode(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        if (last := max(ids, default=0)) >= self.vocabulary:
            token = f"the token {self.tokenizer.id_to_token(last)!r} in it has id {last}"
            raise UserError(f"{token}, config.json's vocab_size is {self.vocabulary}: leave it out")
        return ids

    @functools.cached_property
    def hidden(self) -> set[int]:
        """Ids that no reader sees: special tokens, but for the marks of a thought."""
        added = self.tokenizer.get_added_tokens_decoder().items()
        special = {i for i, t in added if t.special and t.content not in ("<think>", "</think>")}
        return special | set(self.eos)

    def decode(self, ids: list[int]) -> str:
        kept = [i for i in ids if i not in self.hidden]
        return "<think>\n" * self.thinks + self.tokenizer.decode(kept, skip_special_tokens=False)

    def ended(self, ids: list[int]) -> bool:
        return bool(ids) and ids[-1] in self.eos

    def check(self, rows: list[dict], new: int, where: str | Path) -> None:
        """UserError for a row that the model can't take, or not with `new` sampled tokens."""
        for n, row in enumerate(rows, 1):
            try:
                prompt = len(self.prompt(row["prompt"]))
                answer = max(new, len(self.answer(row.get("response", ""))))
                if not 0 < prompt <= self.context - answer:
                    sizes = f"a prompt of {prompt} tokens and {answer} more don't fit"
                    how = f"the context of {self.context}: shorten it or lower --max-new-tokens"
                    raise UserError(f"{sizes} {how}")
            except UserError as e:
                raise UserError(f"{where}, row {n}: {e}") from None


def load_tokenizer(folder: Path, vocabulary: int, spare: bool = False) -> Tokenizer:
    """tokenizer.json, of ids below `vocabulary`, but (spare) for added tokens."""
    text = read_text(path := inside(folder, "tokenizer.json"))
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as e:  # the library raises nothing more precise
        raise UserError(f"cannot read {path}: {e}") from e
    last = max(tokenizer.get_vocab(with_added_tokens=not spare).values(), default=-1)
    if not 0 <= last < vocabulary:
        raise UserError(f"{path}: ids go up to {last}, config.json's vocab_size is {vocabulary}")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def find_template(folder: Path, its: dict) -> tuple[Path, str]:
    """The file and the text of a folder's chat template, as transformers finds it; "": none."""
    path = inside(folder, "chat_template.jinja")
    if path.exists():
        return path, read_text(path)
    path, found = folder / "tokenizer_config.json", its.get("chat_template") or ""
    if type(found) is list and all(type(x) is dict for x in found):
        found = {str(x.get("name")): x.get("template") for x in found}
    found = found.get("default") if type(found) is dict else found
    if type(found) is not str:
        raise UserError(f"{path}: chat_template: want a text, or several with one named default")
    return path, found


def own_format(path: Path, template: str, its: dict, arguments: str) -> Callable:
    """write(prompt) by a folder's own template; write(prompt, answer) is the whole dialogue."""
    mapped = inside(path.parent, "special_tokens_map.json")
    if "added_tokens_decoder" not in its and mapped.exists():  # transformers' rule
        its = its | read_json(mapped)
    named = its.get("extra_special_tokens")
    its = its | named if type(named) is dict else its
    texts = {k: x.get("content") if type(x) is dict else x for k, x in its.items()}
    texts = {k: x for k, x in texts.items() if k.endswith("_token") and type(x) is str}
    with doing(f"read --chat-arguments {arguments}"):
        if type(more := parse_json(arguments)) is not dict:
            raise ValueError('want a JSON object, as {"enable_thinking": true}')
    given = {"tools": None, "documents": None} | {k: x for k, x in texts.items() if x} | more

    def write(prompt: str, *answer: str) -> str:
        turns = [{"role": "user", "content": prompt}]
        turns += [{"role": "assistant", "content": text} for text in answer]
        turns = {"messages": turns, "add_generation_prompt": not answer}
        return render(template, given | turns, path)

    return write


def known_format(folder: Path, name: str) -> tuple[Callable, str]:
    """What writes a prompt in one of FORMATS, or in a text with {prompt}; what ends an answer."""
    own = name.replace("\\n", "\n")  # a shell's quotes pass \n as two characters
    text, end = FORMATS.get(name, (own, ""))
    if "{prompt}" not in text:
        want = "want --chat-format chatml, llama3 or your own, 'User: {prompt}\\nAssistant: '"
        raise UserError(f"{folder}: no chat format found for {name!r}: {want}")
    return lambda prompt: text.replace("{prompt}", prompt), end


def auto_format(folder: Path, its: dict, tokenizer: Tokenizer, arguments: str):
    """As known_format: by the folder's own template; without one, by the special tokens."""
    path, template = find_template(folder, its)
    if not template:
        known = [name for name, (_, end) in FORMATS.items() if end in tokenizer.get_vocab()]
        return known_format(folder, (known or ["auto"])[0])
    if not installed():
        want = 'pip install "jinja2>=3.1.6", or name the format by --chat-format'
        raise UserError(f"{path}: reading its chat template needs the package jinja2: {want}")
    write, end = own_format(path, template, its, arguments), ""
    if write("Hi") == write("Ho"):
        raise UserError(f"{path}: the chat template drops the prompt: use --chat-format")
    with suppress(UserError):  # it need not take answers
        end = write("Hi", "Certainly.").partition("Certainly.")[2]
    return write, end


def load_chat(folder, chat_format="auto", arguments=RunConfig.chat_arguments) -> Chat:
    """The tokenizer, chat format and end-of-text ids of a folder.

    chat_format: auto (the folder's own template; without one, by the special tokens), chatml,
    llama3, or a text with {prompt} in it. arguments: JSON, what the folder's template is given.
    """
    folder = Path(folder)
    names = ("config.json", "generation_config.json", "tokenizer_config.json")
    paths = [inside(folder, name) for name in names]
    config, generation, its = (read_json(path) if path.exists() else {} for path in paths)
    vocabulary = number(config, "vocab_size", paths[0], 1, 10**7, 10**7)
    context = number(config, "max_position_embeddings", paths[0], 1, 10**9, 10**9)
    tokenizer = load_tokenizer(folder, vocabulary, spare=True)  # as a padding token often is
    added = its.get("added_tokens_decoder")
    for i, token in added.items() if type(added) is dict else ():
        text = token.get("content") if type(token) is dict else token
        if str(tokenizer.token_to_id(str(text))) != i:
            what = f"added_tokens_decoder has {text!r} as id {i}, tokenizer.json hasn't"
            raise UserError(f"{paths[2]}: {what}: save the tokenizer anew with transformers")
    marks = [its.get(f"{x}_token") for x in "bos eos unk sep pad cls mask".split()]  # in this order
    more, known = its.get("additional_special_tokens"), tokenizer.get_added_tokens_decoder()
    marks += more if type(more) is list else []
    marks = [x.get("content") if type(x) is dict else x for x in marks]
    known = {"", *(token.content for token in known.values())}  # these keep their flags
    tokenizer.add_special_tokens([x for x in marks if type(x) is str and x not in known])
    if chat_format == "auto":
        write, end = auto_format(folder, its, tokenizer, arguments)
    else:
        write, end = known_format(folder, chat_format)
    ids = generation.get("eos_token_id"), config.get("eos_token_id")
    found = [x for x in ids if x not in (None, [])]
    eos = found[0] if found and isinstance(found[0], list) else found[:1]
    first = tokenizer.encode(end.strip(), add_special_tokens=False).ids[:1]
    if first and first[0] in tokenizer.get_added_tokens_decoder():  # what ends a turn is learnt
        eos = first + [i for i in eos if i != first[0]]
    if not eos or not all(type(i) is int and 0 <= i < vocabulary for i in eos):
        raise UserError(f"{folder}: eos_token_id is {eos}: want one or more ids below {vocabulary}")
    thinks = write("Hi").rstrip().endswith("<think>")
    return Chat(tokenizer, write, thinks, tuple(eos), vocabulary, context)
