"""What a pack holds, read from its manifest alone: for people (`rows`) and for programs (`to_dict`)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashlm.pack.manifest import CUSTOM_GATE, UnitEntry, read_manifest
from flashlm.rows.encodings import encoding_of
from flashlm.sizes import format_size


@dataclass(frozen=True, kw_only=True)
class PackInfo:
    """The shapes and sizes of a pack.

    Attributes:
        pack: Its folder.
        model_type: The transformers model type.
        dtype: Element type of resident floating-point weights, and of rows that are not quantised.
        encodings: Bytes of streamed weights by the encoding of their rows.
        num_layers: Streamed FFNs, or layers of experts.
        num_linears: Linear layers that can be streamed: attention, output layer.
        linear_bytes: Bytes of their files.
        embedding_bytes: Bytes of the table of embeddings, of which a token reads one row; 0 where it is resident, or the
            output layer's.
        num_experts: Experts of all layers; 0 in a model without.
        num_active_experts: Experts that a token uses, over all layers.
        expert_bytes: Bytes of an expert; 0 in a model without.
        hidden_size: d_model, or what experts take and give.
        ffn_size: d_ffn of the largest layer, or neurons of an expert.
        has_gate: Whether the FFNs are gated.
        activation: Name in transformers' `ACT2FN`.
        block_rows: Rows per block.
        block_bytes: Bytes from one block to the next.
        num_blocks: Blocks of these layers; a block of experts is one of them.
        resident_bytes: Bytes of the resident file.
        streamed_bytes: Bytes of all other weight files.
        source: Where the weights came from.
        flashlm_version: The flashlm that wrote the pack.
        format_version: Version of the format.
        notes: What the conversion left out or could not keep, a line each.
    """

    pack: Path
    model_type: str
    dtype: str
    encodings: dict[str, int]
    num_layers: int
    num_linears: int
    linear_bytes: int
    embedding_bytes: int
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

    def _rows_in(self) -> list[tuple[str, str]]:
        if set(self.encodings) <= {encoding_of(self.dtype).name}:
            return []
        parts = (f"{format_size(num_bytes)} in {name}" for name, num_bytes in self.encodings.items())
        return [("streamed rows", ", ".join(parts))]

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
        if self.num_linears:
            shape.append(("linear layers", f"{self.num_linears}, {format_size(self.linear_bytes)}"))
        if self.embedding_bytes:
            shape.append(("embeddings", f"{format_size(self.embedding_bytes)}, read row by row"))
        return [
            ("model type", self.model_type),
            ("source", self.source),
            ("dtype", self.dtype),
            *self._rows_in(),
            *shape,
            ("resident", format_size(self.resident_bytes)),
            ("streamed", format_size(self.streamed_bytes)),
            ("written by", f"flashlm {self.flashlm_version}, format {self.format_version}"),
            *(("note", note) for note in self.notes),
        ]


def _bytes_by_encoding(units: Iterable[UnitEntry]) -> dict[str, int]:
    """Return the bytes of files of one encoding, and of the parts of others."""
    found: dict[str, int] = {}
    for unit in units:
        layout, names = unit.layout, unit.encodings
        sizes = (
            [layout.file_bytes] if len(set(names)) == 1 else [layout.part_bytes(index) for index in range(len(names))]
        )
        for name, num_bytes in zip(names, sizes, strict=False):
            found[name] = found.get(name, 0) + num_bytes
    return found


def describe(pack: str | Path) -> PackInfo:
    """Return what a pack holds; reads its manifest only.

    Raises:
        PackError: Not a finished pack, or a damaged or unknown manifest.
    """
    folder = Path(pack)
    manifest = read_manifest(folder)
    main = manifest.main
    alike = manifest.experts or manifest.ffns
    linears = [unit for unit in manifest.units if unit.kind == "linear"]
    return PackInfo(
        pack=folder,
        model_type=manifest.model_type,
        dtype=manifest.dtype,
        encodings=_bytes_by_encoding(manifest.units),
        num_layers=len(alike),
        num_linears=len(linears),
        linear_bytes=sum(unit.layout.file_bytes for unit in linears),
        embedding_bytes=sum(unit.layout.file_bytes for unit in manifest.tables),
        num_experts=sum(unit.num_experts for unit in manifest.experts),
        num_active_experts=sum(unit.num_active for unit in manifest.experts),
        expert_bytes=main.block_stride_bytes if manifest.experts else 0,
        hidden_size=main.hidden_size,
        ffn_size=main.block_rows if manifest.experts else max(unit.num_rows for unit in manifest.ffns),
        has_gate=main.layout.has_gate,
        activation=main.activation,
        block_rows=main.block_rows,
        block_bytes=main.block_stride_bytes,
        num_blocks=sum(unit.layout.num_blocks for unit in alike),
        resident_bytes=manifest.resident.num_bytes,
        streamed_bytes=manifest.streamed_bytes,
        source=manifest.source.name,
        flashlm_version=manifest.flashlm_version,
        format_version=manifest.format_version,
        notes=manifest.source.notes,
    )
