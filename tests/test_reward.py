"""reward.py: the gradient on a world that can be listed, shadow models on a tiny transformer."""

import math
import random

import pytest
import torch
from conftest import TINY_LLAMA
from test_grpo_train import Letters, tiny

import reward
from config import Config, IRLConfig, UserError, changed
from data import CATEGORIES, HELPFUL
from evaluate import auc
from model import Transformer
from reward import (
    RewardModels,
    adamw,
    fit,
    irl_loss,
    pack_groups,
    sample_groups,
    score_groups,
    standardise,
)
from sample import Batch, run_blocks
from support.hf import load_rewards, read_config, save_rewards
from support.resume import Loop

NAMES = [*CATEGORIES, HELPFUL]


# ---------------------------------------------------------------------------- the loss


class World:
    """P prompts with M responses each, all listed.

    pi_ref, a reward linear in features, one demonstration a prompt.
    """

    def __init__(self, P=3, M=6, features=4, seed=0):
        g = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
        self.log_ref, self.phi = draw(P, M).log_softmax(1), draw(P, M, features)
        self.w, self.demo = draw(features), torch.randint(M, (P,), generator=g)

    def minus_gradient(self, beta):
        """Minus grad l of reward.py, in loops."""
        P, M, _ = self.phi.shape
        total = torch.zeros_like(self.w)
        for p in range(P):
            r = [(self.phi[p, y] @ self.w).item() for y in range(M)]
            weight = [math.exp(self.log_ref[p, y].item() + r[y] / beta) for y in range(M)]
            expected = sum(v / sum(weight) * self.phi[p, y] for y, v in enumerate(weight))
            total += self.phi[p, self.demo[p]] - expected
        return -total / beta / P

    def gradient(self, estimator, beta=1.0, samples=None, log_ratio=0.0):
        """Of irl_loss, by autograd. samples (P, K): indices of responses; None: all of them."""
        w = self.w.clone().requires_grad_(True)
        r = self.phi @ w
        r_demo = r.gather(1, self.demo[:, None])[:, 0]
        r_samples = r if samples is None else r.gather(1, samples)
        irl_loss(r_demo, r_samples, beta, estimator, log_ratio).backward()
        return w.grad

    def error(self, estimator, beta, policy, K, g):
        """Distance of the estimate from K samples of a policy (P, M), mean of five trials."""
        draws = [torch.multinomial(policy, K, replacement=True, generator=g) for _ in range(5)]
        want = self.minus_gradient(beta)
        errors = [(self.gradient(estimator, beta, samples) - want).norm() for samples in draws]
        return sum(errors).item() / 5

    def best(self, beta):
        return (self.log_ref + self.phi @ self.w / beta).softmax(1)


def close(got, want, tolerance):
    torch.testing.assert_close(got, want, atol=tolerance, rtol=0)


