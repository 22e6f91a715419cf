"""Which streamed units keep the encodings that their source has, and which can't be taken as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flashlm.conversion.experts_source import EncodedExperts, ExpertSource
from flashlm.conversion.layer_file import LayerPart
from flashlm.conversion.sources.tensors import EncodedTensor, by_rows
from flashlm.errors import UnsupportedModelError
from flashlm.pack.checkpoint import TensorEntry
from flashlm.rows.encodings import BY_DTYPE, ENCODINGS, encoding_of
from flashlm.structure.experts import ExpertLayer
from flashlm.structure.find_units import EmbeddingLayer, FoundUnit, LinearLayer


def kept_encodings(
    found: Sequence[FoundUnit],
    parts: Mapping[str, tuple[LayerPart, ...]],
    experts: Sequence[ExpertSource | EncodedExperts],
    *,
    keeps_plain: bool,
) -> dict[str, tuple[str, ...]]:
    """Return the encodings of each unit that keeps its source's, by module; of the others rows of values are made.

    Args:
        found: The streamed units.
        parts: Where the weights of feed-forward and linear layers are, by module.
        experts: Where those of experts are, in the order of the layers.
        keeps_plain: Whether plain elements keep their type, too.

    Raises:
        UnsupportedModelError: A unit is in an encoding that can be neither kept nor be left for plain elements.
    """
    kept: dict[str, tuple[str, ...]] = {}
    sources = iter(experts)
    for each in found:
        entries: Sequence[TensorEntry]
        if isinstance(each, ExpertLayer):
            entries, is_laid = next(sources).entries, True
        else:
            entries = [part.entry for part in parts[each.module]]
            axes = [part.neuron_axis for part in parts[each.module]]
            is_laid = isinstance(each, LinearLayer | EmbeddingLayer) or axes == [0] * (len(axes) - 1) + [1]
        encoded = [entry for entry in entries if isinstance(entry, EncodedTensor) and not entry.is_plain]
        if not encoded:
            if keeps_plain and all(by_rows(entry).change is None for entry in entries):
                kept[each.module] = tuple(_plain_name(entry) for entry in entries)
            continue
        _check_known(encoded)
        if isinstance(each, LinearLayer | EmbeddingLayer):
            if encoded[0].is_as_stored:
                kept[each.module] = (encoded[0].encoding,)
        elif not is_laid or any(entry.change is not None for entry in encoded):
            raise UnsupportedModelError(
                f"{encoded[0].path} holds {encoded[0].name} in {encoded[0].encoding}, grouped across what belongs together"
                f" in {each.module}: convert with --quantize q8_0, which writes it anew"
            )
        else:
            kept[each.module] = tuple(by_rows(entry).encoding or _plain_name(entry) for entry in entries)
    return kept


def _plain_name(entry: TensorEntry) -> str:
    return encoding_of(entry.dtype).name if entry.dtype in BY_DTYPE else "fp32"


def _check_known(entries: Sequence[EncodedTensor]) -> None:
    for entry in entries:
        if entry.encoding not in ENCODINGS:
            known = ", ".join(name.upper() for name, each in ENCODINGS.items() if not each.is_plain)
            raise UnsupportedModelError(
                f"{entry.path} holds {entry.name} in {entry.encoding.upper()}, which flashlm does not multiply with: take a"
                f" file in one of {known}, or convert with --quantize q8_0, which writes all that is streamed anew"
            )
