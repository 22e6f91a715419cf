"""One rung of the ladder in a process of its own: load, run tokens, write what each cost as JSON.

    python ladder_child.py SPEC.json OUT.json

`ladder.py` writes the spec and starts this file inside the memory cgroup. In trace-driven runs the rows of every token come
from `row_trace.py`: the model's own predictor (random weights, the paper's rank) is computed all the same, and its answer
is replaced. Reads, cache, bookkeeping and arithmetic are real.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import row_trace
import torch
from device_state import DeviceState
from hybrid_child import Recorder, Spec

import flashlm
from flashlm.engine.ffn import FlashFFN
from flashlm.engine.sparse import RowFetch, SparseRows
from flashlm.memory.cache_plan import plan_capacities
from flashlm.memory.neuron_cache import LayerCapacity
from flashlm.storage.reader import AlignedBuffer, Reader, RowGeometry, Ticket


class SerialRows(SparseRows):
    """Without overlap: everything has landed before anything is computed."""

    @contextmanager
    def fetch(self, layer: int, rows: torch.Tensor, *, is_same_step: bool = False) -> Iterator[RowFetch]:
        with super().fetch(layer, rows, is_same_step=is_same_step) as fetch:
            self.wait(fetch)
            yield fetch


class ForgetfulRows(SerialRows):
    """Without a window: no row survives its token."""

    @contextmanager
    def fetch(self, layer: int, rows: torch.Tensor, *, is_same_step: bool = False) -> Iterator[RowFetch]:
        with super().fetch(layer, rows, is_same_step=is_same_step) as fetch:
            yield fetch
        self.cache.forget(layer, rows)


class Unbundled:
    """Reads the parts of a row (up, down) from places far apart, as if they were stored apart. Contents are then wrong.

    A mix-in before `SparseRows`.
    """

    def _submit(self, layer: int, rows: torch.Tensor, slots: torch.Tensor, ticket: Ticket) -> None:
        layout = self._layouts[layer]
        num_parts = layout.num_parts
        geometry = RowGeometry(
            row_stride_bytes=layout.row_stride_bytes // num_parts,
            block_rows=layout.block_rows * num_parts,
            block_stride_bytes=layout.block_stride_bytes,
        )
        for part in range(num_parts):
            apart = (rows.long() + part * (layout.num_rows // num_parts)) % layout.num_rows
            apart, order = apart.sort()
            self._reader.submit_rows(
                self._files[layer],
                geometry,
                (apart * num_parts + part).to(torch.int32),
                (slots[order] * num_parts + part).contiguous(),
                self._slab,
                buffer_offset=self._offsets[layer],
                max_gap=0,
                ticket=ticket,
            )


class UnbundledForgetfulRows(Unbundled, ForgetfulRows):
    """Predictor alone."""


class UnbundledSerialRows(Unbundled, SerialRows):
    """Predictor and window."""


ROWS = {
    "forgetful-unbundled": UnbundledForgetfulRows,
    "forgetful": ForgetfulRows,
    "serial-unbundled": UnbundledSerialRows,
    "serial": SerialRows,
    "overlap": SparseRows,
}


class TracePredictor:
    """Computes the real predictor, then answers with the trace's rows for the next token."""

    def __init__(self, trace: row_trace.Trace, layer: int, predict: Any) -> None:
        self._trace, self._layer, self._predict = trace, layer, predict
        self._token = 0

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        predicted = self._predict(tokens)
        predicted.zero_()
        for position in range(len(tokens)):
            rows = self._trace.predicted(self._token % self._trace.num_tokens, self._layer)
            predicted[position, rows.long()] = True
            self._token += 1
        return predicted


