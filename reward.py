"""Stage 2: maximum-likelihood inverse RL. From demonstrations alone, one shadow reward model per harm category.

The likelihood of the demonstrations under pi_theta(y|x) = pi_ref(y|x) exp(r(x,y;theta)/beta) / Z(x), the best response to r
under a KL penalty, has the maximum-entropy gradient (Li et al. 2024, arXiv 2405.17888)

    grad l = (1/beta) E_(x,y)~D [ grad r(x,y) - E_y~~pi_theta(.|x) grad r(x,y~) ]:

up with the demonstration's reward, down with what the model would say instead. How irl_loss estimates the second term is its
`estimator`. Decisions where the paper is silent:
1. A shadow model is the top `reward_blocks` blocks of the warm start, copied and trained, and a linear head whose values are
   averaged over the response's tokens: reading the last token alone learned more slowly, and invites tricks with the
   end of text. The blocks below are shared and frozen.
2. An eighth model, helpful, learns from harmless prompts. To every prompt's samples we add `contrast` demonstrations of the other
   kind: answers to harmless prompts for a harmful one, refusals for a harmless one. The policy's samples differ from the
   demonstrations mostly in fluency; these differ in the decision, which is what the reward should see (results/attempts.md).
   The sum over samples is then no longer an estimate under pi_theta: it is softmax regression of the demonstration against all of
   them. `contrast` 0 with `samples` 4 or more gives the estimate back (with one sample alone, its weight is 1: `linear`).
3. r has a free constant, and between categories a free scale: after fitting, each model's rewards of the samples it was
   fitted on (by default some ten a category) are brought to mean 0 and standard deviation 1.
4. The seven begin as one: for `joint_epochs` the harm categories train one model, of which each then takes a copy and goes on
   alone. A dozen prompts a category are too few to learn from scratch what a refusal is.
5. pi_ref is the warm start at the sampling temperature.
6. A penalty `l2` on r^2 keeps the rewards finite: demonstrations and samples are separable, so the likelihood alone would
   send their gap to infinity.
"""

import copy
import functools
import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from batch import Batch
from chat import Chat
from data import CATEGORIES, HELPFUL, UserError
from files import fitting, read_tensors, write
from judge import judge
from loop import Loop
from model import generate, run_blocks
from transformer import Transformer

ESTIMATORS = ("importance", "linear", "logistic")
INTEGRATIONS = ("categorized", "linear")


@dataclass(frozen=True)
class IRLConfig:
    """Reward models by inverse reinforcement learning."""

    prompts: int = 11  # prompts per harm category that samples are drawn for
    helpful_prompts: int = 44  # harmless prompts likewise
    samples: int = 1  # K, samples per prompt
    contrast: int = 2  # demonstrations of the other kind that join each prompt's samples; 0: the paper's samples alone
    estimator: str = "importance"  # importance (samples of pi_ref, weighted) | linear | logistic
    rounds: int = 1  # more than 1: alternate with `policy_steps` GRPO rollouts against the current rewards (Li et al.)
    policy_steps: int = 2  # GRPO rollouts between two rounds; the policy is thrown away afterwards
    joint_epochs: int = (
        1  # first passes over the prompts, in which the seven harm categories share one model
    )
    epochs: int = (
        1  # further passes, in which each category's model, a copy of it, goes its own way
    )
    lr: float = 3e-4  # of the blocks; the head's is ten times that
    beta: float = 1.0  # temperature of the reward: KL weight of the inner problem
    l2: float = 0.01  # weight of the mean squared reward
    batch: int = 6  # prompts a step
    reward_models: int = (
        8  # 8: one per category and a helpful one (the paper's 7RW) | 1: a single one for all (1RW)
    )
    reward_blocks: int = (
        4  # top blocks each model owns; 0: all, which is separate models as in the paper
    )
    integration: str = "categorized"  # categorized: a prompt is scored by its own category's model | linear: a harmful one by the mean of the seven


