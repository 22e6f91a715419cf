"""The digests that a refactor is held against: they can be read, compared, and still come out."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "refactor"))

import digests

RECORDED = Path(__file__).parents[2] / "benchmarks" / "results" / "refactor-digests.json"
DOCUMENT = json.loads(RECORDED.read_text())


def test_no_recorded_case_failed() -> None:
    failed = {
        name: phase
        for name, found in DOCUMENT["cases"].items()
        for phase, digest in found.items()
        if digest.startswith("error") and phase != "lookup"  # transformers refuses it for models with a state
    }
    assert not {name for name in failed if "to its end" in name}
    assert len(failed) == DOCUMENT["num_errors"]


def test_placement_changes_no_recorded_bit() -> None:
    """Everything exact of one model and dtype agrees, wherever its weights are."""
    kinds: dict[str, set[str]] = {}
    for name, found in DOCUMENT["cases"].items():
        model, _, way = name.partition(" hybrid ")
        if way and "reordered" not in model:
            kinds.setdefault(model, set()).add(json.dumps({key: found.get(key) for key in ("short", "long", "verify")}))
    assert len(kinds) > 50
    assert all(len(found) == 1 for found in kinds.values())


def test_differences_names_case_and_phase() -> None:
    other = copy.deepcopy(DOCUMENT)
    name = next(iter(other["cases"]))
    phase = next(iter(other["cases"][name]))
    other["cases"][name][phase] = "0"
    assert digests.differences(DOCUMENT, other, is_part=False) == [f"{name}: {phase}"]
    del other["cases"][name]
    assert digests.differences(DOCUMENT, other, is_part=False) == [f"{name}: only in the old one"]
    assert digests.differences(DOCUMENT, other, is_part=True) == []
    assert digests.differences(other, DOCUMENT, is_part=True) == [f"{name}: only in the new one"]


def test_unlike_environments_are_refused() -> None:
    other = DOCUMENT | {"versions": DOCUMENT["versions"] | {"torch": "1.0"}}
    assert digests.unlike(DOCUMENT, DOCUMENT) == []
    assert [line.partition(":")[0] for line in digests.unlike(DOCUMENT, other)] == ["versions"]


def test_a_document_is_written_a_line_a_case() -> None:
    text = digests.dumps(DOCUMENT)
    assert json.loads(text) == DOCUMENT
    assert text == RECORDED.read_text()


@pytest.mark.slow
def test_some_recorded_digests_still_come_out() -> None:
    command = [sys.executable, digests.__file__, "--quick", "--only", "pru,gpt2,gpt_oss", "--against", str(RECORDED)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 2:
        pytest.skip(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
