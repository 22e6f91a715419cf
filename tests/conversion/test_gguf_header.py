"""Headers of GGUF files from outside: whatever does not add up is refused by name, before anything is written."""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashlm.conversion.convert import convert
from flashlm.conversion.sources.gguf_header import TYPES, models_among, read_gguf_header
from flashlm.errors import ConfigError, FlashError, PackError, UnsupportedModelError
from tests.gguf_files import save_gguf

ALIGNMENT = 32


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def key(name: str, value: str | int) -> bytes:
    kind, content = (8, text(value)) if isinstance(value, str) else (4, struct.pack("<I", value))
    return text(name) + struct.pack("<I", kind) + content


def tensor(name: str, shape: list[int], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind, offset)


def content(
    *tensors: bytes, keys: tuple[bytes, ...] = (key("general.architecture", "llama"),), data: int = 256, **head: int
) -> bytes:
    version = head.get("version", 3)
    counts = head.get("num_tensors", len(tensors)), head.get("num_keys", len(keys))
    start = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)
    return start + bytes(-len(start) % ALIGNMENT) + bytes(data)


GOOD = (tensor("a", [2, 4], 0, 0), tensor("b", [1, 32], 2, 32), tensor("c", [4], 0, 64))


def test_a_header_is_read_as_it_stands(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(content(*GOOD))
    header = read_gguf_header(tmp_path / "x.gguf")
    start = next(iter(header.tensors.values())).offset
    found = [(each.name, each.shape, each.type.name, each.offset - start) for each in header.tensors.values()]
    assert found == [("a", (2, 4), "F32", 0), ("b", (1, 32), "Q4_0", 32), ("c", (4,), "F32", 64)]
    assert header.architecture == "llama"


def test_types_are_of_the_sizes_that_the_reference_has() -> None:
    for number, found in TYPES.items():
        known = gguf.GGMLQuantizationType(number)
        assert (known.name, gguf.GGML_QUANT_SIZES[known]) == (found.name, (found.group_elements, found.group_bytes))


TWICE = key("general.architecture", "llama")
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cut short: it ends after 0 bytes"),
    "other magic": (b"GGML" + content(*GOOD)[4:], "is no GGUF file: it begins with b'GGML'"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(64), "big-endian"),
    "version 1": (content(*GOOD, version=1), "GGUF version 1, 2 and 3 are read"),
    "too many tensors": (content(*GOOD, num_tensors=1 << 60), "says that it holds 1152921504606846976 tensors"),
    "more tensors than bytes": (content(*GOOD, num_tensors=1000), "says that it holds 1000 tensors"),
    "too many keys": (content(*GOOD, num_keys=1 << 40), "metadata keys"),
    "ends within a key": (content(*GOOD)[:100], "cut short: it ends after 100 bytes, within"),
    "long text": (content(keys=(struct.pack("<Q", 1 << 50),), num_tensors=0), "1125899906842624 bytes, at most"),
    "no UTF-8": (content(keys=(text("a") + struct.pack("<IQ", 8, 1) + b"\xff",)), "no UTF-8"),
    "key twice": (content(*GOOD, keys=(TWICE, TWICE)), "general.architecture stands there twice"),
    "odd type of a key": (content(keys=(text("a") + struct.pack("<I", 77),)), "metadata a is of type 77"),
    "list of lists": (content(keys=(text("a") + struct.pack("<IIQ", 9, 9, 1),)), "metadata a is a list of type 9"),
    "long list": (content(keys=(text("a") + struct.pack("<IIQ", 9, 5, 1 << 61),)), "within metadata a"),
    "many texts": (content(keys=(text("a") + struct.pack("<IIQ", 9, 8, 1 << 61),)), "metadata a has 23"),
    "no architecture": (content(*GOOD, keys=(key("general.name", "x"),)), "general.architecture is missing"),
    "no tensors": (content(), "holds no tensors"),
    "no axes": (content(tensor("a", [], 0, 0)), "a has 0 axes"),
    "many axes": (content(tensor("a", [1] * 5, 0, 0)), "a has 5 axes"),
    "no elements": (content(tensor("a", [4, 0], 0, 0)), r"a has the shape \[4, 0\]"),
    "huge": (content(tensor("a", [1 << 40, 1 << 40], 0, 0)), "a has the shape"),
    "unknown type": (content(tensor("a", [1, 32], 99, 0)), "holds a in ggml's type 99, which is not known"),
    "type of activations": (content(tensor("a", [1, 32], 9, 0)), "ggml's type 9"),
    "broken group": (content(tensor("a", [2, 48], 2, 0)), "rows of 48 elements, no multiple of the 32"),
    "odd place": (content(tensor("a", [4], 0, 8)), "a lies at 8, no multiple of 32"),
    "twice": (content(tensor("a", [4], 0, 0), tensor("a", [4], 0, 32)), "a stands there twice"),
    "overlap": (content(tensor("a", [16], 0, 0), tensor("b", [4], 0, 32)), "a and b overlap"),
    "beyond the end": (content(tensor("a", [64], 0, 32)), "too short or damaged: a ends at"),
    "odd alignment": (content(*GOOD, keys=(TWICE, key("general.alignment", 24))), "general.alignment is 24"),
}


@pytest.mark.parametrize("name", BAD)
def test_damaged_headers_are_refused_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(BAD[name][0])
    with pytest.raises(PackError, match=BAD[name][1]):
        convert(tmp_path / "x.gguf", tmp_path / "pack")
    assert not (tmp_path / "pack").exists()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_a_header_says_it_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    raw = bytearray(content(*GOOD, keys=(TWICE, key("llama.block_count", 2))))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 257))] = data.draw(st.integers(0, 255))
    (tmp_path / "x.gguf").write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    with suppress(PackError):
        read_gguf_header(tmp_path / "x.gguf")


