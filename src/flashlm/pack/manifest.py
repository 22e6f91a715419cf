"""The manifest of a pack, `flash/manifest.json`: what is streamed, how it is laid out, and where it came from.

A manifest is outside data: it is validated strictly, every size in it is checked against the layout before anything is
allocated, and file names that would leave the pack are refused. It ends with a checksum of its own text (`sealed`).
`docs/format.md` describes the format byte for byte.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from flashlm.errors import PackError
from flashlm.pack.sealed import seal, unseal
from flashlm.rows.layout import LayerLayout
from flashlm.storage.outside import parse_json, read_document

FORMAT_VERSION: Literal[3] = 3
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
MAX_DIMENSION = 1 << 24
MAX_MANIFEST_BYTES = 64 << 20
CONFIG_NAME = "config.json"
_AGAIN = "convert the model again"

Checksum = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
Dimension = Annotated[int, Field(gt=0, le=MAX_DIMENSION)]
SmallFileName = Annotated[str, Field(pattern=r"^[^/\\\x00]+(/[^/\\\x00]+)*$", max_length=255)]
ModuleName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*$", max_length=1024)]
LayerFileName = Annotated[str, Field(pattern=r"^layer-\d{5}(\.[0-9a-f]{8})?\.rows$")]
ExpertsFileName = Annotated[str, Field(pattern=r"^experts-\d{5}\.rows$")]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class LayerEntry(_Strict):
    """One streamed FFN.

    Attributes:
        module: Dotted path of the module that the engine replaces by the streamed FFN.
        identities: Dotted paths of modules whose work the streamed FFN takes over; they become `nn.Identity`.
        file: Name of the layer's file in `flash/`.
        num_rows: Neurons (d_ffn).
        has_up_bias, has_gate_bias, has_down_bias: Whether the resident file holds `<module>.up_bias` (d_ffn,),
            `<module>.gate_bias` (d_ffn,), `<module>.down_bias` (d_model,).
        checksums: xxh3-64 of each block as read (padding included), 16 hexadecimal digits.
        order_checksum: xxh3-64 of the layer's `.order` file, which says which checkpoint neuron each row is; None where
            rows lie in the checkpoint's order, and there is no such file.
    """

    module: ModuleName
    identities: tuple[ModuleName, ...] = ()
    file: LayerFileName
    num_rows: Dimension
    has_up_bias: bool
    has_gate_bias: bool
    has_down_bias: bool
    checksums: tuple[Checksum, ...]
    order_checksum: Checksum | None = None


class ExpertsEntry(_Strict):
    """The routed experts of one layer; a block of its file is an expert.

    Attributes:
        module: Dotted path of the experts module, whose weights are in the file instead of in the resident one.
        file: Name of its file in `flash/`.
        num_experts: Experts.
        num_active: Experts that a token uses.
        checksums: xxh3-64 of each expert as read (padding included), 16 hexadecimal digits.
    """

    module: ModuleName
    file: ExpertsFileName
    num_experts: Dimension
    num_active: Dimension
    checksums: tuple[Checksum, ...]


class ResidentEntry(_Strict):
    """`flash/resident.safetensors`: everything that stays in DRAM; a checksum for each `chunk_bytes` (last: fewer)."""

    num_bytes: Annotated[int, Field(gt=0)]
    chunk_bytes: Annotated[int, Field(gt=0)]
    checksums: tuple[Checksum, ...]


class SourceEntry(_Strict):
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


class Manifest(_Strict):
    """Everything that a reader of the pack needs to know.

    Attributes:
        format_version: Version of the format; another one is refused by name.
        flashlm_version: The flashlm that wrote the pack.
        model_type: The transformers model type.
        num_hidden_layers: Decoder layers of the model by its config, those included of which nothing is streamed.
        dtype: Element type of rows and resident floating-point weights.
        hidden_size: d_model of the streamed FFNs, or what experts take and give.
        has_gate: Whether rows hold a gate part.
        activation: Name of the activation in transformers' `ACT2FN`; "custom" where experts have a way of their own.
        block_rows: Rows per block: the neurons of an expert where there are experts.
        row_stride_bytes, block_stride_bytes: Stated for other readers; must agree with the layout.
        layers: The streamed FFNs, in the order in which a forward pass meets them; none where there are experts.
        experts: The layers of experts, in the same order; none in a model without.
        resident: The resident file.
        small_files: xxh3-64 of config.json and of every file that was copied beside it (tokenizer, generation config).
        source: Where the weights came from.
    """

    format_version: Literal[3] = FORMAT_VERSION
    flashlm_version: str
    model_type: str
    num_hidden_layers: Annotated[int, Field(gt=0, le=MAX_LAYERS)]
    dtype: Literal["bfloat16", "float16", "float32"]
    hidden_size: Dimension
    has_gate: bool
    activation: str
    block_rows: Dimension
    row_stride_bytes: Annotated[int, Field(gt=0)]
    block_stride_bytes: Annotated[int, Field(gt=0)]
    layers: Annotated[tuple[LayerEntry, ...], Field(max_length=MAX_LAYERS)]
    experts: Annotated[tuple[ExpertsEntry, ...], Field(max_length=MAX_LAYERS)] = ()
    resident: ResidentEntry
    small_files: dict[SmallFileName, Checksum] = {}
    source: SourceEntry

    @model_validator(mode="after")
    def _sizes_agree(self) -> Manifest:
        if bool(self.layers) == bool(self.experts):
            raise ValueError("streamed layers or layers of experts expected, and not both")
        if any({"", ".", ".."} & set(name.split("/")) for name in self.small_files):
            raise ValueError("a small file is no file in the pack")
        if len(self.files) > self.num_hidden_layers:
            raise ValueError(f"{len(self.files)} streamed layers in a model of {self.num_hidden_layers}")
        if self.num_hidden_layers > 8 * len(self.files) + 64:  # no family streams so few; building them would take long
            raise ValueError(f"{self.num_hidden_layers} layers in a model of which {len(self.files)} are streamed")
        if any(layer.num_active > layer.num_experts for layer in self.experts):
            raise ValueError("more active experts than experts")
        for layer, layout in self.files:
            if (layout.row_stride_bytes, layout.block_stride_bytes) != (self.row_stride_bytes, self.block_stride_bytes):
                raise ValueError(
                    f"strides {self.row_stride_bytes} and {self.block_stride_bytes} do not follow from the shapes"
                )
            if len(layer.checksums) != layout.num_blocks:
                raise ValueError(f"{layer.file} has {layout.num_blocks} blocks but {len(layer.checksums)} checksums")
        if len({layer.file for layer, _ in self.files}) != len(self.files):
            raise ValueError("two layers name the same file")
        wanted = -(-self.resident.num_bytes // self.resident.chunk_bytes)
        if len(self.resident.checksums) != wanted:
            raise ValueError(f"{RESIDENT_NAME} needs {wanted} checksums, has {len(self.resident.checksums)}")
        return self

    def layout(self, layer: int) -> LayerLayout:
        """Return the geometry of streamed layer `layer`."""
        return LayerLayout(
            hidden_size=self.hidden_size,
            num_rows=self.layers[layer].num_rows,
            has_gate=self.has_gate,
            dtype=self.dtype,
            block_rows=self.block_rows,
        )

    def experts_layout(self, layer: int) -> LayerLayout:
        """Return the geometry of the file of experts `layer`: block e is expert e."""
        return LayerLayout(
            hidden_size=self.hidden_size,
            num_rows=self.experts[layer].num_experts * self.block_rows,
            has_gate=self.has_gate,
            dtype=self.dtype,
            block_rows=self.block_rows,
        )

    @property
    def files(self) -> list[tuple[LayerEntry | ExpertsEntry, LayerLayout]]:
        """Every streamed file's entry and geometry."""
        layers = [(entry, self.layout(index)) for index, entry in enumerate(self.layers)]
        return [*layers, *((entry, self.experts_layout(index)) for index, entry in enumerate(self.experts))]

    @property
    def streamed_bytes(self) -> int:
        """Bytes of all layer files."""
        return sum(layout.file_bytes for _, layout in self.files)

    @property
    def weights_fingerprint(self) -> str:
        """What identifies the weights, their order included: a digest of all checksums. Calibrations belong to one."""
        digest = xxhash.xxh3_64()
        for entry, _ in self.files:
            for checksum in entry.checksums:
                digest.update(checksum.encode())
        for checksum in self.resident.checksums:
            digest.update(checksum.encode())
        return digest.hexdigest()

    def to_bytes(self) -> bytes:
        """Return the content of `flash/manifest.json`."""
        return seal(self.model_dump_json(indent=1))


