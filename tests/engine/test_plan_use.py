"""Saved plans: one of another model is refused; what of one does not count is said in one warning."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import flashlm
from flashlm.conversion.convert import convert
from flashlm.engine.config import make_settings
from flashlm.errors import ConfigError
from flashlm.planner.machine import rates_of
from flashlm.planner.plan import make_plan
from flashlm.planner.plan_document import save_plan
from flashlm.planner.shape import read_shape
from tests.engine.conftest import BLOCK_ROWS, TinyPack
from tests.models import save_checkpoint
from tests.planner.profiles import make_profile

GIB = 1 << 30
TinyPacks = Callable[..., TinyPack]


@pytest.fixture
def planned(tmp_path: Path) -> Callable[..., Path]:
    """Save a plan of a pack, with some of it changed."""

    def make(of: Path, *, dtype: str = "fp32", **changed: Any) -> Path:
        shape = read_shape(of, dtype=dtype)
        plan = make_plan(shape, rates_of(make_profile(), shape.dtype), 3 * GIB, context=77)
        path = tmp_path / "plan.json"
        save_plan(plan.model_copy(update=changed), path)
        return path

    return make


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in caplog.records if record.name.startswith("flashlm")]
    caplog.clear()
    return [message for message in found if "plan" in message]


@pytest.mark.parametrize("family", ["llama", "olmoe"])
def test_a_plan_of_the_pack_or_its_source_is_used_without_a_word(
    family: str, tiny_pack: TinyPacks, planned: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    tiny = tiny_pack(family)
    for source in (tiny.pack, tiny.source):
        with caplog.at_level(logging.WARNING):
            model = flashlm.load(tiny.pack, plan=planned(source, queue_depth=7))
        assert model.flash.context == 77
        assert "queue depth 7" in model.flash.describe()
        assert _warnings(caplog) == []


@pytest.mark.parametrize(
    ("family", "dtype", "shown"),
    [("opt", "float32", "opt, float32, 2 layers of 88 rows of 2 x 48"), ("llama", "bfloat16", "llama, bfloat16"),
     ("olmoe", "float32", "16 experts|8 experts .3 active. of 40 rows")],
)  # fmt: skip
def test_a_plan_of_other_layers_is_refused(
    family: str, dtype: str, shown: str, tiny_pack: TinyPacks, planned: Callable[..., Path]
) -> None:
    path = planned(tiny_pack(family, dtype).pack)
    with pytest.raises(
        ConfigError, match=rf"of another model: .*{shown}.*llama, float32, 2 layers of 88 rows of 3 x 48"
    ):
        flashlm.load(tiny_pack("llama").pack, plan=path)
    with pytest.raises(ConfigError, match="of another model"):
        flashlm.load(tiny_pack("olmoe" if family != "olmoe" else "mixtral").pack, plan=path)


def test_a_plan_of_a_deeper_or_wider_model_is_refused(
    tiny_pack: TinyPacks, planned: Callable[..., Path], tmp_path: Path
) -> None:
    for number, changed in enumerate(({"num_hidden_layers": 3}, {"intermediate_size": 104})):
        save_checkpoint(tmp_path / f"{number}", "llama", **changed)
        with pytest.raises(ConfigError, match="of another model"):
            flashlm.load(tiny_pack("llama").pack, plan=planned(tmp_path / f"{number}"))


def test_a_plan_of_a_model_alike_is_named(
    tiny_pack: TinyPacks, planned: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pack = tiny_pack("llama").pack
    with caplog.at_level(logging.WARNING):
        flashlm.load(pack, plan=planned(pack, source="SOME/OTHER-MODEL"))
    (message,) = _warnings(caplog)
    assert "SOME/OTHER-MODEL" in message
    assert str(pack) in message
    save_checkpoint(tmp_path / "twin", "llama", seed=1, max_position_embeddings=160)
    convert(tmp_path / "twin", tmp_path / "pack", dtype="float32", block_rows=2 * BLOCK_ROWS)  # cut otherwise
    with caplog.at_level(logging.WARNING):
        flashlm.load(pack, plan=planned(tmp_path / "pack"))
    (message,) = _warnings(caplog)
    assert str(tmp_path / "pack") in message


@pytest.mark.parametrize(
    ("asked", "said", "dropped"),
    [
        ({"dram": "2GiB"}, "its dram 3.00 GiB (dram 2.00 GiB was asked for)", True),
        ({"mode": "naive"}, "its mode hybrid (mode naive was asked for)", True),
        ({"mode": "auto"}, "its mode hybrid (mode auto was asked for)", True),
        ({"context": 99}, "its context 77 (context 99 was asked for)", False),
        ({"dram": "2GiB", "context": 99}, "its context 77 (context 99 was asked for)", True),
    ],
)
def test_what_does_not_count_is_said_once(
    asked: dict[str, Any],
    said: str,
    dropped: bool,
    tiny_pack: TinyPacks,
    planned: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    pack = tiny_pack("llama").pack
    path = planned(pack, queue_depth=7)
    with caplog.at_level(logging.WARNING):
        model = flashlm.load(pack, plan=path, **asked)
    (message,) = _warnings(caplog)
    assert said in message
    assert str(path) in message
    assert ("queue_depth=7" in message) == dropped
    assert ("queue depth 7" in model.flash.describe()) != dropped
    assert model.flash.context == asked.get("context", 77)


def test_a_variable_that_a_plan_goes_before_is_named(
    tiny_pack: TinyPacks,
    planned: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pack = tiny_pack("llama").pack
    monkeypatch.setenv("FLASHLM_DRAM", "2GiB")
    monkeypatch.setenv("FLASHLM_CONTEXT", "77")  # what the plan says, too
    with caplog.at_level(logging.WARNING):
        model = flashlm.load(pack, plan=planned(pack))
    (message,) = _warnings(caplog)
    assert "FLASHLM_DRAM=2GiB" in message
    assert "FLASHLM_CONTEXT" not in message
    assert model.flash.placement.dram_bytes == 3 * GIB
    with caplog.at_level(logging.WARNING):
        flashlm.load(pack, plan=planned(pack), dram="3GiB")
    assert _warnings(caplog) == []
    used = make_settings(plan=planned(pack), dram=3 * GIB, context="77").plan
    assert used is not None
    assert used.notes == ()