def rebuild(model: Any, spec: Spec) -> SparseRows:
    """Give a loaded sparse model the cache and the reads of this rung."""
    flash = model.flash
    layers = [module for module in model.modules() if isinstance(module, FlashFFN)]
    layouts = [layer.layout for layer in layers]
    old = flash.sparse
    capacities: list[LayerCapacity] = list(old.cache.layers)
    if spec["cache_rows"] is not None:
        capacities = plan_capacities(flash.calibration.uses, spec["cache_rows"])
    files = old._files
    flash.sparse = None
    for layer in layers:
        layer.use_rows(None, None)
    counters = old.counters
    del old  # its slab goes before the new one is made
    rows = ROWS[spec["rows"]](
        flash.reader, files, layouts, capacities, window=spec["window"], max_gap=spec["max_gap"], counters=counters
    )
    flash.sparse = rows
    if spec["window"] is None:
        rows.warm()  # as loading does
    return rows


def run_rung(spec: Spec, recorder: Recorder) -> None:
    """Load the pack, run the rung's tokens, and record each."""
    started_s = time.perf_counter()
    model = flashlm.load(
        spec["pack"], dram=spec["dram_bytes"], mode=spec["mode"], context=spec["context"], pin=spec["pin_bytes"]
    )
    flash = model.flash
    placement = flash.placement
    if spec["mode"] == "sparse":
        predicts = [module.bound.predict for module in model.modules() if isinstance(module, FlashFFN)]
        rows = rebuild(model, spec)
        if spec["trace"] is not None:
            trace = row_trace.generate(_trace_spec(spec, model), spec["trace"]["num_tokens"], 0, spec["trace"]["order"])
            predicts = [TracePredictor(trace, layer, predict) for layer, predict in enumerate(predicts)]
        ffns = [module for module in model.modules() if isinstance(module, FlashFFN)]
        for ffn, predict in zip(ffns, predicts, strict=True):
            ffn.use_rows(rows, predict)
    needs = placement.needs
    cache_bytes = placement.cache_bytes
    if flash.sparse is not None:
        cache_bytes = sum(each.num_slots for each in flash.sparse.cache.layers) * flash.manifest.row_stride_bytes
    held_bytes = needs.resident_bytes + needs.predictor_bytes + placement.pinned_bytes + cache_bytes
    total_bytes = needs.resident_bytes + flash.manifest.streamed_bytes
    recorder.note(
        load_s=time.perf_counter() - started_s,
        described=flash.describe(),
        held_bytes=held_bytes,
        total_bytes=total_bytes,
        resident_bytes=needs.resident_bytes,
        predictor_bytes=needs.predictor_bytes,
        cache_bytes=cache_bytes,
        row_bytes=flash.manifest.row_stride_bytes,
        hidden_bytes=flash.manifest.hidden_size * 2,
        num_threads=torch.get_num_threads(),
    )
    ids = spec["ids"] or np.random.default_rng(1).integers(3, spec["vocab_size"], size=4096).tolist()
    cache = None
    occupancy = []
    state = None
    if spec.get("watch_device"):
        state = DeviceState(Path(spec["pack"]), flash.manifest.block_stride_bytes, flash.manifest.row_stride_bytes)
    states = []
    for token in range(spec["num_tokens"]):
        if state is not None and token % spec["watch_device"] == 0:
            flash._stream.settle()  # nothing in flight while the device is measured
            states.append(state.measure())
            recorder.note(states=states)
        with torch.inference_mode():
            cpu_s = time.process_time()
            out = model(input_ids=torch.tensor([ids[token : token + 1]]), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        if not torch.isfinite(out.logits).all():
            raise ArithmeticError("the logits are not finite")
        if flash.sparse is not None:
            layers = flash.sparse.cache.layers
            held = sum(flash.sparse.cache.occupancy(layer) for layer in range(len(layers)))
            occupancy.append(held / sum(layer.num_rows for layer in layers))
        records = [asdict(record) for record in flash.telemetry.records]
        records[-1]["cpu_s"] = time.process_time() - cpu_s
        recorder.note(tokens=records, occupancy=occupancy)
    recorder.note(finished=True)


def _trace_spec(spec: Spec, model: Any) -> row_trace.ModelSpec:
    made = row_trace.MODELS[spec["trace"]["model"]]()
    manifest = model.flash.manifest
    if (made.num_layers, made.num_rows) != (len(manifest.layers), manifest.layers[0].num_rows):
        made = made.resized(num_layers=len(manifest.layers), num_rows=manifest.layers[0].num_rows)
    return made


def prepare(spec: Spec, recorder: Recorder) -> None:
    """Give the pack predictors of the stated ranks with random weights, and the use curves that the trace follows."""
    from flashlm.pack.manifest import read_manifest
    from flashlm.sparsity.calibration_document import (
        LayerSparsity,
        PredictorEntry,
        Sparsity,
        fingerprint,
        predictor_names,
        write_sparsity,
    )

    pack = Path(spec["pack"])
    manifest = read_manifest(pack)
    curves = row_trace.MODELS[spec["model"]]()
    if curves.num_layers != len(manifest.layers):
        curves = curves.resized(num_layers=len(manifest.layers), num_rows=manifest.layers[0].num_rows)
    tensors, layers = {}, []
    for index, (entry, rank, curve) in enumerate(zip(manifest.layers, spec["ranks"], curves.curves, strict=True)):
        reduce, expand, bias = predictor_names(index)
        tensors[reduce] = torch.randn(rank, manifest.hidden_size).to(torch.bfloat16)
        tensors[expand] = torch.randn(entry.num_rows, rank).to(torch.bfloat16)
        tensors[bias] = torch.zeros(entry.num_rows)
        predictor = PredictorEntry(
            kind="trained", rank=rank, threshold=0.5, recall=0.0, false_positive=0.0, predicted_share=curve(1)
        )
        layers.append(
            LayerSparsity(
                activation_threshold=0.0,
                active_share=curves.active[index],
                use_curve=tuple(min(share, 1.0) for share in curve.shares),
                predictor=predictor,
            )
        )
    document = Sparsity(
        fingerprint=fingerprint(manifest), text="random weights, trace-driven", num_tokens=1, layers=tuple(layers),
        tensors_checksum="",
    )  # fmt: skip
    write_sparsity(pack, document, tensors)
    recorder.note(predictor_bytes=sum(each.numel() * each.element_size() for each in tensors.values()), finished=True)


def probe(spec: Spec, recorder: Recorder) -> None:
    """Measure what the reader reaches on these files: rows of one size at random, batch by batch and all at once."""
    from device_rate import memory_read_rate

    files = sorted((Path(spec["pack"]) / "flash").glob("layer-*.rows"))
    random = np.random.default_rng(2)
    reader = Reader()
    opened = [reader.open(path) for path in files]
    found = {}
    smallest = min(file.num_bytes for file in opened)
    for num_bytes in spec["row_bytes"]:
        geometry = RowGeometry(row_stride_bytes=num_bytes, block_rows=1 << 40, block_stride_bytes=num_bytes)
        for batch in spec["batches"]:
            batch = min(batch, smallest // num_bytes // 2)
            buffer = AlignedBuffer((batch + 1) * num_bytes)
            buffer.numpy()[::4096] = 1  # touched
            samples = []
            for _ in range(spec["repeats"]):
                file = opened[int(random.integers(len(opened)))]
                rows = torch.from_numpy(
                    np.sort(random.choice(file.num_bytes // num_bytes - 1, batch, replace=False)).astype(np.int32)
                )
                started_s = time.perf_counter()
                ticket = reader.submit_rows(file, geometry, rows, torch.arange(batch, dtype=torch.int32), buffer)
                reader.wait(ticket)
                samples.append(time.perf_counter() - started_s)
            found[f"{num_bytes}x{batch}"] = {
                "gb_per_s": batch * num_bytes / float(np.median(samples)) / 1e9,
                "median_s": float(np.median(samples)),
            }
    recorder.note(random_reads=found, memory_read_gb_per_s=memory_read_rate(), finished=True)


JOBS = {"rung": run_rung, "prepare": prepare, "probe": probe}


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    JOBS[spec["job"]](spec, Recorder(Path(sys.argv[2])))


if __name__ == "__main__":
    main()
