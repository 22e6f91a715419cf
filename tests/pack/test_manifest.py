from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from flashlm.conversion.convert import convert
from flashlm.errors import PackError
from flashlm.pack.manifest import Manifest, manifest_path, read_manifest, write_manifest
from tests.models import save_checkpoint
from tests.pack.packs import sealed


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("manifest")
    save_checkpoint(folder / "source", "llama")
    convert(folder / "source", folder / "pack")
    return manifest_path(folder / "pack").read_text()


def _read(folder: Path, text: str | bytes) -> Manifest:
    manifest_path(folder).parent.mkdir(exist_ok=True, parents=True)
    manifest_path(folder).write_bytes(text.encode() if isinstance(text, str) else text)
    return read_manifest(folder)


def _change(text: str, *path: str | int, value: object) -> str:
    content = json.loads(text)
    place = content
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return sealed(content).decode()


def test_folder_without_manifest_is_no_pack(tmp_path: Path) -> None:
    with pytest.raises(PackError, match=r"not a finished pack.*flashlm convert"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("version", [1, 2, 3, 6, 0, "3", None, [3], True])
def test_unknown_version_is_refused_by_name(version: object, good: str, tmp_path: Path) -> None:
    with pytest.raises(
        PackError, match=r"format version .* this flashlm reads versions 4 and 5: .*convert the model again"
    ):
        _read(tmp_path, _change(good, "format_version", value=version))


def test_version_4_is_read_and_written_as_it_was(good: str, tmp_path: Path) -> None:
    old = _change(good, "format_version", value=4)
    manifest = _read(tmp_path, old)
    assert manifest.units[0].arrangement == "row"
    write_manifest(tmp_path, manifest)
    assert manifest_path(tmp_path).read_text() == old


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize(
    "change",
    [
        {"encodings": ["fp16"] * 3},
        {"arrangement": "block", "row_stride_bytes": None, "block_stride_bytes": 28672},
    ],
)
def test_what_came_with_version_5_is_refused_in_4(
    version: int, change: dict[str, object], good: str, tmp_path: Path
) -> None:
    new = json.loads(good)
    new["format_version"] = version
    for unit in new["units"]:
        unit.update(change)
    if version == 5:
        manifest = _read(tmp_path, sealed(new))
        write_manifest(tmp_path, manifest)
        assert read_manifest(tmp_path) == manifest
        return
    with pytest.raises(PackError, match=r"of version 4 has not|in a pack of"):
        _read(tmp_path, sealed(new))


@pytest.mark.parametrize(
    "name", ["../layer-00000.rows", "/etc/passwd", "layer-00000.rows/..", "layer-0.rows", "layer-00000.rows\n", ""]
)
def test_path_that_leaves_the_pack_is_refused(name: str, good: str, tmp_path: Path) -> None:
    with pytest.raises(PackError, match=r"units\.0\.file"):
        _read(tmp_path, _change(good, "units", 0, "file", value=name))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("units", 0, "hidden_size"), 1 << 40),
        (("units", 0, "hidden_size"), 1000),
        (("units", 0, "hidden_size"), "48"),
        (("units", 0, "block_rows"), 0),
        (("units", 0, "row_stride_bytes"), 1024),
        (("units", 0, "row_stride_bytes"), None),
        (("units", 0, "kind"), "linear"),
        (("units", 0, "kind"), "attention"),
        (("units", 0, "parts"), ["up", "gate", "down"]),
        (("units", 0, "parts"), ["weight"]),
        (("units", 0, "arrangement"), "block"),
        (("units", 0, "arrangement"), "column"),
        (("units", 0, "biases"), ["weight"]),
        (("units", 0, "num_active"), 2),
        (("units", 0, "encodings"), ["int4"] * 3),
        (("units", 1, "module"), "model.layers.0.mlp"),
        (("units",), []),
        (("units", 0, "module"), ""),
        (("units", 0, "module"), "model..mlp"),
        (("units", 0, "identities"), ["model.norm/"]),
        (("num_hidden_layers",), 10**9),
        (("num_hidden_layers",), 1),
        (("small_files",), {"..": "0" * 16}),
        (("units", 0, "num_rows"), 1000),
        (("units", 0, "checksums"), ["0"]),
        (("units", 1, "file"), "layer-00000.rows"),
        (("units", 0, "surprise"), 1),
        (("resident", "chunk_bytes"), 1),
        (("dtype",), "int4"),
    ],
)
def test_field_that_does_not_fit_is_refused(path: tuple[str, ...], value: object, good: str, tmp_path: Path) -> None:
    with pytest.raises(PackError, match="is invalid at"):
        _read(tmp_path, _change(good, *path, value=value))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(tmp_path: Path, junk: bytes) -> None:
    with pytest.raises(PackError):
        _read(tmp_path, junk)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_manifest_with_any_changed_piece_is_refused(tmp_path: Path, good: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(good) - 1))
    junk = data.draw(st.text(max_size=8))
    changed = good[:start] + junk + good[start + len(junk) :]
    assume(changed != good)
    with pytest.raises(PackError, match=r"manifest\.json"):
        _read(tmp_path, changed)


def test_every_flipped_bit_of_a_manifest_is_refused(tmp_path: Path, good: str) -> None:
    raw = good.encode()
    for at in range(0, len(raw), 7):
        with pytest.raises(PackError, match=r"manifest\.json"):
            _read(tmp_path, raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
