"""encoder.py: random BERT and CLIP text towers against transformers, sentences and the similarity W against loops."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from data import UserError
from encoder import load_encoder, similarity, split_sentences

SMALL = dict(
    vocab_size=20,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=10,
)
CLIP = dict(projection_dim=12, bos_token_id=18, eos_token_id=19, pad_token_id=1)
TEXTS = [
    "w3",
    "w4 w5 w6 w7 w2",
    "",
    "w9 w9",
    "w3 w12",
    " ".join(["w7", "w2"] * 4),
    "w16 w17",
    "w2 w3 w4 w5 w6 w7 w8 w9 w10 w11 w12",
]  # the last is too long


def randomise(model):
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(
                torch.randn(p.shape, generator=g) * 0.3
                + (("orm" in name) and name.endswith("weight"))
            )
    return model.eval()


def save(model, folder, first, last):
    """The model and a tokenizer whose ids are known: word wN is N, every text starts with id `first` and ends with `last`."""
    model.save_pretrained(folder)
    t = Tokenizer(models.WordLevel({f"w{i}": i for i in range(20)}, unk_token="w0"))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    t.post_processor = processors.TemplateProcessing(
        single=f"w{first} $A w{last}", special_tokens=[(f"w{first}", first), (f"w{last}", last)]
    )
    t.enable_padding(
        pad_id=1, pad_token="w1", length=30
    )  # load_encoder has to switch both of these off
    t.enable_truncation(4)
    t.save(str(folder / "tokenizer.json"))
    return folder


def ids_of(text, first, last):
    ids = [first, *(int(w[1:]) for w in text.split()), last]
    return torch.tensor([ids if len(ids) <= 10 else ids[:9] + [last]])


@pytest.mark.parametrize("batch", (1, 3, 64))
@torch.no_grad()
def test_bert(batch, tmp_path):
    """Mean over real tokens, then unit length; no padding leaks in, whatever is batched together."""
    theirs = randomise(transformers.BertModel(transformers.BertConfig(**SMALL)))
    ours = load_encoder(save(theirs, tmp_path, 18, 19))
    want = torch.cat(
        [F.normalize(theirs(ids_of(t, 18, 19)).last_hidden_state.mean(1)) for t in TEXTS]
    )
    got = ours.embed(TEXTS, batch)
    assert (got - want).abs().max() < 1e-5
    assert torch.allclose(got.norm(dim=1), torch.ones(len(TEXTS)))
    assert F.pdist(want).min() > 1e-2  # the texts' vectors do differ
    assert ours.embed([]).shape == (0, 16)


def drop_defaults(folder, **changes):
    """config.json as old transformers wrote it for a whole CLIP: only what differs from the defaults."""
    raw = json.loads((folder / "config.json").read_text())
    for name in ("num_attention_heads", "hidden_act", "layer_norm_eps"):
        del raw["text_config"][name]
    raw["text_config"].update(changes)
    (folder / "config.json").write_text(json.dumps(raw))


# (eos id in config.json, id that ends a text): 2 is what old configs say when they mean the largest id
@pytest.mark.parametrize("eos, last", ((2, 19), (19, 19), (5, 5)))
@pytest.mark.parametrize("act", ("quick_gelu", "gelu"))
@torch.no_grad()
def test_clip_text_model(eos, last, act, tmp_path):
    texts = [t for t in TEXTS if f"w{last}" not in t.split()] + (
        ["w5 w19 w18 w3"] if last == 5 else []
    )  # it counts where w5 stands first
    config = transformers.CLIPTextConfig(
        **{**SMALL, **CLIP, "eos_token_id": eos, "hidden_act": act}
    )
    theirs = randomise(transformers.CLIPTextModelWithProjection(config))
    ours = load_encoder(save(theirs, tmp_path, 18, last))
    want = torch.cat([F.normalize(theirs(ids_of(t, 18, last)).text_embeds) for t in texts])
    assert (ours.embed(texts, 3) - want).abs().max() < 1e-5


@pytest.mark.parametrize("eos", (2, 19))
@torch.no_grad()
def test_whole_clip(eos, tmp_path):
    """A folder with an image tower beside the text tower, and a config.json that leaves defaults out."""
    text = transformers.CLIPTextConfig(
        **{**SMALL, **CLIP, "num_attention_heads": 8, "eos_token_id": eos}
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    config = transformers.CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12
    )
    theirs = randomise(transformers.CLIPModel(config))
    save(theirs, tmp_path, 18, 19)
    drop_defaults(tmp_path)
    want = [
        theirs.text_projection(theirs.text_model(ids_of(t, 18, 19)).pooler_output) for t in TEXTS
    ]
    assert (
        load_encoder(tmp_path).embed(TEXTS, 3) - F.normalize(torch.cat(want))
    ).abs().max() < 1e-5


def test_folder_errors(tmp_path):
    with pytest.raises(UserError, match="nowhere is no text-encoder folder"):
        load_encoder(tmp_path / "nowhere")
    theirs = transformers.BertModel(transformers.BertConfig(**SMALL))
    save(theirs, tmp_path, 18, 19)
    raw = json.loads((tmp_path / "config.json").read_text())
    for changes, words in (
        (dict(model_type="t5"), "unsupported text encoder 't5'"),
        (dict(hidden_act="relu"), "unsupported activation 'relu'"),
        (dict(num_hidden_layers=4), r"lacks 'encoder.layer.3.attention.self.query.weight'"),
        (dict(model_type="clip_text_model"), "lacks"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**raw, **changes}))
        with pytest.raises(UserError, match=words):
            load_encoder(tmp_path)
    del raw["hidden_size"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="lacks 'hidden_size'"):
        load_encoder(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="needs config.json and tokenizer.json"):
        load_encoder(tmp_path)


def test_word_encoder():
    words = load_encoder("words")
    a, b, c, empty = words.embed(["kill the lights", "Lights: the KILL!", "bake a cake", ""])
    assert torch.allclose(a, b, atol=1e-6) and (a @ c).abs() < 0.3 and (empty == 0).all()
    assert torch.allclose(words.embed(["kill the lights"])[0], a) and words.embed([]).shape == (
        0,
        256,
    )


@pytest.mark.parametrize(
    "text, want",
    [
        ("", []),
        ("  \n ", []),
        ("...", []),
        ("One piece", ["One piece"]),
        ("A. B! C? D; E", ["A.", "B!", "C?", "D;", "E"]),
        ("Version 1.5 of it.Then", ["Version 1.5 of it.Then"]),  # a dot cuts only before a space
        (
            "a step\nanother\n\n\n#### The answer. And more.",
            ["a step", "another", "The answer.", "And more."],
        ),
        ("C# and #1 stay", ["C# and #1 stay"]),
        ("yes ... no!? \n - \n ok", ["yes ...", "no!?", "ok"]),
        ("Nein. Äh; 不", ["Nein.", "Äh;", "不"]),
    ],
)
def test_split_sentences(text, want):
    assert split_sentences(text) == want


def loops(response, demonstration):
    """mean over response sentences of the best cosine with any demonstration sentence, with plain numbers."""
    best = []
    for r in response.tolist():
        cos = []
        for d in demonstration.tolist():
            dot = sum(x * y for x, y in zip(r, d))
            cos.append(dot / math.sqrt(sum(x * x for x in r) * sum(y * y for y in d)))
        best.append(max(cos))
    return sum(best) / len(best)


def test_similarity():
    g = torch.Generator().manual_seed(0)
    for k, l in ((1, 1), (1, 5), (5, 1), (3, 4), (7, 2)):
        r, d = (
            torch.randn(k, 6, generator=g, dtype=torch.double),
            torch.randn(l, 6, generator=g, dtype=torch.double),
        )
        w = similarity(r, d)
        assert w.shape == () and -1 <= w <= 1 and float(w) == pytest.approx(loops(r, d), abs=1e-12)
        torch.testing.assert_close(similarity(r * 3, d * 0.2), w)  # lengths do not matter
        torch.testing.assert_close(similarity(r.flip(0), d.flip(0)), w)  # nor does the order
    r, d = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    assert float(similarity(r, d)) == pytest.approx((1 + 0.5**0.5) / 2)
    assert float(similarity(d, d[:1])) == pytest.approx((1 + 0.5**0.5) / 2) and float(
        similarity(d[:1], d)
    ) == pytest.approx(1)  # not symmetric
    assert float(similarity(r[:1], -r[:1])) == pytest.approx(-1)


def test_similarity_of_nothing():
    x = torch.ones(2, 3)
    for a, b in ((x[:0], x), (x, x[:0]), (x[:0], x[:0])):
        assert similarity(a, b).shape == () and similarity(a, b) == 0
    for a, b in ((x[0], x), (x, x[:, :2])):
        with pytest.raises(ValueError, match=r"want \(K, D\) and \(L, D\)"):
            similarity(a, b)
