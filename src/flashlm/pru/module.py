"""`PRU`: the recurrent layer stack with the face of `torch.nn.LSTM`.

Three paths give one result. `grouped` is the written-out time loop on grouped matrices; `folded` builds an LSTM's
dense matrices differentiably on every call and leaves the loop to torch (oneDNN, cuDNN), at g times the recurrent
arithmetic; `native` serves inference of a few tokens on the CPU. `auto` chooses by device, sizes, batch and length.
"""

from __future__ import annotations

from typing import Literal, cast, overload

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from flashlm.errors import ConfigError
from flashlm.pru.cell import PRUCell, State, two_parts
from flashlm.pru.native_step import NativeWeights, is_served, run_native
from flashlm.pru.recurrence import run_dense, run_grouped
from flashlm.pru.shapes import Init, Split, Subsampling, check_choice, check_positive
from flashlm.rows.kernels import choose_plain_strategy

Path = Literal["auto", "grouped", "folded", "native"]
# Dense weights that a step of torch's loop makes up for folding, by the context's groups (up to as many), for batches of
# 8 and more and for smaller ones (benchmarks/results/pru_paths.json).
WEIGHTS_PER_STEP = ((1, 300_000, 20_000), (3, 110_000, 8_000), (None, 25_000, 8_000))
LARGE_BATCH = 8
NATIVE_AUTO_TOKENS = 8  # of a call; with more the grouped loop's products catch up


