"""From a pack and settings to a model that is ready for its weights: look, decide, apply.

The one place where what `decide` needs is gathered: the pack's calibrations, the device's profile, what this process holds.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from flashlm.engine.calibrated import Calibration, find_calibration, find_routing
from flashlm.engine.runtime import UnboundRuntime, apply
from flashlm.errors import ConfigError
from flashlm.memory.limits import read_memory_limits
from flashlm.memory.needs import DEFAULT_CONTEXT, torch_dtype
from flashlm.pack.files import check_files
from flashlm.pack.manifest import Manifest
from flashlm.planner.decide import Decision, decide
from flashlm.planner.machine import stored_rates
from flashlm.planner.plan import check_activations, model_needs
from flashlm.planner.plan_use import check_plan
from flashlm.planner.rates import Rates
from flashlm.planner.settings import Settings
from flashlm.planner.shape import shape_of_model, sparse_shape
from flashlm.structure.agreement import check_structure

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def prepare(
    model: PreTrainedModel, pack: Path, manifest: Manifest, settings: Settings, *, dtype: torch.dtype | None = None
) -> UnboundRuntime:
    """Decide how a pack runs, and put its streamed layers into `model`, whose weights are still to come.

    Args:
        model: As transformers built it.
        pack: The folder.
        manifest: Its manifest.
        settings: What the user chose.
        dtype: What `from_pretrained` was asked for; None where nothing was.

    Raises:
        ConfigError: `dtype`, a mode, another class or other settings were asked for, and they are not the pack's.
        PackError: The pack does not belong to the model.
        BudgetError: It does not fit; nothing was read.
        StorageError: A file is missing or of the wrong size.
    """
    if dtype not in (None, torch_dtype(manifest.dtype)):
        raise ConfigError(
            f"dtype {dtype} was asked for, but {pack} holds {manifest.dtype}: leave dtype out, or convert again"
            " with --dtype"
        )
    check_plan(settings.plan, pack, manifest)
    check_mode(manifest, settings)
    check_activations(settings.activations, manifest.quantised, str(pack))
    check_structure(model, manifest, pack)
    calibration = None if manifest.experts else find_calibration(pack, manifest, settings)
    decision = _decided(model, pack, manifest, settings, calibration)
    for note in decision.notes:
        logger.warning("%s", note)
    check_files(pack, manifest)
    is_predicted = decision.mode == "sparse"
    return apply(
        model, pack, manifest, decision, calibration=calibration if is_predicted else None, check=settings.check
    )


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


def _decided(
    model: PreTrainedModel, pack: Path, manifest: Manifest, settings: Settings, calibration: Calibration | None
) -> Decision:
    context = settings.context or DEFAULT_CONTEXT
    default_dram_bytes = read_memory_limits().default_dram_bytes
    sparse = None
    if calibration is not None:
        sparse = sparse_shape(calibration.sparsity, calibration.manifest, calibration.predictor_bytes)
    shape = shape_of_model(model, pack, manifest, sparse)
    needs = model_needs(shape, context)
    rates = None if manifest.experts else _rates(pack, manifest, settings)
    routing = None
    if manifest.experts:
        routing = find_routing(pack, manifest, must_exist=settings.expert_policy == "pinned")
    return decide(shape, settings, rates, needs=needs, default_dram_bytes=default_dram_bytes, routing=routing)


def _rates(pack: Path, manifest: Manifest, settings: Settings) -> Rates | None:
    """Return what the pack's device and this machine can do; None where the device has no usable profile."""
    try:
        return stored_rates(pack, manifest.dtype, settings.activations)
    except ConfigError as error:
        logger.warning("the planner does without a device profile: %s", error)
        return None
