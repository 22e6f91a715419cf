"""A loaded pack beside its transformers model: a decision carried out. Placement, stream or caches, passes and telemetry.

`apply` swaps the streamed layers in before transformers loads weights; `UnboundRuntime.bind` reads the resident weights and
what is pinned after it, and gives the `FlashRuntime`, which is `model.flash` from then on. Nothing of a pass lives here:
phase, sequences and counters are the `Pass`'s.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from flashlm.engine import load_progress
from flashlm.engine.block_check import BlockCheck
from flashlm.engine.calibrated import Calibration, exactness
from flashlm.engine.counters import Counters
from flashlm.engine.expert_loading import connect_experts, take_out_experts
from flashlm.engine.expert_store import ExpertStore
from flashlm.engine.ffn import FlashFFN
from flashlm.engine.flash_embedding import TableRows, bind_embedding
from flashlm.engine.flash_linear import bind_linear, take_out_weight
from flashlm.engine.forward_pass import Phase
from flashlm.engine.guards import guard
from flashlm.engine.linear import adapt_linears
from flashlm.engine.pass_guard import guard_passes
from flashlm.engine.phases import CallSize, Passes, num_cached_tokens
from flashlm.engine.resident import ResidentLoad, load_resident
from flashlm.engine.row_check import RowCheck
from flashlm.engine.seat import attach, find_linears
from flashlm.engine.sparse import SparseRows
from flashlm.engine.standin import StreamedActivation, StreamedWeight
from flashlm.engine.stream import BlockStream
from flashlm.engine.telemetry import Telemetry
from flashlm.errors import PackError
from flashlm.memory.budget import Placement
from flashlm.memory.expert_policy import CachePolicy
from flashlm.memory.needs import torch_dtype
from flashlm.pack.manifest import Manifest, UnitEntry, resident_path, unit_path
from flashlm.pack.reorder import read_order
from flashlm.planner.choices import CheckChoice, ResolvedMode
from flashlm.planner.decide import Decision
from flashlm.rows.kernels import MAX_TOKENS
from flashlm.rows.products import Gemms
from flashlm.sizes import format_size
from flashlm.sparsity.predictor import Predictor
from flashlm.storage.reader import File, Reader, ReadRequest
from flashlm.storage.slab import Budget, SlabAllocator, SlotRef
from flashlm.structure.ffn_probe import find_learned
from flashlm.transformers_seam import given_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

MAX_LONE_KV_BYTES = 256 << 20  # a KV cache that one thread of torch reads in passing


@dataclass(kw_only=True, eq=False)
class FlashRuntime:
    """What flashlm knows about a model that it feeds from flash; `model.flash` of a loaded pack.

    Attributes:
        pack: The pack's folder.
        manifest: Its manifest.
        decision: How it runs: mode, context, placement, reads.
        reader: The reader of the streamed layers.
        passes: Begins a pass for every call of the model.
        resident_load: What reading the resident part took.
        check: What is held against checksums: "load", "all" or "none".
        calibration: What mode `sparse` goes by; None in the others.
        stream: Blocks of feed-forward layers; None in mode `experts`.
        sparse: The neuron cache and its reads (mode `sparse`).
        experts: The expert cache and its reads (mode `experts`).
    """

    pack: Path
    manifest: Manifest
    decision: Decision
    reader: Reader
    passes: Passes
    resident_load: ResidentLoad
    check: CheckChoice
    calibration: Calibration | None = None
    stream: BlockStream | None = None
    sparse: SparseRows | None = None
    experts: ExpertStore | None = None

    @property
    def mode(self) -> ResolvedMode:
        """The mode in which it runs."""
        return self.decision.mode

    @property
    def context(self) -> int:
        """Tokens that the KV cache may hold, of all sequences and beams together."""
        return self.decision.context

    @property
    def placement(self) -> Placement:
        """Where every block or expert lives."""
        return self.decision.placement

    @property
    def max_gap(self) -> int:
        """Rows between two missing ones that are read through (mode `sparse`)."""
        return self.decision.max_gap

    @property
    def expert_policy(self) -> CachePolicy | None:
        """How the expert cache is run (mode `experts`)."""
        return self.decision.policy

    @property
    def telemetry(self) -> Telemetry:
        """A record per forward pass."""
        return self.passes.telemetry

    def close(self) -> None:
        """Let reads in flight land and close the files. The model can't be used afterwards."""
        if self.stream is not None:
            self.stream.close()
        self.reader.close()

    @property
    def exactness(self) -> str:
        """One line: exact, or how far from it."""
        return exactness(self.manifest, self.calibration, self.decision.activations)

    def describe(self) -> str:
        """Return one line: mode, exactness and where the bytes are."""
        return describe(self.decision, self.manifest, self.exactness, self.reader)

    def phase(self, phase: Phase) -> AbstractContextManager[None]:
        """Name what calls of the model are for, in this thread or task: `with model.flash.phase("verify"):`.

        `generate` names it by itself. A call that nobody names is `decode` with one token per sequence, else `prompt`.

        Args:
            phase: "prompt" (exact in every mode), "decode" or "verify" (rows predicted in mode `sparse`).

        Raises:
            ConfigError: There is no such phase.
        """
        return self.passes.phase(phase)


