from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from flashlm.conversion.convert import convert
from flashlm.conversion.verify import verify
from flashlm.errors import PackError
from flashlm.pack.manifest import read_manifest
from tests.models import save_checkpoint


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    save_checkpoint(folder / "source", "llama")
    convert(folder / "source", folder / "pack", block_rows=16)
    return folder / "pack"


@pytest.fixture
def pack(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "pack"))


def _flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def test_whole_pack_has_no_problems(pack: Path) -> None:
    report = verify(pack)
    assert report.problems == ()
    assert report.num_files == 3 + len(read_manifest(pack).small_files)
    assert report.num_bytes == sum(
        path.stat().st_size for path in pack.rglob("*") if path.suffix in (".rows", ".safetensors")
    )
    report.raise_for_problems()


def test_flipped_bit_names_file_and_block(pack: Path) -> None:
    _flip(pack / "flash" / "layer-00001.rows", 2 * 16 * 512 + 700)
    problems = verify(pack).problems
    assert len(problems) == 1
    assert "layer-00001.rows: block 2 (rows 32 to 47)" in problems[0]


def test_flipped_padding_is_found_too(pack: Path) -> None:
    _flip(pack / "flash" / "layer-00000.rows", 511)
    assert "block 0" in verify(pack).problems[0]


@pytest.mark.parametrize("at", [0, 20, -1])
def test_flipped_bit_in_resident_weights_is_found(at: int, pack: Path) -> None:
    _flip(pack / "flash" / "resident.safetensors", at)
    assert "resident.safetensors: chunk 0" in verify(pack).problems[0]


def test_all_problems_are_found_not_only_the_first(pack: Path) -> None:
    _flip(pack / "flash" / "layer-00000.rows", 3)
    truncated = pack / "flash" / "layer-00001.rows"
    truncated.write_bytes(truncated.read_bytes()[:-4096])
    (pack / "flash" / "resident.safetensors").unlink()
    (pack / "flash" / "layer-00002.rows").write_bytes(b"")
    (pack / "config.json").unlink()
    report = verify(pack)
    text = "\n".join(report.problems)
    assert "layer-00000.rows: block 0" in text
    assert f"layer-00001.rows has {truncated.stat().st_size} bytes, {truncated.stat().st_size + 4096} expected" in text
    assert "layer-00001.rows: block 5" in text
    assert "resident.safetensors is missing" in text
    assert "layer-00002.rows is not part of this pack" in text
    assert "config.json is missing" in text
    with pytest.raises(PackError, match=r"is damaged \(6 problems\)"):
        report.raise_for_problems()


def test_long_file_is_found(pack: Path) -> None:
    with (pack / "flash" / "resident.safetensors").open("ab") as file:
        file.write(b"x")
    assert len(verify(pack).problems) == 1


def test_unfinished_conversion_is_no_pack(pack: Path) -> None:
    (pack / "flash" / "manifest.json").unlink()
    with pytest.raises(PackError, match="not a finished pack"):
        verify(pack)


def test_progress_ends_at_the_total(pack: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    report = verify(pack, progress=lambda *call: calls.append(call))
    assert calls[-1][:2] == (report.num_bytes, report.num_bytes)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_small_files_are_checked(pack: Path, name: str) -> None:
    path = pack / name
    path.write_text(path.read_text().replace("}", " }", 1))
    report = verify(pack)
    assert [problem for problem in report.problems if name in problem and "not as it was converted" in problem]
    path.unlink()
    assert any("is missing" in problem for problem in verify(pack).problems)