class PRU(nn.Module):
    """Pyramidal Recurrent Unit over sequences; a drop-in for `torch.nn.LSTM` (Mehta et al. 2018, figure 2).

    Constructor words, shapes and returns are those of `torch.nn.LSTM`. Parameters are those of one `PRUCell` per layer
    and direction, `cells[layer * num_directions + direction]`.

    Args:
        input_size: N; a layer's input must be divisible by 2^(levels - 1).
        hidden_size: M, divisible by `groups`.
        num_layers: Layers, each fed by the one below.
        bias: Whether both transforms have one.
        batch_first: Sequences are (B, T, features).
        dropout: On the outputs of each layer but the last, while training.
        bidirectional: A second set of cells runs backwards; outputs are joined.
        proj_size: Must be 0: a projected context has no agreed meaning here.
        device: Of the parameters.
        dtype: Of the parameters.
        groups: g of the grouped transform.
        levels: K of the pyramid.
        split: See `PyramidalTransform`.
        subsampling: See `PyramidalTransform`.
        residual: See `PyramidalTransform`.
        init: See `GroupedLinear`.
        weight_dropout: Share of the context's weights dropped, afresh on every call while training (AWD-LSTM).
        path: Which way to compute.

    Raises:
        ConfigError: A size or an option does not fit.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        groups: int = 4,
        levels: int = 2,
        split: Split = "code",
        subsampling: Subsampling = "average",
        residual: bool = True,
        init: Init = "code",
        weight_dropout: float = 0.0,
        path: Path = "auto",
    ) -> None:
        super().__init__()
        check_positive(input_size=input_size, hidden_size=hidden_size, num_layers=num_layers)
        check_choice("path", path, Path)
        for name, share in (("dropout", dropout), ("weight_dropout", weight_dropout)):
            if not 0.0 <= share <= 1.0:  # 1 is allowed, as in nn.LSTM
                raise ConfigError(f"{name} must be from 0 to 1, got {share}")
        if proj_size:
            raise ConfigError(f"proj_size must be 0, got {proj_size}: a PRU has no projection")
        if subsampling == "max" and path == "folded":
            raise ConfigError("subsampling='max' is not linear, so path='folded' can't serve it; take path='grouped'")
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout, self.bidirectional = bias, batch_first, dropout, bidirectional
        self.weight_dropout, self.path, self.proj_size = weight_dropout, path, 0
        self.num_directions = 2 if bidirectional else 1
        self.cells = nn.ModuleList(
            PRUCell(
                input_size if layer == 0 else hidden_size * self.num_directions,
                hidden_size,
                bias,
                device,
                dtype,
                groups=groups,
                levels=levels,
                split=split,
                subsampling=subsampling,
                residual=residual,
                init=init,
            )
            for layer in range(num_layers)
            for _ in range(self.num_directions)
        )
        self._native: dict[int, NativeWeights | None] = {}

    @overload
    def forward(self, input: torch.Tensor, hx: State | None = None) -> tuple[torch.Tensor, State]: ...

    @overload
    def forward(self, input: PackedSequence, hx: State | None = None) -> tuple[PackedSequence, State]: ...

    def forward(
        self, input: torch.Tensor | PackedSequence, hx: State | None = None
    ) -> tuple[torch.Tensor | PackedSequence, State]:
        """Run over sequences.

        Args:
            input: (T, B, input_size), (B, T, input_size) with `batch_first`, (T, input_size) unbatched, or packed.
            hx: h and c, each (num_layers * num_directions, B, hidden_size), without B where unbatched; None: zeros.

        Returns:
            Outputs (T, B, num_directions * hidden_size), arranged like `input`, and the last (h, c), shaped like `hx`.

        Raises:
            ConfigError: A shape does not fit, or the input's dtype is not the weights' (outside autocast).
        """
        self._check_dtype(input.data if isinstance(input, PackedSequence) else input)
        if isinstance(input, PackedSequence):
            return self._run_packed(input, hx)
        if input.dim() not in (2, 3) or input.shape[-1] != self.input_size:
            raise ConfigError(f"input must be 2-D or 3-D with {self.input_size} features, got {tuple(input.shape)}")
        is_batched = input.dim() == 3
        x = input if is_batched else input.unsqueeze(1)
        if is_batched and self.batch_first:
            x = x.transpose(0, 1)
        if x.shape[0] == 0:
            raise ConfigError("input has no steps: a sequence must have at least one")
        if hx is not None and not is_batched:
            h0, c0 = two_parts(hx)
            hx = (_with_batch(h0), _with_batch(c0))
        outputs, (h, c) = self._run(x, self._checked_state(x, hx), None)
        if not is_batched:
            return outputs.squeeze(1), (h.squeeze(1), c.squeeze(1))
        return (outputs.transpose(0, 1) if self.batch_first else outputs), (h, c)

    def reset_parameters(self) -> None:
        """Initialise all weights anew, as at the start; after `to_empty` of a model made on the meta device too."""
        for cell in self._cells():
            cell.reset_parameters()

    @property
    def all_weights(self) -> list[list[nn.Parameter]]:
        """The parameters of each layer and direction, in the order of `cells`."""
        return [list(cell.parameters()) for cell in self._cells()]

    def forward_masked(self, x: torch.Tensor, hx: State | None, mask: torch.Tensor) -> tuple[torch.Tensor, State]:
        """Run over padded sequences, whose state passes unchanged over what is no token; outputs there repeat the last.

        Args:
            x: (T, B, input_size), whatever `batch_first` says.
            hx: As `forward` takes it.
            mask: bool (T, B), False where a sequence has no token: before, after or among its own.

        Returns:
            Outputs (T, B, num_directions * hidden_size), and the last (h, c), shaped like `hx`.

        Raises:
            ConfigError: A shape or dtype does not fit.
        """
        self._check_dtype(x)
        if x.dim() != 3 or x.shape[-1] != self.input_size or mask.shape != x.shape[:2] or mask.dtype != torch.bool:
            raise ConfigError(
                f"input must be (T, B, {self.input_size}) and mask bool (T, B), got {tuple(x.shape)} and {mask.dtype}"
                f" {tuple(mask.shape)}"
            )
        return self._run(x, self._checked_state(x, hx), mask)

    def to_lstm(self) -> nn.LSTM:
        """Return a `torch.nn.LSTM` that computes the same, with dense matrices of its own.

        Raises:
            ConfigError: Sub-sampling is `max`.
        """
        parameter = next(self.parameters())
        lstm = nn.LSTM(
            self.input_size,
            self.hidden_size,
            self.num_layers,
            self.bias,
            self.batch_first,
            self.dropout,
            self.bidirectional,
            device=parameter.device,
            dtype=parameter.dtype,
        )
        with torch.no_grad():
            for position, cell in enumerate(self._cells()):
                layer, direction = divmod(position, self.num_directions)
                suffix = f"_l{layer}" + ("_reverse" if direction else "")
                names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
                for name, value in zip(names, cell.folded_weights(), strict=False):
                    cast(nn.Parameter, getattr(lstm, name + suffix)).copy_(value)
        lstm.train(self.training)
        return lstm

    def flatten_parameters(self) -> None:
        """Do nothing; here because code written for `torch.nn.LSTM` calls it."""

    def extra_repr(self) -> str:
        """Return what `repr` shows."""
        options = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False}
        words = [f"{name}={getattr(self, name)}" for name, usual in options.items() if getattr(self, name) != usual]
        return ", ".join([str(self.input_size), str(self.hidden_size), *words, f"path={self.path}"])

    def _cells(self) -> list[PRUCell]:
        return cast(list[PRUCell], list(self.cells))

    def _check_dtype(self, x: torch.Tensor) -> None:
        dtype = self._cells()[0].context_transform.weight.dtype
        if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
            raise ConfigError(f"input is {x.dtype} and the weights are {dtype}: convert one with .to(...)")

    def _checked_state(self, x: torch.Tensor, hx: State | None) -> State:
        expected = (self.num_layers * self.num_directions, x.shape[1], self.hidden_size)
        if hx is None:
            zeros = x.new_zeros(expected)
            return zeros, zeros
        h, c = two_parts(hx)
        if h.shape != expected or c.shape != expected:
            raise ConfigError(f"hx must be two tensors of shape {expected}, got {tuple(h.shape)} and {tuple(c.shape)}")
        return h, c

    def _run_packed(self, packed: PackedSequence, hx: State | None) -> tuple[PackedSequence, State]:
        if packed.data.shape[-1] != self.input_size:
            raise ConfigError(f"input must have {self.input_size} features, got {tuple(packed.data.shape)}")
        x, lengths = pad_packed_sequence(packed)  # in the caller's order of sequences, like hx
        mask = torch.arange(x.shape[0]).unsqueeze(1) < lengths
        outputs, state = self._run(x, self._checked_state(x, hx), mask.to(x.device))
        order = packed.sorted_indices
        if order is not None:
            outputs, lengths = outputs[:, order], lengths[order.cpu()]
        data = pack_padded_sequence(outputs, lengths)
        return PackedSequence(data.data, packed.batch_sizes, order, packed.unsorted_indices), state

    def _run(self, x: torch.Tensor, hx: State, mask: torch.Tensor | None) -> tuple[torch.Tensor, State]:
        last_h, last_c = [], []
        for layer in range(self.num_layers):
            if layer:
                x = F.dropout(x, self.dropout, self.training)
            outputs = []
            for direction in range(self.num_directions):
                position = layer * self.num_directions + direction
                y, h, c = self._run_cell(position, x, (hx[0][position], hx[1][position]), mask, direction == 1)
                outputs.append(y)
                last_h.append(h)
                last_c.append(c)
            x = outputs[0] if self.num_directions == 1 else torch.cat(outputs, dim=-1)
        return x, (torch.stack(last_h), torch.stack(last_c))

    def _run_cell(
        self, position: int, x: torch.Tensor, state: State, mask: torch.Tensor | None, is_backward: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        cell = self._cells()[position]
        if is_backward:  # padding comes first then, and leaves the state as it was
            x, mask = x.flip(0), None if mask is None else mask.flip(0)
        is_autocast = torch.is_autocast_enabled(x.device.type)
        if is_autocast and emulates_16_bits(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                wide = cell.context_transform.weight.dtype
                y, h, c = self._run_path(position, x.to(wide), (state[0].to(wide), state[1].to(wide)), mask)
        else:
            y, h, c = self._run_path(position, x, state, mask)
        if not is_autocast:  # under autocast the state stays as wide as it came out
            y, h, c = y.to(x.dtype), h.to(state[0].dtype), c.to(state[1].dtype)
        return (y.flip(0) if is_backward else y), h, c

    def _run_path(
        self, position: int, x: torch.Tensor, state: State, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        cell = self._cells()[position]
        path = self._path(cell, x, mask)
        if path == "native":
            tables = self._native[position] = NativeWeights.of(cell, self._native.get(position))
            if tables is not None:
                return run_native(cell, tables, x, state)
            if self.path == "native":
                raise ConfigError(
                    "path='native' serves plain contiguous CPU weights in fp32, bf16 or fp16, all of one dtype; take"
                    " path='auto'"
                )
        if path == "folded":
            weights = cell.folded_weights(self.weight_dropout)
            if torch.is_autocast_enabled("cpu") and x.device.type == "cpu":
                return run_dense(x, weights, *state)  # oneDNN's keeps the cell state in 16 bits
            hx = (state[0].unsqueeze(0).contiguous(), state[1].unsqueeze(0).contiguous())
            y, h, c = torch.lstm(x.contiguous(), hx, weights, self.bias, 1, 0.0, self.training, False, False)
            return y, h.squeeze(0), c.squeeze(0)
        return run_grouped(cell.input_gates(x), cell.context_weight(self.weight_dropout), *state, mask)

    def _path(self, cell: PRUCell, x: torch.Tensor, mask: torch.Tensor | None) -> str:
        is_compiling = torch.compiler.is_compiling()
        if mask is not None:
            return "grouped"  # torch's packed LSTM is slower than masking
        if self.path == "native":
            if not is_served(*x.shape[:2]):
                raise ConfigError(
                    "path='native' serves inference under torch.no_grad() on the CPU, at most 8 sequences and 16 tokens"
                    f" a call; got {x.shape[0]} steps of {x.shape[1]} sequences: take path='auto'"
                )
            return "native"
        if self.path != "auto":
            return self.path
        is_foldable = cell.input_transform.subsampling != "max"
        if is_foldable and (x.device.type == "cuda" or (not is_compiling and folding_pays(cell, x))):
            return "folded"
        is_short = x.shape[0] * x.shape[1] <= NATIVE_AUTO_TOKENS
        return "native" if is_short and not is_compiling and is_served(*x.shape[:2]) else "grouped"

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_native": {}}  # copies make their own


def folding_pays(cell: PRUCell, x: torch.Tensor) -> bool:
    """Return whether `folded` is faster than `grouped` on the CPU for x (T, B, N) (benchmarks/pru_paths.py).

    Folding costs as much as the dense matrices are large, once a call; what torch's loop saves comes with every step.
    """
    is_fp32 = x.dtype == cell.context_transform.weight.dtype == torch.float32
    if x.device.type != "cpu" or not is_fp32 or torch.is_autocast_enabled("cpu") or not x.shape[1]:
        return False  # under autocast `folded` is the grouped loop with more arithmetic; 16-bit weights: not measured
    groups = cell.context_transform.groups
    large, small = next((large, small) for most, large, small in WEIGHTS_PER_STEP if most is None or groups <= most)
    num_weights = 4 * cell.hidden_size * (cell.input_size + cell.hidden_size)
    return num_weights <= (x.shape[0] - 1) * (large if x.shape[1] >= LARGE_BATCH else small)


def emulates_16_bits(device_type: str) -> bool:
    """Whether autocast's products would be emulated: far slower than fp32 (docs/experiments.md)."""
    return device_type == "cpu" and not _is_multiplied(torch.get_autocast_dtype("cpu"))


# torch.compile can't look into the processor's flags
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_multiplied(dtype: torch.dtype) -> bool:
    return choose_plain_strategy(dtype) == "native"


def _with_batch(state: torch.Tensor) -> torch.Tensor:
    if state.dim() != 2:
        raise ConfigError(f"hx of an unbatched input must be 2-D, got {tuple(state.shape)}")
    return state.unsqueeze(1)
