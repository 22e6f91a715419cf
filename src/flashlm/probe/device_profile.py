"""What a machine can do, as measured: the document that `flashlm probe` writes and the planner reads, one per device."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

from pydantic import Field

from flashlm.documents import DocumentKind, Strict
from flashlm.errors import ConfigError

PROFILE_VERSION: Literal[4] = 4
MAX_PROFILE_BYTES = 4 << 20
ENV_CACHE = "FLASHLM_CACHE"

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]
Pattern = Literal["sequential", "random"]


class ReadPoint(Strict):
    """Reads of one size at one depth.

    Attributes:
        pattern: Whether the next read follows the last.
        backend: Of our reader.
        read_bytes: Size of a read.
        queue_depth: Reads in flight.
        gb_per_s, reads_per_s: Medians over rounds.
        cpu_s_per_read: Processor time of this process.
        latency_p50_s, latency_p99_s: Of single reads; at depth 1 only.
    """

    pattern: Pattern
    backend: str
    read_bytes: Annotated[int, Field(gt=0)]
    queue_depth: Annotated[int, Field(gt=0)]
    gb_per_s: Positive
    reads_per_s: Positive
    cpu_s_per_read: Annotated[float, Field(ge=0)]
    latency_p50_s: Positive | None = None
    latency_p99_s: Positive | None = None


class RowReadPoint(Strict):
    """A batch of scattered rows that land in slots, as mode `sparse` reads them."""

    row_bytes: Annotated[int, Field(gt=0)]
    num_rows: Annotated[int, Field(gt=0)]
    seconds: Positive


class ProductRates(Strict):
    """How fast weights of one dtype are multiplied with.

    Attributes:
        dtype: Element type, like "bfloat16".
        matrix_gb_per_s: One token, resident matrices, one call each.
        block_up_gb_per_s, block_down_gb_per_s: One token, the up (or gate) and the down parts of rows in blocks; of the
            down parts those that fire, every second.
        row_up_gb_per_s, row_down_gb_per_s: The same over scattered rows.
        expert_gb_per_s: One token, groups of experts: their rows have short parts, and all of them fire.
        predictor_gb_per_s: Both products of row predictors, whose rows are short.
        gemm_gflop_per_s: 128 tokens, the way that the engine multiplies.
    """

    dtype: str
    matrix_gb_per_s: Positive
    block_up_gb_per_s: Positive
    block_down_gb_per_s: Positive
    row_up_gb_per_s: Positive
    row_down_gb_per_s: Positive
    expert_gb_per_s: Positive
    predictor_gb_per_s: Positive
    gemm_gflop_per_s: Positive


class EncodedRates(Strict):
    """How fast weights of one encoding that is not plain are multiplied with, as a checkpoint's own groups; encoded bytes.

    Attributes:
        encoding: Its name.
        is_int8: Whether tokens are rounded to 8 bits.
        matrix_gb_per_s: One token, whole matrices, or the gate or up part of a block: rows of hidden_size elements.
        down_gb_per_s: One token, the down part of a block: rows of its neurons.
        expert_gb_per_s: One token, groups of experts.
        gemm_gflop_per_s: 128 tokens, the way that the engine multiplies.
    """

    encoding: str
    is_int8: bool = False
    matrix_gb_per_s: Positive
    down_gb_per_s: Positive
    expert_gb_per_s: Positive
    gemm_gflop_per_s: Positive


class DeviceProfile(Strict):
    """A machine and one of its devices.

    Attributes:
        profile_version: Version of this document.
        flashlm_version, date: Who measured, and when.
        device: The device's number, which identifies it on this machine.
        file_system: Its type.
        backend: Of our reader.
        is_direct: Whether reads go past the page cache; if not, rates are those of memory in part.
        write_gb_per_s: Writing and syncing the test file.
        reads, row_reads: What reading reaches.
        segment_s: What each further place in memory that one read lands in adds to it.
        memory_read_gb_per_s: A sum over memory, all threads.
        first_touch_gb_per_s: Filling fresh anonymous memory.
        products: By dtype.
        encoded: By encoding; none in profiles of before there were some.
        read_share, compute_share: What of each is left while both run.
        block_overhead_s: Multiplying with a run of blocks of next to no weights: calls from Python.
        token_overhead_s: A token's time in transformers outside the layers, without weights worth the name.
        matrix_overhead_s: A product's time with a resident matrix of next to no weights, less that of torch.
        layer_overhead_s: A decoder layer's time for one token in transformers, without weights worth the name.
        sparse_layer_overhead_s: A layer's time in mode `sparse` beside weights, predictor, lookup and reads.
        expert_layer_overhead_s: A layer of experts' time for one token beside weights, products and reads.
        expert_group_overhead_s: What computing some of them together takes beside their weights.
        manage_row_s: Looking up one row in the neuron cache.
    """

    profile_version: Literal[4] = PROFILE_VERSION
    flashlm_version: str
    date: str
    device: str
    file_system: str
    backend: str
    is_direct: bool
    write_gb_per_s: Positive
    reads: tuple[ReadPoint, ...]
    row_reads: tuple[RowReadPoint, ...]
    segment_s: Annotated[float, Field(ge=0)]
    memory_read_gb_per_s: Positive
    first_touch_gb_per_s: Positive
    products: tuple[ProductRates, ...]
    encoded: tuple[EncodedRates, ...] = ()
    read_share: Share
    compute_share: Share
    block_overhead_s: Annotated[float, Field(ge=0)]
    token_overhead_s: Annotated[float, Field(ge=0)]
    matrix_overhead_s: Annotated[float, Field(ge=0)]
    layer_overhead_s: Annotated[float, Field(ge=0)]
    sparse_layer_overhead_s: Annotated[float, Field(ge=0)]
    expert_layer_overhead_s: Annotated[float, Field(ge=0)]
    expert_group_overhead_s: Annotated[float, Field(ge=0)]
    manage_row_s: Annotated[float, Field(ge=0)]

    @property
    def stream_gb_per_s(self) -> float:
        """The sequential rate of blocks of 1 MiB and more, several in flight: the median over such points."""
        return median(rate for size, rate in self.stream_rates.items() if size >= 1 << 20)

    @property
    def stream_rates(self) -> dict[int, float]:
        """The sequential rate by block size, GB/s: the median over depths."""
        return self._of_streams(lambda point: point.gb_per_s)

    @property
    def stream_cpu_s(self) -> dict[int, float]:
        """The processor's time of a sequential read by block size: the median over depths."""
        return self._of_streams(lambda point: point.cpu_s_per_read)

    def _of_streams(self, value: Callable[[ReadPoint], float]) -> dict[int, float]:
        found: dict[int, list[float]] = {}
        for point in self.reads:
            if point.pattern == "sequential" and point.backend == self.backend:
                found.setdefault(point.read_bytes, []).append(value(point))
        return {size: median(values) for size, values in sorted(found.items())}

    @property
    def reads_per_s_at_saturation(self) -> float:
        """The most random reads a second, whatever their size."""
        return max(point.reads_per_s for point in self.reads if point.pattern == "random")


