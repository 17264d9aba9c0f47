"""encoder.py against transformers (BERT, CLIP); sentences and the similarity W against loops."""

import json
import math
import os
import random
import shutil

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from test_files import mutate_json
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from config import UserError
from encoder import WordEncoder, load_encoder, similarities, similarity, split_sentences

SMALL = dict(vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=3)
SMALL |= dict(num_attention_heads=4, max_position_embeddings=10)
CLIP = dict(projection_dim=12, bos_token_id=18, eos_token_id=19, pad_token_id=1)
TOO_LONG = "w2 w3 w4 w5 w6 w7 w8 w9 w10 w11 w12"
TEXTS = ["w3", "w4 w5 w6 w7 w2", "", "w9 w9", "w3 w12", "w7 w2 " * 4, "w16 w17", TOO_LONG]


def randomise(model):
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            one = "orm" in name and name.endswith("weight")
            p.copy_(torch.randn(p.shape, generator=g) * 0.3 + one)
    return model.eval()


def save(model, folder, first, last):
    """The model and a tokenizer: wN is N, every text starts with id `first`, ends with `last`."""
    model.save_pretrained(folder)
    t = Tokenizer(models.WordLevel({f"w{i}": i for i in range(20)}, unk_token="w0"))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [(f"w{i}", i) for i in (first, last)]
    frame = f"w{first} $A w{last}"
    t.post_processor = processors.TemplateProcessing(single=frame, special_tokens=special)
    t.enable_padding(pad_id=1, pad_token="w1", length=30)  # load_encoder switches both off
    t.enable_truncation(4)
    t.save(str(folder / "tokenizer.json"))
    return folder


def ids_of(text, first, last):
    ids = [first, *(int(w[1:]) for w in text.split()), last]
    return torch.tensor([ids if len(ids) <= 10 else ids[:9] + [last]])


@pytest.mark.parametrize("batch", (1, 3, 64))
@torch.no_grad()
def test_bert(batch, tmp_path):
    """The mean over real tokens, of unit length; no padding leaks in, whatever is batched."""
    theirs = randomise(transformers.BertModel(transformers.BertConfig(**SMALL)))
    ours = load_encoder(save(theirs, tmp_path, 18, 19))
    mean = lambda text: theirs(ids_of(text, 18, 19)).last_hidden_state.mean(1)
    want, got = F.normalize(torch.cat([mean(t) for t in TEXTS])), ours.embed(TEXTS, batch)
    assert (got - want).abs().max() < 1e-5
    assert torch.allclose(got.norm(dim=1), torch.ones(len(TEXTS)))
    assert F.pdist(want).min() > 1e-2  # the texts' vectors do differ
    assert ours.embed([]).shape == (0, 16)


# 2 is what old configs say when they mean the largest id
@pytest.mark.parametrize("eos, last", ((2, 19), (19, 19), (5, 5)))
@pytest.mark.parametrize("act", ("quick_gelu", "gelu"))
@torch.no_grad()
def test_clip_text_model(eos, last, act, tmp_path):
    """eos: the id in config.json; last: the id that ends a text, which counts where it is first."""
    texts = [t for t in TEXTS if f"w{last}" not in t.split()]
    texts += ["w5 w19 w18 w3"] if last == 5 else []
    more = {**SMALL, **CLIP, "eos_token_id": eos, "hidden_act": act}
    config = transformers.CLIPTextConfig(**more)
    theirs = randomise(transformers.CLIPTextModelWithProjection(config))
    ours = load_encoder(save(theirs, tmp_path, 18, last))
    want = torch.cat([F.normalize(theirs(ids_of(t, 18, last)).text_embeds) for t in texts])
    assert (ours.embed(texts, 3) - want).abs().max() < 1e-5


