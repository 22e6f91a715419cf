"""What a calibration leaves in a pack of experts, `flash/routing.json`: how a text was routed, which cache policy suits it.

Loading takes the policy and the experts to begin with from it; no figure in it changes what the model computes. Like the
sparsity document it belongs to one content of the weights, by its fingerprint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from flashlm.memory.expert_policy import POLICIES, ExpertPolicy
from flashlm.pack.direct_file import write_small_file
from flashlm.pack.manifest import FLASH_DIR, MAX_DIMENSION, MAX_LAYERS, Manifest
from flashlm.pack.sealed import seal
from flashlm.sparsity.calibration_document import fingerprint
from flashlm.sparsity.calibration_file import other_weights, read_calibration_file

ROUTING_VERSION: Literal[2] = 2
ROUTING_NAME = "routing.json"
MAX_ROUTING_BYTES = 16 << 20
MAX_SHARES = 64

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=0, le=1 << 53)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class LayerRouting(_Strict):
    """How one layer's experts were used.

    Attributes:
        counts: For each expert the tokens that were sent to it.
        zero_share: Exact zeros among the inner activations of experts, over the tokens that were sent to them; None where
            the activation has none.
    """

    counts: Annotated[tuple[Count, ...], Field(min_length=1, max_length=MAX_DIMENSION)]
    zero_share: Share | None = None

    def top_share(self, share: float) -> float:
        """Return which share of all uses the most used `share` of the experts got; as much where routing has no skew."""
        ranked = sorted(self.counts, reverse=True)
        return sum(ranked[: max(round(share * len(ranked)), 1)]) / max(sum(ranked), 1)


class PolicyShares(_Strict):
    """Experts found in the cache over experts asked for, on text that the pinned ones were not chosen by.

    Attributes:
        cache_share: Slots over experts.
        lru, lfu, pinned: With each policy.
        best: The one with the most hits; among equals the first.
    """

    cache_share: Annotated[float, Field(gt=0.0, lt=1.0)]
    lru: Share
    lfu: Share
    pinned: Share
    best: ExpertPolicy

    @property
    def shares(self) -> dict[ExpertPolicy, float]:
        """By policy."""
        return {"lru": self.lru, "lfu": self.lfu, "pinned": self.pinned}

    @model_validator(mode="after")
    def _best_is_best(self) -> PolicyShares:
        if self.best != best_of(self.shares):
            raise ValueError(f"best is {self.best}, but {best_of(self.shares)} found more")
        return self


def best_of(shares: dict[ExpertPolicy, float]) -> ExpertPolicy:
    """Return the policy with the largest share; among equals the first of `POLICIES`."""
    return max(POLICIES, key=lambda policy: (shares[policy], -POLICIES.index(policy)))


class Routing(_Strict):
    """A routing calibration.

    Attributes:
        routing_version: Version of this document.
        fingerprint: `fingerprint(manifest)` of the weights that were run.
        text: Name of the text.
        num_tokens: Tokens that `layers` count.
        num_replayed_tokens: Tokens that `replays` were measured on.
        layers: One entry per layer of experts.
        replays: One entry per cache size, ascending; none where a token uses nearly all experts.
    """

    routing_version: Literal[2] = ROUTING_VERSION
    fingerprint: str
    text: str
    num_tokens: Annotated[int, Field(gt=0)]
    num_replayed_tokens: Annotated[int, Field(gt=0)]
    layers: Annotated[tuple[LayerRouting, ...], Field(min_length=1, max_length=MAX_LAYERS)]
    replays: Annotated[tuple[PolicyShares, ...], Field(max_length=MAX_SHARES)]

    @property
    def counts(self) -> list[tuple[int, ...]]:
        """For each layer how often each expert was used."""
        return [layer.counts for layer in self.layers]

    def best_policy(self, cache_share: float) -> ExpertPolicy:
        """Return the policy that was best at the cache size nearest to this one; `lru` where none was tried."""
        if not self.replays:
            return "lru"
        return min(self.replays, key=lambda each: abs(each.cache_share - cache_share)).best

    def rows(self) -> list[tuple[str, str]]:
        """Return the lines that `flashlm info` prints."""
        skew = sum(layer.top_share(0.25) for layer in self.layers) / len(self.layers)
        rows = [
            ("routing of", f"{self.text}, {self.num_tokens} tokens"),
            ("most used quarter", f"takes {skew:.0%} of the uses of a layer's experts (25 % without any skew)"),
        ]
        for each in self.replays:
            shares = ", ".join(f"{policy} {share:.1%}" for policy, share in each.shares.items())
            rows.append((f"found where {100 * each.cache_share:.3g} % fit", f"{shares}: {each.best}"))
        zeros = [layer.zero_share for layer in self.layers if layer.zero_share is not None]
        if zeros:
            value = f"{sum(zeros) / len(zeros):.1%} (layers: {min(zeros):.1%} to {max(zeros):.1%})"
            rows.append(("zeros inside experts", value))
        return rows


def routing_path(pack: Path) -> Path:
    """Return where a pack of experts keeps its routing calibration."""
    return pack / FLASH_DIR / ROUTING_NAME


def read_routing(pack: Path, manifest: Manifest) -> Routing | None:
    """Return the routing calibration of `pack`, None where there is none.

    Raises:
        PackError: It is damaged, of an unknown version, or of other weights than the pack holds.
    """
    path = routing_path(pack)
    found = read_calibration_file(
        path, Routing, version_key="routing_version", version=ROUTING_VERSION, max_bytes=MAX_ROUTING_BYTES
    )
    if found is None:
        return None
    shapes = [len(layer.counts) for layer in found.layers]
    if found.fingerprint != fingerprint(manifest) or shapes != [entry.num_experts for entry in manifest.experts]:
        raise other_weights(path, pack)
    return found


def write_routing(pack: Path, routing: Routing) -> None:
    """Write the document.

    Raises:
        StorageError: It can't be written.
    """
    write_small_file(routing_path(pack), seal(routing.model_dump_json(indent=1)))
