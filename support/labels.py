"""What the fields of other people's files are called, and what a row's labels say of its prompt.

A label that isn't understood is an error, and so is a column that may be one and says harmless.
"""

import contextlib
import functools
import re

from config import UserError
from data import CATEGORIES, HELPFUL
from support.files import parse_json

# Our field: the names that files have for it. The first with a value counts. Here and in NAMES
# case, spaces, _ and - make no difference.
FIELDS = {
    "prompt": "messages conversations conversation turns prompt prompts prompts_final user_prompt "
    "user_input forbidden_prompt goal behavior question instruction query text chosen",
    "context": "context_string",
    "response": "response completion output model_response generation generations reply",
    "label": "label prompt_label prompt_harm_label harm_label safety",
    "safe": "is_safe safe is_benign benign is_harmless harmless",  # these two may be yes or no
    "harmful": "is_harmful harmful is_unsafe unsafe is_toxic toxic toxicity is_malicious malicious",
    "category": "category semantic_category",
}
FIELDS |= {x: x for x in ("draft", "answer", "kind", "type")} | {"input": "input context"}
LABELS, TOPICS = ("kind", "label", "safe", "harmful"), ("category", "type")
YES, NO = "1 1.0 true t yes y".split(), "0 0.0 false f no n".split()

# Our category: the names that Safety-Prompts, StrongREJECT, HarmBench and others have for it.
# None: harmful, but not how. The look-alikes are XSTest's.
LOOKALIKE = "lookalike"
NAMES = {
    "insult": "insult harassment_bullying",
    "unfairness": "unfairness unfairness_and_discrimination hate_harassment_and_discrimination",
    "crime": "crime crimes_and_illegal_activities illegal_goods_and_services non_violent_crimes "
    "illegal cybercrime_intrusion",
    "physical_harm": "physical_harm violence chemical_biological",
    "mental_health": "mental_health",
    "privacy": "privacy privacy_and_property copyright",
    "ethics": "ethics ethics_and_morality ethics_morality disinformation_and_deception "
    "sexual_content misinformation_disinformation",
    HELPFUL: "helpful ordinary harmless benign safe unharmful not_harmful non_harmful non_toxic",
    LOOKALIKE: "lookalike homonyms figurative_language safe_targets safe_contexts definitions "
    "real_group_nons_discr nons_group_real_discr historical_events privacy_public "
    "privacy_fictional",
    None: "harmful unsafe not_safe toxic malicious contrast",
}


@functools.cache
def plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.lower())


ALIASES = {plain(name): ours for ours, names in NAMES.items() for name in names.split()}
OURS = {plain(name): ours for ours, names in FIELDS.items() for name in names.split()}
ASK = "a label? Call it is_safe, is_harmful, or remove it"
KNOWN = ", ".join((*CATEGORIES, HELPFUL, "ordinary", LOOKALIKE, "safe", "harmful"))
LABEL = re.compile(  # what may name a label ...
    r"label|safe|harm|toxic|benign|flag|jailbreak|attack|refus|danger|(?:^|[\W_])hate|offens|abus"
    r"|nsfw|viola|inject|malic|risk|blocked|allowed|appropriate|accepta|complian|innocuous|verdict"
    r"|(?:^|[\W_])class$|classif|expected[\W_]?behav|^(?:target|y|gold|ground[\W_]truth|decision)$"
    r"|illegal|unethical|forbidden|^is[\W_]bad$|^should[\W_](?:answer|comply|respond)$"
)
# ... but beside a column named like REPLIES one like REPLY is a label of the answer.
REPLIES = re.compile(r"(?:.*[a-z\d])?(?:response|completion|answer|reply|output)(?:s|text|\d)*")
REPLY = re.compile("respon|complet|answer|final|annot")
SCORE = re.compile(r"[-+~(\[]*\d.*|\.\d+")  # a number, whatever it means
PLAINLY = re.compile(r"(?:s?\d*[.:)-]\s*)?([^\d=%!{}\x80-\U0010ffff]*)")  # an index, words
NONE = re.compile(  # a label that finds nothing
    r"(?:no|not|non|low|minimal)(?:[\W_]+(?:risk|harm|hate|toxic|viola|offens|applic)\w*)?"
    r"(?:[\W_]+(?:found|detected|content))?|none|na|n\W?a|null|normal|neutral|regular|clean|ok|okay"
    r"|(?:allow|permitt?|pass|answer|respond|assist)(?:ed)?|(?:full_)?compl(?:y|iant|iance)|good"
    r"|sfw|acceptable|appropriate|innocuous|inoffensive|legitimate|negligible|very low|\W+"
)
DENIAL = re.compile(r"(?:no|not|non|does not|isn't)[\W_].{0,30}")  # in a label's column
HARMLESS = re.compile(  # in any column
    r"(?:(?!(?:not|non|un)[\W_])[a-z\d%]+[\W_]+){0,3}(?:should[\W_]+(?:respond|comply|answer)"
    r"|(?:benign|harmless)(?:[\W_]+(?:test|train|set|data|v?\d+|\w+s|prompt)){0,3}\W*"
    r"|(?:unharmful|safe)(?:[\W_]+(?:prompt|request|question|content|no|risk)s?){0,2}\W*)"
)