@pytest.mark.parametrize("eos, where", ((2, "text_config"), (19, "text_config"), (19, "older")))
@torch.no_grad()
def test_whole_clip(eos, where, tmp_path):
    """An image tower lies beside the text tower; config.json leaves defaults out, as old ones."""
    text = {**SMALL, **CLIP, "num_attention_heads": 8, "eos_token_id": eos}
    vision = {**SMALL, "num_hidden_layers": 1, "image_size": 8, "patch_size": 4}
    del vision["vocab_size"], vision["max_position_embeddings"]
    parts = {
        "text_config": transformers.CLIPTextConfig(**text).to_dict(),
        "vision_config": transformers.CLIPVisionConfig(**vision).to_dict(),
    }
    config = transformers.CLIPConfig(**parts, projection_dim=12)
    theirs = randomise(transformers.CLIPModel(config))
    save(theirs, tmp_path, 18, 19)
    raw = json.loads((tmp_path / "config.json").read_text())
    for name in ("num_attention_heads", "hidden_act", "layer_norm_eps"):
        del raw["text_config"][name]
    if where == "older":  # text_config_dict counts
        raw["text_config_dict"] = raw["text_config"]
        raw["text_config"] = raw["text_config"] | {"hidden_act": "gelu", "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    pooled = [theirs.text_model(ids_of(t, 18, 19)).pooler_output for t in TEXTS]
    want = F.normalize(theirs.text_projection(torch.cat(pooled)))
    assert (load_encoder(tmp_path).embed(TEXTS, 3) - want).abs().max() < 1e-5


HEADS = "hidden_size must be a multiple of num_attention_heads"
WRONG = {  # what is wrong in a BERT's config.json, and what is said
    "kind": (dict(model_type="t5"), "text encoder 't5'"),
    "activation": (dict(hidden_act="relu"), "activation 'relu'"),
    "layers": (dict(num_hidden_layers=4), "tensor layers.3.down.bias: found nothing"),
    "family": (dict(model_type="clip_text_model"), "tensor layers.0.down.bias: found nothing"),
    "width": (dict(hidden_size=10**9), "hidden_size.*1000000000"),
    "heads": (dict(num_attention_heads=3), HEADS),
    "shape": (dict(intermediate_size=13), r"layers.0.down.weight: found \(16, 24\)"),
    "positions": (dict(max_position_embeddings=11), r"positions: found \(10, 16\)"),
    "nothing": (dict(hidden_size=None), "hidden_size"),
}


@pytest.fixture
def bert(tmp_path):
    theirs = randomise(transformers.BertModel(transformers.BertConfig(**SMALL)))
    return save(theirs, tmp_path, 18, 19)


@pytest.mark.parametrize("name", WRONG)
def test_folder_errors(bert, name):
    changes, words = WRONG[name]
    raw = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps({**raw, **changes}))
    with pytest.raises(UserError, match=f"{bert}.*{words}"):
        load_encoder(bert)


def test_no_folder(bert, tmp_path):
    (bert / "tokenizer.json").unlink()
    (tmp_path / "lora").mkdir()
    base = {"base_model_name_or_path": "BAAI/bge-small-en-v1.5", "peft_type": "LORA"}
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps(base))
    for folder, why in (
        (bert, "it has no tokenizer.json"),
        (tmp_path / "nowhere", "no such folder; download it first: hf download"),
        (tmp_path / "lora", "an adapter \\(LORA\\): merge it into 'BAAI/bge-small"),
    ):
        with pytest.raises(UserError, match=f"{folder} is no encoder folder: {why}"):
            load_encoder(folder)


def change_tensors(folder, change):
    """change: the new name and tensor of each."""
    state = load_file(folder / "model.safetensors")
    state = dict(change(name, x.clone()) for name, x in state.items())
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def test_names_of_the_first_bert(bert):
    """gamma, beta and bert., read by transformers: the same vectors as under today's names."""
    want = load_encoder(bert).embed(TEXTS)
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def first(name, x):
        for new, its in old.items():
            name = name.replace(new, its)
        return "bert." + name, x

    change_tensors(bert, first)
    theirs = transformers.BertModel.from_pretrained(bert).eval()
    mean = [theirs(ids_of(t, 18, 19)).last_hidden_state.mean(1) for t in TEXTS]
    got = load_encoder(bert).embed(TEXTS)
    assert torch.equal(got, want) and (got - F.normalize(torch.cat(mean))).abs().max() < 1e-5


