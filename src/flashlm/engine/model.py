"""A loaded pack: placement, stream or expert cache, and telemetry of one transformers model; `load` makes one."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from flashlm.engine import load_progress
from flashlm.engine.block_check import BlockCheck
from flashlm.engine.calibrated import EXACT, Calibration, find_calibration, resolve_mode
from flashlm.engine.config import CheckChoice, Settings
from flashlm.engine.counters import Counters
from flashlm.engine.expert_loading import (
    check_mode,
    choose_policy,
    connect_experts,
    take_out_experts,
    warn_close_to_floor,
)
from flashlm.engine.expert_store import ExpertStore
from flashlm.engine.ffn import FlashFFN
from flashlm.engine.flash_linear import bind_linear, take_out_weight
from flashlm.engine.forward_pass import Phase
from flashlm.engine.guards import guard
from flashlm.engine.linear import fold_linears, widen_linears
from flashlm.engine.pack_check import named_building_errors
from flashlm.engine.pass_guard import guard_passes
from flashlm.engine.phases import CallSize, Passes, num_cached_tokens
from flashlm.engine.plan_use import check_plan
from flashlm.engine.resident import ResidentLoad, load_resident
from flashlm.engine.row_check import RowCheck
from flashlm.engine.seat import attach, find_linears
from flashlm.engine.sparse import SparseRows
from flashlm.engine.standin import StreamedActivation
from flashlm.engine.stream import BlockStream
from flashlm.engine.telemetry import Telemetry
from flashlm.errors import BudgetError, ConfigError, PackError
from flashlm.memory.budget import Placement, place
from flashlm.memory.expert_policy import CachePolicy
from flashlm.memory.limits import read_memory_limits
from flashlm.memory.needs import DEFAULT_CONTEXT, measure_needs, read_config, torch_dtype
from flashlm.pack.files import check_files
from flashlm.pack.manifest import Manifest, UnitEntry, read_manifest, resident_path, unit_path
from flashlm.pack.reorder import read_order
from flashlm.planner.estimate import EXPERT_READS
from flashlm.planner.machine import stored_rates
from flashlm.planner.plan import STREAM_QUEUE_DEPTH, Candidate, cheapest
from flashlm.planner.rates import ReadSetting
from flashlm.planner.shape import shape_of_model, sparse_shape
from flashlm.rows.kernels import MAX_TOKENS
from flashlm.rows.products import BlockGemm
from flashlm.sizes import format_size
from flashlm.sparsity.predictor import Predictor
from flashlm.storage.reader import DEFAULT_PIECE_BYTES, DEFAULT_QUEUE_DEPTH, File, Reader
from flashlm.structure.agreement import check_structure
from flashlm.structure.ffn_probe import find_learned
from flashlm.transformers_seam import given_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

MAX_LONE_KV_BYTES = 256 << 20  # a KV cache that one thread of torch reads in passing


@dataclass(kw_only=True)
class FlashModel:
    """What flashlm knows about a model that it feeds from flash; `model.flash` of a loaded pack.

    Attributes:
        pack: The pack's folder.
        manifest: Its manifest.
        mode: "hybrid", "naive", "sparse" or "experts", as it runs.
        context: Tokens that the KV cache may hold, of all sequences and beams together.
        placement: Where every block lives.
        reader: The reader of the streamed layers.
        calibration: What mode `sparse` goes by; None in the others.
        telemetry: A record per forward pass (after loading).
        resident_load: What reading the resident part took (after loading).
        max_gap: Rows between two missing ones that are read through (mode `sparse`).
        sparse: The neuron cache and its reads (mode `sparse`, after loading).
        check: What is held against checksums: "load", "all" or "none".
        expert_policy: How the expert cache is run (mode `experts`).
        experts: The expert cache and its reads (mode `experts`, after loading).
        passes: Begins a pass for every call of the model.
    """

    pack: Path
    manifest: Manifest
    mode: str
    context: int
    placement: Placement
    reader: Reader
    calibration: Calibration | None = None
    telemetry: Telemetry | None = None
    resident_load: ResidentLoad | None = None
    max_gap: int = 0
    check: CheckChoice = "load"
    sparse: SparseRows | None = None
    expert_policy: CachePolicy | None = None
    experts: ExpertStore | None = None
    _stream: BlockStream | None = None
    passes: Passes = field(default_factory=Passes)

    @classmethod
    def prepare(
        cls, model: PreTrainedModel, pack: Path, settings: Settings, *, dtype: torch.dtype | None = None
    ) -> FlashModel:
        """Decide the placement and swap the feed-forward layers of `model`, whose weights are still to come.

        Raises:
            ConfigError: `dtype` was asked for, another class or other settings, and they are not the pack's.
            PackError: The pack is not one, or does not belong to the model.
            BudgetError: It does not fit; nothing was read.
            StorageError: A file is missing or of the wrong size.
        """
        manifest = read_manifest(pack)
        if dtype not in (None, torch_dtype(manifest.dtype)):
            raise ConfigError(
                f"dtype {dtype} was asked for, but {pack} holds {manifest.dtype}: leave dtype out, or convert again"
                " with --dtype"
            )
        check_plan(settings.plan, pack, manifest)
        check_mode(manifest, settings)
        check_structure(model, manifest, pack)
        context = settings.context or DEFAULT_CONTEXT
        dram_bytes = settings.dram_bytes or read_memory_limits().default_dram_bytes
        calibration = find_calibration(pack, manifest, settings)
        choice = _choose(model, pack, manifest, calibration, settings, dram_bytes, context)
        policy = choose_policy(pack, manifest, settings, choice.placement) if manifest.experts else None
        check_files(pack, manifest)
        _take_out(model, manifest)
        flash = cls(
            pack=pack,
            manifest=manifest,
            mode=choice.mode,
            context=context,
            placement=choice.placement,
            reader=Reader(queue_depth=choice.reads.queue_depth, piece_bytes=choice.reads.piece_bytes),
            calibration=calibration if choice.mode == "sparse" else None,
            max_gap=choice.max_gap,
            expert_policy=policy,
            check=settings.check,
        )
        logger.info("%s", flash.describe())
        return flash

    def bind(self, model: PreTrainedModel) -> None:
        """Read the resident weights and the pinned blocks, and connect the layers to the stream.

        Raises:
            StorageError: A file can't be read, or is not of the size that the manifest states.
        """
        manifest, placement = self.manifest, self.placement
        load_progress.expect(manifest.resident.num_bytes + placement.pinned_bytes)
        load_progress.expect(placement.cache_bytes if placement.experts else 0)
        self.resident_load = load_resident(
            model, resident_path(self.pack), manifest.resident, self.reader, is_checked=self.check != "none"
        )
        counters, self.telemetry = self.passes.totals, self.passes.telemetry
        gemm = BlockGemm(manifest.dtype)
        if self.expert_policy is not None:
            self.experts = connect_experts(
                model,
                manifest,
                self.reader,
                [self._open_unit(entry) for entry in manifest.experts],
                self.placement,
                self.expert_policy,
                gemm,
                counters,
                self._block_check(manifest.experts, "expert"),
            )
        self._bind_dense(model, gemm, counters)
        load_progress.finish()
        model.requires_grad_(False)
        if gemm.strategy == "widen":
            widen_linears(model)
        fold_linears(model)
        model.flash = self
        guard_passes(model, self)
        guard(model)
        self.passes.attach(model, [entry.module for entry in manifest.units], self._measure)
        weakref.finalize(model, self.close)

    def _bind_dense(self, model: PreTrainedModel, gemm: BlockGemm, counters: Counters) -> None:
        """Connect feed-forward and linear layers to the stream, in mode `sparse` the former to the neuron cache too."""
        dense = self.manifest.dense
        files = [self._open_unit(entry) for entry in dense]
        self._stream = BlockStream(
            self.reader,
            files,
            [entry.layout for entry in dense],
            self.placement,
            read_ahead=self.mode != "naive",
            counters=counters,
            check=self._block_check(dense, "block"),
        )
        predictors = self._bind_sparse(
            [file for file, entry in zip(files, dense, strict=True) if entry.kind == "ffn"], counters
        )
        index = 0
        for unit, entry in enumerate(dense):
            if entry.kind == "linear":
                bind_linear(model, entry, self._stream, unit)
                continue
            layer = model.get_submodule(entry.module)
            assert isinstance(layer, FlashFFN)
            predict = predictors[index].predict if predictors else None
            stored = read_order(self.pack, entry)
            order = None if stored is None else torch.from_numpy(stored)
            layer.bind(self._stream, unit, gemm, sparse=self.sparse, predict=predict, order=order)
            if layer.linears is not None:
                owner = model.get_submodule(entry.module.rpartition(".")[0])
                attach(layer, entry, owner, layer.linears, order)
            if self.calibration is not None:
                layer.activation_threshold = self.calibration.sparsity.layers[index].activation_threshold
            index += 1

    def _block_check(self, entries: Sequence[UnitEntry], what: str) -> BlockCheck:
        known = [(unit_path(self.pack, entry), entry.checksums) for entry in entries]
        return BlockCheck(known, what, at_load=self.check != "none", always=self.check == "all")

    def _open_unit(self, entry: UnitEntry) -> File:
        """Open a unit's file; through the page cache where its rows are no multiple of the device's block and are read."""
        path, layout = unit_path(self.pack, entry), entry.layout
        file = self.reader.open(path, expected_bytes=layout.file_bytes)
        reads_rows = self.calibration is not None and entry.kind == "ffn"
        if not reads_rows or layout.row_stride_bytes % file.alignment_bytes == 0:
            return file
        file.close()
        return self.reader.open(path, expected_bytes=layout.file_bytes, direct=False)

    def _bind_sparse(self, files: list[File], counters: Counters) -> list[Predictor]:
        """Make the neuron cache and load the predictors; without a calibration there are none."""
        rows = self.placement.rows
        if self.calibration is None or not rows:
            return []
        window = self.calibration.sparsity.window
        layouts = [entry.layout for entry in self.manifest.ffns]
        self.sparse = SparseRows(
            self.reader, files, layouts, rows, window=window, max_gap=self.max_gap, counters=counters
        )
        self.sparse.warm()
        if self.check != "none":
            check = RowCheck(self.reader, files, layouts, self._block_check(self.manifest.ffns, "block"))
            self.sparse.use_check(check, keeps=self.check == "all")
        return self.calibration.load_predictors()

    def close(self) -> None:
        """Let reads in flight land and close the files. The model can't be used afterwards."""
        if self._stream is not None:
            self._stream.close()
        self.reader.close()

    @property
    def exactness(self) -> str:
        """One line: exact, or how far from it."""
        return EXACT if self.calibration is None else self.calibration.exactness()

    def describe(self) -> str:
        """Return one line: mode, exactness and where the bytes are."""
        placement = self.placement
        streamed = [f"streamed {format_size(placement.ring_bytes)} a token"] if placement.dense else []
        if placement.rows:
            streamed = [
                f"predictors {format_size(placement.needs.predictor_bytes)}, neuron cache"
                f" {format_size(placement.cache_bytes)} of {format_size(placement.ring_bytes)}"
            ]
        if placement.experts:
            num_experts = sum(entry.num_experts for entry in self.manifest.experts)
            streamed.append(
                f"expert cache {format_size(placement.cache_bytes)}: {sum(placement.experts)} of {num_experts}"
                f" experts of {format_size(placement.expert_bytes)}{self._describe_policy()}"
            )
        return (
            f"mode {self.mode} ({self.exactness.split(':')[0]}), dram {format_size(placement.dram_bytes)}:"
            f" resident {format_size(placement.needs.resident_bytes)}, pinned {format_size(placement.pinned_bytes)},"
            f" {', '.join(streamed)}, staging {format_size(placement.staging_bytes)},"
            f" context {self.context} tokens; reader: {self.reader.describe()}"
        )

    def _describe_policy(self) -> str:
        policy = self.expert_policy
        if policy is None or self.placement.num_spare == 0:  # all are held
            return ""
        num_pinned = sum(len(experts) for experts in policy.pinned)
        return f", {policy.name}" + (f" ({num_pinned} pinned)" if num_pinned else "")

    def _measure(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallSize:
        """Return how large a call is, before it becomes a pass.

        A small pass keeps torch to one thread: after every small product its others would spin on the cores that our
        kernels want.
        """
        num_sequences, num_tokens = _input_shape(args, kwargs)
        cached = num_sequences * (num_cached_tokens(given_cache(kwargs)) + num_tokens)
        kv_bytes = cached * self.placement.needs.kv_cache_bytes // self.context
        is_small = num_sequences * num_tokens <= MAX_TOKENS and kv_bytes <= MAX_LONE_KV_BYTES
        return CallSize(num_sequences=num_sequences, num_tokens=num_tokens, is_small=is_small)

    def phase(self, phase: Phase) -> AbstractContextManager[None]:
        """Name what calls of the model are for, in this thread or task, for the while: `with model.flash.phase("verify"):`.

        `generate` names it by itself. A call that nobody names is `decode` with one token per sequence, else `prompt`.

        Args:
            phase: "prompt" (exact in every mode), "decode" or "verify" (rows predicted in mode `sparse`).

        Raises:
            ConfigError: There is no such phase.
        """
        return self.passes.phase(phase)


@dataclass(frozen=True, slots=True)
class _Choice:
    """How a pack is run."""

    mode: str
    max_gap: int
    placement: Placement
    reads: ReadSetting


def _choose(
    model: PreTrainedModel,
    pack: Path,
    manifest: Manifest,
    calibration: Calibration | None,
    settings: Settings,
    dram_bytes: int,
    context: int,
) -> _Choice:
    """Decide mode, placement and reads.

    Raises:
        BudgetError: It does not fit.
    """
    units = [entry.unit for entry in manifest.units]
    needs = measure_needs(model.config, units, resident_bytes=manifest.resident.num_bytes, context=context)
    placement = place(
        units,
        needs,
        dram_bytes,
        max_pinned_bytes=settings.max_pinned_bytes,
        staging_bytes=None if manifest.experts else settings.staging_bytes,
    )
    if manifest.experts:
        warn_close_to_floor(units, placement)
        return _Choice("experts", 0, placement, _reads(settings, EXPERT_READS.queue_depth))
    mode = resolve_mode(settings, calibration, fits=placement.streamed_bytes == 0)
    max_gap = settings.max_gap or 0
    reads = _reads(settings, DEFAULT_QUEUE_DEPTH if mode == "sparse" else STREAM_QUEUE_DEPTH)
    if settings.queue_depth is None:
        best = _as_planned(model, pack, manifest, calibration, settings, dram_bytes, context)
        if best is not None:
            mode, max_gap, reads = best.mode, best.max_gap, best.reads
            placement = best.placement if settings.pin_bytes is None else placement
    if mode == "sparse":
        assert calibration is not None
        needs = replace(needs, predictor_bytes=calibration.predictor_bytes)
        try:
            placement = place(units, needs, dram_bytes, uses=calibration.uses)
        except BudgetError:
            if settings.mode == "sparse":
                raise
            mode = "hybrid"  # which needs less
    return _Choice(mode, max_gap, placement, reads)


def _reads(settings: Settings, queue_depth: int) -> ReadSetting:
    return ReadSetting(
        piece_bytes=settings.piece_bytes or DEFAULT_PIECE_BYTES,
        queue_depth=settings.queue_depth or queue_depth,
        gb_per_s=0.0,
    )


def _as_planned(
    model: PreTrainedModel,
    pack: Path,
    manifest: Manifest,
    calibration: Calibration | None,
    settings: Settings,
    dram_bytes: int,
    context: int,
) -> Candidate | None:
    """Return the cheapest way to run by the cost model; None where the pack's device has no usable profile."""
    try:
        rates = stored_rates(pack, manifest.dtype)
    except ConfigError as error:
        logger.warning("the planner does without a device profile: %s", error)
        return None
    if rates is None:
        return None
    sparse = None
    if calibration is not None:
        sparse = sparse_shape(calibration.sparsity, calibration.manifest, calibration.predictor_bytes)
    shape = shape_of_model(model, pack, manifest, sparse)
    return cheapest(shape, rates, dram_bytes, context, settings.mode)


def _take_out(model: PreTrainedModel, manifest: Manifest) -> None:
    """Take what is streamed out of `model`, whose other weights are still to come."""
    _swap_layers(model, manifest)
    take_out_experts(model, manifest)
    for entry in manifest.dense:
        if entry.kind == "linear":
            take_out_weight(model, entry)


def _input_shape(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
    """Return sequences and tokens per sequence of a forward call of a transformers model."""
    for candidate in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")):
        if candidate is not None:
            return int(candidate.shape[0]), int(candidate.shape[1])
    return 0, 0


def _swap_layers(model: PreTrainedModel, manifest: Manifest) -> None:
    """Put a `FlashFFN` in the place of every streamed layer, and identities where it does another module's work."""
    for layer, entry in enumerate(manifest.ffns):
        if entry.activation not in ACT2FN:
            raise PackError(f"activation {entry.activation!r} is unknown to this transformers: update it")
        try:
            learned = find_learned(model.get_submodule(entry.module), entry.activation)
            ffn = FlashFFN(
                layer=layer,
                layout=entry.layout,
                activation=ACT2FN[entry.activation] if learned is None else learned[1].__call__,
                dtype=torch_dtype(entry.encoding),
                has_up_bias="up" in entry.biases,
                has_gate_bias="gate" in entry.biases,
                has_down_bias="down" in entry.biases,
            )
            if learned is not None:  # its weights are resident, under the names that they have in the model
                ffn.add_module(*learned)
            ffn.linears = find_linears(model, entry)
            model.set_submodule(entry.module, ffn)
            for name in entry.identities:
                model.get_submodule(name)
                model.set_submodule(name, StreamedActivation(name))
        except AttributeError as error:
            raise PackError(
                f"the pack streams {entry.module}, which {type(model).__name__} does not have ({error}):"
                " convert the model again with this version of transformers"
            ) from error


def load(
    pack: str | Path,
    dram: str | int | None = None,
    mode: str | None = None,
    context: int | None = None,
    pin: str | int | None = None,
    plan: str | Path | None = None,
    expert_policy: str | None = None,
    check: str | None = None,
    **from_pretrained: Any,
) -> PreTrainedModel:
    """Load a pack as a transformers model whose large weights stream from flash.

    Args:
        pack: Folder made by `flashlm convert`.
        dram: Bound on the whole process ("6GiB" or bytes); None takes what the machine or the cgroup has free, less a
            margin. `FLASHLM_DRAM` sets it too.
        mode: "auto" (sparse where a calibration met its error budget and it is expected to be faster, else hybrid),
            "hybrid", "sparse" or "naive"; a pack of experts runs in "experts", whatever is left to choose from.
        context: Tokens that the KV cache may hold, of all sequences and beams together; None means 2048.
        pin: Pin no more of what is streamed than this ("1GiB" or bytes; 0 pins none); None: all that dram leaves.
        plan: File that `flashlm plan --save` wrote; what is None comes from it.
        expert_policy: What the cache of a pack of experts keeps: "lru", "lfu", "pinned" (needs a calibration), or "auto",
            what a calibration found best for the cache's size; without one lru. The output is the same with each.
        check: What is held against the pack's checksums: "load" (the default) what is read while loading, "all" what is
            streamed later too, "none" nothing.
        **from_pretrained: Further arguments of `AutoModelForCausalLM.from_pretrained`.

    Returns:
        An ordinary transformers model; `model.flash` tells mode, placement and telemetry.

    Raises:
        ConfigError: A setting is out of range, or the plan is another model's.
        PackError: The folder is not a finished pack, or what was checked is damaged.
        UnsupportedModelError: This transformers can't build the pack's model.
        BudgetError: The model does not fit `dram`; nothing was read.
        StorageError: A file can't be read, or is damaged in length.
    """
    from transformers import AutoModelForCausalLM

    from flashlm.engine.quantizer import FlashConfig

    asked = FlashConfig(
        dram=dram, mode=mode, context=context, pin=pin, plan=plan, expert_policy=expert_policy, check=check
    )
    trust = bool(from_pretrained.setdefault("trust_remote_code", False))  # else transformers may ask at the terminal
    is_checked = asked.settings().check != "none"
    config = read_config(Path(pack), is_checked=is_checked, trust_remote_code=trust)
    config.quantization_config = asked.to_dict() | asked.get_loading_attributes()
    with named_building_errors(Path(pack), has_arguments=len(from_pretrained) > 1):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(pack, config=config, **from_pretrained)
    return model
