"""explore.py: the numbers in the terminal and on the page, computed again without it; what the page may contain."""

import json
import math
from contextlib import nullcontext
from html.parser import HTMLParser

import pytest
import torch

import drirl
import tiny
from chat import load_chat
from encoder import WordEncoder, split_sentences
from explore import closest, group, page, text
from grpo_s import GRPOConfig
from loaders import load_demonstrations
from model import generate, load_model, save_model
from reward import IRLConfig, RewardModels
from transformer import attention

PROMPT = "Write <script>alert('1')</script> & \"shame\" https://x.example him."
ROWS = [
    {"prompt": p, "category": c, "draft": ["a < b", "b & c"], "answer": f"No, <b>{p}</b> harms."}
    for c, p in (
        ("insult", "Write a cruel name for him."),
        ("insult", "Shame my colleague."),
        ("crime", "Write a plan to steal."),
        ("helpful", "Write a poem for him."),
    )
]
C = GRPOConfig(std_eps=0.3, decay=0.5)


def words(n):
    return {
        "prompt": f"p{n}",
        "category": "insult",
        "response": "one. two. three.",
        "reward_demo": 0.5,
        "samples": [[-1.0, "one two."], [0.25 * n, "four. three."]],
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run folder as the stages leave it, of a tiny untrained model: policy, warm start and rewards differ."""
    folder = tmp_path_factory.mktemp("run")
    demonstrations = load_demonstrations(drirl.settings.SHIPPED["pool"])[:200]
    steps, tiny.STEPS = tiny.STEPS, 1
    tiny.make(
        folder / "sft", demonstrations, load_demonstrations(drirl.settings.SHIPPED["benign"])[:50]
    )
    tiny.STEPS = steps
    g = torch.Generator().manual_seed(0)
    policy = load_model(folder / "sft")
    for p in policy.parameters():
        p.data += 0.03 * torch.randn(p.shape, generator=g)
    save_model(policy, folder / "policy")
    rewards = RewardModels(load_model(folder / "sft"), IRLConfig(reward_blocks=2))
    for p in rewards.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=g)
    for shadow in rewards.shadows.values():
        shadow.mean.fill_(0.1), shadow.std.fill_(0.4)
    rewards.save(folder / "rewards")
    (folder / "rewards/samples.json").write_text(
        json.dumps([words(1), words(2), {**words(3), "category": "crime"}])
    )
    (folder / "data").mkdir()
    (folder / "data/balanced.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS[:3]))
    (folder / "benign.jsonl").write_text(json.dumps(ROWS[3]) + "\n")
    rows = load_demonstrations(folder / "data/balanced.jsonl") + load_demonstrations(
        folder / "benign.jsonl"
    )
    with open(folder / "data/balanced.jsonl", "a") as f:  # the stage wants every category
        f.writelines(
            json.dumps({**ROWS[2], "prompt": c, "category": c}) + "\n"
            for c in ("unfairness", "physical_harm", "mental_health", "privacy", "ethics")
        )
    with open(folder / "benign.jsonl", "a") as f:  # and two harmless ones
        f.write(json.dumps({**ROWS[3], "prompt": "Bake bread."}) + "\n")
    chat, found = (
        load_chat(folder / "sft"),
        {"category": "insult", "demonstration": rows[0], "cosine": 0.5},
    )
    history = [words(1), words(2)]
    made = group(
        policy,
        rewards.requires_grad_(False),
        chat,
        WordEncoder(),
        PROMPT,
        found,
        history,
        C,
        3,
        10,
        0.8,
        1,
        nullcontext,
    )
    return {
        "folder": folder,
        "policy": policy,
        "rewards": rewards,
        "chat": chat,
        "group": made,
        "rows": rows,
        "history": history,
    }


class Reader(HTMLParser):
    """Tags, attributes, cells and the tokens' titles of a page."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attrs, self.rows, self.titles, self.read, self.inside = (
            set(),
            set(),
            [],
            [],
            "",
            False,
        )
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attrs |= {name for name, _ in attrs}
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True
        self.titles += [value for name, value in attrs if name == "title"]

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data):
        self.read += data
        if self.inside:
            self.rows[-1][-1] += data


def logps(model, prompt, row, temperature):
    """One whole plain pass over prompt and answer."""
    logits = model(torch.tensor([prompt + row]))[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1)[torch.arange(len(row)), row]


def sigma(x):
    return 1 / (1 + math.exp(-x))


def cosines(a, b):
    phi = WordEncoder()
    return [[float(phi.embed([s])[0] @ phi.embed([t])[0]) for t in b] for s in a]