def pooling_file(folder, **raw):
    (folder / "1_Pooling").mkdir(exist_ok=True)
    raw["word_embedding_dimension"] = 16
    (folder / "1_Pooling/config.json").write_text(json.dumps(raw))


def modules_file(folder, *kinds):
    modules = [{"path": f"{i}_{kind}", "type": f"st.models.{kind}"} for i, kind in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(modules))


FLAGS = ("mean_tokens", "max_tokens", "cls_token", "weightedmean_tokens", "lasttoken")
FLAGS = {f"pooling_mode_{name}": False for name in (*FLAGS, "mean_sqrt_len_tokens")}
MEAN, CLS = "pooling_mode_mean_tokens", "pooling_mode_cls_token"
POOLED = {  # 1_Pooling/config.json, what is done
    "nothing": ({}, "mean"),
    "mean": ({**FLAGS, MEAN: True, "include_prompt": True}, "mean"),
    "cls": ({**FLAGS, CLS: True}, "cls"),
    "mean by name": ({"pooling_mode": "mean", "embedding_dimension": 16}, "mean"),
    "cls by name": ({"pooling_mode": "cls"}, "cls"),
    "the name counts": ({**FLAGS, MEAN: True, "pooling_mode": "cls"}, "cls"),
    "no name": ({**FLAGS, CLS: True, "pooling_mode": None}, "cls"),
}


@pytest.mark.parametrize("name", POOLED)
@torch.no_grad()
def test_pooling(bert, name):
    raw, mode = POOLED[name]
    pooling_file(bert, **raw)
    modules_file(bert, "Transformer", "Pooling", "Normalize")
    theirs = transformers.BertModel.from_pretrained(bert).eval()
    states = [theirs(ids_of(t, 18, 19)).last_hidden_state for t in TEXTS]
    want = torch.cat([x[:, 0] if mode == "cls" else x.mean(1) for x in states])
    for batch in (1, 3):
        assert (load_encoder(bert).embed(TEXTS, batch) - F.normalize(want)).abs().max() < 1e-5


@torch.no_grad()
def test_pooling_in_another_folder(bert):
    """modules.json says where it lies."""
    want = {}
    for mode, flag in (("mean", MEAN), ("cls", CLS)):
        pooling_file(bert, **FLAGS | {flag: True})
        want[mode] = load_encoder(bert).embed(TEXTS)
    (bert / "1_Pooling").rename(bert / "pooler")
    assert torch.equal(load_encoder(bert).embed(TEXTS), want["mean"])
    (bert / "modules.json").write_text(json.dumps([{"path": "pooler", "type": "st.Pooling"}]))
    assert torch.equal(load_encoder(bert).embed(TEXTS), want["cls"])
    (bert / "modules.json").write_text(json.dumps([{"path": "../x", "type": "st.Pooling"}]))
    with pytest.raises(UserError, match="leads out of the folder"):
        load_encoder(bert)


@pytest.mark.parametrize(
    "change", [{"is_decoder": True}, {"position_embedding_type": "relative_key_query"}]
)
def test_other_attention_is_refused(bert, change):
    raw = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps(raw | change))
    with pytest.raises(UserError, match="config.json: unsupported: is_decoder, or positions"):
        load_encoder(bert)


