"""config.py: settings, their flags and ranges, recipes, and where a value comes from."""

import json
from dataclasses import fields
from operator import attrgetter

import pytest
from conftest import ROOT, flags, make_world

import config
import drirl
from config import Config, UserError, changed, check, settings, with_recipe

NUMBERS = [(key, f) for key, f, _ in settings() if f.type in (int, float)]
WRITTEN = json.loads((ROOT / "recipes.json").read_text(encoding="utf-8"))
CHOICES = [(key, f) for key, f, _ in settings() if f.metadata["choices"]]


def parse(*argv):
    return drirl.parse([str(a) for a in argv], drirl.STAGES)[1]


def test_every_setting_has_a_flag_with_its_sections_prefix_and_a_help():
    named = [flag for _, _, flag in settings()]
    assert len(named) == len(set(named)) == sum(len(fields(f.type)) for f in fields(Config))
    help_page = drirl.build_parser(drirl.STAGES).format_help()
    for key, f, flag in settings():
        section, name = key.split(".")
        words = (name if section == "run" else key).replace(".", "-").replace("_", "-")
        assert flag == f"--{words}" and f"{flag} " in help_page, key
        assert len(f.metadata["help"]) > 5 and "\n" not in f.metadata["help"], key
    wanted = {"--seed", "--sft-steps", "--irl-epochs", "--irl-reward-blocks", "--grpo-batch"}
    assert wanted <= set(named)


def test_values_are_changed_by_key_and_unknown_keys_fail():
    c = changed(Config(), {"grpo.lr": 0.25, "run.seed": 3})
    assert (c.grpo.lr, attrgetter("run.seed")(c), c.sft) == (0.25, 3, Config().sft)
    for key in ("sft.speed", "ppo.lr", "lr", "grpo.samples.more", ""):
        with pytest.raises(UserError, match=f"^unknown setting {key}$"):
            changed(c, {key: 1})


def refused(key, value, *words):
    with pytest.raises(UserError) as e:
        check(changed(Config(), {key: value}))
    flag = {k: flag for k, _, flag in settings()}[key]
    assert "\n" not in str(e.value) and all(w in str(e.value) for w in (flag, *words)), e.value


@pytest.mark.parametrize("key, f", NUMBERS, ids=[key for key, _ in NUMBERS])
def test_numbers_have_a_range(key, f):
    low, high = f.metadata["low"], f.metadata["high"]
    sound = {"irl.epochs": 1, "irl.joint_epochs": 1}
    for value in (f.type(low), f.type(high)):
        size = {"grpo.prompts": value} if key == "grpo.batch" and value else {}
        size |= {"grpo.batch": 1} if key in ("grpo.passes", "grpo.extrapolate") else {}
        check(changed(Config(), {**sound, **size, key: value}))
    for value in (f.type(low - 1), f.type(high + 1)):
        refused(key, value, f"{value}: want {low} to {high}")
    refused(key, "3", "'3': want a ")
    refused(key, True, "True: want a ")
    if f.type is float:
        refused(key, float("nan"), f"nan: want {low} to {high}")
        refused(key, float("inf"), f"inf: want {low} to {high}")
    else:
        refused(key, 1.5, "a whole number")


@pytest.mark.parametrize("key, f", CHOICES, ids=[key for key, _ in CHOICES])
def test_choices(key, f):
    for value in f.metadata["choices"]:
        check(changed(Config(), {key: value}))
    refused(key, "both", "both: want one of " + ", ".join(f.metadata["choices"]))


def test_texts_and_switches():
    refused("run.resume", "yes", "'yes': want true or false")
    refused("run.resume", 1, "1: want true or false")
    for text in (None, 3, "a\0", "\ud800"):
        refused("run.chat_format", text, "want text")


@pytest.mark.parametrize(
    "values, words",
    [
        ({"irl.epochs": 0, "irl.joint_epochs": 0}, "leave the rewards unfitted"),
        ({"grpo.batch": 5}, "--grpo-batch 5: want a divisor of --grpo-prompts"),
        ({"grpo.passes": 2}, "--grpo-extrapolate, wants --grpo-batch below --grpo-prompts"),
        ({"grpo.extrapolate": 0.5}, "--grpo-passes above 1, or --grpo-extrapolate, wants"),
    ],
)
def test_settings_that_make_no_sense_together(values, words):
    with pytest.raises(UserError, match=words):
        check(changed(Config(), values))
    sound = {"irl.epochs": 1, "grpo.prompts": 10, "grpo.batch": 5}
    check(changed(Config(), values | sound))


# ---------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("name", WRITTEN)
def test_departures(name):
    """Each is of a known setting and type, has a reason of one line, and changes something."""
    below = config.RECIPES.get(WRITTEN[name].get("based on"), {})
    for key, (value, why) in (item for item in WRITTEN[name].items() if item[0] != "based on"):
        before = below[key][0] if key in below else attrgetter(key)(Config())
        assert value != before and type(value) is type(before), key
        assert 5 < len(why) < 80 and "\n" not in why, key