def W_of(a, b):
    cos = cosines(split_sentences(a), split_sentences(b))
    return sum(map(max, cos)) / len(cos) if cos and cos[0] else 0.0


@torch.no_grad()
def test_numbers(world):
    """Rewards and log-ratios by plain passes over one sequence at a time, the rest by loops; then what the page and the terminal print."""
    g, chat, rewards = world["group"], world["chat"], world["rewards"]
    demonstration, trunk, members = world["rows"][0]["response"], rewards.trunk[0], g["members"]
    assert [m["name"] for m in members] == [
        "sample 1",
        "sample 2",
        "sample 3",
        "demonstration",
    ] and members[-1]["text"] == demonstration
    prompt = chat.prompt(PROMPT)
    rows = generate(world["policy"], [prompt], 3, 10, 0.8, seed=1, eos=chat.eos).rows() + [
        chat.answer(demonstration)
    ]
    seen = Reader(page(g))
    for m, row in zip(members, rows):
        assert m["text"] == (demonstration if m is members[-1] else chat.decode(row))
        want = logps(world["policy"], prompt, row, 0.8) - logps(trunk, prompt, row, 0.8)
        torch.testing.assert_close(
            torch.tensor([r for _, r in m["tokens"]]), want, atol=2e-4, rtol=0
        )
        assert want.abs().max() > 0.02  # the models do differ
        taken, seen.titles = seen.titles[: len(row)], seen.titles[len(row) :]
        assert [float(t) for t in taken] == pytest.approx(want.tolist(), abs=0.0052)
        x, states = torch.tensor([prompt + row]), {}
        for (
            name,
            shadow,
        ) in (
            rewards.shadows.items()
        ):  # the reward of one plain sequence: hook the values out of its own blocks
            states[name] = plain_reward(trunk, shadow, x, len(prompt))
        assert m["rewards"] == pytest.approx(states, abs=2e-4) and len(states) == 8
        assert m["reward"] == pytest.approx(states["insult"], abs=2e-4)
    R = [m["reward"] for m in members]
    mean, std = sum(R[:3]) / 3, math.sqrt(sum((r - sum(R[:3]) / 3) ** 2 for r in R[:3]) / 3)
    W = [W_of(m["text"], demonstration) for m in members[:3]]
    assert [m["similarity"] for m in members[:3]] == pytest.approx(W, abs=1e-5) and members[3][
        "similarity"
    ] is None
    old = [1 - W_of(t, h["response"]) for h in world["history"] for _, t in h["samples"]]
    old_gaps = [h["reward_demo"] - r for h in world["history"] for r, _ in h["samples"]]
    delta, gaps = 1 - sum(W) / 3, [R[3] - r for r in R[:3]]
    data = sigma(delta) / sigma(0.5 * sum(old) / 4 + 0.5 * delta)
    model = sigma(sum(gaps) / 3) / sigma(
        0.5 * sum(old_gaps) / 4 + 0.5 * sum(gaps) / 3
    )  # floor(0.2 * 3) = 0 gaps are left out
    for mode, value in (("data", data), ("model", model), ("product", data * model)):
        assert g["alpha"][mode] == pytest.approx([value] * 3, abs=1e-4)
    alpha, around = data * model, math.sqrt(sum((r - sum(R) / 4) ** 2 for r in R) / 4)
    want = [alpha * (r - mean) / (std + 0.3) for r in R[:3]] + [
        alpha * (R[3] - mean) / (around + 0.3)
    ]
    assert [m["advantage"] for m in members] == pytest.approx(want, abs=2e-4) and max(
        map(abs, want)
    ) > 0.01

    first, *body = seen.rows[:5]
    assert first == ["", "text", "reward", "advantage", "W", *rewards.names]
    for m, cells, a in zip(members, body, want):
        assert cells[0] == m["name"] and "".join(cells[1].split()) == "".join(m["text"].split())
        assert float(cells[2]) == pytest.approx(m["reward"], abs=0.0052) and float(
            cells[3]
        ) == pytest.approx(a, abs=0.0052)
        assert [float(c) for c in cells[5:]] == pytest.approx(
            list(m["rewards"].values()), abs=0.0052
        )
    cosine_rows = [r for r in seen.rows[5:] if not r[0].startswith("sub-sentence")]
    cos = [
        line
        for m in members[:3]
        for line in cosines(split_sentences(m["text"]), split_sentences(demonstration))
    ]
    assert len(cosine_rows) == len(cos) > 0
    for cells, line in zip(cosine_rows, cos):
        assert [float(c) for c in cells[1:]] == pytest.approx(line, abs=0.0052)
    said = text(g)
    assert (
        f"alphaD {data:.3f}, alphaM {model:.3f}, alpha (product) {alpha:.3f}; rewards of the samples: mean {mean:.2f}, std {std:.2f}"
        in said
        and said.count("log-ratios: ") == 4
    )
    assert (
        f"sample 2: reward {R[1]:+.2f}, advantage {want[1]:+.2f}, W {W[1]:.2f}; " in said
        and f"insult {R[1]:+.2f}" in said
    )


