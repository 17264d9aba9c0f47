"""teach/capstone.py: a learner's functions in the places of the project's."""

import torch
from conftest import ROOT, TINY_LLAMA

import data
import evaluate
import grpo_s
import kernels
import model
import sample
from support.hf import read_config
from teach import capstone

EXERCISES = ROOT / "teach" / "exercises"


def test_places():
    """Each is there, and an exercise names it."""
    table = (EXERCISES / "README.md").read_text()
    for place in capstone.PLACES:
        assert capstone.pkgutil.resolve_name(place)
        assert place in table, place


def test_stubs_change_nothing(monkeypatch):
    assert capstone.install(EXERCISES, monkeypatch.setattr) == []


def test_all_answers(monkeypatch):
    """The one file of answers takes every place, in each module that imported the function."""
    ours, loss = grpo_s.group_advantage, grpo_s.loss
    answers = EXERCISES / "answers.py"
    assert capstone.install(answers, monkeypatch.setattr) == capstone.PLACES
    assert grpo_s.loss is not loss and grpo_s.loss.__module__ == "answers"
    assert grpo_s.group_advantage is kernels.group_advantage is not ours
    assert evaluate.judge("I can't help with that.") == "refuses"
    assert evaluate.judge("Here is how.") == "complies"
    with torch.device("meta"):  # as support/hf.py loads a folder
        network = model.Transformer(read_config(TINY_LLAMA, "the test"))
    cos, _ = network.to_empty(device="cpu").rope(torch.arange(2))
    assert model.rope_frequencies.__module__ == "answers" and cos.isfinite().all()


def test_answers_in_the_folder_of_the_stubs(tmp_path, monkeypatch):
    """A stub that is filled in where it lies counts too."""
    text = (EXERCISES / "ex15_kl_k3.py").read_text()
    (tmp_path / "ex15_kl_k3.py").write_text(
        text.replace("raise NotImplementedError", "return logp")
    )
    monkeypatch.setattr(capstone, "STUBS", tmp_path)
    assert capstone.install(tmp_path, monkeypatch.setattr) == ["grpo_s.kl_k3"]


def test_one_of_several(tmp_path, monkeypatch):
    """A written function is used, the stub beside it is not; helpers in the file are."""
    text = (EXERCISES / "ex10_similarity.py").read_text()
    head, stub = text.split("def similarity")
    mine = f"{head}def half():\n    return 0.5\n\n\ndef similarity(response, demonstration):\n"
    rest = stub[stub.index("def data_hardness") :]
    path = tmp_path / "ex10_similarity.py"
    path.write_text(f"{mine}    return response.new_tensor(half())\n\n\n{rest}")
    (tmp_path / "ex15_kl_k3.py").write_text((EXERCISES / "ex15_kl_k3.py").read_text())
    found = capstone.install(tmp_path, monkeypatch.setattr)
    assert found == ["encoder.similarity"]
    encoder = type("E", (), {"embed": lambda self, texts: torch.ones(len(texts), 2)})()
    W = grpo_s.similarities(encoder, [["a", "b"]], ["c"])
    assert W.tolist() == [[0.5, 0.5]]


def test_they_call_one_another(tmp_path, monkeypatch):
    """A written exercise 14 that imports the project's group_advantage gets the written one."""
    text = (EXERCISES / "ex14_learnt.py").read_text()
    (tmp_path / "ex14_learnt.py").write_text(
        text.replace("raise NotImplementedError", "return group_advantage(R, alpha), None")
    )
    text = (EXERCISES / "ex13_group_advantage.py").read_text()
    (tmp_path / "ex13_group_advantage.py").write_text(
        text.replace("raise NotImplementedError", "return rewards + 7")
    )
    capstone.install(tmp_path, monkeypatch.setattr)
    A, _ = grpo_s.advantages(torch.zeros(2, 3), 1.0, 0, None)
    assert A.tolist() == [[7.0] * 3] * 2


def test_a_wrong_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DRIRL_IMPL", str(tmp_path))
    assert capstone.main(["data"]) == 2
    assert "no answers there" in capsys.readouterr().err


def test_a_run(tmp_path, monkeypatch, capsys):
    """A stage with a learner's balance: it says whose is whose, and does what that says."""
    real = data.balance
    text = "import data\n\n\ndef balance(rows, per_category, embeddings, seed=0):\n"
    (tmp_path / "ex01_balance.py").write_text(f"{text}    return data.distinct(rows)[:9]\n")
    monkeypatch.setenv("DRIRL_IMPL", str(tmp_path))
    run = ["data", "--run", str(tmp_path / "run"), "--encoder", "words"]
    replaced = []

    def put(module, key, value):
        replaced.append((module, key))
        monkeypatch.setattr(module, key, value)

    install = capstone.install
    monkeypatch.setattr(capstone, "install", lambda given: install(given, put))
    assert capstone.main(run) == 0
    out = capsys.readouterr().out
    assert "yours: data.balance\n" in out and "the project's: data.parse_draft," in out
    assert (data, "balance") in replaced and data.balance is not real
    lines = (tmp_path / "run/data/balanced.jsonl").read_text().splitlines()
    assert len(lines) == 9 + len([x for x in lines if '"helpful"' in x])
    assert sample.generate.__module__ == "sample"
