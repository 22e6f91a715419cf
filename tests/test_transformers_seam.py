"""What transformers keeps to itself is touched in one module, and is there in the transformers that is installed."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import transformers
from torch import nn

import flashlm
from flashlm import _registration, transformers_seam
from flashlm.engine.quantizer import FlashConfig, FlashQuantizer
from flashlm.errors import ConfigError
from flashlm.pru.config import PRUConfig
from flashlm.pru.language_model import PRUForCausalLM

SOURCE = Path(flashlm.__file__).parent
REPOSITORY = Path(__file__).parents[1]
SEAM = SOURCE / "transformers_seam.py"
# What transformers documents for its users; everything else of it goes through the seam.
PUBLIC_MODULES = {"transformers", "transformers.activations", "transformers.utils", "transformers.utils.logging"}
# Names with an underscore that belong to Python and torch, and what is ours on objects of others.
FOREIGN = {*dir(os), *dir(sys), *vars(nn.Module()), "_is_param"}
OWN_PREFIX = "_flash"

TREES = {path: ast.parse(path.read_text()) for path in sorted(SOURCE.rglob("*.py"))}


def defined(tree: ast.AST) -> Iterator[str]:
    """Names that a file of ours gives to something."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Name(id=name, ctx=ast.Store()):
                yield name
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                yield name


OWN = {name for path, tree in TREES.items() if path != SEAM for name in defined(tree)}


def is_private(name: object) -> bool:
    return isinstance(name, str) and name.startswith("_") and not name.startswith("__") and name.isidentifier()


def transformers_modules(node: ast.AST) -> Iterator[str]:
    """Modules of transformers that an import takes something from."""
    match node:
        case ast.Import(names=names):
            yield from (alias.name for alias in names if alias.name.split(".")[0] == "transformers")
        case ast.ImportFrom(module=str(module), names=names) if module.split(".")[0] == "transformers":
            yield module
            inner = [f"{module}.{alias.name}" for alias in names if alias.name.islower()]
            yield from (name for name in inner if find_spec(module) and is_module(name))
        case ast.Call(args=[ast.Constant(value=str(text)), *_]) if text.startswith("transformers."):
            if ast.unparse(node.func).endswith(("import_module", "find_spec", "__import__")):
                yield text


def is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is no package
        return False


def private_names(node: ast.AST) -> Iterator[str]:
    """Names with an underscore that are read or set on something that is not ours."""
    match node:
        case ast.Attribute(value=value, attr=name) if is_private(name) and not ast.unparse(value).startswith("torch"):
            yield name
        case ast.Call(
            func=ast.Name(id="getattr" | "setattr" | "hasattr" | "delattr"), args=[_, ast.Constant(value=name), *_]
        ):
            if is_private(name):
                yield name


def trespasses(tree: ast.AST) -> list[str]:
    found: list[str] = []
    for node in ast.walk(tree):
        found += [module for module in transformers_modules(node) if module not in PUBLIC_MODULES]
        found += [name for name in private_names(node) if name not in OWN | FOREIGN and not name.startswith(OWN_PREFIX)]
    return found


@pytest.mark.parametrize(
    "code",
    [
        "from transformers.core_model_loading import WeightConverter",
        "from transformers import core_model_loading",
        "import transformers.integrations.moe",
        "module = import_module('transformers.cache_utils')",
        "model._get_dtype_plan(dtype)",
        "model._no_split_modules = []",
        "getattr(model, '_no_split_modules', None)",
    ],
)
def test_a_trespass_is_seen(code):
    assert trespasses(ast.parse(code))


@pytest.mark.parametrize(
    "path", [path for path in TREES if path != SEAM], ids=lambda path: str(path.relative_to(SOURCE))
)
def test_only_the_seam_touches_what_transformers_keeps_to_itself(path):
    found = trespasses(TREES[path])
    if path.name.endswith("_seam.py"):  # the seam to another library, whose names these are
        found = [name for name in found if not is_private(name)]
    assert not found, f"{path.name} uses {', '.join(found)}: take it from flashlm.transformers_seam, and name it there"


def test_the_modules_that_registration_waits_for_are_there():
    for name in _registration._REGISTRARS:
        assert is_module(name)


def test_everything_that_the_seam_names_is_there():
    transformers_seam.check.__wrapped__()
    for name in transformers_seam.MODULE_OF:
        assert getattr(transformers_seam, name) is not None
    checked = [node for node in ast.walk(TREES[SEAM]) if isinstance(node, ast.ImportFrom)]
    typed = {alias.name: node.module for node in checked for alias in node.names if alias.asname}
    assert typed == dict(transformers_seam.MODULE_OF)


@pytest.mark.parametrize("ours", [FlashConfig, FlashQuantizer, PRUConfig, PRUForCausalLM], ids=lambda cls: cls.__name__)
def test_what_our_classes_stand_in_for_is_named_in_the_seam(ours):
    """A method that transformers no longer calls would be ours alone, and nothing would say so."""
    bases = [cls for cls in inspect.getmro(ours)[1:] if cls.__module__.startswith("transformers.")]
    inherited = {name for cls in bases for name in vars(cls)}
    named = {name for names in transformers_seam.ATTRIBUTES.values() for name in names}
    assert {name for name in vars(ours) if is_private(name) and name in inherited - {"_abc_impl"}} <= named


def test_what_the_seam_says_of_quantizers_is_what_ours_stands_in_for():
    named = transformers_seam.ATTRIBUTES["transformers.quantizers.base.HfQuantizer"]
    inherited = {name for name in vars(transformers_seam.HfQuantizer) if not name.startswith(("__", "_abc"))}
    assert set(named) == inherited & set(vars(FlashQuantizer))


def test_a_missing_name_is_an_error_that_says_which_transformers_to_take(monkeypatch):
    monkeypatch.delattr("transformers.core_model_loading.Interleave")
    monkeypatch.delattr("transformers.PreTrainedModel._get_dtype_plan")
    installed, (oldest, newest) = version("transformers"), transformers_seam.TRIED
    wanted = rf"transformers {installed} has no .*core_model_loading\.Interleave.*{oldest} to {newest}"
    with pytest.raises(ConfigError, match=wanted):
        _ = transformers_seam.Interleave
    with pytest.raises(ConfigError, match=r"Interleave, transformers\.PreTrainedModel\._get_dtype_plan: "):
        transformers_seam.check.__wrapped__()


def test_the_range_that_was_tried_is_stated_alike_everywhere():
    oldest, newest = transformers_seam.TRIED
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    (stated,) = (line for line in project["dependencies"] if line.startswith("transformers"))
    major, minor, _ = newest.split(".")
    assert stated == f"transformers>={oldest.removesuffix('.0')},<{major}.{int(minor) + 1}"
    makefile = (REPOSITORY / "Makefile").read_text()
    assert re.search(r"^TRANSFORMERS_VERSIONS := (.*)$", makefile, re.MULTILINE)[1].split() == [oldest, newest]
    assert re.search(rf"{oldest}.*{newest}|{oldest[:4]}.*{newest[:4]}", (REPOSITORY / "README.md").read_text())
    assert transformers.__version__ == importlib.metadata.version("transformers")
