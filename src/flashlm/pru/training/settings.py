"""What a run is made of: settings, the paper's regimes as presets, recipes as TOML files. Plain values, no torch."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from flashlm.errors import ConfigError

PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How to train; the defaults are the authors' released code (standard dropout), the field names are AWD-LSTM's.

    Attributes:
        epochs: Passes over the training text.
        batch_size: Columns that the text is cut into, over all processes.
        bptt: Mean length of a window, in tokens.
        has_variable_bptt: Draw each window's length: N(bptt or, 1 in 20, bptt / 2; 5), at least 5; the step's learning
            rate is scaled by length / bptt.
        max_extra_bptt: A window is at most bptt + this long; None: no bound, as in the authors' code.
        lr: Learning rate of SGD and ASGD.
        weight_decay: Times the weights, added to the gradient.
        clip: Bound on the gradient's norm.
        dropout: On the last layer's output.
        dropouth: On the outputs of the layers below.
        dropouti: On the word vectors.
        dropoute: Share of words whose whole vector is dropped (embedding dropout).
        weight_dropout: Share of the recurrent weights dropped, afresh for each window.
        is_locked: One dropout mask for all steps of a window (locked, or variational, dropout).
        alpha: Of activation regularisation: alpha · mean(h²), h the last layer's output after dropout.
        beta: Of temporal activation regularisation: beta · mean((h_t - h_{t-1})²), h before dropout.
        nonmono: ASGD starts when the validation loss is above the best of all but the last so many epochs; None: never.
        starts_averaging: ASGD from the first step (the fine-tuning stage); the `nonmono` rule then ends the run.
        eval_batch_size: Columns in the validation after each epoch.
        seed: Of weights, dropout and window lengths.
        precision: Of the products; weights, state and sums are fp32.
    """

    epochs: int = 200
    batch_size: int = 20
    bptt: int = 70
    has_variable_bptt: bool = True
    max_extra_bptt: int | None = None
    lr: float = 30.0
    weight_decay: float = 1.2e-6
    clip: float = 0.25
    dropout: float = 0.4
    dropouth: float = 0.4
    dropouti: float = 0.4
    dropoute: float = 0.0
    weight_dropout: float = 0.0
    is_locked: bool = False
    alpha: float = 2.0
    beta: float = 1.0
    nonmono: int | None = 5
    starts_averaging: bool = False
    eval_batch_size: int = 10
    seed: int = 1111
    precision: str = "fp32"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "bptt", "eval_batch_size"):
            _check(name, getattr(self, name), int, lambda value: value >= 1, "a positive integer")
        for name in ("lr", "clip"):
            _check(name, getattr(self, name), float, lambda value: value > 0, "greater than 0")
        for name in ("weight_decay", "alpha", "beta"):
            _check(name, getattr(self, name), float, lambda value: value >= 0, "0 or greater")
        for name in ("dropout", "dropouth", "dropouti", "dropoute", "weight_dropout"):
            _check(name, getattr(self, name), float, lambda value: 0 <= value < 1, "at least 0 and less than 1")
        for name in ("nonmono", "max_extra_bptt"):
            value = getattr(self, name)
            if value is not None:
                _check(name, value, int, lambda number: number >= 0, "0 or greater")
        for name in ("has_variable_bptt", "is_locked", "starts_averaging"):
            _check(name, getattr(self, name), bool, lambda value: True, "true or false")
        _check("seed", self.seed, int, lambda value: value >= 0, "0 or greater")
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")


