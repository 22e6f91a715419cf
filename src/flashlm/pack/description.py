"""What a pack holds, read from its manifest alone: for people (`rows`) and for programs (`to_dict`)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashlm.pack.manifest import CUSTOM_GATE, read_manifest
from flashlm.sizes import format_size


@dataclass(frozen=True, kw_only=True)
class PackInfo:
    """The shapes and sizes of a pack.

    Attributes:
        pack: Its folder.
        model_type: The transformers model type.
        dtype: Element type of rows and resident floating-point weights.
        num_layers: Streamed FFNs, or layers of experts.
        num_experts: Experts of all layers; 0 in a model without.
        num_active_experts: Experts that a token uses, over all layers.
        expert_bytes: Bytes of an expert; 0 in a model without.
        hidden_size: d_model, or what experts take and give.
        ffn_size: d_ffn of the largest layer, or neurons of an expert.
        has_gate: Whether the FFNs are gated.
        activation: Name in transformers' `ACT2FN`.
        block_rows: Rows per block.
        block_bytes: Bytes from one block to the next.
        num_blocks: Blocks of all layers; a block of experts is one of them.
        resident_bytes: Bytes of `model.safetensors`.
        streamed_bytes: Bytes of all layer files.
        source: Where the weights came from.
        flashlm_version: The flashlm that wrote the pack.
        format_version: Version of the format.
        notes: What the conversion left out or could not keep, a line each.
    """

    pack: Path
    model_type: str
    dtype: str
    num_layers: int
    num_experts: int
    num_active_experts: int
    expert_bytes: int
    hidden_size: int
    ffn_size: int
    has_gate: bool
    activation: str
    block_rows: int
    block_bytes: int
    num_blocks: int
    resident_bytes: int
    streamed_bytes: int
    source: str
    flashlm_version: str
    format_version: int
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them."""
        return asdict(self) | {"pack": str(self.pack)}

    def rows(self) -> list[tuple[str, str]]:
        """Return (label, value) pairs as people read them."""
        formula = "down(act(gate(x)) * up(x))" if self.has_gate else "down(act(up(x)))"
        if self.activation == CUSTOM_GATE:
            formula, act = "gate and activation of the family's own", ""
        else:
            act = f", act = {self.activation}"
        shape = [
            ("streamed layers", f"{self.num_layers} of {self.hidden_size} x {self.ffn_size}"),
            ("feed-forward", f"{formula}{act}"),
            ("blocks", f"{self.num_blocks} of {self.block_rows} rows, {format_size(self.block_bytes)}"),
        ]
        if self.num_experts:
            token_bytes = self.num_active_experts * self.expert_bytes
            shape = [
                ("experts", f"{self.num_experts} of {self.hidden_size} x {self.ffn_size} in {self.num_layers} layers"),
                ("each", f"{format_size(self.expert_bytes)}, {formula}{act}"),
                ("a token uses", f"{self.num_active_experts} experts, {format_size(token_bytes)}"),
            ]
        return [
            ("model type", self.model_type),
            ("source", self.source),
            ("dtype", self.dtype),
            *shape,
            ("resident", format_size(self.resident_bytes)),
            ("streamed", format_size(self.streamed_bytes)),
            ("written by", f"flashlm {self.flashlm_version}, format {self.format_version}"),
            *(("note", note) for note in self.notes),
        ]


def describe(pack: str | Path) -> PackInfo:
    """Return what a pack holds; reads its manifest only.

    Raises:
        PackError: Not a finished pack, or a damaged or unknown manifest.
    """
    folder = Path(pack)
    manifest = read_manifest(folder)
    return PackInfo(
        pack=folder,
        model_type=manifest.model_type,
        dtype=manifest.dtype,
        num_layers=len(manifest.files),
        num_experts=sum(entry.num_experts for entry in manifest.experts),
        num_active_experts=sum(entry.num_active for entry in manifest.experts),
        expert_bytes=manifest.block_stride_bytes if manifest.experts else 0,
        hidden_size=manifest.hidden_size,
        ffn_size=max((layer.num_rows for layer in manifest.layers), default=manifest.block_rows),
        has_gate=manifest.has_gate,
        activation=manifest.activation,
        block_rows=manifest.block_rows,
        block_bytes=manifest.block_stride_bytes,
        num_blocks=sum(layout.num_blocks for _, layout in manifest.files),
        resident_bytes=manifest.resident.num_bytes,
        streamed_bytes=manifest.streamed_bytes,
        source=manifest.source.name,
        flashlm_version=manifest.flashlm_version,
        format_version=manifest.format_version,
        notes=manifest.source.notes,
    )
