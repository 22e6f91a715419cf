"""The walk over all model types: its results are good, its page is what it writes, a sample comes out the same."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "reliability"))

import models as walk
import models_page

from tests import tiny_models

DOCUMENT = json.loads(walk.RESULTS.read_text())
TYPES = DOCUMENT["types"]


def test_no_model_type_differs_or_fails() -> None:
    assert DOCUMENT["counts"] == walk.counts(TYPES)
    assert DOCUMENT["tries"] == len(TYPES) == sum(DOCUMENT["counts"].values())
    assert DOCUMENT["counts"]["different"] == DOCUMENT["counts"]["error"] == 0
    for name, result in TYPES.items():
        if result["outcome"] == "equal":
            assert result["max_error"] <= DOCUMENT["max_error_allowed"], name
        else:
            assert result["reason"], name


def test_the_page_is_what_the_walk_writes() -> None:
    text = walk.DOCS.read_text()
    assert text == models_page.page(DOCUMENT)
    rows = re.findall(r"^\| (?!model \|)(.+?) \| `([\w-]+)` \|", text, re.MULTILINE)
    assert sorted(name for _, name in rows) == sorted(TYPES)
    shown = [name.lower() for name, _ in rows[: DOCUMENT["counts"]["equal"]]]
    assert shown == sorted(shown)
    assert set(TYPES) == set(models_page.NAMES)


def test_every_model_type_of_this_transformers_was_walked() -> None:
    """A type that a newer transformers adds is for the next walk; one that is gone is no loss."""
    if DOCUMENT["transformers"] == walk.transformers.__version__:
        assert sorted(TYPES) == tiny_models.causal_types()
    assert len(set(TYPES) & set(tiny_models.causal_types())) > 150


@pytest.mark.parametrize("model_type", walk.QUICK)
@pytest.mark.filterwarnings("ignore")
def test_a_sample_comes_out_the_same(model_type: str) -> None:
    found = walk.examine(model_type)
    known = {
        key: value for key, value in TYPES[model_type].items() if key in found and key not in ("reason", "max_error")
    }
    assert known["outcome"]
    assert {key: found[key] for key in known} == known
