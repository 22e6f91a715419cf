"""Settings, presets and recipes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flashlm.errors import ConfigError
from flashlm.pru import PRUConfig, PRUForCausalLM
from flashlm.pru.training.settings import (
    TrainingSettings,
    assigned,
    make_recipe,
    note_on_values,
    preset_settings,
    read_recipe,
)


@pytest.mark.parametrize(
    "field",
    [
        {"lr": 0},
        {"dropout": 1.0},
        {"batch_size": 0},
        {"bptt": 1.5},
        {"precision": "fp16"},
        {"nonmono": -1},
        {"epochs": True},
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(field))):
        TrainingSettings(**field)  # type: ignore[arg-type]


def test_presets_are_the_papers_regimes() -> None:
    standard, awd = preset_settings("standard"), preset_settings("awd")
    assert (standard.lr, standard.batch_size, standard.bptt, standard.clip, standard.weight_decay) == (
        30,
        20,
        70,
        0.25,
        1.2e-6,
    )
    assert (standard.dropout, standard.is_locked, standard.weight_dropout, standard.dropoute) == (0.4, False, 0, 0)
    assert (awd.weight_dropout, awd.dropoute, awd.is_locked, awd.dropouti, awd.dropouth) == (0.5, 0.1, True, 0.4, 0.25)


def test_a_recipe_is_read_and_changed(tmp_path: Path) -> None:
    path = tmp_path / "small.toml"
    path.write_text('preset = "awd"\n[model]\nhidden_size = 12\n[training]\nlr = 20\n')
    model, training = assigned(["groups=3", "subsampling=max", "lr=10", "is_locked=false"])
    recipe = make_recipe(path, None, model, training)
    assert recipe.name == "small"
    assert recipe.model == {"hidden_size": 12, "groups": 3, "subsampling": "max"}
    assert (recipe.training.lr, recipe.training.weight_dropout, recipe.training.is_locked) == (10, 0.5, False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[training]\nlearning_rat = 1", "unknown training setting: 'learning_rat'"),
        ("[training]\ndropouts = 0.1", "did you mean dropout"),
        ("[modle]", "did you mean model"),
        ("x = ", "can't be read"),
        ('preset = "big"', "preset must be one of standard, awd"),
    ],
)
def test_a_wrong_recipe_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_recipe(path)


RECIPES = Path(__file__).parents[3] / "recipes" / "pru"


def test_recipes_of_the_repository_are_whole() -> None:
    recipes = {path.relative_to(RECIPES).as_posix(): read_recipe(path) for path in RECIPES.rglob("*.toml")}
    assert len({recipe.name for recipe in recipes.values()}) == len(recipes) >= 30
    for path, recipe in recipes.items():
        assert recipe.preset == ("awd-finetune" if "finetune" in path else "awd" if "awd" in path else "standard")
        assert recipe.training.batch_size == (80 if "wt2" in path else 20)


@pytest.mark.parametrize(
    ("name", "penn", "wikitext"),
    [
        ("standard/lstm-m1000", 19_869_200, 29_203_678),
        ("standard/lstm-m1200", 25_792_400, 35_126_878),
        ("standard/lstm-m1400", 32_675_600, 42_010_078),
        ("standard/pru-g1-m1000", 18_969_200, 28_303_678),
        ("standard/pru-g2-m1200", 18_512_400, 27_846_878),
        ("standard/pru-g4-m1400", 18_895_600, 28_230_078),
        ("awd/lstm-m1150-ptb", 24_221_600, 33_556_078),
        ("awd/pru-g1-m1000-wt2", 18_969_200, 28_303_678),
        ("awd/pru-g2-m1200-wt2", 18_512_400, 27_846_878),
        ("awd/pru-g4-m1400-wt2-finetune", 18_895_600, 28_230_078),
    ],
)
def test_recipes_have_the_published_number_of_parameters(name: str, penn: int, wikitext: int) -> None:
    model = dict(read_recipe(RECIPES / f"{name}.toml").model)
    counts = []
    for vocab_size in (10_000, 33_278):
        with torch.device("meta"):
            made = PRUForCausalLM(PRUConfig(vocab_size=vocab_size, **model))
        made.tie_weights()
        counts.append(sum(parameter.numel() for parameter in made.parameters()))
    assert counts == [penn, wikitext]


def test_penn_treebanks_values_on_wikitext_are_noted() -> None:
    awd = make_recipe(None, "awd", {}, {})
    note = note_on_values(awd, "WikiText-2")
    assert note is not None
    assert "preset awd has the values for Penn Treebank, and this is WikiText-2" in note
    assert note_on_values(awd, "Penn Treebank") is None
    assert note_on_values(awd, None) is None
    assert note_on_values(make_recipe(None, "standard", {}, {}), "WikiText-2") is None
    assert note_on_values(make_recipe(None, "awd", {}, {"batch_size": 80, "dropouti": 0.65}), "WikiText-2") is None
