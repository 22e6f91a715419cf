"""Settings as users write them: from arguments, a plan and the environment, once; nothing given is ignored in silence."""

from __future__ import annotations

import ast
import inspect
import logging
import re
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest

import flashlm
from flashlm.cli.options import LoadOptions
from flashlm.errors import ConfigError
from flashlm.planner.choices import MODES, ResolvedMode
from flashlm.planner.settings import NAMES, VARIABLES, Settings, make_settings, unknown_variables

ROOT = Path(flashlm.__file__).parents[2]
# Of the build, not of a process.
BUILD_VARIABLES = {"FLASHLM_HAS_URING", "FLASHLM_KERNEL_FLAGS", "FLASHLM_KERNEL_SOURCES", "FLASHLM_SANITIZE"}


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FLASHLM_DRAM", "FLASHLM_MODE", "FLASHLM_CONTEXT", "FLASHLM_CHECK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("pin", ["0", 0, "0 GiB"])
def test_a_pin_of_zero_pins_nothing(pin: str | int) -> None:
    assert make_settings(pin=pin).pin_bytes == 0


@pytest.mark.parametrize("pin", [-1, "-1", "much"])
def test_a_pin_that_is_no_size_is_refused(pin: str | int) -> None:
    with pytest.raises(ConfigError, match=r"not a size|not be below zero"):
        make_settings(pin=pin)


@pytest.mark.parametrize(("dram", "meant"), [("7", "7GiB"), (16, "16GiB"), ("8 B", None)])
def test_a_budget_without_its_unit_is_asked_about(dram: str | int, meant: str | None) -> None:
    with pytest.raises(ConfigError, match=f"did you mean {meant}" if meant else "give more"):
        make_settings(dram=dram)


def test_an_argument_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHLM_DRAM", "2GiB")
    monkeypatch.setenv("FLASHLM_MODE", "naive")
    monkeypatch.setenv("FLASHLM_CONTEXT", "77")
    monkeypatch.setenv("FLASHLM_CHECK", "all")
    assert make_settings() == Settings(dram_bytes=2 << 30, mode="naive", context=77, check="all")
    asked = make_settings(dram="3GiB", mode="hybrid", context="88", check="none")
    assert asked == Settings(dram_bytes=3 << 30, mode="hybrid", context=88, check="none")


@pytest.mark.parametrize(
    ("name", "value"),
    [("FLASHLM_DRAM", "lots"), ("FLASHLM_MODE", "fast"), ("FLASHLM_CONTEXT", "0"), ("FLASHLM_CONTEXT", "many"),
     ("FLASHLM_CHECK", "some")],
)  # fmt: skip
def test_what_the_environment_says_is_checked(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=re.escape(repr(value))):
        make_settings()


def test_a_setting_that_is_none_is_refused_with_what_may_be_meant() -> None:
    with pytest.raises(ConfigError, match=r"no setting drum \(did you mean dram\?\): there are dram, mode"):
        make_settings(drum="3GiB")  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="FlashConfig has no drum: it takes dram, mode"):
        flashlm.FlashConfig(drum="3GiB")  # type: ignore[call-arg]


def test_an_unknown_variable_is_announced_by_name(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FLASHLM_DRAN", "2GiB")
    with caplog.at_level(logging.WARNING):
        assert make_settings().dram_bytes is None
    assert caplog.messages == ["FLASHLM_DRAN (did you mean FLASHLM_DRAM?) of the environment is unknown, and not used"]
    assert unknown_variables(dict.fromkeys(VARIABLES, "1") | {"HOME": "/"}) == []


def test_every_variable_that_is_read_is_known() -> None:
    sources = [*ROOT.glob("src/**/*.py"), *ROOT.glob("autoload/*.py"), *ROOT.glob("native/**/*.*")]
    named = {name for path in sources for name in re.findall(r"FLASHLM_[A-Z_]*[A-Z]", path.read_text())}
    assert named - BUILD_VARIABLES == set(VARIABLES)


def test_the_lists_of_settings_agree() -> None:
    taken = list(inspect.signature(flashlm.load).parameters)
    assert taken == ["pack", *NAMES, "from_pretrained"]
    assert {each.name for each in fields(LoadOptions)} <= set(NAMES)
    assert set(LoadOptions().asked()) == {each.name for each in fields(LoadOptions)}


def test_modes_are_listed_in_one_place() -> None:
    """Elsewhere single modes are named, never all of them."""
    every = set(get_args(ResolvedMode))
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Tuple | ast.List | ast.Set):
                named = {each.value for each in node.elts if isinstance(each, ast.Constant)}
                assert not every <= named or path.name == "choices.py", f"{path}:{node.lineno}"
    assert MODES == ("auto", "hybrid", "sparse", "naive", "experts")


def test_settings_are_frozen() -> None:
    with pytest.raises(AttributeError):
        make_settings().mode = "naive"  # type: ignore[misc]
