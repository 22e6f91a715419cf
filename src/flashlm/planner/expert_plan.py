"""The plan of a mixture of experts: one mode and one placement, so there is nothing to search, only to foretell."""

from __future__ import annotations

from flashlm.memory.budget import Placement
from flashlm.memory.expert_budget import place_experts
from flashlm.memory.expert_needs import measure_expert_needs
from flashlm.planner.bottleneck import would_help
from flashlm.planner.expert_estimate import EXPERT_READS, expert_prompt_s, expert_token
from flashlm.planner.expert_shape import ExpertShape
from flashlm.planner.plan_document import Plan
from flashlm.planner.rates import Rates


def make_expert_plan(shape: ExpertShape, rates: Rates, dram_bytes: int, context: int, prompt_tokens: int) -> Plan:
    """Return what mode `experts` does with a model under a budget.

    Args:
        shape: The model.
        rates: The machine.
        dram_bytes: Bound on the whole process.
        context: Tokens of the KV cache.
        prompt_tokens: Of the prompt that is costed.

    Raises:
        BudgetError: Below the floor; it says what is needed.
    """
    needs = measure_expert_needs(shape.config, shape.uses, shape.resident_bytes, context)

    def placed(dram_bytes: int) -> Placement:
        return place_experts(shape.uses, needs, dram_bytes)

    placement = placed(dram_bytes)
    cost = expert_token(shape, placement, rates)
    return Plan(
        source=shape.name,
        outline=shape.outline,
        dram_bytes=dram_bytes,
        context=context,
        mode="experts",
        is_exact=True,
        hit_share=1.0 - cost.num_reads / sum(use.num_active for use in shape.uses),
        staging_bytes=placement.staging_bytes,
        piece_bytes=EXPERT_READS.piece_bytes,
        queue_depth=EXPERT_READS.queue_depth,
        token_s=cost.total_s,
        prompt_s=expert_prompt_s(shape, placement, rates, prompt_tokens),
        prompt_tokens=prompt_tokens,
        io_s=cost.io_s,
        manage_s=cost.manage_s,
        compute_s=cost.compute_s,
        read_bytes=cost.read_bytes,
        num_reads=cost.num_reads,
        roofline_s=cost.roofline_s,
        resident_bytes=shape.resident_bytes,
        pinned_bytes=0,
        cache_bytes=placement.cache_bytes,
        disk_bytes=shape.total_bytes,
        would_help=would_help(
            lambda rates, dram_bytes: expert_token(shape, placed(dram_bytes), rates).total_s, rates, dram_bytes
        ),
    )