OTHER_POOLING = {  # 1_Pooling/config.json, words of the message
    "max": ({**FLAGS, "pooling_mode_max_tokens": True}, "pooling 'max': want mean or cls"),
    "last": ({**FLAGS, "pooling_mode_lasttoken": True}, "pooling 'lasttoken'"),
    "weighted": ({**FLAGS, "pooling_mode_weightedmean_tokens": True}, "pooling 'weightedmean'"),
    "two": ({**FLAGS, MEAN: True, CLS: True}, r"pooling 'mean_tokens \+ cls'"),
    "two, one by default": ({CLS: True}, r"pooling 'mean_tokens \+ cls'"),
    "none": (FLAGS, "pooling '': want"),
    "max by name": ({"pooling_mode": "max"}, "pooling 'max'"),
    "two by name": ({"pooling_mode": ["cls", "mean"]}, "pooling"),
    "nonsense": ({"pooling_mode": {"a\n": 9**99}}, "pooling"),
}


@pytest.mark.parametrize("name", OTHER_POOLING)
def test_other_pooling_is_refused(bert, name):
    raw, words = OTHER_POOLING[name]
    pooling_file(bert, **raw)
    with pytest.raises(UserError, match=f"{bert}/1_Pooling/config.json: unsupported {words}") as e:
        load_encoder(bert)
    assert "\n" not in str(e.value)


def test_other_modules_are_refused(bert):
    modules_file(bert, "Transformer", "Pooling")
    with pytest.raises(UserError, match="cannot read .*/1_Pooling/config.json: No such file"):
        load_encoder(bert)
    pooling_file(bert, pooling_mode="mean")
    load_encoder(bert)
    modules_file(bert, "Transformer", "Pooling", "Dense", "Normalize")
    with pytest.raises(UserError, match=f"{bert}/modules.json: unsupported module 'Dense'"):
        load_encoder(bert)
    for content in ("[3]", "[{}]", '[{"type": ["Pooling"]}]', "{}", "["):
        (bert / "modules.json").write_text(content)
        with pytest.raises(UserError, match=f"{bert}/modules.json"):
            load_encoder(bert)


def test_pooling_in_the_hugging_face_cache(bert, tmp_path):
    """Its files are links to blobs/, from a subfolder three folders up; other links are refused."""
    pooling_file(bert, pooling_mode="cls")
    folder, blobs = tmp_path / "hub/snapshots/abc", tmp_path / "hub/blobs"
    blobs.mkdir(parents=True)
    (folder / "1_Pooling").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "1_Pooling/config.json"):
        blob = blobs / name.replace("/", "-")
        shutil.copy(bert / name, blob)
        (folder / name).symlink_to(os.path.relpath(blob, (folder / name).parent))
    assert torch.equal(load_encoder(folder).embed(TEXTS), load_encoder(bert).embed(TEXTS))
    (folder / "1_Pooling/config.json").unlink()
    (folder / "1_Pooling/config.json").symlink_to(bert / "config.json")
    with pytest.raises(UserError, match="1_Pooling: 'config.json' leads out of the folder"):
        load_encoder(folder)


def test_quantised_weights_are_refused(bert):
    """Whole numbers that are positions are none."""
    query = "encoder.layer.0.attention.self.query.weight"
    positions = lambda name, x: ("embeddings.position_ids", torch.arange(10)[None])
    change_tensors(bert, lambda name, x: positions(name, x) if "pooler" in name else (name, x))
    load_encoder(bert)
    for kind in (torch.int8, torch.float8_e4m3fn):
        change_tensors(bert, lambda name, x: (name, x.to(kind) if name == query else x))
        with pytest.raises(UserError, match=rf"{bert}: these weights are quantised \({kind}\)"):
            load_encoder(bert)


def test_fuzz(bert):
    """A mutated config.json or pooling mode works or is refused by a UserError."""
    pooling_file(bert, **{**FLAGS, MEAN: True})
    paths = [bert / "config.json", bert / "1_Pooling/config.json"]
    rng, refused = random.Random(0), 0
    whole = [path.read_bytes() for path in paths]
    for n in range(300):
        for path, raw in zip(paths, whole):
            path.write_bytes(raw)
        paths[n % 2].write_bytes(mutate_json(whole[n % 2], rng))
        try:
            load_encoder(bert).embed(["w3 w4"])
        except UserError as e:
            refused += 1
            assert str(bert) in str(e)
    assert 30 < refused < 300


