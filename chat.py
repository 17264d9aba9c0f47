"""Text to tokens and back: the tokenizer of a model folder and its chat format, by hand instead of by a template language."""

import re
from pathlib import Path

from tokenizers import Tokenizer

from data import UserError
from files import inside, number, read_json, read_text

# {system} and {prompt} are filled in; the model continues after the last character.
SYSTEM_TURN = {
    "chatml": "<|im_start|>system\n{system}<|im_end|>\n",
    "llama3": "<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>",
}
FORMATS = {
    "chatml": SYSTEM_TURN["chatml"]
    + "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<|begin_of_text|>"
    + SYSTEM_TURN["llama3"]
    + "<|start_header_id|>user<|end_header_id|>\n\n{prompt}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
}


class Chat:
    """The tokenizer of a model folder with its chat format and its end-of-text ids."""

    def __init__(
        self, tokenizer: Tokenizer, template: str, eos: tuple[int, ...], context: int = 10**9
    ):
        self.tokenizer, self.template, self.eos, self.context = tokenizer, template, eos, context

    def prompt(self, text: str) -> list[int]:
        """Token ids of one user turn, ready for the model to answer."""
        return self.encode(self.template.replace("{prompt}", text))

    def answer(self, text: str) -> list[int]:
        """Token ids of a whole answer, its end-of-text token included: it is sampled, so it must be learnt."""
        return self.encode(text) + [self.eos[0]]

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(
            [i for i in ids if i not in self.eos], skip_special_tokens=True
        )

    def check(self, rows: list[dict], new: int, where: str | Path) -> None:
        """Raises UserError for a row that is too long: its prompt with `new` sampled tokens or with its response exceeds the model's context."""
        for n, row in enumerate(rows, 1):
            prompt, answer = (
                len(self.prompt(row["prompt"])),
                max(new, len(self.answer(row.get("response", "")))),
            )
            if not 0 < prompt <= self.context - answer:
                raise UserError(
                    f"{where}, row {n}: a prompt of {prompt} tokens and an answer of {answer} don't fit the model's context of {self.context} (max_position_embeddings): "
                    f"shorten the row or lower --max-new-tokens: {row['prompt'][:40]!r}"
                )

    def ended(self, ids: list[int]) -> bool:
        return bool(ids) and ids[-1] in self.eos


def default_system(template: str) -> str:
    """The system text that a chat template writes when none is given, if it spells one out (SmolLM2 and Qwen2 do)."""
    found = re.search(r"<\|im_start\|>system(?:\n|\\n)([^'{}|]+?)<\|im_end\|>", template)
    return found.group(1) if found else ""


def load_tokenizer(folder: Path, vocabulary: int) -> Tokenizer:
    """tokenizer.json of a folder whose embedding has `vocabulary` rows; it neither pads nor truncates."""
    path = inside(folder, "tokenizer.json")
    if not path.exists():
        raise UserError(f"{folder} has no tokenizer.json")
    text = read_text(path)
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as e:  # the library raises nothing more precise
        raise UserError(f"cannot read {path}: {e}") from e
    last = max(tokenizer.get_vocab().values(), default=-1)
    if not 0 <= last < vocabulary:
        raise UserError(
            f"{path}: ids go up to {last}, but the embedding has {vocabulary} rows (config.json: vocab_size); take the tokenizer that belongs to the model"
        )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def load_chat(folder: str | Path, chat_format: str = "auto", system: str | None = None) -> Chat:
    """Reads tokenizer.json, the chat format and the eos list of a folder.

    chat_format: auto (from the special tokens), chatml, llama3, or a template of your own with {prompt} in it and
    optionally {system}. system: None takes the model's own default system text; "" sends no system turn.
    """
    folder = Path(folder)
    files = {
        name: inside(folder, name)
        for name in (
            "config.json",
            "tokenizer_config.json",
            "generation_config.json",
            "chat_template.jinja",
        )
    }
    config, its, generation = (
        read_json(path) if path.exists() else {} for path in list(files.values())[:3]
    )
    tokenizer = load_tokenizer(
        folder, rows := number(config, "vocab_size", folder / "config.json", 1, 10**7, 10**7)
    )
    jinja = (
        read_text(files["chat_template.jinja"])
        if files["chat_template.jinja"].exists()
        else its.get("chat_template") or ""
    )
    if chat_format == "auto":
        known = [
            name
            for name, mark in (("chatml", "<|im_start|>"), ("llama3", "<|start_header_id|>"))
            if tokenizer.token_to_id(mark) is not None
        ]
        if not known:
            raise UserError(
                f"{folder}: unknown chat format (neither ChatML's nor Llama 3's special tokens); pass your own, "
                "for example --chat-format 'User: {prompt}\\nAssistant: '"
            )
        chat_format = known[0]
    template = FORMATS.get(
        chat_format, chat_format.replace("\\n", "\n")
    )  # a shell's quotes pass \n as two characters
    if "{prompt}" not in template:
        raise UserError(
            f"chat format {chat_format!r}: want auto, {', '.join(FORMATS)}, or a template with {{prompt}} in it"
        )
    if system and "{system}" not in template:
        raise UserError(
            f"--system has no place in the chat format {chat_format!r}: put {{system}} into it, or leave --system out"
        )
    if system is None:
        system = default_system(str(jinja))
    if not system:
        template = template.replace(SYSTEM_TURN.get(chat_format, "{system}"), "")
    template = template.replace("{system}", system)
    if (
        "enable_thinking" in str(jinja) and chat_format in FORMATS
    ):  # Qwen3: an empty thought, so that it answers at once
        template += "<think>\n\n</think>\n\n"
    eos = (
        config.get("eos_token_id")
        if generation.get("eos_token_id") is None
        else generation["eos_token_id"]
    )
    eos = eos if isinstance(eos, list) else [eos] if eos is not None else []
    if not all(type(i) is int and 0 <= i < rows for i in eos):
        raise UserError(
            f"{folder}: eos_token_id is {eos}: want ids below {rows} (generation_config.json or config.json)"
        )
    turn_end = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}.get(chat_format)
    if (
        turn_end and (i := tokenizer.token_to_id(turn_end)) is not None
    ):  # the one that ends a turn comes first: it is trained on
        eos = [i] + [e for e in eos if e != i]
    if not eos:
        raise UserError(f"{folder}: no eos_token_id in generation_config.json or config.json")
    return Chat(
        tokenizer,
        template,
        tuple(eos),
        number(config, "max_position_embeddings", folder / "config.json", 1, 10**9, 10**9),
    )
