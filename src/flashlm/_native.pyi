from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeVar, TypeVarTuple

from numpy import uint8
from numpy.typing import NDArray

_Args = TypeVarTuple("_Args")
_Value = TypeVar("_Value")

# --- row kernels (native/bindings_kernels.cpp): addresses of float32 x, h, y, out, bias, dst; uint32 slots; 0: none ---
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
def project_many(dtype: int, table_address: int, num_products: int, num_tokens: int) -> None: ...
def linear(
    dtype: int,
    weight_address: int,
    num_rows: int,
    hidden_size: int,
    x_address: int,
    num_tokens: int,
    out_address: int,
    bias_address: int = 0,
) -> None: ...
def accumulate_many(
    dtype: int,
    table_address: int,
    num_products: int,
    num_tokens: int = 1,
    h_stride: int = 0,
    takes_zeros: bool = False,
) -> None: ...
def lstm_gates(
    input_address: int,
    context_address: int,
    c_address: int,
    h_next_address: int,
    c_next_address: int,
    batch: int,
    size: int,
) -> None: ...
def lstm_forward(
    dtype: int,
    gates_address: int,
    c_address: int,
    activations_address: int,
    h_next_address: int,
    c_next_address: int,
    h_low_address: int,
    batch: int,
    size: int,
) -> None: ...
def lstm_backward(
    dtype: int,
    activations_address: int,
    c_address: int,
    c_next_address: int,
    grad_h_address: int,
    grad_h_next_address: int,
    grad_c_address: int,
    grad_gates_address: int,
    grad_c_before_address: int,
    batch: int,
    size: int,
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

# --- reader (native/bindings_reader.cpp); flashlm.storage.reader is its typed face ---

class AlignedBuffer:
    def __init__(self, num_bytes: int, huge_pages: bool = True) -> None: ...
    @property
    def address(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    def numpy(self) -> NDArray[uint8]: ...

class Ticket:
    def __init__(self) -> None: ...
    @property
    def is_in_flight(self) -> bool: ...
    @property
    def num_reads(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...

class Reader:
    def __init__(self, backend: str, queue_depth: int, num_threads: int, piece_bytes: int) -> None: ...
    @property
    def backend(self) -> str: ...
    @property
    def refusal(self) -> str: ...
    @property
    def bytes_read(self) -> int: ...
    @property
    def num_reads(self) -> int: ...
    def open(self, path: str, direct: bool) -> tuple[int, int]: ...
    def file_info(self, file_id: int) -> tuple[int, bool, int]: ...
    def close_file(self, file_id: int) -> None: ...
    def submit(self, ticket: Ticket, requests: list[tuple[int, int, int, AlignedBuffer, int]]) -> None: ...
    def submit_one(
        self, ticket: Ticket, file_id: int, offset: int, length: int, buffer: AlignedBuffer, buffer_offset: int
    ) -> None: ...
    def submit_rows(
        self,
        ticket: Ticket,
        file_id: int,
        row_stride: int,
        block_rows: int,
        block_stride: int,
        rows_address: int,
        slots_address: int,
        num_rows: int,
        buffer: AlignedBuffer,
        buffer_offset: int,
        scratch_offset: int,
        max_gap: int,
        max_bytes: int,
    ) -> None: ...
    def is_done(self, ticket: Ticket) -> bool: ...
    def wait(self, ticket: Ticket) -> tuple[int, str, int, int, int] | None: ...
    def close(self) -> None: ...

# --- one pass at a time (native/bindings_turn.cpp) ---

class Turn:
    def __init__(self) -> None: ...
    def take(
        self, enter: Callable[[*_Args], _Value], leave: Callable[[_Value, bool], None], *args: *_Args
    ) -> AbstractContextManager[_Value]: ...

# --- neuron cache (native/bindings_cache.cpp); flashlm.memory.neuron_cache is its typed face ---

class RowCache:
    def __init__(self, layers: list[tuple[int, int, int]], window: int) -> None: ...
    @property
    def num_layers(self) -> int: ...
    def room(self, layer: int) -> int: ...
    def occupancy(self, layer: int) -> int: ...
    def acquire(
        self, layer: int, rows_address: int, num_rows: int, slots_address: int, order_address: int, is_same_step: bool
    ) -> int: ...
    def forget(self, layer: int, rows_address: int, num_rows: int) -> None: ...

class ThreadHold:
    def __init__(
        self, omp_get_max_threads: int, omp_set_num_threads: int, mkl_set_num_threads_local: int, num_threads: int
    ) -> None: ...
    def run(self, call: Callable[[], _Value]) -> _Value: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *details: object) -> None: ...
