"""Loading experts: the modules' weights taken out before loading, the store connected after."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from flashlm.engine.block_check import BlockCheck
from flashlm.engine.counters import Counters
from flashlm.engine.expert_store import ExpertStore
from flashlm.engine.experts import IMPLEMENTATION, BoundExperts
from flashlm.engine.llama4 import lead_experts
from flashlm.engine.standin import StreamedWeight
from flashlm.errors import PackError
from flashlm.memory.budget import Placement
from flashlm.memory.expert_policy import CachePolicy
from flashlm.memory.needs import torch_dtype
from flashlm.pack.manifest import Manifest
from flashlm.rows.products import Gemms
from flashlm.storage.reader import File, Reader
from flashlm.storage.slab import SlabAllocator
from flashlm.structure.experts import OUT_WEIGHT_NAME, in_weight_name
from flashlm.transformers_seam import keep_from_initialising, lead_experts_to

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def take_out_experts(model: PreTrainedModel, manifest: Manifest) -> None:
    """Remove the streamed weights from the experts modules, and lead their calls to flashlm.

    Raises:
        PackError: The pack does not belong to the model.
    """
    for entry in manifest.experts:
        try:
            module = model.get_submodule(entry.module)
            names = (in_weight_name(has_gate=entry.layout.has_gate), OUT_WEIGHT_NAME)
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
    gemms: Gemms,
    counters: Counters,
    check: BlockCheck,
    slabs: SlabAllocator,
    *,
    int8: bool,
) -> ExpertStore:
    """Fill the expert cache and connect every experts module to it.

    Raises:
        StorageError: An expert can't be read.
        PackError: An expert is damaged.
    """
    layouts = [entry.layout for entry in manifest.experts]
    store = ExpertStore(reader, files, layouts, placement, policy=policy, counters=counters, check=check, slabs=slabs)
    store.warm()
    for index, entry in enumerate(manifest.experts):
        module = model.get_submodule(entry.module)
        module.flash_experts = BoundExperts(
            layer=index, layout=layouts[index], store=store, gemm=gemms.of(layouts[index]), int8=int8
        )  # type: ignore[assignment]
        shapes: dict[str, tuple[int, ...]] = module.flash_shapes  # type: ignore[assignment]
        for name, shape in shapes.items():
            weight = StreamedWeight(f"{entry.module}.{name}", shape, torch_dtype(manifest.dtype))
            module.register_parameter(name, weight)  # type: ignore[arg-type]  # it counts as one
    return store
