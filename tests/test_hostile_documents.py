"""Documents that say anything at all: each reader answers with a named error, whatever was signed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashlm.conversion.convert import convert
from flashlm.conversion.sources.safetensors import INDEX_NAME, open_checkpoint
from flashlm.errors import FlashError
from flashlm.pack.checkpoint import read_header
from flashlm.pack.manifest import manifest_path, read_manifest
from flashlm.pack.pack_config import read_pack_config
from flashlm.planner.plan_document import load_plan
from flashlm.probe.device_profile import load_profile, save_profile
from flashlm.sparsity.calibration_document import document_path, read_sparsity
from flashlm.sparsity.routing import read_routing, routing_path
from tests.engine.calibrations import write_calibration
from tests.models import save_checkpoint
from tests.pack.packs import sealed
from tests.planner.profiles import make_profile

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def readers(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[Path, dict[str, Any], Callable[[], Any], bool]]:
    """Where a document lies, a good one, how it is read, and whether it is signed."""
    folder = tmp_path_factory.mktemp("hostile")
    save_checkpoint(folder / "source", "llama")
    convert(folder / "source", folder / "pack")
    pack = folder / "pack"
    manifest = read_manifest(pack)
    write_calibration(pack)
    save_profile(make_profile(), folder / "profile.json")
    index = folder / "sharded" / INDEX_NAME
    index.parent.mkdir()
    places: dict[str, tuple[Path, Callable[[], Any], bool]] = {
        "manifest": (manifest_path(pack), lambda: read_manifest(pack), True),
        "sparsity": (document_path(pack), lambda: read_sparsity(pack, manifest), True),
        "routing": (routing_path(pack), lambda: read_routing(pack, manifest), True),
        "config": (pack / "config.json", lambda: read_pack_config(pack, manifest, is_checked=False), False),
        "plan": (folder / "plan.json", lambda: load_plan(folder / "plan.json"), False),
        "profile": (folder / "profile.json", lambda: load_profile(folder / "profile.json"), False),
        "index": (index, lambda: open_checkpoint(index.parent), False),
    }
    return {
        name: (
            path,
            json.loads(path.read_text()) if path.exists() else {"plan_version": 3, "routing_version": 2},
            *rest,
        )
        for name, (path, *rest) in places.items()
    }


@pytest.mark.parametrize("name", ["manifest", "sparsity", "routing", "config", "plan", "profile", "index"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_in_any_place_is_read_or_a_named_error(
    name: str, readers: dict[str, tuple[Path, dict[str, Any], Callable[[], Any], bool]], data: st.DataObject
) -> None:
    path, good, read, is_signed = readers[name]
    content = json.loads(json.dumps(good))
    place: Any = content
    while isinstance(place, dict | list) and place:
        keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            place[key] = data.draw(JSON)
            break
        place = place[key]
    path.write_bytes(sealed(content) if is_signed else json.dumps(content).encode())
    said = ""
    try:
        read()
    except FlashError as error:
        said = str(error)
    assert not said or str(path.parent) in said


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.dictionaries(st.text(max_size=4), JSON, max_size=3))
def test_any_header_is_read_or_a_named_error(header: dict[str, Any], tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    said = ""
    try:
        read_header(path)
    except FlashError as error:
        said = str(error)
    assert not said or str(path) in said