def manifest_path(pack: Path) -> Path:
    """Return where `pack` keeps its manifest."""
    return pack / FLASH_DIR / MANIFEST_NAME


def layer_path(pack: Path, entry: LayerEntry | ExpertsEntry) -> Path:
    """Return the path of a layer's file."""
    return pack / FLASH_DIR / entry.file


def order_path(pack: Path, entry: LayerEntry) -> Path:
    """Return where the order of a layer's rows is kept: int32 little-endian (num_rows,)."""
    return layer_path(pack, entry).with_suffix(".order")


def resident_path(pack: Path) -> Path:
    """Return where `pack` keeps the weights that stay in DRAM."""
    return pack / RESIDENT_NAME


def _what_instead(pack: Path) -> str:
    """Return what to do about a folder without a manifest: convert it where it is a model, else convert into it."""
    config = pack / "config.json"
    if config.is_file() and any(pack.glob("*.safetensors")):
        return f"it is a model folder. Convert it: flashlm convert {pack} PACK"
    return f"{manifest_path(pack)} is missing. Make one with: flashlm convert SOURCE {pack}"


def read_manifest(pack: Path) -> Manifest:
    """Read and check the manifest of `pack`.

    Raises:
        PackError: No manifest (not a pack, or an unfinished conversion), another version, a changed text, or invalid
            content.
    """
    path = manifest_path(pack)
    try:
        text = read_document(path, MAX_MANIFEST_BYTES, advice=_AGAIN)
    except FileNotFoundError:
        raise PackError(f"{pack} is not a finished pack: {_what_instead(pack)}") from None
    content = parse_json(text, path, advice=_AGAIN)
    _check_version(path, content.get("format_version") if isinstance(content, dict) else None)
    try:
        return Manifest.model_validate_json(unseal(text, path, "Convert the model again"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise PackError(f"{path} is invalid at {where}: {first['msg']} ({error.error_count()} problems)") from error


def _check_version(path: Path, version: object) -> None:
    if type(version) is int and version == FORMAT_VERSION:  # True == 1
        return
    reason = f"{path} has format version {version!r}, this flashlm reads version {FORMAT_VERSION}"
    if type(version) is int and version > FORMAT_VERSION:
        raise PackError(f"{reason}: update flashlm, or convert the model again")
    raise PackError(
        f"{reason}: convert the model again (it is an old pack, whose weights other programs took for whole)"
    )