_KIND = DocumentKind(
    model=DeviceProfile,
    version_key="profile_version",
    max_bytes=MAX_PROFILE_BYTES,
    advice="run `flashlm probe` again",
    error=ConfigError,
)


def cache_folder() -> Path:
    """Return where profiles are kept: `FLASHLM_CACHE`, else `flashlm` in the user's cache folder."""
    own = os.environ.get(ENV_CACHE)
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "flashlm"


def device_id(folder: Path) -> str:
    """Return what identifies the device of `folder` on this machine.

    Raises:
        ConfigError: There is no such folder.
    """
    try:
        number = folder.stat().st_dev
    except OSError as error:
        raise ConfigError(f"{folder} can't be probed: {error.strerror}") from error
    return f"{os.major(number)}-{os.minor(number)}"


def profile_path(folder: Path) -> Path:
    """Return where the profile of the device of `folder` is kept."""
    return cache_folder() / f"profile-{re.sub(r'[^0-9-]', '', device_id(folder))}.json"


def save_profile(profile: DeviceProfile, path: Path) -> None:
    """Write a profile, atomically.

    Raises:
        StorageError: It can't be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{path.parent} can't be made: {error.strerror}. Set {ENV_CACHE} to a folder of yours"
        ) from error
    _KIND.write(path, profile)


def load_profile(path: Path) -> DeviceProfile | None:
    """Return a profile, None where there is none.

    Raises:
        ConfigError: It is damaged or of another version.
    """
    return _KIND.read(path)
