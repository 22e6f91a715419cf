"""The manifest of a pack, `flash/manifest.json`: what is streamed, how it is laid out, and where it came from.

A manifest is outside data: it is validated strictly, every size in it is checked against the layout before anything is
allocated, and file names that would leave the pack are refused. It ends with a checksum of its own text.
`docs/format.md` describes the format byte for byte.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import xxhash
from pydantic import AfterValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from flashlm.documents import DocumentKind, Strict, describe_versions
from flashlm.errors import ConfigError, PackError
from flashlm.pack.units import Kind, Unit
from flashlm.rows.encodings import ENCODINGS, encoding_of
from flashlm.rows.layout import GATED, MATRIX, UNGATED, Arrangement, LayerLayout, Part

FORMAT_VERSION: Literal[5] = 5
READ_VERSIONS = (4, FORMAT_VERSION)  # a pack of version 4 is one of version 5 in which all units are arranged by row
CUSTOM_GATE = "custom"  # the activation of experts that do more than act(gate) * up
FLASH_DIR = "flash"
MANIFEST_NAME = "manifest.json"
# Not `model.safetensors`: without flashlm transformers must find no weights, instead of half of them.
RESIDENT_NAME = f"{FLASH_DIR}/resident.safetensors"
# What `flashlm calibrate` leaves in FLASH_DIR; `flashlm.sparsity.calibration_document` and `.routing` describe it.
CALIBRATION_NAMES = (
    "sparsity.json",
    "sparsity.safetensors",
    "profile.safetensors",
    "calibration.partial",
    "routing.json",
)

MAX_LAYERS = 2_000  # a model of so many is built in seconds; none has half of them
MAX_UNITS = 32_000  # a layer has a feed-forward layer or experts, and some ten linear layers
MAX_DIMENSION = 1 << 24
MAX_MANIFEST_BYTES = 64 << 20
CONFIG_NAME = "config.json"

_ENCODINGS_OF_4 = {"bf16", "fp16", "fp32", "q8_0"}


def _is_encoding(name: str) -> str:
    if name not in ENCODINGS:
        raise ValueError(f"{name[:40]!r} is no encoding: {', '.join(ENCODINGS)} are")
    return name


EncodingName = Annotated[str, AfterValidator(_is_encoding)]
Checksum = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
Dimension = Annotated[int, Field(gt=0, le=MAX_DIMENSION)]
SmallFileName = Annotated[str, Field(pattern=r"^[^/\\\x00]+(/[^/\\\x00]+)*$", max_length=255)]
ModuleName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*$", max_length=1024)]
UnitFileName = Annotated[str, Field(pattern=r"^(layer|experts|linear|embedding)-\d{5}(\.[0-9a-f]{8})?\.rows$")]


class UnitEntry(Strict):
    """One streamed unit: a feed-forward layer, the routed experts of a layer, a linear layer, or a table of embeddings.

    Attributes:
        kind: Which of these.
        module: Dotted path of the module in the model: `ffn`: the one that the streamed layer replaces; `experts`: the
            experts module, without its two large weights; `linear`, `embedding`: the layer itself, without its weight.
        identities: Dotted paths of modules whose work a streamed feed-forward layer takes over.
        file: Name of the unit's file in `flash/`.
        hidden_size: Elements of each part of a row: d_model; what experts take and give; a linear layer's inputs.
        num_rows: Neurons of a feed-forward layer (d_ffn), or of all experts; a linear layer's outputs; tokens of a table.
        parts: What a row is made of, in order.
        encodings: Of each part, how its elements are written: a name of `ENCODINGS`.
        block_rows: Rows per block: the neurons of an expert in a layer of experts.
        arrangement: How a block is arranged: "row", or "block" where no row lies by itself.
        row_stride_bytes, block_stride_bytes: Stated for other readers; must agree with the layout. No row stride where no
            row lies by itself.
        num_active: Blocks that a token uses: all; a few of a layer of experts; one of a table of embeddings.
        activation: Name in transformers' `ACT2FN`; "custom" where experts have a way of their own; none of a linear layer.
        biases: Parts of a feed-forward layer or linear layer whose biases the resident file holds: `<module>.up_bias`
            (num_rows,), `.gate_bias` (num_rows,), `.down_bias` (hidden_size,); of a linear layer `<module>.bias`.
        table: Dotted path of the table of input embeddings that shares a linear layer's weight; "" where none does.
        checksums: xxh3-64 of each block as read (padding included), 16 hexadecimal digits.
        order_checksum: xxh3-64 of the `.order` file of a feed-forward layer, which says which checkpoint neuron each row
            is; None where rows lie in the checkpoint's order, and there is no such file.
    """

    kind: Kind
    module: ModuleName
    identities: tuple[ModuleName, ...] = ()
    file: UnitFileName
    hidden_size: Dimension
    num_rows: Annotated[int, Field(gt=0, le=MAX_DIMENSION**2)]
    parts: tuple[Part, ...]
    encodings: tuple[EncodingName, ...]
    block_rows: Dimension
    arrangement: Arrangement = "row"
    row_stride_bytes: Annotated[int, Field(gt=0)] | None
    block_stride_bytes: Annotated[int, Field(gt=0)]
    num_active: Annotated[int, Field(gt=0)]
    activation: str = ""
    biases: tuple[Part, ...] = ()
    table: ModuleName | Literal[""] = ""
    checksums: tuple[Checksum, ...]
    order_checksum: Checksum | None = None

    @model_validator(mode="after")
    def _fits_its_kind(self) -> UnitEntry:
        try:
            layout = self.layout
        except ConfigError as error:
            raise ValueError(str(error)) from error
        is_matrix = self.kind in ("linear", "embedding")
        allowed = (MATRIX,) if is_matrix else (GATED, UNGATED)
        if self.parts not in allowed:
            raise ValueError(f"a unit of kind {self.kind} has no rows of {self.parts}")
        row_stride_bytes = None if layout.is_by_block else layout.row_stride_bytes
        if (row_stride_bytes, layout.block_stride_bytes) != (self.row_stride_bytes, self.block_stride_bytes):
            raise ValueError(
                f"strides {self.row_stride_bytes} and {self.block_stride_bytes} do not follow from the shapes"
            )
        if len(self.checksums) != layout.num_blocks:
            raise ValueError(f"{self.file} has {layout.num_blocks} blocks but {len(self.checksums)} checksums")
        if not set(self.biases) <= set(self.parts) or (self.kind in ("experts", "embedding") and self.biases):
            raise ValueError(f"biases of {self.biases} in a unit of kind {self.kind}")
        if self.kind == "experts":
            if self.num_active > layout.num_blocks or self.num_rows % self.block_rows:
                raise ValueError("more active experts than experts, or a part of one")
        elif self.kind == "embedding":
            if self.num_active != 1:
                raise ValueError(f"a token uses one block of {self.file}, not {self.num_active}")
        elif self.num_active != layout.num_blocks:
            raise ValueError(f"a token uses all {layout.num_blocks} blocks of {self.file}, not {self.num_active}")
        if self.kind != "ffn" and (self.identities or self.order_checksum is not None):
            raise ValueError(f"identities or an order of rows in a unit of kind {self.kind}")
        if self.order_checksum is not None and layout.is_by_block:
            raise ValueError("an order of rows that don't lie by themselves")
        if self.table and self.kind != "linear":
            raise ValueError(f"a table of embeddings in a unit of kind {self.kind}")
        return self

    @model_serializer(mode="wrap")
    def _without_the_usual(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave the arrangement of rows out: what version 4 can say reads as it does there."""
        fields: dict[str, Any] = write(self)
        if self.arrangement == "row":
            fields.pop("arrangement", None)
        return fields

    @cached_property
    def layout(self) -> LayerLayout:
        """The unit's geometry."""
        return LayerLayout(
            hidden_size=self.hidden_size,
            num_rows=self.num_rows,
            parts=self.parts,
            encodings=self.encodings,
            block_rows=self.block_rows,
            arrangement=self.arrangement,
        )

    @property
    def unit(self) -> Unit:
        """The unit, as sizes."""
        return Unit(kind=self.kind, layout=self.layout, num_active=self.num_active)

    @property
    def num_experts(self) -> int:
        """Blocks: experts, where it is a layer of these."""
        return self.layout.num_blocks