def says(ours: str, value) -> str | None:
    """What a field's value says of the prompt, a key of NAMES; "" if that isn't known."""
    text = str(value).strip().rstrip(".!").lower()
    if ours in ("safe", "harmful") and text in YES + NO:
        return HELPFUL if (text in YES) == (ours == "safe") else None
    words = PLAINLY.fullmatch(text) if isinstance(value, str) else None
    letters = re.sub("[^a-z]", "", words[1]) if words else ""
    contrast = ours == "type" and letters.startswith("contrast")  # XSTest's
    return ALIASES.get("contrast" if contrast else letters, "")


def leaves(name: str, value) -> list[tuple[str, object]]:
    """(name, value) of everything in a nested value, in one that is a text of JSON too."""
    if isinstance(value, str) and value[:1] in ("{", "["):
        with contextlib.suppress(ValueError):
            value = parse_json(value)
    if isinstance(value, dict) and value:
        return [leaf for k, x in value.items() for leaf in leaves(f"{name}.{k}", x)]
    if isinstance(value, list) and value:
        return [leaf for x in value for leaf in leaves(name, x)]
    return [(name, value)]


def meanings_of(record: dict, fields: dict, strict: bool, replied: bool) -> dict[str, str | None]:
    """{our field: what it says}. With `strict` a topic must be known, unless a label is.

    replied: the record has a response, which a label may be about.
    """
    out, kind = {}, says("type", fields.get("type", ("", ""))[1])  # XSTest's, of the prompt
    for ours in (ours for ours in LABELS + TOPICS if ours in fields):
        name, value = fields[ours]
        found, text = says(ours, value), str(value).strip(" .!").lower()
        unclear = strict or NONE.fullmatch(text) or HARMLESS.fullmatch(text)
        either = ours in ("safe", "harmful") or plain(name) in ("label", "harmlabel", "safety")
        if found == HELPFUL and either and replied and kind == "":
            raise UserError(f"{name} {value!r}: of the response? Call the prompt's prompt_label")
        if found != "":
            out[ours] = found
        elif ours in LABELS or unclear and not out:
            why = f"{name} {value!r:.99}; known: {KNOWN}; for 0 and 1 is_safe or is_harmful"
            raise UserError(why)
    others = [leaf for k, x in record.items() if plain(k) not in OURS for leaf in leaves(k, x)]
    if replied or any(REPLIES.fullmatch(plain(k)) and not LABEL.search(k.lower()) for k in record):
        others = [(name, x) for name, x in others if not REPLY.search(plain(name))]
    models = [plain(k).removesuffix("response") for k in record if plain(k).endswith("response")]
    models = tuple(filter(None, models))  # GPT4_harmful speaks of GPT4_response
    others = [(name, x) for name, x in others if not plain(name).startswith(models)]
    topic = out.keys() <= {*TOPICS} and {*out.values()} <= {*CATEGORIES}  # and no label
    for name, value in others if topic else ():
        label, text = LABEL.search(name.lower()), str(value).strip(" .!").lower()
        found = says("harmful" if label else "label", value)
        doubt = found is None or any(x.fullmatch(text) for x in (SCORE, NONE, DENIAL))
        if (label and doubt) or found == HELPFUL or HARMLESS.fullmatch(text):
            raise UserError(f"{name} {value!r:.99}: {ASK}")
    every = [(x, k, v) for x in out for k, v in record.items() if OURS.get(plain(k)) == x]
    labels = [x for x in others if LABEL.search(x[0].lower()) and not REPLY.search(plain(x[0]))]
    every += [("label", *x) for x in labels if says("label", x[1]) not in CATEGORIES]
    found = {f"{name} {value!r}": says(ours, value) for ours, name, value in every}
    sides = {x in (HELPFUL, LOOKALIKE): text for text, x in found.items() if x != ""}
    if len(sides) > 1:
        raise UserError(" contradicts ".join(sides.values()))
    return out
