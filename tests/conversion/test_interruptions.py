"""Conversions that are killed, run out of space, or meet a target that is not theirs."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashlm.conversion.convert import convert
from flashlm.conversion.verify import verify
from flashlm.errors import ConfigError, PackError, StorageError
from flashlm.pack.manifest import read_manifest
from flashlm.structure.families import build_meta_model
from tests.models import save_checkpoint, tiny_config
from tests.pack.packs import all_bytes

# Imports once, then converts in one forked child after the other: `SOURCE PACK WHAT CALL`, where a child kills itself
# without any clean-up at the n-th report of progress on a file. Prints how each child ended and its peak memory in KiB.
_CHILDREN = """
import os, resource, signal, sys
import torch, transformers
from transformers import AutoModelForCausalLM
import flashlm.conversion.convert as conversion
conversion.RECORD_EVERY_BYTES = 1  # tiny files are recorded as large ones are: each at once
def run(source, pack, what, call):
    calls = 0
    def die_at(done, total, now):
        nonlocal calls
        calls += now == what
        if calls == int(call):
            os.kill(os.getpid(), signal.SIGKILL)
    conversion.convert(source, pack, progress=die_at)
for line in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        run(*line.split())
        os._exit(0)
    _, status, usage = os.wait4(child, 0)
    print(status, usage.ru_maxrss)
"""


def _run(*lines: str) -> list[tuple[int, int]]:
    """Return the wait status and the peak memory in KiB of each child."""
    done = subprocess.run(
        [sys.executable, "-c", _CHILDREN, *lines], capture_output=True, text=True, timeout=250, check=True
    )
    return [(int(line.split()[0]), int(line.split()[1])) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    save_checkpoint(folder / "source", "llama", num_hidden_layers=4)
    convert(folder / "source", folder / "pack")
    return folder


def test_killed_conversions_go_on_and_end_with_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    pack = tmp_path / "pack"
    points = [
        "flash/resident.safetensors 2",  # the first file half written
        "layer-00000.rows 1",  # a layer half written
        "layer-00002.rows 2",  # a layer in place, but not yet recorded
    ]
    ends = _run(*(f"{whole / 'source'} {pack} {point}" for point in points))
    assert [status for status, _ in ends] == [signal.SIGKILL] * 3
    with pytest.raises(PackError, match="not a finished pack"):
        read_manifest(pack)
    before = {path: path.stat().st_ino for path in (pack / "flash").glob("layer-0000[01].rows")}
    assert len(before) == 2
    convert(whole / "source", pack)
    assert all(path.stat().st_ino == inode for path, inode in before.items())  # kept, not written again
    assert all_bytes(pack) == all_bytes(whole / "pack")


@pytest.mark.parametrize("name", ["flash/resident.safetensors", "layer-00002.rows"])
def test_interrupted_conversion_goes_on(name: str, whole: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int, what: str) -> None:
        if what == name:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(whole / "source", tmp_path / "pack", progress=interrupt)
    assert not list((tmp_path / "pack").rglob(".*.tmp"))
    with pytest.raises(ConfigError, match=r"unfinished conversion.*delete it"):
        convert(whole / "source", tmp_path / "pack", dtype="fp32")
    lines: list[str] = []
    convert(whole / "source", tmp_path / "pack", announce=lines.append)
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
    convert(whole / "source", tmp_path / "pack")
    assert all_bytes(tmp_path / "pack") == all_bytes(whole / "pack")


def test_finished_file_that_was_cut_is_written_again(whole: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int, what: str) -> None:
        if what == "layer-00003.rows":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(whole / "source", tmp_path / "pack", progress=interrupt)
    (tmp_path / "pack" / "flash" / "layer-00001.rows").write_bytes(b"short")
    convert(whole / "source", tmp_path / "pack")
    assert all_bytes(tmp_path / "pack") == all_bytes(whole / "pack")


@pytest.mark.parametrize("content", ['{"fingerprint": 3}', '{"progress_version": 1, "fingerprint": 3}', "{", "[]"])
def test_damaged_progress_record_is_refused(content: str, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "pack" / "flash").mkdir(parents=True)
    (tmp_path / "pack" / "flash" / "progress.json").write_text(content)
    with pytest.raises(PackError, match=r"progress\.json .*: delete the unfinished pack and convert again"):
        convert(whole / "source", tmp_path / "pack")


def test_second_conversion_at_the_same_time_is_refused(whole: Path, tmp_path: Path) -> None:
    leftover = tmp_path / "pack" / "flash" / ".layer-00000.rows.tmp"
    leftover.parent.mkdir(parents=True)
    leftover.touch()
    fd = os.open(tmp_path / "pack" / "flash", os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        with pytest.raises(ConfigError, match="another conversion"):
            convert(whole / "source", tmp_path / "pack")
        assert leftover.exists()  # the other one is writing it
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
        convert(whole / "source", small_disk / "pack")
    assert raised.value.wanted_bytes is not None
    assert raised.value.wanted_bytes > (raised.value.got_bytes or 0)
    assert not (small_disk / "pack" / "flash" / "resident.safetensors").exists()


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
        convert(whole / "source", small_disk / "pack", progress=fill)
    assert raised.value.errno == errno.ENOSPC
    filler.unlink()
    convert(whole / "source", small_disk / "pack")
    assert all_bytes(small_disk / "pack") == all_bytes(whole / "pack")


def _save_blank(folder: Path, *, num_layers: int) -> None:
    """A checkpoint of zeros with layers of 24 MiB."""
    config = tiny_config("llama", num_hidden_layers=num_layers, hidden_size=256, intermediate_size=16384)
    config.save_pretrained(folder)
    state = build_meta_model(config).state_dict()
    blank = {name: torch.zeros(value.shape, dtype=torch.bfloat16) for name, value in state.items()}
    save_file(blank, folder / "model.safetensors")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    for num_layers in (4, 10):
        _save_blank(tmp_path / f"source{num_layers}", num_layers=num_layers)
    ends = _run(*(f"{tmp_path}/source{count} {tmp_path}/pack{count} none 1" for count in (4, 10)))
    assert [status for status, _ in ends] == [0, 0]
    smaller_kib, larger_kib = (peak for _, peak in ends)
    assert larger_kib < smaller_kib + 3 * (24 << 10)  # six layers more, less than three in memory
    assert larger_kib < 1 << 20
    assert verify(tmp_path / "pack10").problems == ()


def test_a_source_found_damaged_while_its_weights_pass_leaves_nothing(whole: Path, tmp_path: Path) -> None:
    source, pack = shutil.copytree(whole / "source", tmp_path / "source"), tmp_path / "pack"
    state = load_file(source / "model.safetensors")
    state["model.layers.3.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    damaged = pytest.raises(PackError, match=r"layers\.3\.mlp\.up_proj\.weight holds 100000, too large for float16")
    with damaged:
        convert(source, pack, dtype="fp16")
    assert not pack.exists()

    def stop(done: int, total: int, what: str) -> None:
        if what == "layer-00002.rows":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, pack, dtype="fp16", progress=stop)
    assert len(list((pack / "flash").iterdir())) > 2
    with damaged:  # goes on where it was
        convert(source, pack, dtype="fp16")
    assert list(pack.iterdir()) == []