class ResidentEntry(Strict):
    """`flash/resident.safetensors`: everything that stays in DRAM; a checksum for each `chunk_bytes` (last: fewer)."""

    num_bytes: Annotated[int, Field(gt=0)]
    chunk_bytes: Annotated[int, Field(gt=0)]
    checksums: tuple[Checksum, ...]


class SourceEntry(Strict):
    """Where the weights came from.

    Attributes:
        name: The folder or hub id as given.
        files: Size of each weight file by its name.
        fingerprint: Identifies the conversion (source files with their times, settings), so that one that is asked for
            again is known to be done.
        notes: What the conversion left out or could not keep, a line each.
    """

    name: str
    files: dict[str, int]
    fingerprint: str = ""
    notes: tuple[str, ...] = ()


class Manifest(Strict):
    """Everything that a reader of the pack needs to know.

    Attributes:
        format_version: Version of the format; another one is refused by name.
        flashlm_version: The flashlm that wrote the pack.
        model_type: The transformers model type.
        num_hidden_layers: Decoder layers of the model by its config, those included of which nothing is streamed.
        dtype: Element type of resident floating-point weights.
        units: What is streamed, in the order in which a forward pass meets it.
        resident: The resident file.
        small_files: xxh3-64 of config.json and of every file that was copied beside it (tokenizer, generation config).
        source: Where the weights came from.
    """

    format_version: Literal[4, 5] = FORMAT_VERSION
    flashlm_version: str
    model_type: str
    num_hidden_layers: Annotated[int, Field(gt=0, le=MAX_LAYERS)]
    dtype: Literal["bfloat16", "float16", "float32"]
    units: Annotated[tuple[UnitEntry, ...], Field(min_length=1, max_length=MAX_UNITS)]
    resident: ResidentEntry
    small_files: dict[SmallFileName, Checksum] = Field(default_factory=dict)
    source: SourceEntry

    @model_validator(mode="after")
    def _sizes_agree(self) -> Manifest:
        if any({"", ".", ".."} & set(name.split("/")) for name in self.small_files):
            raise ValueError("a small file is no file in the pack")
        main = max(len(self.ffns), len(self.experts))
        if main == 0:
            raise ValueError("feed-forward layers or layers of experts expected")
        if main > self.num_hidden_layers:
            raise ValueError(f"{main} streamed layers in a model of {self.num_hidden_layers}")
        if self.num_hidden_layers > 8 * main + 64:  # no family streams so few; building them would take long
            raise ValueError(f"{self.num_hidden_layers} layers in a model of which {main} are streamed")
        if self.format_version == 4:
            self._check_is_of_4()
        if len({unit.file for unit in self.units}) != len(self.units):
            raise ValueError("two units name the same file")
        modules = [module for unit in self.units for module in (unit.module, unit.table) if module]
        if len(set(modules)) != len(modules):
            raise ValueError("two units name the same module")
        wanted = -(-self.resident.num_bytes // self.resident.chunk_bytes)
        if len(self.resident.checksums) != wanted:
            raise ValueError(f"{RESIDENT_NAME} needs {wanted} checksums, has {len(self.resident.checksums)}")
        return self

    def _check_is_of_4(self) -> None:
        for unit in self.units:  # plain rows have the resident weights' dtype: nothing else was written
            allowed = {name for name in _ENCODINGS_OF_4 if not ENCODINGS[name].is_plain} | {
                encoding_of(self.dtype).name
            }
            others = set(unit.encodings) - allowed
            if others:
                raise ValueError(f"{unit.file} has rows of {', '.join(others)} in a pack of {self.dtype}")
            if unit.arrangement != "row":
                raise ValueError(f"{unit.file} has blocks that a pack of version 4 has not")

    @cached_property
    def ffns(self) -> tuple[UnitEntry, ...]:
        """The streamed feed-forward layers."""
        return tuple(unit for unit in self.units if unit.kind == "ffn")

    @cached_property
    def experts(self) -> tuple[UnitEntry, ...]:
        """The layers of experts."""
        return tuple(unit for unit in self.units if unit.kind == "experts")

    @cached_property
    def dense(self) -> tuple[UnitEntry, ...]:
        """The units of which a token uses every block."""
        return tuple(unit for unit in self.units if unit.unit.is_dense)

    @cached_property
    def tables(self) -> tuple[UnitEntry, ...]:
        """The tables of embeddings that no linear layer shares."""
        return tuple(unit for unit in self.units if unit.kind == "embedding")

    @property
    def main(self) -> UnitEntry:
        """The first feed-forward layer or layer of experts; all of a kind are alike but in their rows."""
        return (self.experts or self.ffns)[0]

    def with_units(self, units: tuple[UnitEntry, ...]) -> Manifest:
        """Return this manifest with other units."""
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return Manifest(**(fields | {"units": units}))

    @property
    def quantised(self) -> tuple[str, ...]:
        """Names of the encodings of streamed weights that are not plain elements."""
        names = {name for unit in self.units for name in unit.encodings}
        return tuple(sorted(name for name in names if not ENCODINGS[name].is_plain))

    @property
    def keeps_groups(self) -> bool:
        """Whether weights have the encodings that the source had, and were not quantised by flashlm."""
        return any(unit.layout.is_by_block for unit in self.units)

    @property
    def streamed_bytes(self) -> int:
        """Bytes of all units' files."""
        return sum(unit.layout.file_bytes for unit in self.units)

    @property
    def weights_fingerprint(self) -> str:
        """What identifies the weights, their order included: a digest of all checksums. Calibrations belong to one."""
        digest = xxhash.xxh3_64()
        for unit in self.units:
            for checksum in unit.checksums:
                digest.update(checksum.encode())
        for checksum in self.resident.checksums:
            digest.update(checksum.encode())
        return digest.hexdigest()


_KIND = DocumentKind(
    model=Manifest,
    version_key="format_version",
    versions=READ_VERSIONS,
    max_bytes=MAX_MANIFEST_BYTES,
    advice="convert the model again",
    is_sealed=True,
)


def check_version(format_version: object) -> None:
    """Refuse a pack whose config.json states a version that is not read.

    Raises:
        PackError: Which, and which are.
    """
    if format_version not in READ_VERSIONS:
        raise PackError(
            f"the pack has format version {format_version!r}, this flashlm reads {describe_versions(READ_VERSIONS)}:"
            " convert the model again"
        )


def manifest_path(pack: Path) -> Path:
    """Return where `pack` keeps its manifest."""
    return pack / FLASH_DIR / MANIFEST_NAME


def unit_path(pack: Path, entry: UnitEntry) -> Path:
    """Return the path of a unit's file."""
    return pack / FLASH_DIR / entry.file


def order_path(pack: Path, entry: UnitEntry) -> Path:
    """Return where the order of a feed-forward layer's rows is kept: int32 little-endian (num_rows,)."""
    return unit_path(pack, entry).with_suffix(".order")


def resident_path(pack: Path) -> Path:
    """Return where `pack` keeps the weights that stay in DRAM."""
    return pack / RESIDENT_NAME


def _what_instead(pack: Path) -> str:
    """Return what to do about a folder without a manifest: convert it where it is a model, else convert into it."""
    config = pack / "config.json"
    if pack.is_file():
        return f"it is a file. Convert what holds a model: flashlm convert {pack} PACK"
    if (config.is_file() and any(pack.glob("*.safetensors"))) or any(pack.glob("*.gguf")):
        return f"it is a model folder. Convert it: flashlm convert {pack} PACK"
    return f"{manifest_path(pack)} is missing. Make one with: flashlm convert SOURCE {pack}"


def write_manifest(pack: Path, manifest: Manifest) -> None:
    """Write the manifest of `pack`, in the place of one that is there.

    Raises:
        StorageError: It can't be written.
    """
    _KIND.write(manifest_path(pack), manifest)


def read_manifest(pack: Path) -> Manifest:
    """Read and check the manifest of `pack`.

    Raises:
        PackError: No manifest (not a pack, or an unfinished conversion), another version, a changed text, or invalid
            content.
    """
    manifest = None if pack.is_file() else _KIND.read(manifest_path(pack))
    if manifest is None:
        raise PackError(f"{pack} is not a finished pack: {_what_instead(pack)}")
    return manifest
