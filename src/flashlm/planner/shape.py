"""What the planner needs to know of a model: from a pack, or from a `config.json` alone, before any download."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from flashlm.errors import ConfigError, PackError
from flashlm.memory.cache_plan import LayerUse
from flashlm.pack.manifest import Manifest, manifest_path, read_manifest
from flashlm.pack.units import Unit, has_rows, of_kind
from flashlm.planner.outline import outline
from flashlm.planner.rates import Rates
from flashlm.rows.encodings import ENCODINGS, bytes_per_element, encoding_of
from flashlm.rows.layout import LayerLayout, canonical_dtype
from flashlm.rows.quantize import QUANTIZERS
from flashlm.sparsity.calibration_document import Sparsity, read_sparsity, tensors_path
from flashlm.sparsity.routing import read_routing
from flashlm.structure import activations
from flashlm.structure.experts import ExpertLayer
from flashlm.structure.families import FfnLayer, build_meta_model
from flashlm.structure.find_units import FoundUnit, find_units
from flashlm.structure.model_config import load_config, load_pack_config
from flashlm.structure.unit_layouts import RowWriting, choose_layouts, stated_encodings, streamed_names
from flashlm.transformers_seam import Conv1D

CONFIG_NAME = "config.json"
RELU_NAMES = ("relu", "relu2", "fatrelu")  # activations with exact zeros


@dataclass(frozen=True, kw_only=True)
class SparseShape:
    """What mode `sparse` would do with a model.

    Attributes:
        uses: How each layer's predicted rows are used.
        active_shares: Of each layer's rows, those that are predicted for a token and do fire.
        predictor_bytes: DRAM of the predictors.
        increase: Measured relative rise of perplexity; None where it was not measured.
        has_passed: Whether a calibration met its error budget.
        origin: Where all this comes from: "calibrated on ...", or "assumed ...".
    """

    uses: tuple[LayerUse, ...]
    active_shares: tuple[float, ...]
    predictor_bytes: int
    increase: float | None
    has_passed: bool
    origin: str


@dataclass(frozen=True, kw_only=True)
class HitCurve:
    """The share of a token's experts that the cache has, over the share of all experts that it holds.

    Attributes:
        points: (share held, share found), ascending; between them, and to (0, 0) and (1, 1), the line. None at all is
            uniform routing: every expert is as likely as any other, whatever came before.
        origin: Where it comes from.
    """

    points: tuple[tuple[float, float], ...] = ()
    origin: str

    def hit_share(self, held_share: float) -> float:
        """Return the share that is found where `held_share` of the experts are held."""
        line = [(0.0, 0.0), *self.points, (1.0, 1.0)]
        for (low, low_hits), (high, high_hits) in pairwise(line):
            if low <= held_share <= high and high > low:
                return low_hits + (held_share - low) / (high - low) * (high_hits - low_hits)
        return 1.0


UNIFORM = HitCurve(origin="ASSUMED uniform: as many found as are held")


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A model as the cost model sees it.

    Attributes:
        name: Where it comes from, as it was given.
        model_type: The transformers model type.
        activation: That of its feed-forward layers or experts, by its name in `ACT2FN`.
        config: Its transformers config.
        dtype: Element type of the pack's resident weights, like "bfloat16".
        units: What is streamed, in forward order.
        resident_bytes: Weights that stay in DRAM.
        matrix_bytes: Linear layers that every token is multiplied with, streamed or not, but for feed-forward layers and
            experts that are streamed as such; an embedding table that is only looked up is not.
        matrix_weights: Their elements.
        num_matrices: How many these are.
        num_layers: Decoder layers.
        is_pack: Whether it is converted already.
        sparse: What is known of its sparsity; None where nothing is.
        hits: How often a cache of experts has one.
    """

    name: str
    model_type: str
    activation: str
    config: Any
    dtype: str
    units: tuple[Unit, ...]
    resident_bytes: int
    matrix_bytes: int
    matrix_weights: int
    is_pack: bool
    num_matrices: int = 0
    num_layers: int
    sparse: SparseShape | None = None
    hits: HitCurve = UNIFORM

    @property
    def quantised(self) -> tuple[str, ...]:
        """Encodings of streamed weights that are not plain elements."""
        names = {name for unit in self.units for name in unit.layout.encodings}
        return tuple(sorted(name for name in names if not ENCODINGS[name].is_plain))

    def assumed(self, rates: Rates) -> tuple[str, ...]:
        """Return the encodings of which rates hold nothing: they are taken to be as fast, by their bytes, as the dtype."""
        unmeasured = set(self.quantised) - set(rates.encoded)
        neurons = [*of_kind(self.units, "ffn"), *of_kind(self.units, "experts")]
        by_rows = [unit.layout for unit in neurons if not unit.layout.is_by_block]
        names = unmeasured | {name for layout in by_rows for name in layout.encodings if name in self.quantised}
        return tuple(sorted(names))

    @property
    def layouts(self) -> tuple[LayerLayout, ...]:
        """Geometry of the streamed feed-forward layers."""
        return tuple(unit.layout for unit in of_kind(self.units, "ffn"))

    @property
    def experts(self) -> tuple[Unit, ...]:
        """The layers of experts."""
        return tuple(of_kind(self.units, "experts"))

    @property
    def output_bytes(self) -> int:
        """Bytes of the output layer, which every token ends with."""
        streamed, text = self._streamed_output, self.config.get_text_config(decoder=True)
        if streamed is not None:
            return streamed.weight_bytes
        return int(text.vocab_size) * int(text.hidden_size) * bytes_per_element(self.dtype)

    @property
    def output_encoding(self) -> str:
        """Encoding of the output layer."""
        streamed = self._streamed_output
        return encoding_of(self.dtype).name if streamed is None else streamed.encodings[0]

    @property
    def _streamed_output(self) -> LayerLayout | None:
        last, text = self.units[-1], self.config.get_text_config(decoder=True)
        shape = (int(text.vocab_size), int(text.hidden_size))
        is_output = last.kind == "linear" and (last.layout.num_rows, last.layout.hidden_size) == shape
        return last.layout if is_output else None

    @property
    def outline(self) -> str:
        """Model type, dtype and streamed units, in words that differ where any of these do."""
        return outline(self.model_type, self.units)

    @property
    def streamed_bytes(self) -> int:
        """Bytes of all units' files."""
        return sum(unit.layout.file_bytes for unit in self.units)

    @property
    def total_bytes(self) -> int:
        """Disk that the pack takes, a few small files aside."""
        return self.resident_bytes + self.streamed_bytes


