"""The routing document: what is written is read, anything else refused by name; and what a trace says of policies."""

from __future__ import annotations

import numpy as np
import pytest

from flashlm.calibration.routing_trace import RoutingTrace, compare_policies
from flashlm.errors import PackError
from flashlm.pack.manifest import FLASH_DIR, MANIFEST_NAME, read_manifest
from flashlm.sparsity.calibration_document import fingerprint
from flashlm.sparsity.routing import (
    MAX_ROUTING_BYTES,
    LayerRouting,
    PolicyShares,
    Routing,
    read_routing,
    routing_path,
    write_routing,
)
from tests.pack.packs import replace_sealed, sealed

CHECKSUM = "0123456789abcdef"
NUM_EXPERTS = 4


@pytest.fixture
def pack(tmp_path):
    """A manifest alone: the document needs nothing else of a pack."""
    unit = {
        "kind": "experts",
        "hidden_size": 32,
        "num_rows": NUM_EXPERTS * 16,
        "parts": ["up", "down"],
        "encodings": ("fp32",) * 2,
        "block_rows": 16,
        "row_stride_bytes": 512,
        "block_stride_bytes": 8192,
        "num_active": 2,
        "activation": "relu2",
        "checksums": [CHECKSUM] * NUM_EXPERTS,
    }
    content = {
        "format_version": 4,
        "flashlm_version": "0",
        "num_hidden_layers": 2,
        "model_type": "olmoe",
        "dtype": "float32",
        "units": [
            unit | {"module": f"layers.{index}.experts", "file": f"experts-{index:05d}.rows"} for index in range(2)
        ],
        "resident": {"num_bytes": 10, "chunk_bytes": 10, "checksums": [CHECKSUM]},
        "source": {"name": "tiny", "files": {}},
    }
    (tmp_path / FLASH_DIR).mkdir()
    (tmp_path / FLASH_DIR / MANIFEST_NAME).write_bytes(sealed(content))
    return tmp_path


@pytest.fixture
def written(pack):
    layers = (LayerRouting(counts=(6, 0, 1, 1), zero_share=0.5), LayerRouting(counts=(2, 2, 2, 2)))
    replays = (
        PolicyShares(cache_share=0.25, lru=0.1, lfu=0.3, pinned=0.2, best="lfu"),
        PolicyShares(cache_share=0.75, lru=0.8, lfu=0.8, pinned=0.7, best="lru"),
    )
    routing = Routing(
        fingerprint=fingerprint(read_manifest(pack)),
        text="t",
        num_tokens=8,
        num_replayed_tokens=4,
        layers=layers,
        replays=replays,
    )
    write_routing(pack, routing)
    return routing


def test_what_is_written_is_read(pack, written):
    found = read_routing(pack, read_manifest(pack))
    assert found == written
    assert found.counts == [(6, 0, 1, 1), (2, 2, 2, 2)]
    assert [found.best_policy(share) for share in (0.01, 0.3, 0.6, 1.0)] == ["lfu", "lfu", "lru", "lru"]
    assert dict(found.rows())["most used quarter"].startswith("takes 50%")


def test_a_pack_without_a_document_has_none(pack):
    assert read_routing(pack, read_manifest(pack)) is None


def test_another_checkpoint_is_refused(pack, written):
    path = pack / FLASH_DIR / MANIFEST_NAME
    replace_sealed(path, CHECKSUM, "0123456789abcdee")  # of an expert
    with pytest.raises(PackError, match="made for other weights than this pack holds"):
        read_routing(pack, read_manifest(pack))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            '"routing_version": 2',
            '"routing_version": 3',
            "has routing version 3, this flashlm reads version 2: update flashlm, or run",
        ),
        ('"routing_version": 2', '"routing_version": true', "has routing version True"),
        ('"zero_share": 0.5', '"zero_share": 1.5', "invalid at layers.0.zero_share"),
        ('"lru": 0.1', '"lru": 0.4', "best is lfu, but lru found more"),
        ('"best": "lfu"', '"best": "fifo"', "invalid at replays.0.best"),
        ('"cache_share": 0.25', '"cache_share": NaN', "invalid at replays.0.cache_share|is invalid|is not JSON"),
        ('"text": "t"', '"text": "t", "extra": 1', "invalid at extra"),
        ("   6,\n", "", "made for other weights"),
        ("   6,\n", "   -6,\n", "invalid at layers.0.counts.0"),
        ("{", "", "is not JSON"),
    ],
)
def test_a_changed_document_is_refused(pack, written, old, new, message):
    path = routing_path(pack)
    assert old in path.read_text()
    replace_sealed(path, old, new)
    with pytest.raises(PackError, match=message):
        read_routing(pack, read_manifest(pack))


def test_a_document_that_is_too_large_is_not_read(pack):
    with routing_path(pack).open("wb") as file:
        file.truncate(MAX_ROUTING_BYTES + 1)
    with pytest.raises(PackError, match="is larger than"):
        read_routing(pack, read_manifest(pack))


def trace(rows, num_experts=8):
    return RoutingTrace(experts=[np.array(rows, dtype=np.int32)], num_experts=[num_experts])


def test_numbers_that_are_no_experts_are_not_counted():
    found = trace([[0, 7], [8, 7], [-1, 0]])
    assert found.counts() == [(2, 0, 0, 0, 0, 0, 0, 2)]
    assert found.steps() == [(0, [0, 7]), (0, [7]), (0, [0])]
    assert found.part(range(1, 2)).counts() == [(0, 0, 0, 0, 0, 0, 0, 1)]


def test_pinned_experts_are_those_of_the_known_part():
    """The unseen part uses others: knowing nothing of them, pinning finds less than LRU."""
    known, unseen = trace([[0], [1]] * 20), trace([[4], [5]] * 20)
    (found,) = compare_policies(known, unseen, shares=(0.25,))
    assert found.best == "lru"
    assert found.lru == pytest.approx(38 / 40)
    assert found.pinned == 0.0


def test_a_cache_holds_a_tokens_experts_at_least_and_sizes_are_tried_once():
    rows = [[0, 1, 2], [3, 4, 5]] * 10
    found = compare_policies(trace(rows), trace(rows), shares=(0.125, 0.25, 0.5, 0.75, 1.0))
    assert [each.cache_share for each in found] == [0.375, 0.5, 0.75]
    assert compare_policies(trace(rows, 3), trace(rows, 3)) == ()