def rewritten(path: Path, change: Callable[[bytes], bytes]) -> Path:
    path.write_bytes(change(path.read_bytes()))
    return path


def test_a_file_that_ends_within_its_weights_is_refused(tmp_path: Path) -> None:
    save_gguf(tmp_path / "x.gguf", "llama")
    with pytest.raises(PackError, match="too short or damaged"):
        convert(rewritten(tmp_path / "x.gguf", lambda raw: raw[:-40]), tmp_path / "pack")
    assert not (tmp_path / "pack").exists()


def test_families_that_nobody_can_place_are_refused_by_name(tmp_path: Path) -> None:
    save_gguf(tmp_path / "x.gguf", "llama")
    other = rewritten(tmp_path / "x.gguf", lambda raw: raw.replace(text("llama"), text("mamba"), 1))
    with pytest.raises(
        UnsupportedModelError, match=r"architecture 'mamba', of which flashlm reads no GGUF files: llama, "
    ):
        convert(other, tmp_path / "pack")
    assert not (tmp_path / "pack").exists()


def test_tensors_that_have_no_place_and_places_without_tensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    save_gguf(path, "llama")
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xy.weight"))
    with pytest.raises(UnsupportedModelError, match=r"1 tensors that have no place .* first blk\.1\.ffn_xy\.weight"):
        convert(path, tmp_path / "pack")
    path.write_bytes(whole.replace(b"blk.1.ffn_up.weight", b"blk.9.ffn_up.weight"))
    with pytest.raises(FlashError, match=r"blk\.9\.ffn_up\.weight"):
        convert(path, tmp_path / "pack")
    path.write_bytes(
        whole.replace(
            text("llama.block_count") + struct.pack("<II", 4, 2),
            text("llama.block_count") + struct.pack("<II", 4, 1 << 30),
        )
    )
    with pytest.raises(PackError, match=r"llama\.block_count is 1073741824"):
        convert(path, tmp_path / "pack")
    assert not (tmp_path / "pack").exists()


def split(path: Path, count: int) -> list[Path]:
    """The parts of a file, as llama-gguf-split cuts it: all metadata in the first."""
    reader = gguf.GGUFReader(path)
    paths = [path.parent / f"x-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    for number, part in enumerate(paths):
        writer = gguf.GGUFWriter(part, "llama")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        if number == 0:
            for field in reader.fields.values():
                if field.name.startswith(("llama.", "tokenizer.", "general.name")):
                    value = field.contents()
                    if isinstance(value, list):
                        writer.add_array(field.name, value)
                    elif isinstance(value, str):
                        writer.add_string(field.name, value)
                    else:
                        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(field.name, value)
        for each in reader.tensors[number::count]:
            writer.add_tensor(each.name, np.array(each.data), raw_dtype=each.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


def test_any_part_of_a_split_model_stands_for_all(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    save_gguf(tmp_path / "whole" / "x.gguf", "llama")
    parts = split(tmp_path / "whole" / "x.gguf", 3)
    whole = convert(tmp_path / "whole" / "x.gguf", tmp_path / "p1")
    for number, part in enumerate(parts):
        manifest = convert(part, tmp_path / f"p2-{number}")
        assert manifest.weights_fingerprint == whole.weights_fingerprint
        assert sorted(manifest.source.files) == [each.name for each in parts]
    (tmp_path / "whole" / "x.gguf").unlink()
    assert convert(tmp_path / "whole", tmp_path / "p3").weights_fingerprint == whole.weights_fingerprint
    parts[2].rename(tmp_path / "away.gguf")
    with pytest.raises(PackError, match=r"one of 3 files of a model, 1 are missing, first x-00003-of-00003\.gguf"):
        convert(parts[0], tmp_path / "p4")
    (tmp_path / "away.gguf").write_bytes(parts[1].read_bytes())
    (tmp_path / "away.gguf").rename(parts[2])
    with pytest.raises(PackError, match=r"says that it is part 1 of 3, by its name it is 2 of 3"):
        convert(parts[0], tmp_path / "p4")
    parts[0].rename(tmp_path / "x-00001-of-00003.gguf")
    with pytest.raises(PackError, match=r"one of 3 files of a model, 1 are missing, first x-00001-of-00003\.gguf"):
        convert(tmp_path / "whole", tmp_path / "p4")
    (tmp_path / "x-00001-of-00003.gguf").rename(tmp_path / "whole" / "renamed.gguf")
    with pytest.raises(PackError, match=r"one of 3 files of a model: give them the names"):
        convert(tmp_path / "whole" / "renamed.gguf", tmp_path / "p4")
    assert not (tmp_path / "p4").exists()


def test_a_folder_with_several_models_lists_them(tmp_path: Path) -> None:
    for name in ("b.gguf", "a.gguf", "mmproj-a.gguf", "c-00001-of-00002.gguf", "c-00002-of-00002.gguf"):
        (tmp_path / name).write_bytes(b"")
    assert models_among(path.name for path in tmp_path.iterdir()) == ["a.gguf", "b.gguf", "c-00001-of-00002.gguf"]
    with pytest.raises(
        ConfigError, match=r"holds 3 GGUF models, name one of them: a\.gguf, b\.gguf, c-00001-of-00002\.gguf"
    ):
        convert(tmp_path, tmp_path.parent / "pack")