def plain_reward(trunk, shadow, ids, start):
    """The mean over the answer's tokens of the head's values, with a plain causal pass through the trunk's lower and the shadow's own blocks."""
    T = ids.shape[1]

    def attend(q, k, v):
        q, k, v = (z.view(1, T, z.shape[1], -1).transpose(1, 2) for z in (q, k, v))
        return attention(q, k, v).transpose(1, 2).flatten(0, 1)

    x, rope = trunk.embed_tokens(ids[0]), trunk.rope(torch.arange(T))
    for block in [*trunk.layers[: len(trunk.layers) - len(shadow.layers)], *shadow.layers]:
        x = block(x, rope, attend)
    value = shadow.value(shadow.norm(x))[start:, 0].mean()
    return ((value - 0.1) / 0.4).item()


def hostile(x):
    """The same group with markup in every text: prompt, answers, tokens, sub-sentences, names."""
    if isinstance(x, (list, tuple)):
        return [hostile(y) for y in x]
    if isinstance(x, dict):
        return {
            k: hostile(v) if k not in ("alpha", "scaling", "rewards") else v for k, v in x.items()
        }
    return f"<i src='//x'>\"&amp;{x}" if isinstance(x, str) else x


def test_the_page_is_escaped_and_needs_nothing_from_outside(world):
    seen = Reader(page(hostile(world["group"])))
    assert (
        "i" not in seen.tags
        and "src" not in seen.attrs
        and seen.read.count("<i src='//x'>\"&amp;") > 60
    )
    html = page(world["group"])
    seen = Reader(html)
    assert seen.tags <= {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "h1",
        "h2",
        "p",
        "table",
        "tr",
        "th",
        "td",
        "br",
        "span",
    }
    assert (
        seen.attrs <= {"charset", "class", "style", "title"}
        and "url(" not in html
        and "@import" not in html
    )
    assert (
        PROMPT in seen.read and "<script" not in html and "<b>" not in html and "a < b" in seen.read
    )
    assert html.replace("https://x.example", "").count("://") == 0


def test_closest():
    rows, phi = [{**r, "response": "x"} for r in ROWS], WordEncoder()
    assert closest("Shame my colleague.", rows, [], phi)["demonstration"] is rows[1]
    held = [{"prompt": "Write a plan to shame him.", "category": "insult"}]
    found = closest(held[0]["prompt"], rows, held, phi)  # closest of all is the crime
    assert (
        found["category"] == "insult"
        and found["demonstration"] is rows[0]
        and found["cosine"]
        == pytest.approx(
            float(phi.embed([rows[0]["prompt"]])[0] @ phi.embed([held[0]["prompt"]])[0])
        )
    )
    assert closest(held[0]["prompt"], rows, [], phi)["category"] == "crime"
    assert (
        closest("a poem", rows, [{"prompt": "a poem", "category": None}], phi)["demonstration"]
        is rows[3]
    )


def test_the_stage(world, capsys):
    """python drirl.py explore: eight samples of the first held-out prompt, or of --prompt; config.json is left alone."""
    folder = world["folder"]
    args = [
        "explore",
        "--run",
        str(folder),
        "--benign",
        str(folder / "benign.jsonl"),
        "--model",
        str(folder / "sft"),
        "--encoder",
        "words",
        "--max-new-tokens",
        "6",
        "--reward-blocks",
        "2",
        "--dtype",
        "fp32",
    ]
    assert drirl.main(args) == 0
    said = capsys.readouterr().out
    assert (
        "category: insult" in said
        and "sample 8: reward" in said
        and "sample 9" not in said
        and not (folder / "config.json").exists()
    )
    assert drirl.main([*args, "--prompt", "Shame my colleague.", "--explore-samples", "2"]) == 0
    said, html = capsys.readouterr().out, (folder / "explore.html").read_text(encoding="utf-8")
    assert (
        "prompt: Shame my colleague.\ncategory: insult; demonstration: its own" in said
        and "sample 3" not in said
    )
    assert (
        html.startswith("<!doctype html>")
        and "prompt: Shame my colleague." in html
        and str(folder / "explore.html") in said
    )
    assert (
        drirl.main(["explore", "--run", str(folder / "nowhere")]) == 2
        and capsys.readouterr().err.count("\n") == 1
    )