def test_a_recipe_based_on_another_has_its_departures_too():
    assert set(WRITTEN) == set(config.RECIPES) == {"laptop", "laptop-few", "tiny", "gpu"}
    tiny, laptop = config.RECIPES["tiny"], config.RECIPES["laptop"]
    assert tiny["run.temperature"] == laptop["run.temperature"]
    assert tiny["sft.steps"] == WRITTEN["tiny"]["sft.steps"] != laptop["sft.steps"]


@pytest.mark.parametrize("name", ["", *config.RECIPES])
def test_recipes(name):
    c, departures = with_recipe(name), config.RECIPES.get(name, {})
    check(c)
    assert c.run.recipe == name
    for key, _, _ in settings():
        want = departures[key][0] if key in departures else attrgetter(key)(Config())
        assert attrgetter(key)(c) == want or key == "run.recipe", key


def test_a_recipe_leaves_other_values_and_an_unknown_one_is_refused():
    c = with_recipe("laptop", changed(Config(), {"sft.lr": 0.5, "sft.batch": 3}))
    assert (c.sft.lr, c.sft.batch) == (config.RECIPES["laptop"]["sft.lr"][0], 3)
    with pytest.raises(
        UserError, match="^--recipe large: want one of laptop, laptop-few, tiny, gpu$"
    ):
        with_recipe("large")


def test_the_stage_recipes_prints_the_tables(capsys):
    assert drirl.main(["recipes"]) == 0
    said = capsys.readouterr().out
    for name, departures in config.RECIPES.items():
        assert f"| {name} | paper | recipe | why |" in said
        for key, (value, why) in departures.items():
            flag = "--" + key.removeprefix("run.").replace(".", "-").replace("_", "-")
            line = f"| {flag} | {attrgetter(key)(Config())} | {value} | {why} |"
            assert (line in said) == (value != attrgetter(key)(Config())), line


def test_a_cpu_without_a_recipe(tmp_path, monkeypatch, capsys):
    """A whole run says that the paper's setting takes hours, and names laptop."""
    make_world(tmp_path, 3, 8, [{"prompt": "Hello?", "kind": "ordinary"}])
    for stage in drirl.ORDER:
        monkeypatch.setitem(drirl.STAGES, stage, lambda run: None)
    for name, recipe, told in (("a", [], True), ("b", ["--recipe", "tiny"], False)):
        argv = ["all", *flags(tmp_path), "--encoder", "words", "--run", str(tmp_path / name)]
        assert drirl.main(argv + recipe) == 0
        said = capsys.readouterr().out
        assert ("hours on a CPU" in said and "--recipe laptop" in said) == told


# ---------------------------------------------------------------------------- where a value is from


def test_flags_over_the_recipe_over_the_folder_over_defaults(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"sft": {"lr": 0.5, "steps": 3, "batch": 5}, "run": {"seed": 4, "run": "old"}})
    )
    c = parse("sft", "--run", tmp_path, "--sft-lr", "0.25", "--grpo-open-prompts", "true")
    assert (c.sft.lr, c.sft.steps, c.run.seed, c.grpo.open_prompts) == (0.25, 3, 4, True)
    assert c.sft.helpful_share == Config().sft.helpful_share
    assert c.run.run == str(tmp_path)  # the folder may have been moved
    c = parse("sft", "--run", tmp_path, "--recipe", "laptop", "--sft-lr", "0.25")
    assert (c.sft.lr, c.sft.steps, c.sft.batch) == (
        0.25,
        config.RECIPES["laptop"]["sft.steps"][0],
        5,
    )
    assert c.run.recipe == "laptop"


def test_a_whole_run_takes_no_settings_of_the_folder(tmp_path):
    (tmp_path / "config.json").write_text('{"run": {"seed": 4}, "sft": {"gone": 1}}')
    assert parse("all", "--run", tmp_path, "--sft-lr", "0.25").run.seed == 0
    with pytest.raises(UserError, match="config.json: unknown setting sft.gone: remove it there"):
        parse("sft", "--run", tmp_path)


def test_a_folder_is_evaluated_apart_from_any_run(tmp_path, monkeypatch):
    """eval --model without --run leaves runs/default aside, and no other stage does."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/default").mkdir(parents=True)
    (tmp_path / "runs/default/config.json").write_text('{"run": {"seed": 4}}')
    assert parse("eval", "--model", "m").run.seed == 0
    assert parse("eval").run.seed == parse("sft", "--model", "m").run.seed == 4


def test_what_a_run_saves_is_what_it_reads(tmp_path):
    c = changed(with_recipe("laptop"), {"run.run": str(tmp_path), "grpo.lr": 0.3})
    drirl.Run(c).begin("data")
    assert parse("grpo", "--run", tmp_path) == c
