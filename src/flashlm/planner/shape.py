"""What the planner needs to know of a model: from a pack, or from a `config.json` alone, before any download."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from flashlm.errors import ConfigError, PackError
from flashlm.memory.cache_plan import LayerUse
from flashlm.memory.expert_needs import expert_uses
from flashlm.pack.manifest import Manifest, manifest_path, read_manifest
from flashlm.planner.expert_shape import UNIFORM, ExpertShape, HitCurve, resident_bytes, uses_of_layers
from flashlm.planner.outline import outline
from flashlm.rows.layout import DTYPE_BYTES, LayerLayout, canonical_dtype, choose_block_rows
from flashlm.sparsity.calibration_document import Sparsity, read_sparsity, tensors_path
from flashlm.sparsity.routing import read_routing
from flashlm.structure import activations
from flashlm.structure.experts import ExpertLayer, find_expert_layers
from flashlm.structure.families import FfnLayer, build_meta_model, find_ffn_layers
from flashlm.structure.model_config import load_config, load_pack_config
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
class ModelShape:
    """A model as the cost model sees it.

    Attributes:
        name: Where it comes from, as it was given.
        model_type: The transformers model type.
        activation: The FFN's, by its name in `ACT2FN`.
        config: Its transformers config.
        layouts: The streamed layers.
        resident_bytes: Weights that stay in DRAM.
        matrix_bytes: Of these, what every token multiplies with; an embedding table that is only looked up is not.
        num_matrices: Linear layers that these make.
        is_pack: Whether it is converted already.
        sparse: What is known of its sparsity; None where nothing is.
    """

    name: str
    model_type: str
    activation: str
    config: Any
    layouts: tuple[LayerLayout, ...]
    resident_bytes: int
    matrix_bytes: int
    is_pack: bool
    num_matrices: int = 0
    sparse: SparseShape | None = None

    @property
    def dtype(self) -> str:
        """Element type of the pack, a key of `DTYPE_BYTES`."""
        return self.layouts[0].dtype

    @property
    def output_bytes(self) -> int:
        """Bytes of the output layer, which every token ends with."""
        text = self.config.get_text_config(decoder=True)
        return int(text.vocab_size) * int(text.hidden_size) * DTYPE_BYTES[self.dtype]

    @property
    def outline(self) -> str:
        """Model type, dtype and streamed layers, in words that differ where any of these do."""
        return outline(self.model_type, [(layout, None) for layout in self.layouts])

    @property
    def streamed_bytes(self) -> int:
        """Bytes of all layer files."""
        return sum(layout.file_bytes for layout in self.layouts)

    @property
    def total_bytes(self) -> int:
        """Disk that the pack takes, a few small files aside."""
        return self.resident_bytes + self.streamed_bytes


def read_shape(source: str | Path, *, dtype: str = "bf16", trust_remote_code: bool = False) -> ModelShape | ExpertShape:
    """Return the shape of a pack, a model folder, a config.json, or a model on the hub (its config only).

    Args:
        source: Which.
        dtype: Element type that a conversion would get; a pack has its own.
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
    if experts := find_expert_layers(model):
        return _expert_shape(str(source), model, experts, dtype)
    layers = find_ffn_layers(model)
    largest = max(layers, key=lambda layer: layer.num_rows)
    block_rows = choose_block_rows(
        hidden_size=largest.hidden_size, num_rows=largest.num_rows, has_gate=largest.has_gate, dtype=dtype
    )
    layouts = tuple(
        LayerLayout(
            hidden_size=layer.hidden_size,
            num_rows=layer.num_rows,
            has_gate=layer.has_gate,
            dtype=dtype,
            block_rows=block_rows,
        )
        for layer in layers
    )
    streamed = _streamed_names(layers)
    matrices = _matrices(model, streamed)
    resident = sum(p.numel() for name, p in model.named_parameters() if name not in streamed)
    return ModelShape(
        name=str(source),
        model_type=config.model_type,
        activation=largest.activation,
        config=config,
        layouts=layouts,
        resident_bytes=resident * DTYPE_BYTES[dtype],
        matrix_bytes=sum(weight.numel() for weight in matrices) * DTYPE_BYTES[dtype],
        num_matrices=len(matrices),
        is_pack=False,
    )


