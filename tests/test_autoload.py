"""An installed flashlm makes packs known in every interpreter: light, silent, and not at all where that is not wanted."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

MAKE_PTH = Path(__file__).parents[1] / "autoload" / "make_pth.py"
PTH_NAME = "flashlm-autoload.pth"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder of packages with flashlm's autoload in it and no flashlm."""
    folder = tmp_path / "site"
    folder.mkdir()
    subprocess.run([sys.executable, MAKE_PTH, folder / PTH_NAME], check=True)
    return folder


def _python(site: Path, code: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` where `site` is the only folder of packages."""
    start = f"import site, sys; site.addsitedir({str(site)!r}); {code}"
    return subprocess.run(
        [sys.executable, "-S", *options, "-c", start],
        capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **environment},
    )  # fmt: skip


def _is_quiet(done: subprocess.CompletedProcess[str]) -> bool:
    return done.returncode == 0 and done.stderr == ""


def test_it_is_in_the_environment_of_these_tests() -> None:
    """Both a wheel and an editable install put it beside the package, as one line."""
    import importlib.metadata

    (installed,) = (file for file in importlib.metadata.files("flashlm") or () if file.name == PTH_NAME)
    assert len(Path(installed.locate()).read_text().splitlines()) == 1
    code = (
        "import sys; print(any(type(finder).__name__ == 'FlashlmWaiter' for finder in sys.meta_path),"
        " 'flashlm' in sys.modules)"
    )
    for options in ((), ("-I",)):
        done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["True", "False"]


def test_nothing_but_a_finder_is_added(site: Path) -> None:
    code = "print(sorted(sys.modules)); print([getattr(f, '__name__', type(f).__name__) for f in sys.meta_path])"
    off, on = _python(site, code, FLASHLM_AUTOLOAD="0"), _python(site, code)
    assert _is_quiet(off)
    assert _is_quiet(on)
    (modules, finders), (modules_off, finders_off) = (
        map(ast.literal_eval, run.stdout.splitlines()) for run in (on, off)
    )
    assert modules == modules_off
    assert finders == ["FlashlmWaiter", *finders_off]


@pytest.mark.parametrize(
    "code",
    [
        "import json, email, urllib.request",
        "import importlib.util; importlib.util.find_spec('transformers')",
        "import transformers",  # one that is empty
    ],
)
def test_it_sleeps_until_transformers_is_really_imported(site: Path, code: str) -> None:
    (site / "transformers").mkdir()
    (site / "transformers" / "__init__.py").touch()
    (site / "flashlm.py").write_text("raise SystemExit('woken')")
    assert _is_quiet(_python(site, code))


@pytest.mark.parametrize(
    "flashlm",
    ["", "raise RuntimeError('broken')", "import a_module_that_is_not_there", "def broken(:", None],
    ids=["empty", "raises", "misses a module", "no Python", "not there"],
)
def test_a_broken_flashlm_breaks_nobody_else(site: Path, flashlm: str | None) -> None:
    (site / "transformers").mkdir()
    (site / "transformers" / "__init__.py").write_text("from transformers import part")
    (site / "transformers" / "part.py").write_text("x = 3")
    if flashlm is not None:
        (site / "flashlm").mkdir()
        (site / "flashlm" / "__init__.py").write_text(flashlm)
    done = _python(site, "import transformers.part as part; print(part.x)")
    assert _is_quiet(done)
    assert done.stdout == "3\n"


def test_it_may_be_taken_away_while_a_program_runs(site: Path) -> None:
    """Nothing but the line itself is needed at the start."""
    assert [path.name for path in site.iterdir()] == [PTH_NAME]
    code = f"import os; os.unlink({str(site / PTH_NAME)!r}); import json; print(3)"
    assert _is_quiet(_python(site, code))


def test_a_registrar_that_fails_is_silent_only_where_nobody_asked_for_flashlm(site: Path) -> None:
    """flashlm is there, but what it registers can't be imported: torch is missing here."""
    package = Path(__file__).parents[1] / "src" / "flashlm"
    shutil.copytree(package, site / "flashlm", ignore=shutil.ignore_patterns("__pycache__"))
    registry = site / "transformers" / "quantizers"
    registry.mkdir(parents=True)
    (site / "transformers" / "__init__.py").touch()
    (registry / "__init__.py").touch()
    (registry / "auto.py").write_text("x = 3")
    code = "import transformers.quantizers.auto as auto; print(auto.x)"
    done = _python(site, code)
    assert _is_quiet(done)
    assert done.stdout == "3\n"
    asked = _python(site, f"import flashlm; {code}")
    assert asked.returncode == 1
    assert "ModuleNotFoundError" in asked.stderr


@pytest.mark.parametrize(("autoload", "works"), [("1", True), ("0", False)])
def test_a_stock_program_opens_a_pack_or_says_why_not(
    autoload: str, works: bool, small_pack: Callable[[], Path]
) -> None:
    """Without flashlm transformers finds no weights; it used to go on with random ones."""
    code = (
        "import sys; from transformers import AutoModelForCausalLM as A;"
        f"model = A.from_pretrained({str(small_pack())!r}); print(type(model.flash).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "FLASHLM_AUTOLOAD": autoload},
    )  # fmt: skip
    if works:
        assert done.returncode == 0, done.stderr
        assert done.stdout == "FlashModel\n"
    else:
        assert done.returncode == 1
        assert "no file named model.safetensors" in done.stderr


@pytest.fixture
def small_pack(tmp_path: Path) -> Callable[[], Path]:
    from flashlm.conversion.convert import convert
    from tests.models import save_checkpoint

    def make() -> Path:
        save_checkpoint(tmp_path / "source", "llama")
        convert(tmp_path / "source", tmp_path / "pack", dtype="fp32")
        return tmp_path / "pack"

    return make
