"""The harness that caps processes: which way it takes, what it writes and reads in each, and how it refuses."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import capped  # of the benchmarks, which are no package
from capped import CappedRun, CappingUnavailable, V1Group, V2Group, new_group, scope_argv


def _write(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_version_1_is_taken_where_its_memory_controller_is(tmp_path: Path) -> None:
    v1 = _write(tmp_path / "v1", memory__limit_in_bytes="9223372036854771712")
    group = new_group(v1, tmp_path / "v2")
    assert isinstance(group, V1Group)
    assert group.path.parent == v1
    _write(group.path, memory__swappiness="60", memory__memsw__limit_in_bytes="0")
    group.set_limit(123 << 20)
    written = [(group.path / f"memory.{name}").read_text() for name in ("limit_in_bytes", "memsw.limit_in_bytes")]
    assert written == [str(123 << 20)] * 2
    _write(
        group.path, memory__max_usage_in_bytes="7", memory__oom_control="oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"
    )
    assert (group.peak_bytes(), group.num_oom_kills()) == (7, 2)


def test_version_2_makes_a_child_and_reads_its_counters(tmp_path: Path) -> None:
    own = capped._own_v2_folder(tmp_path, _write(tmp_path, proc="12:cpu:/x\n0::/user/mine\n") / "proc")
    assert own == tmp_path / "user" / "mine"
    root = _write(tmp_path / "v2", cgroup__controllers="cpu memory pids\n", cgroup__subtree_control="cpu\n")
    capped._enable_v2_memory(root)
    assert (root / "cgroup.subtree_control").read_text() == "+memory"
    group = V2Group(_write(tmp_path / "group", memory__max="max", memory__swap__max="max"))
    group.set_limit(99)
    assert [(group.path / f"memory.{name}").read_text() for name in ("max", "swap.max")] == ["99", "0"]
    assert group.peak_bytes() is None  # a kernel before 5.19
    _write(group.path, memory__peak="77\n", memory__events="low 0\nhigh 0\nmax 5\noom 1\noom_kill 1\n")
    _write(group.path, memory__stat="anon 1\npgmajfault 3\n")
    assert (group.peak_bytes(), group.num_limit_hits(), group.num_oom_kills()) == (77, 5, 1)
    assert group.num_major_faults() == 3


def test_a_group_without_the_memory_controller_is_refused_by_name(tmp_path: Path) -> None:
    root = _write(tmp_path / "v2", cgroup__controllers="cpu pids\n", cgroup__subtree_control="")
    with pytest.raises(OSError, match="memory controller is not delegated") as refused:
        capped._enable_v2_memory(root)
    assert refused.value.errno == errno.ENOTSUP
    with pytest.raises(CappingUnavailable, match="systemd-run --user --scope"):
        new_group(tmp_path / "none", tmp_path / "neither")


def test_a_scope_is_the_users_own_unless_we_are_root() -> None:
    assert scope_argv(["prog", "-x"], 5, is_root=False)[:3] == ["systemd-run", "--user", "--scope"]
    mine = scope_argv(["prog", "-x"], 5, is_root=True)
    assert "--user" not in mine
    assert mine[-3:] == ["--", "prog", "-x"]
    assert "MemoryMax=5" in mine
    assert "MemorySwapMax=0" in mine


@pytest.mark.parametrize(
    ("returncode", "num_oom_kills", "killed"),
    [(0, 0, False), (1, 0, False), (-9, 0, True), (137, 0, True), (1, 1, True)],
)
def test_a_kill_is_told_from_a_failure(returncode: int, num_oom_kills: int, killed: bool) -> None:
    done = CappedRun(
        returncode=returncode,
        wall_s=0.0,
        peak_bytes=None,
        num_limit_hits=0,
        num_major_faults=0,
        num_oom_kills=num_oom_kills,
        interface="cgroup v2",
    )
    assert done.was_killed is killed


def test_a_child_beyond_its_limit_is_killed_and_one_within_is_not() -> None:
    try:
        method = capped.cap_method()
    except CappingUnavailable as error:
        pytest.skip(f"no memory limit can be set here: {error}")
    program = "import sys; held = bytearray(int(sys.argv[1])); print(len(held))"
    for num_bytes, killed in ((8 << 20, False), (256 << 20, True)):
        argv = [sys.executable, "-c", program, str(num_bytes)]
        done = capped.run_capped(argv, limit_bytes=64 << 20, timeout_s=60, capture=True, method=method)
        assert done.was_killed is killed, done
        assert (done.stdout == f"{num_bytes}\n") is not killed
    assert not list(capped.V1_ROOT.glob(f"flashlm-bench-{os.getpid()}-*"))
