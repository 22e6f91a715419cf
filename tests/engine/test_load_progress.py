"""Who waits for a model hears how far the reading is."""

from __future__ import annotations

import pytest

import flashlm
from flashlm.engine.load_progress import watch_loading


@pytest.mark.parametrize(("family", "check"), [("llama", "load"), ("llama", "none"), ("mixtral", "load")])
def test_reading_is_told_up_to_the_end(family, check, tiny_pack):
    told = []
    with watch_loading(lambda *what: told.append(what)):
        model = flashlm.load(tiny_pack(family).pack, context=32, check=check)
    placement = model.flash.placement
    expected = model.flash.manifest.resident.num_bytes + placement.pinned_bytes
    expected += placement.cache_bytes if placement.experts else 0
    assert {(total, what) for _, total, what in told} == {(expected, "reading weights")}
    read = [done for done, _, _ in told]
    assert read == sorted(read)
    assert 0 < read[0] < read[-1] == expected


def test_nobody_listening_costs_nothing(tiny_pack):
    told = []
    with watch_loading(lambda *what: told.append(what)):
        pass
    flashlm.load(tiny_pack("llama").pack, context=32)
    assert told == []
