"""Every setting with its default and help, and the recipes.

The defaults follow the paper's public notes; what these don't give (harmless prompts, steps) is
ours. A recipe is a list of departures, each with its reason, in recipes.json: `drirl.py recipes`.
"""

import json
import re
from dataclasses import Field, dataclass, field, fields, replace
from operator import attrgetter
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
SHIPPED = {"pool": CORPUS / "pool.jsonl", "benign": CORPUS / "benign.jsonl"}
SHIPPED["prompts"] = CORPUS / "test.jsonl"


class UserError(ValueError):
    """Something the user gave is wrong; the command line prints the message as one line."""


def setting(default, text: str, low=None, high=10**6, choices: str = ""):
    """A field with its help. Numbers go from low (by default 1, or just above 0) to high."""
    low = (1e-12 if type(default) is float else 1) if low is None else low
    rules = {"low": low, "high": high, "choices": choices.split()}
    return field(default=default, metadata={"help": text, **rules})


@dataclass(frozen=True)
class RunConfig:
    """The run."""

    recipe: str = setting("", "departures from the paper: laptop laptop-few tiny gpu; empty: none")
    run: str = setting("runs/default", "folder of the run")
    model: str = setting("", "model folder to align; empty: SmolLM2-135M-Instruct")
    encoder: str = setting("", "BERT or CLIP folder; empty: all-MiniLM-L6-v2; words: no weights")
    pool: str = setting("", "harmful prompts with refusals; empty: corpus/pool.jsonl")
    benign: str = setting("", "harmless demonstrations; empty: corpus/benign.jsonl")
    prompts: str = setting("", "held-out prompts to evaluate on; empty: corpus/test.jsonl")
    eval_prompts: int = setting(0, "how many of them, evenly of each kind; 0: all", low=0)
    rival: bool = setting(False, "also train more by SFT, for as long as irl and grpo took")
    per_category: int = setting(
        72, "demonstrations of each harm category, and at most 7 times as many harmless", low=2
    )
    generate: bool = setting(False, "data: the model writes the demonstrations a category lacks")
    max_new_tokens: int = setting(128, "tokens of a response (data --generate true: 96)")
    temperature: float = setting(1.0, "of samples in irl and grpo (--generate true: 0.7)", low=0.01)
    chat_format: str = setting("auto", "auto: the folder's; chatml, llama3; a text with {prompt}")
    chat_arguments: str = setting('{"enable_thinking": false}', "JSON for the chat template")
    device: str = setting("cpu", "cpu or cuda")
    dtype: str = setting("auto", "auto: bf16 where it is faster", choices="auto fp32 bf16")
    seed: int = setting(0, "of balancing, sampling and batches", low=0, high=2**31)
    resume: bool = setting(True, "go on with what was interrupted; false: anew")


@dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning."""

    steps: int = setting(200, "optimizer steps")
    blocks: int = setting(0, "top blocks trained; 0: the whole model", low=0)
    lr: float = setting(2e-5, "learning rate; 5% warm-up, and linear to zero")
    batch: int = setting(16, "demonstrations a step")
    helpful_share: float = setting(0.5, "share of harmless demonstrations", low=0, high=1)


@dataclass(frozen=True)
class IRLConfig:
    """Reward models by inverse reinforcement learning."""

    prompts: int = setting(72, "prompts to sample for in each harm category; harmless: x 4", low=2)
    samples: int = setting(4, "K, samples per prompt")
    contrast: int = setting(0, "opposite (harmless, harmful) demonstrations beside samples", low=0)
    estimator: str = setting(
        "importance", "of the expected reward's gradient", choices="importance linear logistic"
    )
    joint_epochs: int = setting(0, "first passes: the harm categories share a model", low=0)
    epochs: int = setting(2, "passes in which each category's model learns alone", low=0)
    lr: float = setting(1e-5, "learning rate of the blocks; the head's is ten times that")
    beta: float = setting(1.0, "weight of the KL penalty that makes pi_r ~ pi_ref exp(r / beta)")
    reward_blocks: int = setting(0, "top blocks each reward model owns; 0: all", low=0)
    integration: str = setting(
        "categorized", "linear: the models' mean; one: one model", choices="categorized linear one"
    )


@dataclass(frozen=True)
class GRPOConfig:
    """GRPO-S."""

    rollouts: int = setting(100, "times that fresh samples are drawn")
    prompts: int = setting(64, "P, prompts of a rollout, half of them harmless")
    samples: int = setting(8, "G, samples per prompt, which are compared", low=2)
    passes: int = setting(1, "passes over a rollout, from the same weights; then averaged")
    batch: int = setting(0, "prompts of an update, dividing P: weights are averaged; 0: P", low=0)
    members: str = setting("all", "samples learnt from; ends: best and worst", choices="all ends")
    anchor: int = setting(0, "demonstrations in each update, with advantage 1", low=0)
    blocks: int = setting(0, "top blocks trained; 0: the whole model", low=0)
    lr: float = setting(1e-6, "learning rate; 5% warm-up, and linear to zero")
    extrapolate: float = setting(0.0, "ExPO: weights go this share of their way further", low=0)
    clip: float = setting(0.2, "bad samples: no gradient once pi / pi_old is below 1 - clip")
    clip_high: float = setting(0.2, "good samples: no gradient above 1 + this; 0: as in SFT", low=0)
    beta_kl: float = setting(0.04, "weight of the KL penalty to the warm start", low=0)
    open_prompts: bool = setting(False, "draw prompts without demonstration, where there are 8")
    scaling: str = setting(
        "product", "alpha; spread: the product ** 8", choices="none data model product sum spread"
    )
    std_eps: float = setting(1e-4, "eps beside a group's reward std", low=0)
    tokens_per_batch: int = setting(4096, "tokens of a forward pass: memory alone depends on it")
    shard: bool = setting(False, "under torchrun: FSDP2, each process keeps part of the policy")

    @property
    def updates(self) -> int:  # of a pass
        return self.prompts // (self.batch or self.prompts)


@dataclass(frozen=True)
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    irl: IRLConfig = field(default_factory=IRLConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)


RECIPES = {}  # {name: {key: [value, why]}}, with the departures of the recipe it is based on
for _name, _own in json.loads((CORPUS.parent / "recipes.json").read_text()).items():
    RECIPES[_name] = {**RECIPES.get(_own.pop("based on", None), {}), **_own}


def settings() -> list[tuple[str, Field, str]]:
    """(key, field, flag) of every setting: "sft.lr" has the flag --sft-lr, "run.seed" --seed."""
    found = {f"{part.name}.{f.name}": f for part in fields(Config) for f in fields(part.type)}
    return [(k, f, "--" + re.sub("[._]", "-", k.removeprefix("run."))) for k, f in found.items()]


def changed(c: Config, values: dict) -> Config:
    """The settings with {key: value} in them. An unknown key is a UserError."""
    known = {key for key, *_ in settings()}
    for key, value in values.items():
        if key not in known:
            raise UserError(f"unknown setting {key}")
        section, name = key.split(".")
        part = replace(getattr(c, section), **{name: value})
        c = replace(c, **{section: part})
    return c


def with_recipe(name: str, c: Config = Config()) -> Config:
    """The settings c with a recipe's departures in them; the name "" has none."""
    if name and name not in RECIPES:
        raise UserError(f"--recipe {name}: want one of {', '.join(RECIPES)}")
    departures = {key: value for key, (value, _) in RECIPES.get(name, {}).items()}
    return changed(c, {**departures, "run.recipe": name})


def check(c: Config, name=lambda key, flag: flag) -> None:
    """Raises UserError for a value that would only fail minutes later. name: what to call it."""
    kinds = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    for key, f, flag in settings():
        value, rule, what = attrgetter(key)(c), f.metadata, name(key, flag)
        allowed = (int, float) if f.type is float else (f.type,)
        if type(value) not in allowed or (f.type is str and re.search("[\0\ud800-\udfff]", value)):
            raise UserError(f"{what} {value!r}: want {kinds[f.type]}")
        if rule["choices"] and value not in rule["choices"]:
            raise UserError(f"{what} {value}: want one of {', '.join(rule['choices'])}")
        if f.type in (int, float) and not rule["low"] <= value <= rule["high"]:
            raise UserError(f"{what} {value}: want {rule['low']} to {rule['high']}")
    if c.irl.joint_epochs + c.irl.epochs == 0:
        raise UserError("--irl-joint-epochs 0 and --irl-epochs 0 leave the rewards unfitted")
    if (c.grpo.passes > 1 or c.grpo.extrapolate) and c.grpo.updates < 2:
        what = "--grpo-passes above 1, or --grpo-extrapolate,"
        raise UserError(f"{what} wants --grpo-batch below --grpo-prompts")
    if c.grpo.batch and c.grpo.prompts % c.grpo.batch:
        raise UserError(f"--grpo-batch {c.grpo.batch}: want a divisor of --grpo-prompts")
