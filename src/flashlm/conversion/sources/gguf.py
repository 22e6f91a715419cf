"""A GGUF file as a source: transformers makes config and tokenizer of its metadata, our tables say where its tensors belong.

transformers reads a small file that holds the same metadata and, under every tensor's name, one number: so it sees all parts
of a split model, maps no weights into memory, and the file's own header has been checked before. What its mapping of a
family leaves at a default though the file states it, is completed here.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from flashlm.conversion.experts_source import EncodedExperts, ExpertRows
from flashlm.conversion.names import NameMap, check_names
from flashlm.conversion.sources.gguf_header import GgufHeader, GgufTensor
from flashlm.conversion.sources.gguf_names import FAMILIES, GgufFamily
from flashlm.conversion.sources.safetensors import Checkpoint
from flashlm.conversion.sources.tensors import EncodedTensor, ForeignTensor, InterleavedTensor, StoredTensor
from flashlm.errors import FlashError, PackError, UnsupportedModelError
from flashlm.pack.checkpoint import TensorEntry
from flashlm.pack.manifest import CONFIG_NAME, MAX_LAYERS
from flashlm.pack.pack_config import MAX_EXPERTS
from flashlm.rows.encodings import ENCODINGS
from flashlm.storage.outside import open_regular
from flashlm.structure.experts import ExpertLayer

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_HEADER_NAME = "header.gguf"
_ALIGNMENT = 32
# What transformers keeps of where a tokenizer was loaded from.
_NOT_OF_TOKENIZERS = ("is_local", "local_files_only", "name_or_path", "gguf_file", "add_bos_token_", "tokenizer_file")
_NOT_OF_CONFIGS = re.compile(
    r"^tokenizer\.(ggml\.(tokens|scores|token_type|merges|pre|model)|chat_template)|\.rope\.scaling\."
)
_MOE_SIZES = {
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
# By architecture: the model's settings that transformers does not take from a file, by the file's keys.
_COMPLETED: dict[str, dict[str, str]] = {
    "qwen2moe": _MOE_SIZES,
    "qwen3moe": _MOE_SIZES,
    "qwen3": {"attention.key_length": "head_dim"},
    "qwen2": {"attention.key_length": "head_dim"},
    "gpt-oss": {"attention.key_length": "head_dim", "attention.sliding_window": "sliding_window"},
    "gemma2": {name: name for name in ("attn_logit_softcapping", "final_logit_softcapping")},
    "gpt2": {"context_length": "n_positions", "feed_forward_length": "n_inner"},
    "starcoder2": {"rope.freq_base": "rope_theta"},
    "stablelm": {"rope.freq_base": "rope_theta"},
    "phi3": {"attention.sliding_window": "sliding_window"},
    "falcon": {"attention.layer_norm_epsilon": "layer_norm_epsilon", "feed_forward_length": "ffn_hidden_size"},
    "nemotron": {"attention.layer_norm_epsilon": "norm_eps"},
}
_YARN = {
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
_LLAMA3: tuple[dict[str, Any], ...] = tuple(
    {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    for factor in (8.0, 32.0)
)
_MAX_FACTORS = 1024
_PARTIAL_ROTARY = ("stablelm", "nemotron", "phi3")


def write_model_folder(header: GgufHeader, folder: Path) -> tuple[str, ...]:
    """Write what a model folder holds beside its weights: config, tokenizer, chat template, generation config.

    Args:
        header: Of the file.
        folder: Empty.

    Returns:
        A line for each thing that could not be made.

    Raises:
        UnsupportedModelError: An architecture that transformers or flashlm does not know from GGUF files.
        PackError: Metadata that no model has.
    """
    _check_metadata(header)
    family_of(header)
    bare = folder / _HEADER_NAME
    try:
        bare.write_bytes(_bare(header, for_config=True))
        config = _config(header, folder)
        bare.write_bytes(_bare(header, for_config=False))
        notes = _write_tokenizer(header, folder)
    finally:
        bare.unlink(missing_ok=True)
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
    _write_generation_config(header, folder)
    return notes


def family_of(header: GgufHeader) -> GgufFamily:
    """Return the names of the file's family.

    Raises:
        UnsupportedModelError: There are none.
    """
    found = FAMILIES.get(header.architecture)
    if found is None:
        raise UnsupportedModelError(
            f"{header.files[0]} is of architecture {header.architecture!r}, of which flashlm reads no GGUF files:"
            f" {', '.join(FAMILIES)} are. Convert the model's safetensors instead"
        )
    return found


def _check_metadata(header: GgufHeader) -> None:
    for key, most in (("block_count", MAX_LAYERS), ("nextn_predict_layers", MAX_LAYERS), ("expert_count", MAX_EXPERTS)):
        value = header.of_model(key)
        if value is not None and (type(value) is not int or not 0 <= value <= most):
            raise PackError(f"{header.files[0]} says {header.architecture}.{key} is {value}, at most {most} expected")
    count, used = (header.of_model(f"expert_{key}") for key in ("count", "used_count"))
    if count and used is not None and (type(used) is not int or not 0 < used <= count):
        raise PackError(f"{header.files[0]} says that a token uses {used} of {count} experts")
    for key, value in header.metadata.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise PackError(f"{header.files[0]} says {key} is {value}")
        if key.endswith("_token_id") and type(value) is not int:
            raise PackError(f"{header.files[0]} says {key} is {value!r}, a number expected")


def _bare(header: GgufHeader, *, for_config: bool) -> bytes:
    """Return a GGUF file of the same metadata, whose tensors are a number each.

    For a config the vocabulary is one token, since transformers takes long over long lists, and rotary scaling is left out:
    we read it ourselves.
    """
    raw = dict(header.raw)
    if for_config:
        raw = {key: value for key, value in raw.items() if not _NOT_OF_CONFIGS.search(key)}
        raw["tokenizer.ggml.tokens"] = _text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 1) + _text("t")
    alignment = header.metadata.get("general.alignment", _ALIGNMENT)
    content = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(header.tensors), len(raw)))
    for value in raw.values():
        content += value
    for index, name in enumerate(header.tensors):
        content += _text(name) + struct.pack("<IQIQ", 1, 1, 0, index * alignment)
    content += bytes(-len(content) % alignment + len(header.tensors) * alignment)
    return bytes(content)


def _text(value: str) -> bytes:
    encoded = value.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _config(header: GgufHeader, folder: Path) -> dict[str, Any]:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, gguf_file=_HEADER_NAME)
        content: dict[str, Any] = config.to_diff_dict() | {"model_type": config.model_type} | _completed(header, config)
    except FlashError:
        raise
    except ImportError as error:
        raise UnsupportedModelError(f"GGUF files are read with the package gguf: pip install gguf ({error})") from error
    except Exception as error:  # each family's reader and config have ways of their own to stumble
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UnsupportedModelError(
            f"no config can be made of {header.files[0]}, of architecture {header.architecture!r}: {reason}"
        ) from error
    for name in ("_model_name_or_path", "_name_or_path", "transformers_version"):
        content.pop(name, None)
    return content


def _completed(header: GgufHeader, config: Any) -> dict[str, Any]:
    """Return settings that the file states and transformers' mapping leaves at their defaults."""
    found: dict[str, Any] = {}
    for key, name in _COMPLETED.get(header.architecture, {}).items():
        value = header.of_model(key)
        if value is not None and name != "rope_theta":
            found[name] = value
    embeddings = header.tensors.get("token_embd.weight")
    if embeddings is not None:
        found["vocab_size"] = embeddings.shape[0]
    rope = _rope(header, config)
    if rope is not None:
        found["rope_parameters"] = rope
    if rope is not None and rope.get("rope_type") == "longrope":
        found["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    if header.architecture == "gemma2" and header.of_model("block_count") == 46:  # as llama.cpp tells the 27B model
        found["query_pre_attn_scalar"] = config.hidden_size // config.num_attention_heads
    if header.architecture == "gemma3" and header.of_model("block_count") == 62:
        found["query_pre_attn_scalar"] = config.hidden_size // config.num_attention_heads
    return found


def _rope(header: GgufHeader, config: Any) -> dict[str, Any] | None:
    """Return the model's rotary settings where the file states more of them than transformers takes."""
    known = getattr(config, "rope_parameters", None)
    if not isinstance(known, dict):
        return None
    by_kind = "full_attention" in known  # Gemma 3 has others for its sliding layers
    rope = dict(known["full_attention"] if by_kind else known)
    if "rope_theta" in _COMPLETED.get(header.architecture, {}).values() and header.of_model("rope.freq_base"):
        rope["rope_theta"] = header.of_model("rope.freq_base")
    width = header.of_model("rope.dimension_count")
    if header.architecture in _PARTIAL_ROTARY and width:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        rope["partial_rotary_factor"] = width / head_dim
    rope |= _rope_scaling(header, rope)
    if not by_kind:
        return rope if rope != known else None
    return known | {"full_attention": rope} if rope != known["full_attention"] else None


def _rope_scaling(header: GgufHeader, rope: dict[str, Any]) -> dict[str, Any]:
    """Return how the file stretches rotary angles: by its metadata, or by factors that are tensors."""
    factor = header.of_model("rope.scaling.factor") or header.of_model(
        "rope.scale_linear"
    )  # as files had it until 2023
    kind = header.of_model("rope.scaling.type") or "linear"
    original = header.of_model("rope.scaling.original_context_length")
    factors = _floats(header, "rope_freqs.weight")
    if factors is not None:
        return _llama3_scaling(header, rope, factors)
    short, long = (_floats(header, f"rope_factors_{length}.weight") for length in ("short", "long"))
    if short is not None and long is not None and original:
        scaling = {"rope_type": "longrope", "short_factor": short.tolist(), "long_factor": long.tolist()}
        attention = header.of_model("rope.scaling.attn_factor")
        return (
            scaling
            | {"original_max_position_embeddings": original}
            | ({"attention_factor": attention} if attention else {})
        )
    if kind == "none" or (kind == "linear" and (not factor or factor == 1)):
        return {}
    if kind not in ("linear", "yarn") or not factor:
        raise UnsupportedModelError(
            f"{header.files[0]} stretches rotary angles in a way that is not known here: {kind!r} by {factor}. Convert the"
            " model's safetensors instead"
        )
    scaling = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        values = {name: header.of_model(f"rope.scaling.{key}") for key, name in _YARN.items()}
        scaling |= {name: value for name, value in values.items() if value is not None}
    return scaling


def _floats(header: GgufHeader, name: str) -> torch.Tensor | None:
    """Return a small tensor of the file in fp32, None where there is none."""
    tensor = header.tensors.get(name)
    if tensor is None:
        return None
    if tensor.type.name != "F32" or len(tensor.shape) != 1 or tensor.shape[0] > _MAX_FACTORS:
        raise PackError(
            f"{tensor.path} holds {name} as {tensor.type.name} {list(tensor.shape)}: a short list of F32 expected"
        )
    with open_regular(tensor.path) as file:
        file.seek(tensor.offset)
        return torch.frombuffer(bytearray(file.read(tensor.num_bytes)), dtype=torch.float32)


def _llama3_scaling(header: GgufHeader, rope: dict[str, Any], factors: torch.Tensor) -> dict[str, Any]:
    """Return the settings of Llama 3.1's and 3.2's rotary scaling that give the file's factors; it has nothing but these."""
    if bool((factors == 1).all()):
        return {}
    wavelengths = 2 * torch.pi * rope["rope_theta"] ** (torch.arange(len(factors)) / len(factors))
    for scaling in _LLAMA3:
        factor, low, high, original = scaling.values()
        smooth = (original / wavelengths - low) / (high - low)
        wanted = 1 / ((1 - smooth) / factor + smooth)
        wanted = torch.where(
            wavelengths < original / high, 1.0, torch.where(wavelengths > original / low, factor, wanted)
        )
        if torch.allclose(factors, wanted, rtol=1e-3):
            return {"rope_type": "llama3"} | scaling
    raise UnsupportedModelError(
        f"{header.files[0]} stretches rotary angles by factors (rope_freqs.weight) that are not those of Llama 3.1 or 3.2:"
        " convert the model's safetensors instead"
    )


def _write_tokenizer(header: GgufHeader, folder: Path) -> tuple[str, ...]:
    from transformers import PreTrainedTokenizerFast

    if "tokenizer.ggml.model" not in header.metadata:
        return ("no tokenizer: the file holds none",)
    try:
        PreTrainedTokenizerFast.from_pretrained(folder, gguf_file=_HEADER_NAME).save_pretrained(folder)
    except BaseException as error:  # each kind of tokenizer has ways of its own to stumble
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of the library in Rust
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return (f"no tokenizer: transformers makes none of the file ({reason}); put the model's own into the pack",)
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text())
    kept = {key: value for key, value in content.items() if key not in _NOT_OF_TOKENIZERS}
    path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n")
    return ()


