"""What a mixture-of-experts model needs in DRAM before a single expert is held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from flashlm.memory.budget import Needs
from flashlm.memory.expert_budget import ExpertUse
from flashlm.memory.needs import SLACK_BYTES, measure_needs, pass_facts
from flashlm.memory.pass_memory import PassFacts, working_bytes
from flashlm.pack.manifest import Manifest
from flashlm.rows.kernels import WIDEN_PIECE_BYTES
from flashlm.rows.layout import ROWS_PER_STEP, LayerLayout

# Live fp32 vectors of a prompt's tokens in a layer of experts: input, sum, one expert's tokens, its output, and a copy.
LIVE_EXPERT_VECTORS = 5
LIVE_ROW_VECTORS = 5  # of one product's rows: gate, up, both joined, the activation, their product


def rows_per_product(layout: LayerLayout) -> int:
    """Return the rows of an expert that one matrix product takes, so that their fp32 copy stays small."""
    row_bytes = layout.num_parts * layout.hidden_size * 4
    return min(max(WIDEN_PIECE_BYTES // row_bytes // ROWS_PER_STEP, 1) * ROWS_PER_STEP, layout.block_rows)


def expert_uses(manifest: Manifest) -> list[ExpertUse]:
    """Return the layers of experts of a pack."""
    return [
        ExpertUse(layout=manifest.experts_layout(index), num_active=entry.num_active)
        for index, entry in enumerate(manifest.experts)
    ]


def expert_pass_facts(config: Any, uses: Sequence[ExpertUse]) -> PassFacts:
    """Return what the memory of the passes of a model with experts depends on."""
    layout = uses[0].layout
    pieces = replace(layout, block_rows=rows_per_product(layout))
    facts = pass_facts(config, [pieces])
    vectors_bytes = (LIVE_EXPERT_VECTORS * layout.hidden_size + LIVE_ROW_VECTORS * pieces.block_rows) * 4
    most = max(uses, key=lambda use: use.num_experts)
    routing_bytes = 8 * 4 * most.num_experts + 64 * most.num_active  # scores, their copies, sorted indices
    return replace(facts, token_bytes=facts.token_bytes + vectors_bytes + routing_bytes)


def measure_expert_needs(config: Any, uses: Sequence[ExpertUse], resident_bytes: int, context: int) -> Needs:
    """Return what loading a pack of experts into this process takes.

    Args:
        config: The transformers config of the model.
        uses: The layers of experts.
        resident_bytes: Size of the resident weights.
        context: Tokens of the KV cache, over all sequences; a prompt may be as long.
    """
    needs = measure_needs(config, [uses[0].layout], resident_bytes=resident_bytes, context=context)
    return replace(needs, working_bytes=SLACK_BYTES + working_bytes(expert_pass_facts(config, uses), context))
