"""teach/explore.py: what it prints, computed again without it; teach/tiny.py."""

import dataclasses
import json
import math
import re

import pytest
import torch

import config
from encoder import WordEncoder, split_sentences
from model import attention
from reward import RewardModels
from sample import generate
from support.chat import load_chat
from support.hf import load_model, load_rewards, save_model, save_rewards
from support.judge import judge
from support.loaders import load_rows
from teach import explore, tiny

PROMPT = 'Write a cruel joke about him & his "shame" at https://x.example.'
ROWS = [
    {"prompt": p, "category": c, "draft": ["a < b", "b & c"], "answer": f"No, {p} harms."}
    for c, p in (
        ("insult", "Write a cruel name for him."),
        ("insult", "Shame my colleague."),
        ("crime", "Write a plan to steal."),
        ("helpful", "Write a poem for her."),
    )
]
EPS, TEMPERATURE, SEED = 0.3, 0.8, 1


def drawn(n, category="insult"):
    """What IRL's stage keeps of a prompt's samples."""
    samples = [[-1.0, "one two."], [0.25 * n, "four. three."]]
    row = {"prompt": f"p{n}", "category": category, "response": "one. two. three."}
    return {**row, "reward_demo": 0.5, "samples": samples}


def write_rows(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run folder as the stages leave it: policy, warm start and rewards differ."""
    folder = tmp_path_factory.mktemp("run")
    pool, benign = (load_rows(config.SHIPPED[name]) for name in ("pool", "benign"))
    sft = dataclasses.replace(tiny.SFT, steps=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "SFT", sft)
        tiny.make(folder / "sft", pool[:200], benign[:50])
    g = torch.Generator().manual_seed(0)
    policy = load_model(folder / "sft")
    for p in policy.parameters():
        p.data += 0.03 * torch.randn(p.shape, generator=g)
    save_model(policy, folder / "policy")
    rewards = RewardModels(load_model(folder / "sft"), config.IRLConfig(reward_blocks=2))
    for p in rewards.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=g)
    for shadow in rewards.shadows.values():
        shadow.mean.fill_(0.1)
        shadow.std.fill_(0.4)
    history = json.dumps([drawn(1), drawn(2), drawn(3, "crime")])
    save_rewards(rewards, folder / "rewards", {"samples.json": history})
    others = ("unfairness", "physical_harm", "mental_health", "privacy", "ethics")
    more = [{**ROWS[2], "prompt": f"{c}?", "category": c} for c in others]
    write_rows(folder / "data/balanced.jsonl", ROWS[:3] + more)
    write_rows(folder / "benign.jsonl", [ROWS[3], {**ROWS[3], "prompt": "Bake bread."}])
    (folder / "done").mkdir()
    for stage in ("sft", "irl", "grpo"):
        (folder / f"done/{stage}.json").write_text('{"settings": {}, "seconds": 1.0}')
    return folder


def flags(folder):
    given = {
        "run": folder,
        "benign": folder / "benign.jsonl",
        "model": folder / "sft",
        "encoder": "words",
        "dtype": "fp32",
        "seed": SEED,
        "max-new-tokens": 10,
        "temperature": TEMPERATURE,
        "irl-reward-blocks": 2,
        "grpo-std-eps": EPS,
    }
    return [str(word) for name, value in given.items() for word in (f"--{name}", value)]


def logps(model, prompt, row):
    """One whole plain pass over prompt and answer."""
    logits = model(torch.tensor([prompt + row]))[0, len(prompt) - 1 : -1] / TEMPERATURE
    return logits.log_softmax(-1)[torch.arange(len(row)), row]


def plain_reward(reference, shadow, ids, start):
    """The head's mean over the answer's tokens, by a plain causal pass through all blocks."""
    T = ids.shape[1]

    def attend(q, k, v):
        q, k, v = (z.view(1, T, z.shape[1], -1).transpose(1, 2) for z in (q, k, v))
        return attention(q, k, v).transpose(1, 2).flatten(0, 1)

    x, rope = reference.embed_tokens(ids[0]), reference.rope(torch.arange(T))
    below = len(reference.layers) - len(shadow.layers)
    for block in [*reference.layers[:below], *shadow.layers]:
        x = block(x, rope, attend)
    return (shadow.value(shadow.norm(x))[start:, 0].mean().item() - 0.1) / 0.4


def sigma(x):
    return 1 / (1 + math.exp(-x))


def cosines(a, b):
    phi = WordEncoder()
    return [[float(phi.embed([s])[0] @ phi.embed([t])[0]) for t in b] for s in a]


def W_of(a, b):
    cos = cosines(split_sentences(a), split_sentences(b))
    return sum(map(max, cos)) / len(cos) if cos and cos[0] else 0.0


def floats(text):
    return [float(x) for x in re.findall(r"(?<![\w.])[-+]?\d+\.\d+", text)]


@torch.no_grad()
def test_numbers(folder, capsys):
    """Rewards and log-ratios by plain passes over one sequence at a time, the rest by loops."""
    assert explore.main([*flags(folder), "--prompt", PROMPT, "--grpo-samples", "3"]) == 0
    said = capsys.readouterr().out
    head, *members = said.partition("\n[explore]")[0].rstrip("\n").split("\n\n")
    policy, reference = load_model(folder / "policy"), load_model(folder / "sft")
    rewards = load_rewards(
        RewardModels(reference, config.IRLConfig(reward_blocks=2)), folder / "rewards"
    )
    chat, rows = load_chat(folder / "sft"), load_rows(folder / "data/balanced.jsonl")
    prompt, demonstration = chat.prompt(PROMPT), rows[0]["response"]
    answers = generate(policy, [prompt], 3, 10, TEMPERATURE, seed=SEED, eos=chat.eos)
    answers.append(chat.answer(demonstration))
    texts = [*map(chat.decode, answers[:3]), demonstration]
    by_model, R = [], []
    for row in answers:
        ids = torch.tensor([prompt + row])
        one = {k: plain_reward(reference, s, ids, len(prompt)) for k, s in rewards.shadows.items()}
        by_model.append(one)
        R.append(one["insult"])
    mean = sum(R[:3]) / 3
    std = math.sqrt(sum((r - mean) ** 2 for r in R[:3]) / 3)
    W = [W_of(text, demonstration) for text in texts[:3]]
    history = [drawn(1), drawn(2)]
    old = [1 - W_of(t, h["response"]) for h in history for _, t in h["samples"]]
    old_gaps = [h["reward_demo"] - r for h in history for r, _ in h["samples"]]
    delta, gap = 1 - sum(W) / 3, R[3] - mean
    data = sigma(delta) / sigma(0.5 * sum(old) / 4 + 0.5 * delta)
    model = sigma(gap) / sigma(0.5 * sum(old_gaps) / 4 + 0.5 * gap)  # floor(0.2 * 3) = 0 left out
    alpha = data * model
    A = [alpha * (r - mean) / (std + EPS) for r in R[:3]]

    similar = cosines([PROMPT], [r["prompt"] for r in ROWS])[0]
    assert max(similar) == similar[0]
    first, second, third = head.split("\n")
    assert first == f"prompt: {PROMPT}"
    assert second == (f"category: insult; demonstration: that of {ROWS[0]['prompt']!r}, "
                      f"cosine {similar[0]:.2f}")  # fmt: skip
    assert "alpha (product)" in third
    assert floats(third) == pytest.approx([data, model, alpha, mean, std], abs=0.0052)
    assert [m.split(":")[0] for m in members] == ["sample 1", "sample 2", "sample 3",
                                                  "demonstration"]  # fmt: skip
    for i, (member, row, text) in enumerate(zip(members, answers, texts)):
        title, *lines = member.split("\n")
        assert title.endswith("; " + judge(text) + ("" if chat.ended(row) else ", cut"))
        assert floats(title) == pytest.approx([R[i], *A[i : i + 1], *W[i : i + 1]], abs=0.0052)
        n = text.count("\n") + 1
        assert [line[4:] for line in lines[:n]] == text.split("\n")
        names = re.findall(r"(\w+) [-+]", lines[n])
        assert names == [*by_model[i]] and len(names) == 8
        assert floats(lines[n]) == pytest.approx(list(by_model[i].values()), abs=0.0052)
        own, theirs = split_sentences(text) if i < 3 else [], split_sentences(demonstration)
        pairs, ratios = lines[n + 1 : -1], lines[-1]
        assert len(pairs) == len(own)
        for line, sentence, cos in zip(pairs, own, cosines(own, theirs)):
            assert sentence in line and line.endswith(theirs[cos.index(max(cos))])
            assert float(line.split()[0]) == pytest.approx(max(cos), abs=0.0052)
        want = logps(policy, prompt, row) - logps(reference, prompt, row)
        got = [float(x) for x in re.findall(r"[-+]\d+\.\d\d(?= |$)", ratios)]
        assert want.abs().max() > 0.02 and got == pytest.approx(want.tolist(), abs=0.0052)


def test_closest():
    rows, phi = [{**r, "response": "x"} for r in ROWS], WordEncoder()
    category, row, cosine = explore.closest("Shame my colleague.", rows, [], phi)
    assert category == "insult" and row is rows[1] and cosine == pytest.approx(1)
    prompt = "Write a plan to shame him."  # closest of all is the crime
    assert explore.closest(prompt, rows, [], phi)[:2] == ("crime", rows[2])
    held_out = [{"prompt": prompt, "category": "insult"}]
    category, row, cosine = explore.closest(prompt, rows, held_out, phi)
    assert category == "insult" and row is rows[0]
    assert cosine == pytest.approx(cosines([prompt], [rows[0]["prompt"]])[0][0])
    assert (
        explore.closest("a poem", rows, [{"prompt": "a poem", "category": None}], phi)[1] is rows[3]
    )


def test_command(folder, capsys, monkeypatch):
    """Eight samples of the first held-out prompt, or of --prompt; nothing is written.

    What an encoder makes of no text may have any width.
    """
    real, before = WordEncoder.embed, sorted(folder.rglob("*"))
    embed = lambda self, texts, *a: real(self, texts, *a) if texts else torch.zeros(0, 3)
    monkeypatch.setattr(WordEncoder, "embed", embed)
    assert explore.main(flags(folder)) == 0
    said = capsys.readouterr().out
    assert "sample 8: reward" in said and "sample 9" not in said
    first = json.loads(config.SHIPPED["prompts"].read_text().split("\n")[0])
    assert f"prompt: {first['prompt']}\ncategory: {first['category']}; " in said
    assert explore.main([*flags(folder), "--prompt", ROWS[1]["prompt"], "--grpo-samples", "2"]) == 0
    said = capsys.readouterr().out
    assert "\ncategory: insult; demonstration: its own\n" in said and "sample 3" not in said
    assert sorted(folder.rglob("*")) == before
    assert explore.main(["--run", str(folder / "nowhere")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_tiny(tmp_path, capsys, monkeypatch):
    """python -m teach.tiny makes a folder once, and anew for another seed."""
    monkeypatch.setattr(tiny, "SFT", dataclasses.replace(tiny.SFT, steps=1, batch=1))
    corpus = {"--pool": "pool", "--benign": "benign"}
    args = [str(tmp_path / "base")]
    for flag, name in corpus.items():
        lines = config.SHIPPED[name].read_text().split("\n")
        (tmp_path / name).with_suffix(".jsonl").write_text("\n".join(lines[:40]))
        args += [flag, str(tmp_path / f"{name}.jsonl")]
    weights = tmp_path / "base/model.safetensors"
    assert tiny.main(args) == 0 and "was made before" not in capsys.readouterr().out
    made = weights.read_bytes()
    assert tiny.main(args) == 0 and "was made before" in capsys.readouterr().out
    assert tiny.main([*args, "--seed", "1"]) == 0 and weights.read_bytes() != made
    assert load_model(tmp_path / "base").config.layers == 4
    assert tiny.main([args[0], "--pool", str(tmp_path / "nowhere.jsonl")]) == 2
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text("{}")  # somebody's own model
    assert tiny.main([str(tmp_path / "other"), *args[1:]]) == 2
    assert "not ours" in capsys.readouterr().err
