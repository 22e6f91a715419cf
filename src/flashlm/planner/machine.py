"""From a device profile to the rates of the cost model."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

from flashlm.errors import ConfigError
from flashlm.planner.choices import Activations
from flashlm.planner.cost import Overlap
from flashlm.planner.rates import EncodedProducts, Rates, ReadSetting
from flashlm.probe.device_profile import DeviceProfile, Pattern, load_profile, profile_path
from flashlm.probe.probe import probe


def rates_of(profile: DeviceProfile, dtype: str, activations: Activations = "exact") -> Rates:
    """Return the rates for one dtype, and for encodings those with activations of a kind.

    Scattered rows are priced by batches: a batch takes a fixed time and a time per row, which two batch sizes tell apart.

    Raises:
        ConfigError: The profile lacks the dtype, or batches of rows.
    """
    products = next((each for each in profile.products if each.dtype == dtype), None)
    if products is None or not profile.row_reads:
        raise ConfigError(f"this device's profile has no figures for {dtype}: run `flashlm probe` again")
    by_size: dict[int, list[tuple[int, float]]] = {}
    for point in profile.row_reads:
        by_size.setdefault(point.row_bytes, []).append((point.num_rows, point.seconds))
    random_gb_per_s, latencies = {}, []
    for row_bytes, batches in by_size.items():
        latency_s, row_s = _line(sorted(batches))
        random_gb_per_s[row_bytes] = row_bytes / row_s / 1e9
        latencies.append(latency_s)
    return Rates(
        stream_gb_per_s=profile.stream_rates,
        random_gb_per_s=random_gb_per_s,
        batch_latency_s=min(latencies),  # hardly a matter of size; what else the device does only adds to it
        segment_s=profile.segment_s,
        memory_gb_per_s=profile.memory_read_gb_per_s,
        matrix_gb_per_s=products.matrix_gb_per_s,
        block_up_gb_per_s=products.block_up_gb_per_s,
        block_down_gb_per_s=products.block_down_gb_per_s,
        row_up_gb_per_s=products.row_up_gb_per_s,
        row_down_gb_per_s=products.row_down_gb_per_s,
        expert_gb_per_s=products.expert_gb_per_s,
        predictor_gb_per_s=products.predictor_gb_per_s,
        gemm_gflop_per_s=products.gemm_gflop_per_s,
        block_overhead_s=profile.block_overhead_s,
        token_overhead_s=profile.token_overhead_s,
        matrix_overhead_s=profile.matrix_overhead_s,
        layer_overhead_s=profile.layer_overhead_s,
        sparse_layer_overhead_s=profile.sparse_layer_overhead_s,
        expert_layer_overhead_s=profile.expert_layer_overhead_s,
        expert_group_overhead_s=profile.expert_group_overhead_s,
        manage_row_s=profile.manage_row_s,
        read_cpu_s=profile.stream_cpu_s,
        overlap=Overlap(read_share=profile.read_share, compute_share=profile.compute_share),
        stream_settings=_settings(profile, "sequential"),
        random_settings=_settings(profile, "random"),
        encoded={
            each.encoding: EncodedProducts(
                matrix_gb_per_s=each.matrix_gb_per_s,
                up_gb_per_s=each.matrix_gb_per_s,
                down_gb_per_s=each.down_gb_per_s,
                expert_gb_per_s=each.expert_gb_per_s,
                gemm_gflop_per_s=each.gemm_gflop_per_s,
            )
            for each in profile.encoded
            if each.is_int8 == (activations == "int8")
        },
    )


def _settings(profile: DeviceProfile, pattern: Pattern) -> tuple[ReadSetting, ...]:
    return tuple(
        ReadSetting(piece_bytes=point.read_bytes, queue_depth=point.queue_depth, gb_per_s=point.gb_per_s)
        for point in profile.reads
        if point.pattern == pattern and point.backend == profile.backend
    )


def _line(batches: list[tuple[int, float]]) -> tuple[float, float]:
    """Return (seconds of a batch, seconds per row) from batches of (rows, seconds): a single row's, and some hundred rows'.

    The largest batches are left to those that have no smaller: an engine's batch is one layer's misses.
    """
    (few, few_s), *more = batches
    if few > 1 or not more:
        few, few_s = 0, 0.0
        more = batches
    row_s = statistics.median((seconds - few_s) / (count - few) for count, seconds in more[:2])
    if row_s <= 0.0:
        return 0.0, more[0][1] / more[0][0]
    return max(few_s - row_s, 0.0), row_s


def stored_rates(folder: Path, dtype: str, activations: Activations = "exact") -> Rates | None:
    """Return the rates of the device of `folder` from its profile, None where there is none.

    Raises:
        ConfigError: The profile is damaged or of another version.
    """
    profile = load_profile(profile_path(folder))
    return None if profile is None else rates_of(profile, dtype, activations)


def rates_for(folder: Path, dtype: str, announce: Callable[[str], None], activations: Activations = "exact") -> Rates:
    """Return the rates of the device of `folder`; where there is no profile yet, probe it first.

    Raises:
        ConfigError, StorageError: As in `probe`.
    """
    found = stored_rates(folder, dtype, activations)
    if found is not None:
        return found
    announce(f"no profile of the device of {folder} yet: probing it, once (`flashlm probe` does it again)")
    return rates_of(probe(folder, announce=announce), dtype, activations)