def _pack_shape(pack: Path, trust_remote_code: bool) -> ModelShape | ExpertShape:
    manifest = read_manifest(pack)
    config: Any = load_pack_config(pack, manifest, trust_remote_code=trust_remote_code)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = build_meta_model(config, trust_remote_code=trust_remote_code)
    if manifest.experts:
        return _expert_pack_shape(pack, model, manifest)
    return shape_of_model(model, pack, manifest, _pack_sparsity(pack, manifest))


def _expert_shape(name: str, model: PreTrainedModel, layers: tuple[ExpertLayer, ...], dtype: str) -> ExpertShape:
    matrices = _matrices(model, set())
    return ExpertShape(
        name=name,
        model_type=model.config.model_type,
        config=model.config,
        uses=uses_of_layers(layers, dtype),
        resident_bytes=resident_bytes(sum(p.numel() for p in model.parameters()), layers, dtype),
        matrix_bytes=sum(weight.numel() for weight in matrices) * DTYPE_BYTES[dtype],
        num_matrices=len(matrices),
        num_layers=int(model.config.get_text_config(decoder=True).num_hidden_layers),
        is_pack=False,
    )


def _pack_hits(pack: Path, manifest: Manifest) -> HitCurve:
    """Return how often the expert cache has an expert, as the pack's routing calibration found; else as assumed."""
    try:
        routing = read_routing(pack, manifest)
    except PackError:
        return UNIFORM
    if routing is None or not routing.replays:
        return UNIFORM
    return HitCurve(
        points=tuple((each.cache_share, each.shares[each.best]) for each in routing.replays),
        origin=f"calibrated on {routing.text}, {routing.num_replayed_tokens} tokens",
    )


def _expert_pack_shape(pack: Path, model: PreTrainedModel, manifest: Manifest) -> ExpertShape:
    matrices = _matrices(model, set())
    return ExpertShape(
        name=str(pack),
        model_type=manifest.model_type,
        config=model.config,
        uses=tuple(expert_uses(manifest)),
        resident_bytes=manifest.resident.num_bytes,
        matrix_bytes=sum(weight.numel() for weight in matrices) * DTYPE_BYTES[manifest.dtype],
        num_matrices=len(matrices),
        num_layers=int(model.config.get_text_config(decoder=True).num_hidden_layers),
        is_pack=True,
        hits=_pack_hits(pack, manifest),
    )


def shape_of_model(model: PreTrainedModel, pack: Path, manifest: Manifest, sparse: SparseShape | None) -> ModelShape:
    """Return the shape of a pack whose model has been built, its feed-forward layers still in place."""
    # By the manifest, not by looking for FFNs again: that needs weights, and here they may be on the meta device.
    replaced = tuple(f"{name}." for entry in manifest.layers for name in (entry.module, *entry.identities))
    streamed = {name for name, _ in model.named_parameters() if name.startswith(replaced)}
    matrices = _matrices(model, streamed)
    return ModelShape(
        name=str(pack),
        model_type=manifest.model_type,
        activation=manifest.activation,
        config=model.config,
        layouts=tuple(manifest.layout(layer) for layer in range(len(manifest.layers))),
        resident_bytes=manifest.resident.num_bytes,
        matrix_bytes=sum(weight.numel() for weight in matrices) * DTYPE_BYTES[manifest.dtype],
        num_matrices=len(matrices),
        is_pack=True,
        sparse=sparse,
    )


def _pack_sparsity(pack: Path, manifest: Manifest) -> SparseShape | None:
    """Return what the pack's calibration says; None without one that can be used."""
    try:
        sparsity = read_sparsity(pack, manifest)
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
            for entry, layer in zip(manifest.layers, sparsity.layers, strict=True)
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


def _streamed_names(layers: tuple[FfnLayer, ...]) -> set[str]:
    return {source.name for layer in layers for source in (*layer.parts, *layer.biases.values())}


def _matrices(model: PreTrainedModel, streamed: set[str]) -> list[torch.Tensor]:
    """Return the weights of resident linear layers: a tied output layer counts, a table of embeddings does not."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        module.weight
        for module in model.modules()
        if isinstance(module, (nn.Linear, Conv1D)) and names.get(id(module.weight)) not in streamed
    ]
