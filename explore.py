"""One group from the inside: what the next GRPO-S rollout would compute for one prompt, in the terminal and as a page (explore.html).

The aligned policy draws the samples. Rewards, similarities, alpha and advantages are those of grpo_s.py, whose running means start from IRL's samples, as they
do at the first rollout; the log-ratio of a token is log pi_theta - log pi_ref at the sampling temperature, pi_ref being the warm start.
"""

import copy
from dataclasses import dataclass, replace
from html import escape

import torch

import grpo_s
from batch import Batch
from chat import Chat
from encoder import split_sentences
from judge import judge
from model import generate, token_logps
from reward import RewardModels
from transformer import Transformer


@dataclass(frozen=True)
class ExploreConfig:
    """explore: one group from the inside."""

    prompt: str = ""  # the prompt whose group explore shows; empty: the first held-out prompt
    samples: int = 8  # G, samples of that prompt


def closest(prompt: str, rows: list[dict], held_out: list[dict], encoder) -> dict:
    """{"category", "demonstration": a row, "cosine"} of a prompt: its own demonstration if it has one, else the one whose prompt is most similar,
    in its category if a held-out row names that, else among all."""
    own = [r for r in rows if r["prompt"] == prompt]
    category = next((r["category"] for r in own + held_out if r["prompt"] == prompt), None)
    rows = own or [r for r in rows if r["category"] == category] or rows
    cos = encoder.embed([r["prompt"] for r in rows]) @ encoder.embed([prompt])[0]
    best = rows[int(cos.argmax())]
    return {
        "category": category or best["category"],
        "demonstration": best,
        "cosine": cos.max().item(),
    }


def group(
    policy: Transformer,
    rewards: RewardModels,
    chat: Chat,
    encoder,
    prompt: str,
    found: dict,
    history: list[dict],
    c: grpo_s.GRPOConfig,
    samples: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    amp,
) -> dict:
    """Everything text and page show; found: what closest returns, history: as for grpo_s.train. The last of "members" is the demonstration."""
    category, demonstration, ids = (
        found["category"],
        found["demonstration"]["response"],
        chat.prompt(prompt),
    )
    rows = generate(
        policy, [ids], samples, max_new_tokens, temperature, seed=seed, eos=chat.eos
    ).rows() + [chat.answer(demonstration)]
    batch = Batch([ids], [rows], policy.device)
    with torch.no_grad(), amp():
        x = rewards.hidden(batch)
        scores = rewards(x, batch, [category])[None]  # (1, G + 1)
        by_model = {name: shadow(x, batch).tolist() for name, shadow in rewards.shadows.items()}
        ratios = token_logps(policy, batch, temperature) - token_logps(
            rewards.trunk[0], batch, temperature
        )  # (G + 1, T)
    texts = [chat.decode(r) for r in rows[:-1]]
    W = grpo_s.similarities(encoder, [texts], [demonstration]).to(scores.device)  # (1, G)
    means = grpo_s.start_means([h for h in history if h["category"] == category], encoder)
    alpha = {
        mode: grpo_s.difficulty(
            W,
            scores[:, -1:] - scores[:, :-1],
            [category],
            *copy.deepcopy(means),
            replace(c, scaling=mode),
        )
        for mode in {"data", "model", c.scaling}
    }
    advantage = grpo_s.advantages(scores, alpha[c.scaling], c.std_eps)[0].tolist()
    theirs = split_sentences(demonstration)
    members = []
    for i, row in enumerate(rows):
        text = texts[i] if i < samples else demonstration
        own = split_sentences(text)
        cos = encoder.embed(own) @ encoder.embed(theirs).T  # (K, L)
        members.append(
            {
                "name": f"sample {i + 1}" if i < samples else "demonstration",
                "text": text,
                "verdict": judge(text),
                "ended": chat.ended(row),
                "reward": scores[0, i].item(),
                "rewards": {name: r[i] for name, r in by_model.items()},
                "advantage": advantage[i],
                "similarity": W[0, i].item() if i < samples else None,
                "sentences": list(zip(own, cos.tolist())),
                "tokens": [
                    (chat.tokenizer.decode([t], skip_special_tokens=False), r)
                    for t, r in zip(row, ratios[i].tolist())
                ],
            }
        )
    return {
        "prompt": prompt,
        **found,
        "members": members,
        "theirs": theirs,
        "scaling": c.scaling,
        "alpha": {mode: a[0].tolist() for mode, a in alpha.items()},
        "mean": scores[0, :-1].mean().item(),
        "std": scores[0, :-1].std(correction=0).item(),
    }