def read_shape(
    source: str | Path, *, dtype: str = "bf16", quantize: str | None = None, trust_remote_code: bool = False
) -> ModelShape:
    """Return the shape of a pack, a model folder, a config.json, or a model on the hub (its config only).

    Of a model that is quantised already a conversion keeps what the config says is; of a GGUF file only the header tells
    that (`planned_shape`).

    Args:
        source: Which.
        dtype: Element type that a conversion would get; a pack has its own.
        quantize: Encoding that a conversion would write rows in; a pack has its own.
        trust_remote_code: Run model code that comes with the source.

    Raises:
        ConfigError: Nothing is there, or the dtype is unknown.
        PackError: A damaged pack or config.
        UnsupportedModelError: A family that flashlm can't place.
    """
    folder = Path(source).expanduser()
    if os.path.lexists(manifest_path(folder)):  # a damaged one is for the reader to refuse
        return _pack_shape(folder, trust_remote_code)
    config = _read_config(source, trust_remote_code)
    dtype = canonical_dtype(dtype)
    model = build_meta_model(config, trust_remote_code=trust_remote_code)
    found = find_units(model, dtype_bytes=bytes_per_element(dtype))
    if quantize is not None and quantize not in QUANTIZERS:
        raise ConfigError(f"quantize is {quantize!r}: one of {', '.join(QUANTIZERS)} expected")
    kept = {} if quantize else stated_encodings(found, getattr(config, "quantization_config", None))
    units = choose_layouts(found, RowWriting(dtype=dtype, quantize=quantize, kept=kept))
    streamed = {name for each in found for name in streamed_names(each)}
    resident = sum(p.numel() for name, p in model.named_parameters() if name not in streamed)
    resident_bytes = resident * bytes_per_element(dtype)
    return planned_shape(str(source), config, model, found, units, dtype=dtype, resident_bytes=resident_bytes)


