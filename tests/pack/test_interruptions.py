"""Conversions that are killed, run out of space, or meet a target that is not theirs."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flashlm.errors import ConfigError, PackError, StorageError
from flashlm.pack.convert import convert
from flashlm.pack.manifest import read_manifest
from flashlm.pack.verify import verify
from tests.models import save_checkpoint
from tests.pack.packs import all_bytes

# Kills itself without any clean-up at the n-th report of progress, which may come anywhere inside a file.
_KILLED = """
import os, signal, sys
from flashlm.pack.convert import convert
calls = 0
def die_at(done, total, what):
    global calls
    calls += 1
    if calls == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
convert(sys.argv[1], sys.argv[2], block_rows=16, progress=die_at)
"""

# Reports peak memory in KiB: before the conversion, and after it.
_MEASURED = """
import resource, sys
import torch, transformers
from transformers import AutoModelForCausalLM
from flashlm.pack.convert import convert
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(sys.argv[1], sys.argv[2])
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def _run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, timeout=200, check=False
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    save_checkpoint(folder / "source", "llama", num_hidden_layers=4)
    convert(folder / "source", folder / "pack", block_rows=16)
    return folder


def test_killed_conversions_go_on_and_end_with_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    pack = tmp_path / "pack"
    finished_layers = []
    for call in (3, 24, 5):  # inside model.safetensors, in layer 0, in a later layer after going on
        killed = _run(_KILLED, whole / "source", pack, call)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        with pytest.raises(PackError, match="not a finished pack"):
            read_manifest(pack)
        finished_layers.append(len(list((pack / "flash").glob("layer-*.rows"))))
    assert 0 < finished_layers[-1] < 4
    files = list((pack / "flash").glob("layer-*.rows"))
    before = {path: path.stat().st_ino for path in files[:-1]}
    convert(whole / "source", pack, block_rows=16)
    assert all(path.stat().st_ino == inode for path, inode in before.items())
    assert all_bytes(pack) == all_bytes(whole / "pack")


@pytest.mark.parametrize("name", ["model.safetensors", "layer-00002.rows"])
def test_interrupted_conversion_goes_on(name: str, whole: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int, what: str) -> None:
        if what == name:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(whole / "source", tmp_path / "pack", block_rows=16, progress=interrupt)
    assert not list((tmp_path / "pack").rglob(".*.tmp"))
    with pytest.raises(ConfigError, match=r"unfinished conversion.*delete it"):
        convert(whole / "source", tmp_path / "pack", block_rows=32)
    lines: list[str] = []
    convert(whole / "source", tmp_path / "pack", block_rows=16, announce=lines.append)
    assert all_bytes(tmp_path / "pack") == all_bytes(whole / "pack")


def test_source_that_changed_meanwhile_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "source", "llama")
    convert(tmp_path / "source", tmp_path / "pack")
    save_checkpoint(tmp_path / "source", "llama", seed=1)
    with pytest.raises(ConfigError, match="another source"):
        convert(tmp_path / "source", tmp_path / "pack")


def test_leftovers_of_a_killed_start_are_no_obstacle(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "pack" / "flash").mkdir(parents=True)
    (tmp_path / "pack" / "flash" / ".progress.json.tmp").write_text("{")
    convert(whole / "source", tmp_path / "pack", block_rows=16)
    assert all_bytes(tmp_path / "pack") == all_bytes(whole / "pack")


def test_finished_file_that_was_cut_is_written_again(whole: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int, what: str) -> None:
        if what == "layer-00003.rows":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(whole / "source", tmp_path / "pack", block_rows=16, progress=interrupt)
    (tmp_path / "pack" / "flash" / "layer-00001.rows").write_bytes(b"short")
    convert(whole / "source", tmp_path / "pack", block_rows=16)
    assert all_bytes(tmp_path / "pack") == all_bytes(whole / "pack")


def test_damaged_progress_record_is_refused(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "pack" / "flash").mkdir(parents=True)
    (tmp_path / "pack" / "flash" / "progress.json").write_text('{"fingerprint": 3}')
    with pytest.raises(PackError, match="damaged: delete"):
        convert(whole / "source", tmp_path / "pack")


def test_second_conversion_at_the_same_time_is_refused(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "pack" / "flash").mkdir(parents=True)
    fd = os.open(tmp_path / "pack" / "flash", os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        with pytest.raises(ConfigError, match="another conversion"):
            convert(whole / "source", tmp_path / "pack")
    finally:
        os.close(fd)


def test_folder_with_other_things_is_left_alone(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="not empty"):
        convert(whole / "source", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("inside", ["", "pack", "deep/er"])
def test_pack_inside_its_own_source_is_refused(inside: str, whole: Path) -> None:
    with pytest.raises(ConfigError, match="own source"):
        convert(whole / "source", whole / "source" / inside)


def test_target_that_is_a_file_is_refused(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="not a folder"):
        convert(whole / "source", tmp_path / "file")


def test_target_that_cannot_be_made_is_a_storage_error(whole: Path) -> None:
    with pytest.raises(StorageError, match="can't be written") as raised:
        convert(whole / "source", "/proc/flashlm-pack")
    assert raised.value.path == "/proc/flashlm-pack"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = os.geteuid() == 0 and not subprocess.call(
        ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(disk)], stderr=subprocess.DEVNULL
    )
    if not mounted:
        pytest.skip("mounting a small tmpfs needs root")
    yield disk
    subprocess.call(["umount", str(disk)])


def test_too_small_disk_is_refused_before_anything_is_written(whole: Path, small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(bytes(15 << 20))
    with pytest.raises(StorageError, match=r"does not fit.* needed,.* free") as raised:
        convert(whole / "source", small_disk / "pack", block_rows=16)
    assert raised.value.wanted_bytes is not None
    assert raised.value.wanted_bytes > (raised.value.got_bytes or 0)
    assert not (small_disk / "pack" / "model.safetensors").exists()


def test_disk_that_fills_up_half_way_is_reported_and_can_go_on(whole: Path, small_disk: Path) -> None:
    filler = small_disk / "filler"

    def fill(done: int, total: int, what: str) -> None:
        if what == "layer-00001.rows" and not filler.exists():
            filler.touch()
            with filler.open("ab") as file:
                try:
                    while True:
                        os.write(file.fileno(), bytes(4096))
                except OSError:
                    return

    with pytest.raises(StorageError, match=r"no space left.*run the same command again") as raised:
        convert(whole / "source", small_disk / "pack", block_rows=16, progress=fill)
    assert raised.value.errno == errno.ENOSPC
    filler.unlink()
    convert(whole / "source", small_disk / "pack", block_rows=16)
    assert all_bytes(small_disk / "pack") == all_bytes(whole / "pack")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    peaks = []
    for num_layers in (2, 6):
        source, pack = tmp_path / f"source{num_layers}", tmp_path / f"pack{num_layers}"
        save_checkpoint(
            source, "llama", dtype=torch.bfloat16, num_hidden_layers=num_layers, hidden_size=512, head_dim=128,
            intermediate_size=16384,
        )  # fmt: skip
        measured = _run(_MEASURED, source, pack)
        assert measured.returncode == 0, measured.stderr
        before, after = map(int, measured.stdout.split())
        peaks.append(after - before)
    assert verify(pack).problems == ()
    layer_kib = 3 * 512 * 16384 * 2 // 1024  # 48 MiB; three layers would show
    assert peaks[1] < peaks[0] + layer_kib
    assert peaks[1] < 5 * layer_kib