def test_word_encoder():
    words = load_encoder("words")
    a, b, c, empty = words.embed(["kill the lights", "Lights: the KILL!", "bake a cake", ""])
    assert torch.allclose(a, b, atol=1e-6) and (a @ c).abs() < 0.3 and (empty == 0).all()
    assert torch.allclose(words.embed(["kill the lights"])[0], a)
    assert words.embed([]).shape == (0, 256)


SENTENCES = {
    "": [],
    "  \n ": [],
    "...": [],
    "One piece": ["One piece"],
    "A. B! C? D; E": ["A.", "B!", "C?", "D;", "E"],
    "Version 1.5 of it.Then": ["Version 1.5 of it.Then"],  # a dot cuts only before a space
    "a step\nanother\n\n\n#### So. And more.": ["a step", "another", "So.", "And more."],
    "C# and #1 stay": ["C# and #1 stay"],
    "yes ... no!? \n - \n ok": ["yes ...", "no!?", "ok"],
    "Nein. Äh; 不": ["Nein.", "Äh;", "不"],
}


@pytest.mark.parametrize("text", SENTENCES)
def test_split_sentences(text):
    assert split_sentences(text) == SENTENCES[text]


def loops(response, demonstration):
    """The mean over response sentences of the best cosine, with plain numbers."""
    best = []
    for r in response.tolist():
        cos = []
        for d in demonstration.tolist():
            dot = sum(x * y for x, y in zip(r, d))
            cos.append(dot / math.sqrt(sum(x * x for x in r) * sum(y * y for y in d)))
        best.append(max(cos))
    return sum(best) / len(best)


@pytest.mark.parametrize("k, l", ((1, 1), (1, 5), (5, 1), (3, 4), (7, 2)))
def test_similarity(k, l):
    g = torch.Generator().manual_seed(0)
    r, d = (torch.randn(n, 6, generator=g, dtype=torch.double) for n in (k, l))
    w = similarity(r, d)
    assert w.shape == () and -1 <= w <= 1 and w.item() == pytest.approx(loops(r, d), abs=1e-12)
    torch.testing.assert_close(similarity(r * 3, d * 0.2), w)  # lengths do not matter
    torch.testing.assert_close(similarity(r.flip(0), d.flip(0)), w)  # nor does the order


def test_similarity_by_hand():
    """It is not symmetric."""
    r, d = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    for a, b, want in ((r, d, (1 + 0.5**0.5) / 2), (d, d[:1], (1 + 0.5**0.5) / 2), (d[:1], d, 1)):
        assert similarity(a, b).item() == pytest.approx(want)
    assert similarity(r[:1], -r[:1]).item() == pytest.approx(-1)


def test_similarity_of_nothing():
    x = torch.ones(2, 3)
    for a, b in ((x[:0], x), (x, x[:0]), (x[:0], x[:0])):
        assert similarity(a, b).shape == () and similarity(a, b) == 0
    for a, b in ((x[0], x), (x, x[:, :2])):
        with pytest.raises(ValueError, match=r"want \(K, D\) and \(L, D\)"):
            similarity(a, b)


def test_similarities():
    """Each is similarity of the sentences' embeddings; a text without sentences has 0."""
    texts = [["One cat. Two dogs!", "####", "A bird sings\n#### Two dogs"]]
    texts += [["Nothing alike", "Two dogs", "one cat"]]
    demonstrations, encoder = ["one cat\n#### Two dogs.", "A bird sings"], WordEncoder()
    W = similarities(encoder, texts, demonstrations)
    sentences = lambda text: encoder.embed(split_sentences(text))
    for p, group in enumerate(texts):
        for i, text in enumerate(group):
            direct = similarity(sentences(text), sentences(demonstrations[p]))
            assert W[p, i].item() == pytest.approx(direct.item(), abs=1e-5)
    assert W[0, 0].item() == pytest.approx(1, abs=1e-5) and W[0, 1] == 0 and W[1, 0].abs() < 0.5