def planned_shape(
    name: str,
    config: Any,
    model: PreTrainedModel,
    found: Sequence[FoundUnit],
    units: tuple[Unit, ...],
    *,
    dtype: str,
    resident_bytes: int,
) -> ModelShape:
    """Return the shape of a pack that is still to be made.

    Args:
        name: Of the source, as it was given.
        config: Its config.
        model: Its model, on the meta device.
        found: What of it is streamed.
        units: The same, as units.
        dtype: Element type of what is resident.
        resident_bytes: Bytes of that.
    """
    matrices = _matrices(model, _replaced(found))
    return ModelShape(
        name=name,
        model_type=config.model_type,
        activation=_activation(found),
        config=config,
        dtype=dtype,
        units=units,
        resident_bytes=resident_bytes,
        matrix_bytes=_matrix_bytes(matrices, units, dtype),
        matrix_weights=sum(weight.numel() for weight in matrices),
        num_matrices=len(matrices),
        num_layers=_num_layers(config),
        is_pack=False,
    )


def _activation(found: Iterable[FoundUnit]) -> str:
    return next(each.activation for each in found if isinstance(each, FfnLayer | ExpertLayer))


def _replaced(found: Iterable[FoundUnit]) -> set[str]:
    """Return the names of weights that streamed feed-forward layers take the place of."""
    return {name for each in found if isinstance(each, FfnLayer) for name in streamed_names(each)}


def _matrix_bytes(matrices: list[torch.Tensor], units: tuple[Unit, ...], dtype: str) -> int:
    """Return the bytes of linear layers: of those that are streamed by their rows' encoding, of the others by `dtype`."""
    element_bytes = bytes_per_element(dtype)
    linears = [unit.layout for unit in of_kind(units, "linear")]
    others = sum(weight.numel() for weight in matrices) - sum(layout.num_weights for layout in linears)
    return others * element_bytes + sum(layout.weight_bytes for layout in linears)


def _num_layers(config: Any) -> int:
    return int(config.get_text_config(decoder=True).num_hidden_layers)


def _pack_shape(pack: Path, trust_remote_code: bool) -> ModelShape:
    manifest = read_manifest(pack)
    config: Any = load_pack_config(pack, manifest, trust_remote_code=trust_remote_code)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = build_meta_model(config, trust_remote_code=trust_remote_code)
    return shape_of_model(model, pack, manifest, _pack_sparsity(pack, manifest), hits=_pack_hits(pack, manifest))


def _pack_hits(pack: Path, manifest: Manifest) -> HitCurve:
    """Return how often the expert cache has an expert, as the pack's routing calibration found; else as assumed."""
    try:
        routing = read_routing(pack, manifest) if manifest.experts else None
    except PackError:
        return UNIFORM
    if routing is None or not routing.replays:
        return UNIFORM
    return HitCurve(
        points=tuple((each.cache_share, each.shares[each.best]) for each in routing.replays),
        origin=f"calibrated on {routing.text}, {routing.num_replayed_tokens} tokens",
    )