def facts(g: dict) -> list[str]:
    """The group's own lines: prompt, demonstration, difficulty."""
    own = (
        "its own"
        if g["demonstration"]["prompt"] == g["prompt"]
        else f"that of {g['demonstration']['prompt']!r}, cosine {g['cosine']:.2f}"
    )
    mean = {mode: sum(a) / len(a) for mode, a in g["alpha"].items()}
    return [
        f"prompt: {g['prompt']}",
        f"category: {g['category']}; demonstration: {own}",
        f"alphaD {mean['data']:.3f}, alphaM {mean['model']:.3f}, alpha ({g['scaling']}) {mean[g['scaling']]:.3f}; rewards of the samples: mean {g['mean']:.2f}, std {g['std']:.2f}",
    ]


def head(m: dict) -> str:
    similar = "" if m["similarity"] is None else f", W {m['similarity']:.2f}"
    return f"{m['name']}: reward {m['reward']:+.2f}, advantage {m['advantage']:+.2f}{similar}; {m['verdict']}{'' if m['ended'] else ', cut'}"


def text(g: dict) -> str:
    """The group for a terminal."""
    lines = facts(g)
    for m in g["members"]:
        lines += [
            "",
            head(m),
            *("    " + line for line in m["text"].split("\n")),
            "  rewards:    " + ", ".join(f"{name} {r:+.2f}" for name, r in m["rewards"].items()),
        ]
        for sentence, cos in m["sentences"] if m["similarity"] is not None and g["theirs"] else []:
            lines.append(f"  {max(cos):.2f}  {sentence}  ~  {g['theirs'][cos.index(max(cos))]}")
        lines.append(
            "  log-ratios: "
            + " ".join(f"{token.strip() or repr(token)[1:-1]}{r:+.2f}" for token, r in m["tokens"])
        )
    return "\n".join(lines)


STYLE = """body { font: 15px/1.45 sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em } h2 { font-size: 1.1em; margin-top: 2em } pre { white-space: pre-wrap }
table { border-collapse: collapse; margin: .6em 0 } td, th { border: 1px solid #ccc; padding: .15em .5em; text-align: left } .best { font-weight: bold } .tokens span { white-space: pre-wrap }"""


def table(heads: list[str], rows: list[list[str]]) -> str:
    """Cells are HTML already, heads are text."""
    return (
        "<table><tr>"
        + "".join(f"<th>{escape(h)}</th>" for h in heads)
        + "</tr>"
        + "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
        + "</table>"
    )


def shade(token: str, ratio: float) -> str:
    """A token, the greener the more the policy likes it than the warm start does, the redder the less; pointing at it shows the number."""
    colour = f"rgba({'0,150,60' if ratio > 0 else '210,40,40'},{min(1.0, abs(ratio) / 2):.2f})"
    return f'<span style="background:{colour}" title="{ratio:+.2f}">{escape(token)}</span>'


def page(g: dict) -> str:
    """The group as one HTML page that needs nothing from outside."""
    parts = [
        f"<!doctype html><html><head><meta charset='utf-8'><title>One group</title><style>{STYLE}</style></head><body><h1>One group from the inside</h1>",
        *(f"<p>{escape(line)}</p>" for line in facts(g)),
        table(
            ["", "text", "reward", "advantage", "W", *g["members"][0]["rewards"]],
            [
                [
                    escape(m["name"]),
                    escape(m["text"]).replace("\n", "<br>"),
                    f"{m['reward']:+.2f}",
                    f"{m['advantage']:+.2f}",
                    "" if m["similarity"] is None else f"{m['similarity']:.2f}",
                    *(f"{r:+.2f}" for r in m["rewards"].values()),
                ]
                for m in g["members"]
            ],
        ),
    ]
    for m in g["members"]:
        parts += [
            f"<h2>{escape(head(m))}</h2>",
            "<p>log-ratio of each token to the warm start (point at one):</p><p class='tokens'>"
            + "".join(shade(*t) for t in m["tokens"])
            + "</p>",
        ]
        if m["similarity"] is not None:
            parts.append(
                table(
                    ["sub-sentence, cosine to each of the demonstration's", *g["theirs"]],
                    [
                        [
                            escape(s),
                            *(
                                f"<span class='{'best' if c == max(cos) else ''}'>{c:.2f}</span>"
                                for c in cos
                            ),
                        ]
                        for s, cos in m["sentences"]
                    ],
                )
            )
    return "\n".join([*parts, "</body></html>"]) + "\n"