@pytest.mark.parametrize("beta", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_importance_over_all_responses_is_the_exact_gradient(seed, beta):
    world = World(seed=seed)
    got = world.gradient("importance", beta, log_ratio=world.log_ref)
    close(got, world.minus_gradient(beta), 1e-10)


def test_importance_corrects_for_the_sampler():
    """Samples of a uniform q: log_ratio = log pi_ref - log q, whatever its constant."""
    world = World(seed=2)
    got = world.gradient("importance", log_ratio=world.log_ref - math.log(1 / 6))
    close(got, world.minus_gradient(1.0), 1e-10)


def test_importance_converges_with_samples_of_the_reference():
    """1 / sqrt(K) would be a 32nd."""
    world, g = World(seed=3), torch.Generator().manual_seed(0)
    policy = world.log_ref.exp()
    few, many = (world.error("importance", 1.0, policy, K, g) for K in (20, 20000))
    assert many < 0.03 and many < few / 8


def test_linear_converges_with_samples_of_the_best_response():
    """Samples of pi_ref need their weights: without, the estimate is biased."""
    world, beta, g = World(seed=3), 0.7, torch.Generator().manual_seed(0)
    few, many = (world.error("linear", beta, world.best(beta), K, g) for K in (20, 20000))
    assert many < 0.03 and many < few / 8
    assert world.error("linear", beta, world.log_ref.exp(), 20000, g) > 0.2


def test_linear_is_the_plain_mean():
    """Responses listed in proportion to a policy (counts 3, 1, 2) give its expectation."""
    world, beta = World(P=2, M=3, seed=4), 0.7
    policy = torch.tensor([3 / 6, 1 / 6, 2 / 6], dtype=torch.float64)
    want = -sum(world.phi[p, world.demo[p]] - policy @ world.phi[p] for p in range(2)) / 2 / beta
    got = world.gradient("linear", beta, torch.tensor([[0, 0, 0, 1, 2, 2]] * 2))
    close(got, want, 1e-12)


def test_logistic_by_hand():
    demo, samples = torch.tensor([1.0, 0.0]), torch.tensor([[0.0, 2.0], [0.0, -1.0]])
    want = sum(math.log(1 + math.exp(-d / 0.5)) for d in (1, -1, 0, 1)) / 4
    assert irl_loss(demo, samples, 0.5, "logistic").item() == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("gap, slope", [(1e4, 0), (-1e4, -1)])
def test_logistic_is_bounded_and_finite(gap, slope):
    demo = torch.tensor([gap], requires_grad=True)
    value = irl_loss(demo, torch.zeros(1, 3), 1.0, "logistic")
    value.backward()
    assert 0 <= value.item() < math.inf and demo.grad.item() == slope


def test_importance_is_finite_at_extremes():
    r = torch.tensor([[1e4, -1e4]], requires_grad=True)
    irl_loss(torch.tensor([0.0]), r, 1.0, "importance").backward()
    assert r.grad.tolist() == [[1.0, 0.0]]


BETA = 0.5


def truth():
    """A world, its true table of rewards, and pi*, which the demonstrations are drawn from."""
    world = World(P=2, M=4, seed=5)
    draw = torch.Generator().manual_seed(9)
    table = torch.randn(2, 4, generator=draw, dtype=torch.float64)
    return world, table, (world.log_ref + table / BETA).softmax(1)


def centred(z):
    return z - z.mean(1, keepdim=True)


def test_exact_descent_recovers_the_true_reward():
    """Up to a constant per prompt. The loss is linear in r_demo, so its mean over pi* will do."""
    world, table, demonstrated = truth()
    r = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    more = {"max_iter": 300, "tolerance_grad": 1e-12, "tolerance_change": 1e-16}
    optimizer = torch.optim.LBFGS([r], **more, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = irl_loss((demonstrated * r).sum(1), r, BETA, "importance", world.log_ref)
        value.backward()
        return value

    optimizer.step(closure)
    close(centred(r.detach()), centred(table), 1e-5)


def test_alternating_descent_recovers_the_true_reward():
    """As Li et al.: samples of the best response to the current table, then a step of descent."""
    world, table, demonstrated = truth()
    g = torch.Generator().manual_seed(1)
    r, late = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True), []
    for step in range(600):
        best = (world.log_ref + r.detach() / BETA).softmax(1)
        samples = r.gather(1, torch.multinomial(best, 4000, replacement=True, generator=g))
        value = irl_loss((demonstrated * r).sum(1), samples, BETA, "linear")
        (grad,) = torch.autograd.grad(value, r)
        r.data -= 0.5 * grad
        if step >= 500:
            late.append(r.detach().clone())
    close(centred(torch.stack(late).mean(0)), centred(table), 0.03)


def test_irl_loss_errors():
    for demo, samples in (((2,), (2,)), ((2, 1), (2, 3)), ((2,), (3, 2))):
        with pytest.raises(ValueError, match="want r_demo"):
            irl_loss(torch.zeros(demo), torch.zeros(samples))
    with pytest.raises(ValueError, match="estimator"):
        irl_loss(torch.zeros(2), torch.zeros(2, 3), estimator="magic")


def test_auc():
    assert auc([3.0, 2.0], [1.0, 0.0]) == 1 and auc([0.0], [1.0, 2.0]) == 0
    assert auc([2.0, 0.0], [1.0, 0.0]) == (1 + 1 + 0 + 0.5) / 4 and auc([1.0], [1.0]) == 0.5
    assert math.isnan(auc([], [1.0])) and math.isnan(auc([1.0], []))


# ---------------------------------------------------------------------------- the models

SHAPE = {"vocab_size": 20, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [2, 2]]
COMPLETIONS = [[[3, 4], [5]], [[6, 7, 8, 9]], [[1], [2, 3, 4], [5, 5]], [[7, 0]]]
MIXED = ["crime", HELPFUL, "insult", "crime"]


@pytest.fixture
def reference():
    torch.manual_seed(0)
    return Transformer(read_config({**TINY_LLAMA, **SHAPE})).requires_grad_(False)


def random_models(reference, **change):
    """Reward models whose every weight differs between categories."""
    models = RewardModels(reference, IRLConfig(**{"reward_blocks": 2, **change}))
    torch.manual_seed(1)
    with torch.no_grad():
        for p in models.parameters():
            p.add_(torch.randn_like(p) * 0.1)
        for i, shadow in enumerate(models.shadows.values()):
            shadow.mean.fill_(0.1 * i)
            shadow.std.fill_(1.0 + i)
    return models.requires_grad_(False)


def score(models, reference, prompts=PROMPTS, completions=COMPLETIONS, categories=MIXED):
    batch = Batch(prompts, completions)
    return models(run_blocks(reference, batch, stop=models.below), batch, categories)


def same(got, want):
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_a_mixed_batch_is_each_prompt_alone(reference, blocks):
    models, parts = random_models(reference, reward_blocks=blocks), [*zip(PROMPTS, COMPLETIONS)]
    assert models.below == (3 - blocks if blocks else 0)
    alone = [score(models, reference, [p], [c], [name]) for (p, c), name in zip(parts, MIXED)]
    same(score(models, reference), torch.cat(alone))
    other = [score(models, reference, [p], [c], ["ethics"]) for p, c in parts]
    assert ((torch.cat(other) - torch.cat(alone)).abs() > 1e-4).all()


def test_padding_does_not_move_where_the_reward_is_read(reference):
    models = random_models(reference)
    more = [*PROMPTS, [1] * 12], [*COMPLETIONS, [[3] * 15]], [*MIXED, "crime"]
    same(score(models, reference, *more)[:7], score(models, reference))


def test_the_reward_is_read_from_every_token_and_the_prompt(reference):
    models = random_models(reference)
    groups = [[4, 5, 6], [4, 5, 7], [4, 7, 6], [7, 5, 6]]
    r = score(models, reference, [[1, 2], [1, 3]], [groups, groups[:1]], ["crime"] * 2)
    assert len({round(v, 5) for v in r.tolist()}) == 5


@torch.no_grad()
def test_the_reward_is_the_mean_over_the_tokens(reference):
    """The head's values of the sequence run alone, in the samples' stds."""
    models, batch = random_models(reference), Batch([[1, 2]], [[[3, 4, 5]]])
    shadow = models.shadows["crime"]
    x = run_blocks(shadow, batch, run_blocks(reference, batch, stop=1))
    values = shadow.value(shadow.norm(x))[2:]
    want = (values.mean() - shadow.mean) / shadow.std
    same(score(models, reference, [[1, 2]], [[[3, 4, 5]]], ["crime"]), want[None])


def test_linear_integration_is_the_mean_of_the_harm_models(reference):
    """Of harmful prompts; a harmless one, which the seven would have refused, keeps its own."""
    own = random_models(reference)
    each = torch.stack([score(own, reference, categories=[name] * 4) for name in NAMES])
    owner = Batch(PROMPTS, COMPLETIONS).owner
    harmless = torch.tensor([name == HELPFUL for name in MIXED])[owner]
    want = torch.where(harmless, each[NAMES.index(HELPFUL)], each[:-1].mean(0))
    same(score(random_models(reference, integration="linear"), reference), want)


def test_one_model_for_all_harm(reference):
    """Beside the helpful one: as with seven, it is known which prompts are harmless."""
    models = random_models(reference, integration="one")
    assert list(models.shadows) == models.names == ["harm", HELPFUL]
    harm, helpful = (score(models, reference, categories=[c] * 4) for c in ("insult", HELPFUL))
    owner = Batch(PROMPTS, COMPLETIONS).owner
    harmless = torch.tensor([name == HELPFUL for name in MIXED])[owner]
    same(score(models, reference, categories=MIXED), torch.where(harmless, helpful, harm))
    assert harmless.any() and not harmless.all() and (harm - helpful).abs().min() > 1e-3


def test_rewards_start_at_zero(reference):
    models = RewardModels(reference, IRLConfig(reward_blocks=1))
    assert score(models, reference).tolist() == [0.0] * 7


def test_save_and_load(reference, tmp_path):
    models, folder = random_models(reference), tmp_path / "rewards"
    save_rewards(models, folder, {"note.txt": "as one set"})
    assert (folder / "note.txt").read_text() == "as one set"
    other = lambda blocks: RewardModels(reference, IRLConfig(reward_blocks=blocks))
    again = load_rewards(other(2), folder)
    assert torch.equal(score(again, reference), score(models, reference))
    assert not any(p.requires_grad for p in again.parameters())
    with pytest.raises(UserError, match="of another --model or --irl-reward-blocks"):
        load_rewards(other(1), folder)
    (folder / "crime.safetensors").unlink()
    with pytest.raises(UserError, match="crime.safetensors; run irl first"):
        load_rewards(other(2), folder)


# ---------------------------------------------------------------------------- fitting


def separable(categories, n=6, seed=0):
    """Demonstrations are made of low tokens, samples of high ones."""
    rng, groups = random.Random(seed), []
    draw = lambda low, high: [rng.randrange(low, high) for _ in range(rng.randint(2, 5))]
    for category in [c for c in categories for _ in range(n)]:
        ids = {"prompt_ids": draw(1, 20), "demonstration": draw(1, 9)}
        samples = [draw(11, 20) for _ in range(3)]
        groups.append({"category": category, **ids, "samples": samples})
    return groups


def fitted(reference, groups, size=6, **change):
    """Reward models, their packed batches and the records of the fit."""
    c = IRLConfig(**{"lr": 1e-3, "reward_blocks": 1, **change})
    models, records = RewardModels(reference, c), []
    batches = pack_groups(models, reference, groups, torch.float32, size)
    loop = Loop("irl", log=lambda **r: records.append(r))
    fit(models, batches, c, torch.float32, loop=loop)
    return models, batches, records


def rewards_of(models, reference, groups, answers):
    """Rewards (len(groups), n) of n answers to each group's prompt."""
    prompts, names = ([g[key] for g in groups] for key in ("prompt_ids", "category"))
    return score(models, reference, prompts, answers, names).view(len(groups), -1)


def samples_of(groups):
    return [g["samples"] for g in groups]


def all_of(groups):
    return [[g["demonstration"], *g["samples"]] for g in groups]


def check_standard(r):
    assert abs(r.mean().item()) < 1e-4 and r.std(correction=0).item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("estimator", ["importance", "linear", "logistic"])
def test_fit(reference, estimator):
    """Accuracy rises; rewards of the fitted samples have mean 0, std 1; the reference stays."""
    before = {k: v.clone() for k, v in reference.state_dict().items()}
    more = {"lr": 3e-3, "joint_epochs": 3, "epochs": 5, "size": 3, "estimator": estimator}
    groups = separable(NAMES)
    models, batches, records = fitted(reference, groups, **more)
    standardise(models, batches, torch.float32)  # again changes nothing
    assert {r["model"] for r in records} == set(NAMES)
    assert [r["step"] for r in records] == list(range(1, 8 * 16 + 1))
    assert records[0]["accuracy"] == 0 and records[-1]["gap_demo_minus_others"] > 0
    assert sum(r["accuracy"] for r in records[-16:]) / 16 > 0.95
    assert all(torch.equal(v, before[k]) for k, v in reference.state_dict().items())
    assert not any(p.requires_grad for p in models.parameters())
    held = separable(NAMES, n=2, seed=1)
    r = rewards_of(models, reference, held, all_of(held))
    assert (r[:, :1] > r[:, 1:]).float().mean() > 0.9
    for name in NAMES:
        mine = [g for g in groups if g["category"] == name]
        check_standard(rewards_of(models, reference, mine, samples_of(mine)))


def test_what_a_step_is_made_of(reference, monkeypatch):
    """The penalty, beta, ten times the learning rate for the heads, new moments at the parting."""
    seen, optimizers = [], []

    def watched(r_demo, r_others, beta, estimator):
        seen.append((torch.cat((r_demo[:, None], r_others), 1), beta, estimator))
        return irl_loss(r_demo, r_others, beta, estimator)

    def made(*args):
        optimizers.append(adamw(*args))
        return optimizers[-1]

    monkeypatch.setattr(reward, "irl_loss", watched)
    monkeypatch.setattr(reward, "adamw", made)
    monkeypatch.setattr(reward, "L2", 0.5)
    penalties = []

    class Watched(Loop):
        def update(self, step, loss, parameters, /, **record):
            penalties.append(loss.item() - record["loss"])
            super().update(step, loss, parameters, **record)

    c = IRLConfig(reward_blocks=1, joint_epochs=2, epochs=1, beta=0.7, lr=1e-3)
    models, groups = RewardModels(reference, c), separable(NAMES, n=2)
    batches = pack_groups(models, reference, groups, torch.float32)
    fit(models, batches, c, torch.float32, loop=Watched("irl"))
    assert {args[1:] for args in seen} == {(0.7, "importance")}
    want = [0.5 * r.pow(2).mean().item() for r, *_ in seen]
    assert penalties == pytest.approx(want, abs=1e-6) and max(want) > 0.01
    assert len(optimizers) == 2
    blocks, heads = optimizers[0].param_groups
    assert heads["lr"] == pytest.approx(10 * blocks["lr"])
    assert sum(p.numel() for p in heads["params"]) == len(NAMES) * 33


def test_fit_trains_a_category_on_its_own_groups(reference):
    """The same groups for crime, others for insult: crime's model must not change."""
    rest, heads = [name for name in NAMES if name != "crime"], []
    for seed in (1, 2):
        groups = separable(["crime"]) + separable(rest, seed=seed)
        models, *_ = fitted(reference, groups, epochs=2, size=8)
        heads.append({name: shadow.value.weight for name, shadow in models.shadows.items()})
    near = lambda name: torch.allclose(heads[0][name], heads[1][name], atol=1e-4)
    assert near("crime") and not near("insult")


@pytest.mark.parametrize("epochs, alike", [(0, True), (1, False)])
def test_joint_epochs_share_one_harm_model(reference, epochs, alike):
    """The seven are one model, but for their normalisation, until further epochs part them."""
    models, _, records = fitted(reference, separable(NAMES), joint_epochs=2, epochs=epochs, size=8)
    vectors = {}
    for name, shadow in models.shadows.items():
        vectors[name] = torch.cat([p.flatten() for p in shadow.parameters()])
        assert shadow.value.weight.abs().max() > 0
    for name in CATEGORIES:
        assert torch.equal(vectors[name], vectors["crime"]) == (alike or name == "crime")
    assert not torch.equal(vectors[HELPFUL], vectors["crime"])
    assert sorted(r["model"] for r in records) == sorted(NAMES * (2 + epochs))


def test_fit_needs_groups_of_every_model(reference):
    groups = separable([name for name in NAMES if name != "privacy"], n=1)
    with pytest.raises(UserError, match="no samples to fit reward model 'privacy' on"):
        fitted(reference, groups)


def test_one_model_is_fitted_on_all_harm(reference):
    groups = separable(NAMES, n=2)
    models, batches, records = fitted(reference, groups, integration="one", size=4)
    assert {r["model"] for r in records} == {"harm", HELPFUL} and len(batches) == 5  # of 14 and 2
    for harmless in (False, True):
        mine = [g for g in groups if (g["category"] == HELPFUL) == harmless]
        check_standard(rewards_of(models, reference, mine, samples_of(mine)))


def test_contrasts_are_pushed_down_and_left_out_of_the_scale(reference):
    """Samples equal to the demonstration teach nothing; the contrast must end below both."""
    groups = []
    for g in separable(NAMES):
        contrast = [g["samples"][0]]
        groups.append({**g, "samples": [g["demonstration"]] * 2, "contrast": contrast})
    more = {"lr": 3e-3, "joint_epochs": 1, "epochs": 4, "size": 3}
    models, batches, _ = fitted(reference, groups, **more)
    score_groups(models, batches, torch.float32)
    assert all(len(g["rewards"]) == 2 for g in groups)
    low = rewards_of(models, reference, groups, [g["contrast"] for g in groups])[:, 0]
    demos = torch.tensor([g["reward_demo"] for g in groups])
    assert (low < demos).float().mean() > 0.9
    for name in NAMES:
        check_standard(torch.tensor([g["rewards"] for g in groups if g["category"] == name]))


@pytest.mark.parametrize("size", (1, 4, 100))
def test_score_adds_rewards_to_groups(reference, size):
    """The same whatever the batch size, and the demonstration's apart from the samples'."""
    models, groups = random_models(reference), separable(["crime", HELPFUL, "insult"], n=2)
    batches = pack_groups(models, reference, groups, torch.float32, size)
    score_groups(models, batches, torch.float32)
    for g in groups:
        alone = rewards_of(models, reference, [g], all_of([g]))[0].tolist()
        assert [g["reward_demo"], *g["rewards"]] == pytest.approx(alone, abs=1e-5)


# ---------------------------------------------------------------------------- samples


def test_sample_groups():
    """Prompts of each category as asked for, four times as many harmless; K samples, contrasts."""
    chat, rows = Letters(), []
    for name in NAMES:
        for p in ("abc", "d", "efghi") if name != HELPFUL else "abcdefghi":
            rows.append({"prompt": p, "category": name, "response": name[:3]})
    values = {"irl.prompts": 2, "irl.samples": 2, "irl.contrast": 2}
    c = changed(Config(), {**values, "run.max_new_tokens": 4})
    groups = sample_groups(tiny(), chat, rows, c)
    names = [g["category"] for g in groups]
    assert all(names.count(name) == (8 if name == HELPFUL else 2) for name in NAMES)
    for g in groups:
        assert g["prompt_ids"] == chat.prompt(g["prompt"])
        assert g["demonstration"] == chat.answer(g["category"][:3])
        assert len(g["samples"]) == 2 and all(1 <= len(ids) <= 4 for ids in g["samples"])
        other = [HELPFUL] if g["category"] != HELPFUL else CATEGORIES
        assert len(g["contrast"]) == 2
        assert all(ids in [chat.answer(name[:3]) for name in other] for ids in g["contrast"])
    assert sample_groups(tiny(), chat, rows, c) == groups
    assert sample_groups(tiny(), chat, rows, changed(c, {"run.seed": 1})) != groups
