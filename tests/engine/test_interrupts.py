"""After an interrupt, wherever it falls and however often, the next answer has the bits of an undisturbed one.

The sweep is that of `benchmarks/reliability/interrupts.py`, here once around every call where a pass's state is kept.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.interrupted import MODES, make_pack, sweep
from tests.storage.conftest import build_faults

GROWTH_BYTES = 8 << 20  # some of it is the sweep's own notes
QUARANTINE_BYTES = 256 << 20  # freed memory that gcc's address sanitizer keeps, to see who uses it still


def growth_limit() -> int:
    """Return how many bytes a process may grow by without having lost any."""
    is_sanitized = "libasan" in Path("/proc/self/maps").read_text()
    return GROWTH_BYTES + (QUARANTINE_BYTES if is_sanitized else 0)


@pytest.mark.parametrize("mode", MODES)
def test_the_answer_after_an_interrupt_is_right(mode: str, tmp_path: Path) -> None:
    library = build_faults(tmp_path)
    if library is None:
        pytest.skip("reads are delayed by a preloaded library: needs Linux and cc")
    pack = make_pack(tmp_path, mode)
    backend = "auto" if mode == "naive" else "threads"
    arguments = ("--sites", "--double", "60", "--timer", "40", "--budget-s", "5")
    done = sweep(pack, mode, library, backend, *arguments)
    assert done["exit_status"] == 0, done["stderr"]
    assert done["num_slots"] == 2
    assert done["num_missed"] if mode in ("sparse", "experts") else done["num_reads_of_a_token"] > 8
    for kind, result in done["results"].items():
        assert (result["num_wrong"], result["errors"]) == (0, {}), (kind, result["wrong_at"], result["errors"])
    # Nearly each falls where it is meant to; how many a busy machine has time for is another thing.
    for kind in ("sites", "double"):
        result = done["results"][kind]
        assert result["num_tried"] >= 5, (kind, result)
        assert result["num_interrupted"] >= 0.9 * result["num_tried"], (kind, result)
    assert done["after"]["num_fds"] == done["before"]["num_fds"]
    assert done["after"]["rss_bytes"] - done["before"]["rss_bytes"] < growth_limit()
