# --- row kernels: native/bindings_kernels.cpp; addresses of float32 x, h, y, out, bias, dst and uint32 slots (0: none) ---
# dtype of the rows: 0 bfloat16, 1 float16, 2 float32. ValueError where a number is out of range.

MAX_TOKENS: int

def project(
    dtype: int,
    block_address: int,
    num_rows: int,
    row_stride_bytes: int,
    part_offset_bytes: int,
    hidden_size: int,
    x_address: int,
    num_tokens: int,
    out_address: int,
    out_stride: int,
    bias_address: int = 0,
    slots_address: int = 0,
) -> None: ...
def accumulate(
    dtype: int,
    block_address: int,
    num_rows: int,
    row_stride_bytes: int,
    part_offset_bytes: int,
    hidden_size: int,
    h_address: int,
    h_stride: int,
    num_tokens: int,
    y_address: int,
    slots_address: int = 0,
) -> None: ...
def widen(
    dtype: int,
    block_address: int,
    num_rows: int,
    row_stride_bytes: int,
    part_offset_bytes: int,
    hidden_size: int,
    dst_address: int,
    slots_address: int = 0,
) -> None: ...
def simd_level() -> str: ...
def simd_levels() -> list[str]: ...
def set_simd_level(name: str | None) -> None: ...
def num_threads() -> int: ...
def set_num_threads(num_threads: int) -> None: ...
