"""The probe on a small file: what it writes, refuses, and never leaves behind; and what `doctor` finds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from flashlm.cli.app import main
from flashlm.errors import ConfigError, StorageError
from flashlm.planner.machine import rates_of
from flashlm.probe import doctor as doctor_module
from flashlm.probe import file as probe_file_module
from flashlm.probe.device_profile import load_profile, profile_path, save_profile
from flashlm.probe.doctor import examine
from flashlm.probe.file import choose_bytes, probe_file
from flashlm.probe.probe import probe
from tests.planner.profiles import make_profile

SIZE = 96 << 20


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHLM_CACHE", str(tmp_path / "cache"))


def test_a_probe_measures_keeps_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "device"
    folder.mkdir()
    with pytest.raises(SystemExit) as done:
        main(["probe", str(folder), "--size", "96MiB", "--seconds", "0.2", "--json"])
    assert done.value.code == 0
    shown = json.loads(capsys.readouterr().out)
    profile = load_profile(profile_path(folder))
    assert profile is not None
    assert profile.model_dump(mode="json") == shown
    assert list(folder.iterdir()) == []
    patterns = {(point.pattern, point.read_bytes) for point in profile.reads}
    assert {("random", 4096), ("random", 1 << 20), ("sequential", 1 << 20)} <= patterns
    for point in profile.reads:
        assert point.gb_per_s == pytest.approx(point.reads_per_s * point.read_bytes / 1e9)
        assert (point.latency_p50_s is not None) == (point.queue_depth == 1)
    assert 0 < profile.read_share <= 1
    for dtype in ("bfloat16", "float16", "float32"):
        assert rates_of(profile, dtype).random_read_gb_per_s(16384) > 0


def test_a_probe_that_is_stopped_leaves_nothing(tmp_path: Path) -> None:
    def stop(done: int, total: int, what: str) -> None:
        if done > 2:
            raise KeyboardInterrupt

    folder = tmp_path / "device"
    folder.mkdir()
    with pytest.raises(KeyboardInterrupt):
        probe(folder, file_bytes=SIZE, seconds=0.2, progress=stop)
    assert list(folder.iterdir()) == []
    assert load_profile(profile_path(folder)) is None


def test_the_file_has_no_name_where_unnamed_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(probe_file_module.os, "O_TMPFILE", raising=False)
    with probe_file(tmp_path, 8 << 20) as file:
        assert not [each for each in tmp_path.iterdir() if each.is_file()]
        assert file.path.stat().st_size == file.num_bytes == 8 << 20
        assert file.write_gb_per_s > 0


def test_a_device_is_never_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 1 << 30
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100 * gib, 97 * gib, 3 * gib))
    assert choose_bytes(tmp_path, 2 * gib) == gib // 2
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100 * gib, 98 * gib, 2 * gib))
    with pytest.raises(StorageError, match="not to fill the device"):
        choose_bytes(tmp_path, 2 * gib)


@pytest.mark.parametrize("name", ["missing", "file"])
def test_a_folder_that_cant_be_probed_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="can't be probed"):
        probe(tmp_path / name, file_bytes=SIZE)
    with pytest.raises(ConfigError, match="not a folder"):
        examine(tmp_path / name)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"profile_version": 9}', '{"profile_version": 1, "reads": 3}'])
def test_a_damaged_profile_is_refused(content: str, tmp_path: Path) -> None:
    path = profile_path(tmp_path)
    save_profile(make_profile(), path)
    assert load_profile(path) == make_profile()
    path.write_text(content)
    with pytest.raises(ConfigError, match="run `flashlm probe` again"):
        load_profile(path)


def test_doctor_finds_nothing_bad_here_and_says_what_is_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        main(["doctor", str(tmp_path), "--json"])
    assert done.value.code == 0
    found = {each["what"]: each for each in json.loads(capsys.readouterr().out)}
    assert {"file system", "io_uring", "memory", "swap", "processor", "versions"} <= found.keys()
    monkeypatch.setattr(doctor_module, "file_system", lambda folder: "nfs4")
    slow = next(each for each in examine(tmp_path) if each.what == "file system")
    assert (slow.level, bool(slow.advice)) == ("warn", True)