def shape_of_model(
    model: PreTrainedModel, pack: Path, manifest: Manifest, sparse: SparseShape | None, *, hits: HitCurve = UNIFORM
) -> ModelShape:
    """Return the shape of a pack whose model has been built, its feed-forward layers still in place.

    `hits` counts in estimates only: loading, which makes none for experts, does without.
    """
    # By the manifest, not by looking for FFNs again: that needs weights, and here they may be on the meta device.
    replaced = tuple(f"{name}." for entry in manifest.ffns for name in (entry.module, *entry.identities))
    streamed = {name for name, _ in model.named_parameters() if name.startswith(replaced)}
    matrices = _matrices(model, streamed)
    units = tuple(entry.unit for entry in manifest.units)
    return ModelShape(
        name=str(pack),
        model_type=manifest.model_type,
        activation=manifest.main.activation,
        config=model.config,
        dtype=manifest.dtype,
        units=units,
        resident_bytes=manifest.resident.num_bytes,
        matrix_bytes=_matrix_bytes(matrices, units, manifest.dtype),
        matrix_weights=sum(weight.numel() for weight in matrices),
        num_matrices=len(matrices),
        num_layers=_num_layers(model.config),
        is_pack=True,
        sparse=sparse,
        hits=hits,
    )


def _pack_sparsity(pack: Path, manifest: Manifest) -> SparseShape | None:
    """Return what the pack's calibration says; None without one that can be used."""
    try:
        has_some = manifest.ffns and has_rows(entry.unit for entry in manifest.ffns)
        sparsity = read_sparsity(pack, manifest) if has_some else None
    except PackError:
        return None
    if sparsity is None or not sparsity.has_predictors:
        return None
    return sparse_shape(sparsity, manifest, tensors_path(pack).stat().st_size)


def sparse_shape(sparsity: Sparsity, manifest: Manifest, predictor_bytes: int) -> SparseShape:
    """Return what a calibration document says."""
    evaluation = sparsity.evaluation
    recalled = [
        layer.active_share * layer.predictor.recall if layer.predictor is not None else layer.active_share
        for layer in sparsity.layers
    ]
    return SparseShape(
        uses=tuple(
            LayerUse(num_rows=entry.num_rows, use_curve=layer.use_curve)
            for entry, layer in zip(manifest.ffns, sparsity.layers, strict=True)
        ),
        active_shares=tuple(recalled),
        predictor_bytes=predictor_bytes,
        increase=None if evaluation is None else evaluation.increase,
        has_passed=evaluation is not None and evaluation.has_passed,
        origin=f"calibrated on {sparsity.text}",
    )


def _read_config(source: str | Path, trust_remote_code: bool) -> Any:
    path = Path(source).expanduser()
    if path.name == CONFIG_NAME and path.is_file():
        path = path.parent
    is_local = path.is_dir()
    if not is_local and (path.exists() or path.is_absolute() or str(source).startswith((".", "~"))):
        raise ConfigError(f"{source} is neither a pack, nor a model folder, nor a config.json")
    activations.register()
    if not is_local:
        path = _fetch_config(str(source), trust_remote_code)
    return load_config(path, trust_remote_code=trust_remote_code)


def _fetch_config(source: str, trust_remote_code: bool) -> Path:
    """Return a folder with the config of a model on the hub: one request, where transformers' own way retries for long."""
    from huggingface_hub import snapshot_download

    patterns = [CONFIG_NAME, *(["*.py"] if trust_remote_code else [])]
    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except (OSError, ValueError, RuntimeError) as error:  # hub errors derive from these, as do httpx's
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{source} is neither local nor a model whose config the hub gives: {reason}") from error


def _matrices(model: PreTrainedModel, streamed: set[str]) -> list[torch.Tensor]:
    """Return the weights of linear layers: a tied output layer counts, a table of embeddings does not."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        module.weight
        for module in model.modules()
        if isinstance(module, (nn.Linear, Conv1D)) and names.get(id(module.weight)) not in streamed
    ]
