"""reward.py: the maximum-entropy gradient on an enumerable world, and the shadow reward models on a tiny transformer."""

import math
import random
from contextlib import nullcontext

import pytest
import torch

import reward
from data import CATEGORIES, HELPFUL, UserError
from batch import Batch
from loop import Loop
from reward import IRLConfig, RewardModels, auc, fit, irl_loss
from transformer import Config, Transformer

NAMES = [*CATEGORIES, HELPFUL]


# ------------------------------------------------------------------------------------------------ the loss


class World:
    """P prompts with M responses each, all listed: pi_ref, a reward linear in features, one demonstration a prompt."""

    def __init__(self, P=3, M=6, features=4, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.log_ref = torch.randn(P, M, generator=g, dtype=torch.float64).log_softmax(1)
        self.phi = torch.randn(P, M, features, generator=g, dtype=torch.float64)
        self.w = torch.randn(features, generator=g, dtype=torch.float64)
        self.demo = torch.randint(M, (P,), generator=g)
        self.rows = torch.arange(P)

    def minus_gradient(self, beta):
        """-(1/beta) mean over prompts of [phi(demo) - sum_y pi_theta(y) phi(y)], pi_theta = pi_ref exp(r / beta) / Z, in loops."""
        total = torch.zeros_like(self.w)
        for p in range(len(self.phi)):
            weight = [
                math.exp(self.log_ref[p, y].item() + (self.phi[p, y] @ self.w).item() / beta)
                for y in range(self.phi.shape[1])
            ]
            expected = sum(v / sum(weight) * self.phi[p, y] for y, v in enumerate(weight))
            total += self.phi[p, self.demo[p]] - expected
        return -total / beta / len(self.phi)

    def gradient(self, estimator, beta, samples=None, log_ratio=0.0):
        """Of irl_loss, by autograd; samples (P, K): indices of responses, all of them if not given."""
        w = self.w.clone().requires_grad_(True)
        r = self.phi @ w
        irl_loss(
            r[self.rows, self.demo],
            r if samples is None else r.gather(1, samples),
            beta,
            estimator,
            log_ratio,
        ).backward()
        return w.grad


@pytest.mark.parametrize("beta", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_importance_over_all_responses_is_the_exact_gradient(seed, beta):
    world = World(seed=seed)
    torch.testing.assert_close(
        world.gradient("importance", beta, log_ratio=world.log_ref),
        world.minus_gradient(beta),
        atol=1e-10,
        rtol=0,
    )


def test_importance_corrects_for_the_sampler():
    """Samples of a uniform q: log_ratio = log pi_ref - log q, whatever its constant."""
    world = World(seed=2)
    log_q = math.log(1 / 6)
    torch.testing.assert_close(
        world.gradient("importance", 1.0, log_ratio=world.log_ref - log_q),
        world.minus_gradient(1.0),
        atol=1e-10,
        rtol=0,
    )


def test_importance_converges_with_samples_of_the_reference():
    world, g = World(seed=3), torch.Generator().manual_seed(0)
    errors = []
    for K in (20, 20000):
        trials = [
            (
                world.gradient(
                    "importance",
                    1.0,
                    torch.multinomial(world.log_ref.exp(), K, replacement=True, generator=g),
                )
                - world.minus_gradient(1.0)
            )
            .norm()
            .item()
            for _ in range(5)
        ]
        errors.append(sum(trials) / 5)
    assert errors[1] < 0.03 and errors[1] < errors[0] / 8  # 1 / sqrt(K) would be a 32nd


def test_linear_is_the_plain_mean():
    """Responses listed in proportion to a policy (counts 3, 1, 2) give the policy's expectation."""
    world, beta = World(P=2, M=3, seed=4), 0.7
    samples = torch.tensor([[0, 0, 0, 1, 2, 2]] * 2)
    policy = torch.tensor([3 / 6, 1 / 6, 2 / 6], dtype=torch.float64)
    want = -sum(world.phi[p, world.demo[p]] - policy @ world.phi[p] for p in range(2)) / 2 / beta
    torch.testing.assert_close(world.gradient("linear", beta, samples), want, atol=1e-12, rtol=0)


def test_logistic_by_hand():
    demo, samples = torch.tensor([1.0, 0.0]), torch.tensor([[0.0, 2.0], [0.0, -1.0]])
    want = sum(math.log(1 + math.exp(-d / 0.5)) for d in (1, -1, 0, 1)) / 4
    assert irl_loss(demo, samples, 0.5, "logistic").item() == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("gap", [1e4, -1e4])
def test_logistic_is_bounded_and_finite(gap):
    demo = torch.tensor([gap], requires_grad=True)
    value = irl_loss(demo, torch.zeros(1, 3), 1.0, "logistic")
    value.backward()
    assert (
        0 <= value.item() < math.inf
        and demo.grad.isfinite().all()
        and demo.grad.item() == (0 if gap > 0 else -1)
    )


def test_importance_is_finite_at_extremes():
    r = torch.tensor([[1e4, -1e4]], requires_grad=True)
    irl_loss(torch.tensor([0.0]), r, 1.0, "importance").backward()
    assert r.grad.tolist() == [[1.0, 0.0]]


def centred(z):
    return z - z.mean(1, keepdim=True)


def test_linear_converges_with_samples_of_the_best_response():
    """The other kind: samples of pi_theta itself, plain mean."""
    world, beta, g, errors = World(seed=3), 0.7, torch.Generator().manual_seed(0), []
    best = (world.log_ref + world.phi @ world.w / beta).softmax(1)
    for K in (20, 20000):
        trials = [
            (
                world.gradient(
                    "linear", beta, torch.multinomial(best, K, replacement=True, generator=g)
                )
                - world.minus_gradient(beta)
            )
            .norm()
            .item()
            for _ in range(5)
        ]
        errors.append(sum(trials) / 5)
    assert errors[1] < 0.03 and errors[1] < errors[0] / 8
    biased = world.gradient(
        "linear", beta, torch.multinomial(world.log_ref.exp(), 20000, replacement=True, generator=g)
    )
    assert (
        biased - world.minus_gradient(beta)
    ).norm() > 0.2  # samples of pi_ref need their weights


@pytest.mark.parametrize("estimator, tolerance", [("importance", 1e-5), ("linear", 0.03)])
def test_descent_recovers_the_true_reward(estimator, tolerance):
    """Demonstrations in proportion to pi* of a true table: the table comes back, up to a constant per prompt. importance: all responses listed, exact.
    linear: alternating, as in Li et al.: the best response to the current table, samples of it, one step of descent; the mean of the last tables."""
    world, beta, g = World(P=2, M=4, seed=5), 0.5, torch.Generator().manual_seed(1)
    true = torch.randn(2, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    demonstrated = (world.log_ref + true / beta).softmax(1)
    r = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)

    def loss(samples, log_ratio=0.0):  # linear in the demonstration's reward, so its mean will do
        return irl_loss((demonstrated * r).sum(1), samples, beta, estimator, log_ratio)

    if estimator == "importance":
        optimizer = torch.optim.LBFGS(
            [r],
            max_iter=300,
            tolerance_grad=1e-12,
            tolerance_change=1e-16,
            line_search_fn="strong_wolfe",
        )

        def closure():
            optimizer.zero_grad()
            value = loss(r, world.log_ref)
            value.backward()
            return value

        optimizer.step(closure)
        found = r.detach()
    else:
        tables = []
        for step in range(600):
            best = (world.log_ref + r.detach() / beta).softmax(1)
            (grad,) = torch.autograd.grad(
                loss(r.gather(1, torch.multinomial(best, 4000, replacement=True, generator=g))), r
            )
            r.data -= 0.5 * grad
            tables.append(r.detach().clone())
        found = torch.stack(tables[-100:]).mean(0)
    torch.testing.assert_close(centred(found), centred(true), atol=tolerance, rtol=0)


def test_irl_loss_errors():
    for demo, samples in (
        (torch.zeros(2), torch.zeros(2)),
        (torch.zeros(2, 1), torch.zeros(2, 3)),
        (torch.zeros(2), torch.zeros(3, 2)),
    ):
        with pytest.raises(ValueError, match="want r_demo"):
            irl_loss(demo, samples)
    with pytest.raises(ValueError, match="estimator"):
        irl_loss(torch.zeros(2), torch.zeros(2, 3), estimator="magic")


def test_auc():
    assert auc([3.0, 2.0], [1.0, 0.0]) == 1 and auc([0.0], [1.0, 2.0]) == 0
    assert auc([2.0, 0.0], [1.0, 0.0]) == (1 + 1 + 0 + 0.5) / 4 and auc([1.0], [1.0]) == 0.5
    assert math.isnan(auc([], [1.0])) and math.isnan(auc([1.0], []))


# ------------------------------------------------------------------------------------------------ the models


@pytest.fixture
def trunk():
    torch.manual_seed(0)
    config = {
        "model_type": "llama",
        "vocab_size": 20,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return Transformer(Config.from_dict(config)).requires_grad_(False)


def random_models(trunk, **change):
    """Reward models whose every weight differs between categories."""
    models = RewardModels(trunk, IRLConfig(**{"reward_blocks": 2, **change}))
    torch.manual_seed(1)
    with torch.no_grad():
        for p in models.parameters():
            p.add_(torch.randn_like(p) * 0.1)
        for i, shadow in enumerate(models.shadows.values()):
            shadow.mean.fill_(0.1 * i), shadow.std.fill_(1.0 + i)
    return models.requires_grad_(False)


def score(models, prompts, completions, categories):
    batch = Batch(prompts, completions)
    return models(models.hidden(batch), batch, categories)


PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [2, 2]]
COMPLETIONS = [[[3, 4], [5]], [[6, 7, 8, 9]], [[1], [2, 3, 4], [5, 5]], [[7, 0]]]
MIXED = ["crime", HELPFUL, "insult", "crime"]


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_a_mixed_batch_is_each_prompt_alone(trunk, blocks):
    models = random_models(trunk, reward_blocks=blocks)
    alone = torch.cat(
        [score(models, [p], [c], [name]) for p, c, name in zip(PROMPTS, COMPLETIONS, MIXED)]
    )
    torch.testing.assert_close(
        score(models, PROMPTS, COMPLETIONS, MIXED), alone, atol=1e-5, rtol=1e-5
    )
    other = torch.cat([score(models, [p], [c], ["ethics"]) for p, c in zip(PROMPTS, COMPLETIONS)])
    assert ((other - alone).abs() > 1e-4).all()


def test_padding_does_not_move_where_the_reward_is_read(trunk):
    models = random_models(trunk)
    short = score(models, PROMPTS, COMPLETIONS, MIXED)
    longer = score(models, [*PROMPTS, [1] * 12], [*COMPLETIONS, [[3] * 15]], [*MIXED, "crime"])
    torch.testing.assert_close(longer[: len(short)], short, atol=1e-5, rtol=1e-5)


def test_reward_depends_on_prompt_and_on_the_last_token(trunk):
    r = score(
        random_models(trunk), [[1, 2], [1, 3]], [[[4, 5], [4, 6]], [[4, 5]]], ["crime", "crime"]
    )
    assert len({round(v, 5) for v in r.tolist()}) == 3


def test_linear_integration_is_the_mean_of_the_harm_models(trunk):
    """Of harmful prompts; a harmless one, which the seven would have refused, keeps its own model."""
    models = random_models(trunk, integration="linear")
    each = torch.stack(
        [score(random_models(trunk), PROMPTS, COMPLETIONS, [name] * 4) for name in NAMES]
    )
    harmless = torch.tensor(
        [MIXED[p] == HELPFUL for p, group in enumerate(COMPLETIONS) for _ in group]
    )
    want = torch.where(harmless, each[NAMES.index(HELPFUL)], each[:-1].mean(0))
    torch.testing.assert_close(
        score(models, PROMPTS, COMPLETIONS, MIXED), want, atol=1e-5, rtol=1e-5
    )


def test_one_model_for_all(trunk):
    models = random_models(trunk, reward_models=1)
    assert list(models.shadows) == ["all"] and models.name("crime") == "all"
    torch.testing.assert_close(
        score(models, PROMPTS, COMPLETIONS, MIXED),
        score(models, PROMPTS, COMPLETIONS, ["insult"] * 4),
    )


def test_rewards_start_at_zero(trunk):
    assert (
        score(RewardModels(trunk, IRLConfig(reward_blocks=1)), PROMPTS, COMPLETIONS, MIXED).tolist()
        == [0.0] * 7
    )


def separable(categories, n=6, seed=0):
    """Demonstrations are made of low tokens, samples of high ones."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda low, high: torch.randint(
        low, high, (int(torch.randint(2, 6, (1,), generator=g)),), generator=g
    ).tolist()
    return [
        {
            "category": c,
            "prompt_ids": draw(1, 20),
            "demonstration": draw(1, 9),
            "samples": [draw(11, 20) for _ in range(3)],
        }
        for c in categories
        for _ in range(n)
    ]


@pytest.mark.parametrize("estimator", ["importance", "linear", "logistic"])
def test_fit(trunk, estimator):
    """Accuracy rises; rewards of the fitted samples are brought to mean 0 and std 1; the trunk stays as it was."""
    c = IRLConfig(lr=3e-3, joint_epochs=3, epochs=5, batch=3, reward_blocks=1, estimator=estimator)
    models, groups, records, before = (
        RewardModels(trunk, c),
        separable(NAMES),
        [],
        {k: v.clone() for k, v in trunk.state_dict().items()},
    )
    fit(
        models,
        reward.prepare(models, groups, c.batch, nullcontext),
        c,
        nullcontext,
        loop=Loop("irl", log=lambda **r: records.append(r)),
    )
    assert (
        len(records) == 8 * 16
        and {r["model"] for r in records} == set(NAMES)
        and records[-1]["step"] == 128
    )
    assert (
        records[0]["accuracy"] == 0
        and sum(r["accuracy"] for r in records[-16:]) / 16 > 0.95
        and records[-1]["gap_demo_minus_others"] > 0
    )
    assert all(torch.equal(v, before[k]) for k, v in trunk.state_dict().items()) and not any(
        p.requires_grad for p in models.parameters()
    )
    held = separable(NAMES, n=2, seed=1)
    r = score(
        models,
        [g["prompt_ids"] for g in held],
        [[g["demonstration"], *g["samples"]] for g in held],
        [g["category"] for g in held],
    ).view(-1, 4)
    assert (r[:, :1] > r[:, 1:]).float().mean() > 0.9
    for name in NAMES:
        mine = [g for g in groups if g["category"] == name]
        r = score(
            models,
            [g["prompt_ids"] for g in mine],
            [g["samples"] for g in mine],
            [name] * len(mine),
        )
        assert abs(r.mean().item()) < 1e-4 and r.std(correction=0).item() == pytest.approx(
            1, abs=1e-4
        )


def test_fit_trains_a_category_on_its_own_groups(trunk):
    """The same groups for crime, but other groups for insult: crime's model must not change."""
    c, fitted = IRLConfig(lr=1e-3, joint_epochs=0, epochs=2, batch=8, reward_blocks=1), []
    for seed in (1, 2):
        models = RewardModels(trunk, c)
        rest = [name for name in NAMES if name != "crime"]
        fit(
            models,
            reward.prepare(
                models, separable(["crime"]) + separable(rest, seed=seed), c.batch, nullcontext
            ),
            c,
            nullcontext,
        )
        fitted.append(
            {name: models.shadows[name].value.weight.clone() for name in ("crime", "insult")}
        )
    assert torch.allclose(fitted[0]["crime"], fitted[1]["crime"], atol=1e-4) and not torch.allclose(
        fitted[0]["insult"], fitted[1]["insult"], atol=1e-4
    )


def test_joint_epochs_share_one_harm_model(trunk):
    """With no further epochs the seven are one model, but for their normalisation; helpful is its own. Further epochs part them."""
    for epochs, same in ((0, True), (1, False)):
        c = IRLConfig(lr=1e-3, joint_epochs=2, epochs=epochs, batch=8, reward_blocks=1)
        models, steps = RewardModels(trunk, c), []
        fit(
            models,
            reward.prepare(models, separable(NAMES), c.batch, nullcontext),
            c,
            nullcontext,
            loop=Loop("irl", log=lambda **r: steps.append(r["model"])),
        )
        weights = {name: dict(shadow.named_parameters()) for name, shadow in models.shadows.items()}
        equal = lambda a, b: all(torch.equal(weights[a][k], weights[b][k]) for k in weights[a])
        assert all(
            equal(a, b) == (same or a == b) for a in CATEGORIES for b in CATEGORIES
        ) and not equal("crime", HELPFUL)
        assert all(w["value.weight"].abs().max() > 0 for w in weights.values()) and sorted(
            steps
        ) == sorted(NAMES * (2 + epochs))


def test_opposites():
    rows = [{"category": name, "n": i} for name in NAMES for i in range(3)]
    rng = random.Random(0)
    assert all(
        r["category"] == HELPFUL for r in reward.opposites({"category": "crime"}, rows, 3, rng)
    )
    picked = [r for _ in range(20) for r in reward.opposites({"category": HELPFUL}, rows, 2, rng)]
    assert {r["category"] for r in picked} == set(CATEGORIES)


def test_contrasts_are_pushed_down_and_left_out_of_the_scale(trunk):
    """Samples equal to the demonstration teach nothing; the contrast, made of other tokens, must end below both."""
    groups = [
        {**g, "samples": [g["demonstration"]] * 2, "contrast": [g["samples"][0]]}
        for g in separable(NAMES)
    ]
    c = IRLConfig(lr=3e-3, joint_epochs=1, epochs=4, batch=3, reward_blocks=1)
    models = RewardModels(trunk, c)
    batches = reward.prepare(models, groups, c.batch, nullcontext)
    fit(models, batches, c, nullcontext)
    reward.score(models, batches, nullcontext)
    low = score(
        models,
        [g["prompt_ids"] for g in groups],
        [g["contrast"] for g in groups],
        [g["category"] for g in groups],
    )
    assert (
        all(len(g["rewards"]) == 2 for g in groups)
        and (low < torch.tensor([g["reward_demo"] for g in groups])).float().mean() > 0.9
    )
    for name in NAMES:
        r = torch.tensor([g["rewards"] for g in groups if g["category"] == name])
        assert abs(r.mean().item()) < 1e-4 and r.std(correction=0).item() == pytest.approx(
            1, abs=1e-3
        )


def test_score_adds_rewards_to_groups(trunk):
    """The same whatever the batch size, and the demonstration's apart from the samples'."""
    models, groups = random_models(trunk), separable(["crime", HELPFUL, "insult"], n=2)
    for size in (1, 4, 100):
        reward.score(models, reward.prepare(models, groups, size, nullcontext), nullcontext)
        for g in groups:
            alone = score(
                models, [g["prompt_ids"]], [[g["demonstration"], *g["samples"]]], [g["category"]]
            ).tolist()
            assert [g["reward_demo"], *g["rewards"]] == pytest.approx(alone, abs=1e-5)


def test_save_and_load(trunk, tmp_path):
    models = random_models(trunk)
    models.save(tmp_path / "rewards")
    again = RewardModels(trunk, IRLConfig(reward_blocks=2)).load(tmp_path / "rewards")
    assert torch.equal(
        score(again, PROMPTS, COMPLETIONS, MIXED), score(models, PROMPTS, COMPLETIONS, MIXED)
    ) and not any(p.requires_grad for p in again.parameters())
    (tmp_path / "rewards" / "crime.safetensors").unlink()
    with pytest.raises(UserError, match="crime.safetensors"):
        RewardModels(trunk, IRLConfig(reward_blocks=2)).load(tmp_path / "rewards")