def apply(
    model: PreTrainedModel,
    pack: Path,
    manifest: Manifest,
    decision: Decision,
    *,
    calibration: Calibration | None,
    check: CheckChoice,
) -> UnboundRuntime:
    """Swap the streamed layers of `model`, whose weights are still to come, for ours.

    Args:
        model: As transformers built it.
        pack: The folder.
        manifest: Its manifest.
        decision: How it will run.
        calibration: What mode `sparse` goes by; None in the others.
        check: What is held against checksums.

    Raises:
        PackError: The pack does not belong to the model.
    """
    _swap_layers(model, manifest)
    take_out_experts(model, manifest)
    for entry in manifest.dense:
        if entry.kind == "linear":
            take_out_weight(model, entry.module)
            if entry.table:
                take_out_weight(model, entry.table)
    for entry in manifest.tables:
        take_out_weight(model, entry.module)
    reader = Reader(queue_depth=decision.queue_depth, piece_bytes=decision.piece_bytes)
    logger.info("%s", describe(decision, manifest, exactness(manifest, calibration, decision.activations), reader))
    return UnboundRuntime(
        pack=pack, manifest=manifest, decision=decision, reader=reader, calibration=calibration, check=check
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class UnboundRuntime:
    """A decision of which the first half is carried out: the layers are ours, and no weight has been read yet.

    Attributes are those of `FlashRuntime`.
    """

    pack: Path
    manifest: Manifest
    decision: Decision
    reader: Reader
    calibration: Calibration | None
    check: CheckChoice

    def bind(self, model: PreTrainedModel) -> FlashRuntime:
        """Read the resident weights and what is pinned, connect the layers, and return the runtime.

        Raises:
            StorageError: A file can't be read, or is not of the size that the manifest states.
            PackError: What was read is damaged.
        """
        manifest, placement, passes = self.manifest, self.decision.placement, Passes()
        load_progress.expect(manifest.resident.num_bytes + placement.pinned_bytes)
        load_progress.expect(placement.cache_bytes if placement.experts else 0)
        resident_load = load_resident(
            model, resident_path(self.pack), manifest.resident, self.reader, is_checked=self.check != "none"
        )
        slabs = SlabAllocator(Budget(placement.dram_bytes - placement.needs.total_bytes))
        gemms = Gemms(torch_dtype(manifest.dtype), int8=self.decision.activations == "int8")
        experts = None
        if self.decision.policy is not None:
            experts = connect_experts(
                model,
                manifest,
                self.reader,
                [self._open_unit(entry) for entry in manifest.experts],
                placement,
                self.decision.policy,
                gemms,
                passes.totals,
                self._block_check(manifest.experts, "expert"),
                slabs,
                int8=self.decision.activations == "int8",
            )
        stream, sparse = self._bind_dense(model, gemms, passes.totals, slabs)
        self._bind_tables(model, passes.totals, slabs)
        load_progress.finish()
        model.requires_grad_(False)
        adapt_linears(model)
        runtime = FlashRuntime(
            pack=self.pack,
            manifest=manifest,
            decision=self.decision,
            reader=self.reader,
            passes=passes,
            resident_load=resident_load,
            check=self.check,
            calibration=self.calibration,
            stream=stream,
            sparse=sparse,
            experts=experts,
        )
        model.flash = runtime
        guard_passes(model, manifest, self.decision)
        guard(model)
        passes.attach(model, [entry.module for entry in manifest.units], self._measure)
        weakref.finalize(model, runtime.close)
        return runtime

    def _bind_dense(
        self, model: PreTrainedModel, gemms: Gemms, counters: Counters, slabs: SlabAllocator
    ) -> tuple[BlockStream, SparseRows | None]:
        """Connect feed-forward and linear layers to the stream, in mode `sparse` the former to the neuron cache too."""
        dense, int8 = self.manifest.dense, self.decision.activations == "int8"
        files = [self._open_unit(entry) for entry in dense]
        stream = BlockStream(
            self.reader,
            files,
            [entry.layout for entry in dense],
            self.decision.placement,
            read_ahead=self.decision.mode != "naive",
            counters=counters,
            check=self._block_check(dense, "block"),
            slabs=slabs,
        )
        of_ffns = [file for file, entry in zip(files, dense, strict=True) if entry.kind == "ffn"]
        sparse, predictors = self._bind_sparse(of_ffns, counters, slabs)
        index = 0
        for unit, entry in enumerate(dense):
            if entry.kind == "linear":
                weight = bind_linear(model, entry, stream, unit, torch_dtype(self.manifest.dtype), int8=int8)
                if entry.table:
                    rows = self._table_rows(entry, files[unit], stream.pinned_place(unit), counters)
                    bind_embedding(model, entry.table, weight, rows)
                continue
            layer = model.get_submodule(entry.module)
            assert isinstance(layer, FlashFFN)
            predict = predictors[index].predict if predictors else None
            stored = read_order(self.pack, entry)
            order = None if stored is None else torch.from_numpy(stored)
            layer.bind(stream, unit, gemms.of(entry.layout), int8=int8, sparse=sparse, predict=predict, order=order)
            if layer.linears is not None:
                owner = model.get_submodule(entry.module.rpartition(".")[0])
                attach(layer, entry, owner, layer.linears, order)
            if self.calibration is not None:
                layer.activation_threshold = self.calibration.sparsity.layers[index].activation_threshold
            index += 1
        return stream, sparse

    def _bind_tables(self, model: PreTrainedModel, counters: Counters, slabs: SlabAllocator) -> None:
        """Connect tables of embeddings that no linear layer shares: pinned, or read row by row."""
        check, dtype = self._block_check(self.manifest.tables, "block"), torch_dtype(self.manifest.dtype)
        for unit, (entry, each) in enumerate(zip(self.manifest.tables, self.decision.placement.tables, strict=True)):
            layout, file = entry.layout, self._open_unit(entry)
            weight: StreamedWeight | nn.Parameter
            weight = StreamedWeight(f"{entry.module}.weight", (layout.num_rows, layout.hidden_size), dtype)
            is_pinned, plain = each.pinned_bytes > 0, None if layout.plain is None else layout.plain.dtype
            # Elements of another dtype, and rows of padded blocks, are no weight of torch's: they are decoded row by row.
            plain = plain if plain == dtype and layout.joins else None
            # Of a table that stays on flash one block is held against its checksum: a file of another pack is noticed.
            blocks = range(layout.num_blocks if is_pinned else 1)
            num_bytes = each.pinned_bytes or layout.read_bytes(0)
            cuts = [(layout.block_stride_bytes, num_bytes)]
            memory = (slabs if is_pinned else SlabAllocator()).slabs(cuts, huge_pages=False)[0]
            requests = [
                ReadRequest.into(memory.slot(block), file, layout.offset_of(block), layout.read_bytes(block))
                for block in blocks
            ]
            if is_pinned or self.check != "none":
                check.read(self.reader, requests, [(unit, block) for block in blocks])
            rows = self._table_rows(entry, file, memory.slot(0) if is_pinned else None, counters)
            if is_pinned and plain is not None:
                content = torch.from_numpy(memory.slot(0).numpy(layout.num_rows * layout.row_bytes))
                values = content.view(plain).view(layout.num_rows, layout.hidden_size)
                weight = nn.Parameter(values, requires_grad=False)
            bind_embedding(model, entry.module, weight, rows)

    def _table_rows(self, entry: UnitEntry, file: File, pinned: SlotRef | None, counters: Counters) -> TableRows:
        check, dtype = self._block_check([entry], "block"), torch_dtype(self.manifest.dtype)
        return TableRows(entry.layout, dtype, self.reader, file, 0, check, counters, pinned=pinned)

    def _bind_sparse(
        self, files: list[File], counters: Counters, slabs: SlabAllocator
    ) -> tuple[SparseRows | None, list[Predictor]]:
        """Make the neuron cache and load the predictors; without a calibration there are none."""
        capacities = self.decision.placement.rows
        if self.calibration is None or not capacities:
            return None, []
        layouts = [entry.layout for entry in self.manifest.ffns]
        sparse = SparseRows(
            self.reader,
            files,
            layouts,
            capacities,
            window=self.calibration.sparsity.window,
            max_gap=self.decision.max_gap,
            counters=counters,
            slabs=slabs,
        )
        sparse.warm()
        if self.check != "none":
            check = RowCheck(self.reader, files, layouts, self._block_check(self.manifest.ffns, "block"))
            sparse.use_check(check, keeps=self.check == "all")
        return sparse, self.calibration.load_predictors()

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

    def _measure(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallSize:
        """Return how large a call is, before it becomes a pass.

        A small pass keeps torch to one thread: after every small product its others would spin on the cores that our
        kernels want.
        """
        num_sequences, num_tokens = _input_shape(args, kwargs)
        cached = num_sequences * (num_cached_tokens(given_cache(kwargs)) + num_tokens)
        kv_bytes = cached * self.decision.placement.needs.kv_cache_bytes // self.decision.context
        is_small = num_sequences * num_tokens <= MAX_TOKENS and kv_bytes <= MAX_LONE_KV_BYTES
        return CallSize(num_sequences=num_sequences, num_tokens=num_tokens, is_small=is_small)


def describe(decision: Decision, manifest: Manifest, exactness: str, reader: Reader) -> str:
    """Return one line on a decision: mode, exactness and where the bytes are."""
    placement = decision.placement
    streamed = [f"streamed {format_size(placement.ring_bytes)} a token"] if placement.dense else []
    if placement.rows:
        streamed = [
            f"predictors {format_size(placement.needs.predictor_bytes)}, neuron cache"
            f" {format_size(placement.cache_bytes)} of {format_size(placement.ring_bytes)}"
        ]
    if placement.experts:
        num_experts = sum(entry.num_experts for entry in manifest.experts)
        streamed.append(
            f"expert cache {format_size(placement.cache_bytes)}: {sum(placement.experts)} of {num_experts}"
            f" experts of {format_size(placement.expert_bytes)}{_describe_policy(decision)}"
        )
    return (
        f"mode {decision.mode} ({exactness.split(':')[0]}), dram {format_size(placement.dram_bytes)}:"
        f" resident {format_size(placement.needs.resident_bytes)}, pinned {format_size(placement.pinned_bytes)},"
        f" {', '.join(streamed)}, staging {format_size(placement.staging_bytes)},"
        f" context {decision.context} tokens; reader: {reader.describe()}"
    )


def _describe_policy(decision: Decision) -> str:
    policy = decision.policy
    if policy is None or decision.placement.num_spare == 0:  # all are held
        return ""
    num_pinned = sum(len(experts) for experts in policy.pinned)
    return f", {policy.name}" + (f" ({num_pinned} pinned)" if num_pinned else "")


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
                dtype=torch_dtype(manifest.dtype),
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