def irl_loss(
    r_demo: Tensor,
    r_samples: Tensor,
    beta: float = 1.0,
    estimator: str = "importance",
    log_ratio: Tensor | float = 0.0,
) -> Tensor:
    """A loss whose gradient estimates minus the maximum-entropy gradient above, mean over prompts.

    r_demo (P,): rewards of the demonstrations; r_samples (P, K): of sampled responses.
    importance: samples come from some q; pi_theta's expectation weighs them by softmax_k(r_k/beta + log_ratio_k) with
        log_ratio = log pi_ref - log q (0 when sampled from pi_ref, as by fit). Exact as K grows, or when all responses are listed once
        and log_ratio = log pi_ref.  loss = -r_demo/beta + logsumexp_k(r_k/beta + log_ratio_k), whose gradient is that.
    linear: samples come from a policy already improved against r: plain mean.  loss = (mean_k r_k - r_demo) / beta
    logistic: bounded below.  loss = -mean_k log sigma((r_demo - r_k) / beta)
    """
    if r_demo.ndim != 1 or r_samples.ndim != 2 or len(r_demo) != len(r_samples):
        raise ValueError(
            f"want r_demo (P,) and r_samples (P, K), got {tuple(r_demo.shape)} and {tuple(r_samples.shape)}"
        )
    if estimator == "importance":
        return (torch.logsumexp(r_samples / beta + log_ratio, dim=1) - r_demo / beta).mean()
    if estimator == "linear":
        return (r_samples.mean(1) - r_demo).mean() / beta
    if estimator == "logistic":
        return -F.logsigmoid((r_demo[:, None] - r_samples) / beta).mean()
    raise ValueError(f"estimator {estimator!r}: want one of {', '.join(ESTIMATORS)}")


class Shadow(nn.Module):
    """One shadow reward model: copies of the trunk's top blocks and last norm, and a linear head."""

    def __init__(self, trunk: Transformer, blocks: int):
        super().__init__()
        top = trunk.layers[trunk.c.layers - blocks :] if blocks else []
        self.layers, self.norm = (
            nn.ModuleList(copy.deepcopy(b) for b in top).float(),
            copy.deepcopy(trunk.norm).float(),
        )
        self.value = nn.Linear(trunk.c.hidden_size, 1)
        nn.init.zeros_(self.value.weight)  # every reward starts at 0
        nn.init.zeros_(self.value.bias)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))
        self.rope = trunk.rope
        self.requires_grad_(True)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """x (N, D) below this model's blocks -> rewards (B,), float32, in standard deviations of the fitted samples."""
        x = run_blocks(self, batch, x)
        value = self.value(self.norm(x[batch.first :]))[:, 0].float()  # of every completion token
        total = value.new_zeros(batch.mask.shape).masked_scatter(batch.mask, value).sum(1)
        return (total / batch.mask.sum(1) - self.mean) / self.std


class RewardModels(nn.Module):
    """The shadow models of all categories over one frozen trunk (the reference policy)."""

    def __init__(self, trunk: Transformer, c: IRLConfig):
        super().__init__()
        self.names = [*CATEGORIES, HELPFUL] if c.reward_models > 1 else ["all"]
        blocks = c.reward_blocks or trunk.c.layers
        self.below, self.integration = trunk.c.layers - min(blocks, trunk.c.layers), c.integration
        self.trunk = [trunk]  # in a list: shared, so neither saved nor trained here
        self.shadows = nn.ModuleDict(
            {name: Shadow(trunk, trunk.c.layers - self.below) for name in self.names}
        ).to(trunk.device)

    def name(self, category: str) -> str:
        return category if category in self.shadows else "all"

    def hidden(self, batch: Batch, x: Tensor | None = None, start: int = 0) -> Tensor:
        """The frozen trunk: (N, D) below the models' own blocks."""
        with torch.no_grad():
            return run_blocks(self.trunk[0], batch, x, start, self.below)

    def forward(self, x: Tensor, batch: Batch, categories: list[str]) -> Tensor:
        """Rewards (B,) of a batch's completions, from hidden() states; categories: one per prompt. The two integrations are SRMIR's (v1)."""
        if self.integration == "linear" or len(self.names) == 1:
            helpful = torch.tensor([c == HELPFUL for c in categories], device=x.device)[batch.owner]
            *harm, last = (s(x, batch) for s in self.shadows.values())
            return torch.where(helpful, last, torch.stack(harm).mean(0)) if harm else last
        out = x.new_zeros(len(batch.owner), dtype=torch.float32)
        for category in sorted(
            set(categories)
        ):  # categorized: each prompt runs through its own model only
            rows = [b for b, p in enumerate(batch.owner.tolist()) if categories[p] == category]
            part, tokens = batch.select(rows)
            out[rows] = self.shadows[category](x[tokens], part)
        return out

    def save(self, folder: Path, beside: dict[str, str] | None = None) -> None:
        """One set (files.write): the models, and files of text that belong to them."""
        states = {
            name: {k: v.contiguous() for k, v in shadow.state_dict().items()}
            for name, shadow in self.shadows.items()
        }
        texts = {folder / name: text for name, text in (beside or {}).items()}
        write(
            {
                **texts,
                **{
                    folder / f"{name}.safetensors": functools.partial(save_file, state)
                    for name, state in states.items()
                },
            }
        )

    def load(self, folder: Path) -> "RewardModels":
        for name, shadow in self.shadows.items():
            path = folder / f"{name}.safetensors"
            if not path.exists():
                raise UserError(
                    f"no reward model {path}; run the irl stage first, with the same --reward-models"
                )
            shadow.load_state_dict(
                fitting(
                    shadow.state_dict(),
                    read_tensors(path),
                    f"{path}, of another --model or --reward-blocks (run irl again)",
                )
            )
        return self.requires_grad_(False)


