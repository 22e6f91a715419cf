"""Loading a pack of experts: the placement, the modules' weights taken out before loading, the store connected after."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from flashlm.engine.block_check import BlockCheck
from flashlm.engine.config import Settings
from flashlm.engine.counters import Counters
from flashlm.engine.expert_store import ExpertStore
from flashlm.engine.experts import IMPLEMENTATION, BoundExperts
from flashlm.engine.llama4 import lead_experts
from flashlm.engine.standin import StreamedWeight
from flashlm.errors import ConfigError, PackError
from flashlm.memory.budget import Placement
from flashlm.memory.expert_budget import is_close_to_floor, place_experts
from flashlm.memory.expert_needs import expert_uses, measure_expert_needs
from flashlm.memory.expert_policy import CachePolicy, make_policy
from flashlm.pack.manifest import Manifest
from flashlm.rows.products import BlockGemm
from flashlm.sparsity.routing import Routing, read_routing
from flashlm.storage.reader import File, Reader
from flashlm.structure.experts import OUT_WEIGHT_NAME, in_weight_name
from flashlm.transformers_seam import keep_from_initialising, lead_experts_to

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def check_mode(manifest: Manifest, settings: Settings) -> None:
    """Refuse a mode or an expert policy that does not go with what the pack streams.

    Raises:
        ConfigError: Mode `experts` or a policy for a pack without, or another mode than it for a pack with experts.
    """
    if manifest.experts and settings.mode not in ("auto", "experts"):
        raise ConfigError(f"mode={settings.mode!r}: this pack streams experts; leave mode out, or choose experts")
    if not manifest.experts and settings.mode == "experts":
        raise ConfigError("mode='experts': this pack has no experts; leave mode out")
    if not manifest.experts and settings.expert_policy != "auto":
        raise ConfigError(f"expert_policy={settings.expert_policy!r}: this pack has no experts; leave it out")


def choose_policy(pack: Path, manifest: Manifest, settings: Settings, placement: Placement) -> CachePolicy:
    """Return how the expert cache is run: as asked, or as the pack's routing calibration found best for its size.

    Raises:
        ConfigError: `pinned` is asked for, and the pack has no routing calibration.
        PackError: `pinned` is asked for, and the calibration is damaged or of other weights.
    """
    assert placement.experts is not None
    name = settings.expert_policy
    routing = _find_routing(pack, manifest, must_exist=name == "pinned")
    if name == "auto":
        share = sum(placement.experts) / sum(entry.num_experts for entry in manifest.experts)
        name = "lru" if routing is None else routing.best_policy(share)
    counts = None if routing is None else routing.counts
    return make_policy(name, placement.experts, [entry.num_active for entry in manifest.experts], counts)


def _find_routing(pack: Path, manifest: Manifest, *, must_exist: bool) -> Routing | None:
    try:
        routing = read_routing(pack, manifest)
    except PackError as error:
        if must_exist:
            raise
        logger.warning("the expert cache does without this pack's routing calibration: %s", error)
        return None
    if routing is None and must_exist:
        raise ConfigError(
            f"{pack} has no routing calibration, which expert policy pinned needs: run `flashlm calibrate {pack}` first"
        )
    return routing


def place_model(
    model: PreTrainedModel, manifest: Manifest, settings: Settings, dram_bytes: int, context: int
) -> Placement:
    """Decide how many experts of each layer are held.

    Raises:
        BudgetError: Not even one token's experts fit.
    """
    uses = expert_uses(manifest)
    needs = measure_expert_needs(model.config, uses, manifest.resident.num_bytes, context)
    placement = place_experts(uses, needs, dram_bytes, max_cache_bytes=settings.pin_bytes)
    if is_close_to_floor(uses, placement):
        logger.warning(
            "the expert cache holds %d experts, a token uses %d: next to nothing will be found in it; raise dram",
            sum(placement.experts or ()),
            sum(use.num_active for use in uses),
        )
    return placement


def take_out_experts(model: PreTrainedModel, manifest: Manifest) -> None:
    """Remove the streamed weights from the experts modules, and lead their calls to flashlm.

    Raises:
        PackError: The pack does not belong to the model.
    """
    for entry in manifest.experts:
        try:
            module = model.get_submodule(entry.module)
            names = (in_weight_name(has_gate=manifest.has_gate), OUT_WEIGHT_NAME)
            shapes = {name: tuple(module.get_parameter(name).shape) for name in names}
            for name in names:
                module.register_parameter(name, None)
            module.flash_shapes = shapes  # they are named again once the rest has loaded
        except AttributeError as error:
            raise PackError(
                f"the pack streams experts of {entry.module}, which {type(model).__name__} does not have ({error}):"
                " convert the model again with this version of transformers"
            ) from error
        # transformers would fill what it takes for missing weights with random numbers.
        keep_from_initialising(module)
        if not lead_experts(model, entry.module):
            lead_experts_to(module.config, IMPLEMENTATION)


def connect_experts(
    model: nn.Module,
    manifest: Manifest,
    reader: Reader,
    files: list[File],
    placement: Placement,
    policy: CachePolicy,
    gemm: BlockGemm,
    counters: Counters,
    check: BlockCheck,
) -> ExpertStore:
    """Fill the expert cache and connect every experts module to it.

    Raises:
        StorageError: An expert can't be read.
        PackError: An expert is damaged.
    """
    layouts = [manifest.experts_layout(index) for index in range(len(manifest.experts))]
    store = ExpertStore(reader, files, layouts, placement, policy=policy, counters=counters, check=check)
    store.warm()
    for index, entry in enumerate(manifest.experts):
        module = model.get_submodule(entry.module)
        module.flash_experts = BoundExperts(layer=index, layout=layouts[index], store=store, gemm=gemm)  # type: ignore[assignment]
        shapes: dict[str, tuple[int, ...]] = module.flash_shapes  # type: ignore[assignment]
        for name, shape in shapes.items():
            weight = StreamedWeight(f"{entry.module}.{name}", shape, getattr(torch, manifest.dtype))
            module.register_parameter(name, weight)  # type: ignore[arg-type]  # it counts as one
    return store
