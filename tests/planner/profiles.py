"""A made-up device profile."""

from __future__ import annotations

from pathlib import Path

from flashlm.probe.device_profile import DeviceProfile, ProductRates, ReadPoint, RowReadPoint, profile_path


def make_profile() -> DeviceProfile:
    """A machine of round numbers."""
    reads = [
        ReadPoint(
            pattern=pattern,
            backend="io_uring",
            read_bytes=size,
            queue_depth=32,
            gb_per_s=rate,
            reads_per_s=rate * 1e9 / size,
            cpu_s_per_read=5e-6,
        )
        for pattern, size, rate in (("random", 4096, 0.1), ("random", 65536, 1.0), ("sequential", 1 << 20, 2.0))
    ]
    return DeviceProfile(
        flashlm_version="0",
        date="2026-01-01",
        device="0-0",
        file_system="ext4",
        backend="io_uring",
        is_direct=True,
        write_gb_per_s=1.0,
        reads=tuple(reads),
        row_reads=tuple(
            RowReadPoint(row_bytes=size, num_rows=count, seconds=1e-3 + count * 3e-5)
            for size in (4096, 16384)
            for count in (100, 600)
        ),
        segment_s=1e-6,
        memory_read_gb_per_s=25.0,
        first_touch_gb_per_s=1.0,
        products=tuple(
            ProductRates(
                dtype=dtype,
                matrix_gb_per_s=20.0,
                block_up_gb_per_s=18.0,
                block_down_gb_per_s=11.0,
                row_up_gb_per_s=17.0,
                row_down_gb_per_s=10.0,
                expert_gb_per_s=15.0,
                predictor_gb_per_s=10.0,
                gemm_gflop_per_s=70.0,
            )
            for dtype in ("bfloat16", "float32")
        ),
        read_share=0.9,
        compute_share=0.9,
        block_overhead_s=3e-5,
        token_overhead_s=1e-3,
        matrix_overhead_s=5e-5,
        layer_overhead_s=3e-4,
        sparse_layer_overhead_s=5e-4,
        expert_layer_overhead_s=2e-4,
        expert_group_overhead_s=1e-4,
        manage_row_s=2e-8,
    )


def profile_of(folder: Path) -> Path:
    """Where the profile of a folder's device is kept in tests."""
    return profile_path(folder)