def _write_generation_config(header: GgufHeader, folder: Path) -> None:
    ends = [header.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(each for each in ends if each is not None))
    content: dict[str, Any] = {"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {}
    for key, name in (("bos", "bos_token_id"), ("padding", "pad_token_id")):
        value = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if value is not None:
            content[name] = value
    (folder / "generation_config.json").write_text(json.dumps(content, indent=2) + "\n")


def gguf_checkpoint(header: GgufHeader) -> Checkpoint:
    """Return the files and tensors by their names in the file."""
    tensors: dict[str, TensorEntry] = {name: _by_rows(tensor) for name, tensor in header.tensors.items()}
    return Checkpoint(folder=header.files[0].parent, files=header.files, tensors=tensors)


def _by_rows(tensor: GgufTensor, **changes: Any) -> StoredTensor:
    """Return a tensor of the file as it is stored, but for `changes`."""
    plain = _PLAIN.get(tensor.type.name)
    # An axis alone is of rows of one element: there are biases in the order of their matrix's rows.
    width = tensor.shape[-1] if len(tensor.shape) > 1 or plain is None else 1
    encoding = "" if plain else tensor.type.name.lower()
    fields: dict[str, Any] = {
        "name": tensor.name,
        "path": tensor.path,
        "dtype": plain or torch.float32,
        "shape": tensor.shape,
        "offset": tensor.offset,
        "encoding": encoding,
        "num_rows": math.prod(tensor.shape) // width,
        "width": width,
        "stored_row_bytes": width // tensor.type.group_elements * tensor.type.group_bytes,
    } | changes
    if plain or encoding in ENCODINGS:
        return StoredTensor(**fields)
    return ForeignTensor(ggml_type=tensor.type.name, **fields)


def map_gguf_names(
    model: PreTrainedModel, header: GgufHeader, checkpoint: Checkpoint, layers: Sequence[ExpertLayer]
) -> NameMap:
    """Return where every weight of `model` is in the file.

    Args:
        model: On the meta device.
        header: Of the file.
        checkpoint: Its files.
        layers: The layers whose experts are streamed.

    Raises:
        PackError: A weight is missing or has another shape.
        UnsupportedModelError: A tensor has no place in the model.
    """
    family, state = family_of(header), model.state_dict()
    found = NameMap()
    parts: dict[str, dict[str, GgufTensor]] = {}
    unknown, left_out = [], []
    beyond = _layers_beyond(header, model.config.get_text_config(decoder=True).num_hidden_layers)
    for name, tensor in header.tensors.items():
        expert = family.experts_of(name)
        if family.ignored.search(name) or name.startswith(beyond):
            left_out.append(name)
        elif expert is not None:
            layer, part, suffix = expert
            parts.setdefault(layer, {})[f"{part}.{suffix}"] = tensor
        elif (target := family.name_of(name)) is None or target not in state:
            unknown.append(name)
        else:
            shape = _grown(tensor.shape, tuple(state[target].shape), is_transposed=family.is_transposed(name))
            found.entries[target] = _by_rows(
                tensor,
                shape=shape,
                order=_order(family, tensor, model.config),
                change=family.change_of(name, model.config),
                is_transposed=family.is_transposed(name),
            )
    found.left_out = tuple(left_out)
    found.experts = tuple(_experts(layer, _of_layer(parts, layer, header), found, header.files[0]) for layer in layers)
    unknown += [each.name for rest in parts.values() for each in rest.values()]
    if unknown:
        raise UnsupportedModelError(
            f"{header.files[0]} holds {len(unknown)} tensors that have no place in {type(model).__name__} as flashlm reads"
            f" GGUF files of architecture {header.architecture!r}, first {', '.join(sorted(unknown)[:3])}"
        )
    check_names(model, found, layers, checkpoint)
    return found


def _layers_beyond(header: GgufHeader, num_layers: int) -> tuple[str, ...]:
    """Return what the names of layers begin with that predict further tokens: transformers builds none."""
    count = header.of_model("nextn_predict_layers")
    return tuple(f"blk.{num_layers + index}." for index in range(count if type(count) is int else 0))


def _order(family: GgufFamily, tensor: GgufTensor, config: Any) -> torch.Tensor | None:
    num_rows = math.prod(tensor.shape[:-1]) if len(tensor.shape) > 1 else tensor.shape[0]
    order = family.order_of(tensor.name, config, num_rows)
    if order is not None and len(tensor.shape) == 1 and tensor.type.name not in _PLAIN:
        raise UnsupportedModelError(
            f"{tensor.path} holds {tensor.name} in {tensor.type.name}, grouped across rows that change places: convert the"
            " model's safetensors instead"
        )
    return order


def _grown(stored: tuple[int, ...], wanted: tuple[int, ...], *, is_transposed: bool) -> tuple[int, ...]:
    """Return a tensor's shape in the model: axes of one element come and go."""
    stored = tuple(reversed(stored)) if is_transposed else stored
    same = [size for size in stored if size != 1] == [size for size in wanted if size != 1]
    return wanted if same else stored


def _of_layer(parts: dict[str, dict[str, GgufTensor]], layer: ExpertLayer, header: GgufHeader) -> dict[str, GgufTensor]:
    for start in parts:
        if layer.module.startswith(f"{start}."):
            return parts.pop(start)
    raise PackError(f"{header.files[0]} lacks the experts of {layer.module}")


def _experts(layer: ExpertLayer, parts: dict[str, GgufTensor], found: NameMap, file: Path) -> EncodedExperts:
    """Return one layer's experts; their biases go into `found`, as the model has them."""
    wanted = ("gate", "up", "down") if layer.has_gate else ("up", "down")
    weights: list[ExpertRows] = []
    for part in wanted:
        rows, width = (layer.hidden_size, layer.num_rows) if part == "down" else (layer.num_rows, layer.hidden_size)
        joined = parts.get("gate_up.weight") if part != "down" else None
        tensor = joined or parts.get(f"{part}.weight")
        if tensor is None:
            raise PackError(f"{file} lacks {part} of the experts of {layer.module}")
        stored_rows = rows if joined is None else 2 * rows
        if tensor.shape != (layer.num_experts, stored_rows, width):
            raise PackError(
                f"{tensor.path} holds {tensor.name} with shape {list(tensor.shape)}, the model's config wants"
                f" {[layer.num_experts, stored_rows, width]}"
            )
        entry, first = _by_rows(tensor), rows if joined is not None and part == "up" else 0
        starts = [expert * stored_rows + first for expert in range(layer.num_experts)]
        weights.append(ExpertRows(slices=tuple((entry, range(start, start + rows)) for start in starts)))
    used = {f"{part}.weight" for part in (*wanted, "gate_up")}
    _add_biases(layer, {name: tensor for name, tensor in parts.items() if name not in used}, found)
    return EncodedExperts(layer=layer, parts=tuple(weights))


def _add_biases(layer: ExpertLayer, parts: dict[str, GgufTensor], found: NameMap) -> None:
    names = {"gate_up.bias": f"{layer.in_weight}_bias", "down.bias": f"{layer.out_weight}_bias"}
    if not layer.has_gate:
        names["up.bias"] = names["gate_up.bias"]
    halves = [parts.pop(name, None) for name in ("gate.bias", "up.bias")] if layer.has_gate else []
    if len(halves) == 2 and halves[0] is not None and halves[1] is not None:
        found.entries[names["gate_up.bias"]] = _interleaved(halves[0], halves[1], layer)
    for part, tensor in parts.items():
        if part not in names:
            raise PackError(f"{tensor.path} holds {tensor.name}, which has no place in {layer.module}")
        found.entries[names[part]] = _by_rows(tensor)


def _interleaved(gate: GgufTensor, up: GgufTensor, layer: ExpertLayer) -> EncodedTensor:
    even, odd = _by_rows(gate), _by_rows(up)
    if layer.is_concatenated or not even.is_plain or even.dtype != odd.dtype or even.shape != odd.shape:
        raise UnsupportedModelError(f"{gate.path} holds {gate.name} and {up.name} in a way that is not known here")
    return InterleavedTensor(
        name=even.name,
        path=even.path,
        dtype=even.dtype,
        shape=(*even.shape[:-1], 2 * even.shape[-1]),
        offset=even.offset,
        encoding="",
        num_rows=even.num_rows,
        width=2 * even.width,
        even=even,
        odd=odd,
    )