def optimizer_of(models: RewardModels, c: IRLConfig):
    """AdamW; the heads, which start at zero, learn ten times faster than the blocks."""
    parts = [
        [p for name, p in models.named_parameters() if (".value." in name) == head]
        for head in (False, True)
    ]
    optimizer = torch.optim.AdamW(
        [{"params": parts[0], "lr": c.lr}, {"params": parts[1], "lr": 10 * c.lr}],
        weight_decay=0.0,
        fused=True,
    )
    for group in optimizer.param_groups:
        group["peak"] = group["lr"]
    return optimizer


def opposites(row: dict, rows: list[dict], n: int, rng: random.Random) -> list[dict]:
    """n random demonstrations of the other kind: of harmless prompts for a harmful row, of harmful ones for a harmless row."""
    return rng.sample(
        [r for r in rows if (r["category"] == HELPFUL) != (row["category"] == HELPFUL)], n
    )


def sample_groups(
    policy: Transformer,
    chat: Chat,
    rows: list[dict],
    c: IRLConfig,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> list[dict]:
    """What prepare takes: K responses of the policy to each of c.prompts prompts of each harm category and c.helpful_prompts harmless ones."""
    rng, of = (
        random.Random(seed),
        {name: [r for r in rows if r["category"] == name] for name in (*CATEGORIES, HELPFUL)},
    )
    part = [r for name in CATEGORIES for r in rng.sample(of[name], min(c.prompts, len(of[name])))]
    part += rng.sample(of[HELPFUL], min(c.helpful_prompts, len(of[HELPFUL])))
    groups, size = [], max(1, 128 // c.samples)
    bar = tqdm(total=len(part), desc="irl samples", unit="prompt")
    part.sort(key=lambda r: len(r["prompt"]))
    for i in range(0, len(part), size):
        prompts = [chat.prompt(r["prompt"]) for r in part[i : i + size]]
        drawn = generate(
            policy,
            prompts,
            c.samples,
            max_new_tokens,
            temperature,
            seed=rng.randrange(2**31),
            eos=chat.eos,
        ).rows()
        for k, (r, prompt) in enumerate(zip(part[i : i + size], prompts)):
            groups.append(
                {
                    **r,
                    "prompt_ids": prompt,
                    "demonstration": chat.answer(r["response"]),
                    "samples": drawn[k * c.samples : (k + 1) * c.samples],
                    "contrast": [
                        chat.answer(o["response"]) for o in opposites(r, rows, c.contrast, rng)
                    ],
                }
            )
        bar.update(len(prompts))
    bar.close()
    rng.shuffle(groups)
    return groups


def prepare(models: RewardModels, groups: list[dict], size: int, amp) -> list[tuple]:
    """Batches of up to `size` prompts of one model each: (model name, groups, Batch, trunk's hidden states). The trunk runs here only.

    A group: {"category": str, "prompt_ids": ids, "demonstration": ids, "samples": K lists of ids}, and "contrast", more lists, if any.
    """
    out = []
    for name in models.names:
        mine = [g for g in groups if models.name(g["category"]) == name]
        for i in range(0, len(mine), size):
            part = mine[i : i + size]
            batch = Batch(
                [g["prompt_ids"] for g in part],
                [[g["demonstration"], *g["samples"], *g.get("contrast", [])] for g in part],
                models.trunk[0].device,
            )
            with amp():
                out.append((name, part, batch, models.hidden(batch)))
    return out


def fit(
    models: RewardModels,
    batches: list[tuple],
    c: IRLConfig,
    amp,
    seed: int = 0,
    loop: Loop | None = None,
) -> None:
    """Fits every model on the prepared batches of its categories, one optimizer step a batch, and normalises it at the end."""
    rng, loop = random.Random(seed), loop or Loop("irl")
    for name in sorted(set(models.names) - {name for name, *_ in batches}):
        raise UserError(f"no samples to fit the reward model {name!r} on; raise --irl-prompts")
    models.requires_grad_(True)
    for shadow in models.shadows.values():
        shadow.mean.zero_(), shadow.std.fill_(1.0)
    harmful = [name for name in models.names if name in CATEGORIES]
    steps, step = (c.joint_epochs + c.epochs) * len(batches), -1
    bar = tqdm(total=steps, desc="irl", unit="step")
    for epoch in range(c.joint_epochs + c.epochs):
        joint = epoch < c.joint_epochs
        if epoch == 0 or epoch == c.joint_epochs:  # AdamW's moments start anew when the models part
            optimizer = optimizer_of(models, c)
        for name, _, batch, x in rng.sample(batches, len(batches)):
            step += 1
            bar.update()
            if loop.skip(step, models, optimizer):
                continue
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * (1 - step / steps)
            shadow = models.shadows[harmful[0] if joint and name in harmful else name]
            with amp():
                r = shadow(x, batch).view(len(batch.source[0]), -1)  # (P, 1 + K + contrast)
            loss = irl_loss(r[:, 0], r[:, 1:], c.beta, c.estimator)
            loop.update(
                step,
                loss + c.l2 * r.pow(2).mean(),
                shadow.parameters(),
                model=name,
                loss=loss.item(),
                accuracy=(r[:, :1] > r[:, 1:]).float().mean().item(),
                gap_demo_minus_others=(r[:, :1] - r[:, 1:]).mean().item(),
            )
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if joint and epoch == c.joint_epochs - 1:
            for name in harmful[1:]:
                models.shadows[name].load_state_dict(models.shadows[harmful[0]].state_dict())
    bar.close()
    models.requires_grad_(False)
    K = len(batches[0][1][0]["samples"])
    with torch.no_grad(), amp():
        for name, shadow in models.shadows.items():
            r = torch.cat(
                [
                    shadow(x, b).view(len(b.source[0]), -1)[:, 1 : 1 + K].flatten()
                    for n, _, b, x in batches
                    if n == name
                ]
            )
            shadow.mean.copy_(r.mean()), shadow.std.copy_(r.std(correction=0).clamp(min=1e-6))


def score(models: RewardModels, batches: list[tuple], amp) -> None:
    """Adds `rewards` (of the samples) and `reward_demo` to every group of the prepared batches."""
    for _, part, batch, x in batches:
        with torch.no_grad(), amp():
            r = models(x, batch, [g["category"] for g in part]).view(len(part), -1).tolist()
        for g, (first, *rest) in zip(part, r):
            g["reward_demo"], g["rewards"] = first, rest[: len(g["samples"])]


def auc(positive: list[float], negative: list[float]) -> float:
    """Chance that a positive scores above a negative, ties counting half; NaN if either is empty."""
    if not positive or not negative:
        return math.nan
    p, n = torch.tensor(positive)[:, None], torch.tensor(negative)
    return ((p > n).float() + 0.5 * (p == n).float()).mean().item()


def reward_report(groups: list[dict], chat: Chat) -> dict:
    """AUC of wanted (harmful: refusing, harmless: answering) against unwanted samples, of their rewards and of their length alone."""
    out = {}
    for kind, wanted in (("harmful", "refusing"), ("harmless", "answering")):
        rows = [
            (s, r)
            for g in groups
            if (g["category"] == HELPFUL) == (kind == "harmless")
            for s, r in zip(g["samples"], g["rewards"])
        ]
        right = [(judge(chat.decode(s)) == "refuses") == (kind == "harmful") for s, _ in rows]
        good, bad = (
            [row for row, ok in zip(rows, right) if ok == which] for which in (True, False)
        )
        out[kind] = {
            "wanted": wanted,
            "good": len(good),
            "bad": len(bad),
            "auc": auc([r for _, r in good], [r for _, r in bad]),
            "auc_length": auc([len(s) for s, _ in good], [len(s) for s, _ in bad]),
        }
    return out