# Merity et al.'s values for Penn Treebank; the paper says no more than that it took theirs.
_AWD = {"dropouth": 0.25, "dropoute": 0.1, "weight_dropout": 0.5, "is_locked": True, "epochs": 500, "seed": 141}
PRESETS: dict[str, dict[str, Any]] = {
    "standard": {},
    "awd": _AWD,
    "awd-finetune": _AWD | {"starts_averaging": True, "max_extra_bptt": 10},
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A model and how to train it.

    Attributes:
        name: For tables and plots.
        preset: `standard`, `awd` or `awd-finetune`.
        model: Fields of `PRUConfig` that differ from its defaults; the corpus gives vocab_size.
        training: All settings, the preset's included.
    """

    name: str
    preset: str = "standard"
    model: Mapping[str, Any] = field(default_factory=dict)
    training: TrainingSettings = field(default_factory=TrainingSettings)


def preset_settings(name: str, **changes: Any) -> TrainingSettings:
    """Return a preset with some fields changed.

    Raises:
        ConfigError: The preset or a field is unknown, or a value is out of range.
    """
    if name not in PRESETS:
        raise ConfigError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    check_known("training setting", changes, [item.name for item in fields(TrainingSettings)])
    return TrainingSettings(**(PRESETS[name] | changes))


def note_on_values(recipe: Recipe, corpus: str | None) -> str | None:
    """Return a line where an advanced preset's values for Penn Treebank meet WikiText-2, else None."""
    own = ("batch_size", "dropouti", "dropouth")  # what AWD-LSTM's two commands differ in, beside length and seed
    if corpus != "WikiText-2" or not recipe.preset.startswith("awd"):
        return None
    preset = preset_settings(recipe.preset)
    if any(getattr(recipe.training, name) != getattr(preset, name) for name in own):
        return None
    return (
        f"preset {recipe.preset} has the values for Penn Treebank, and this is WikiText-2: its own are batch_size=80,"
        " dropouti=0.65, dropouth=0.2 (recipes/pru/awd/*-wt2.toml)"
    )


def read_recipe(path: Path) -> Recipe:
    """Read a recipe: keys name and preset, tables [model] and [training].

    Raises:
        ConfigError: The file can't be read, is not TOML, or has an unknown key.
    """
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"recipe {path} can't be read: {error}") from error
    check_known(f"key of recipe {path.name}", content, ["name", "preset", "model", "training"])
    preset = content.get("preset", "standard")
    return Recipe(
        name=content.get("name", path.stem),
        preset=preset,
        model=content.get("model", {}),
        training=preset_settings(preset, **content.get("training", {})),
    )


def make_recipe(path: Path | None, preset: str | None, model: Mapping[str, Any], training: Mapping[str, Any]) -> Recipe:
    """Return a recipe file's recipe, or a preset's, with fields of the model and of the training changed.

    Raises:
        ConfigError: Both a file and a preset are given, or something in them is wrong.
    """
    if path is not None and preset is not None:
        raise ConfigError("give a recipe or a preset, not both: the recipe names its preset")
    recipe = Recipe(
        name=preset or "standard", preset=preset or "standard", training=preset_settings(preset or "standard")
    )
    if path is not None:
        recipe = read_recipe(path)
    check_known("training setting", training, [item.name for item in fields(TrainingSettings)])
    return replace(recipe, model={**recipe.model, **model}, training=replace(recipe.training, **training))


def assigned(assignments: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parse NAME=VALUE, values as in TOML (a bare word is text); return those of the model and those of the training.

    Raises:
        ConfigError: There is no `=`.
    """
    model: dict[str, Any] = {}
    training: dict[str, Any] = {}
    names = [item.name for item in fields(TrainingSettings)]
    for assignment in assignments:
        name, sign, text = assignment.partition("=")
        if not sign:
            raise ConfigError(f"--set wants NAME=VALUE, got {assignment!r}")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        (training if name in names else model)[name] = value
    return model, training


def check_known(what: str, given: Mapping[str, Any], known: list[str]) -> None:
    """Raise ConfigError for the first key that is not known, with the nearest that is."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"
            raise ConfigError(f"unknown {what}: {name!r}{hint}")


def _check(name: str, value: Any, kind: type, is_allowed: Any, wanted: str) -> None:
    is_number = isinstance(value, int | float) if kind is float else isinstance(value, kind)
    if not is_number or (kind is not bool and isinstance(value, bool)) or not is_allowed(value):
        raise ConfigError(f"{name} must be {wanted}, got {value!r}")
