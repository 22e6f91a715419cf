"""Device and processes of a run, through accelerate: one process alone, or several under `torchrun`."""

from __future__ import annotations

import atexit

import torch
from accelerate import PartialState
from accelerate.utils import reduce

from flashlm.errors import ConfigError


class Processes:
    """The processes that train together, each on its columns of the batch.

    Args:
        device: `auto` (CUDA where there is one), `cpu`, `cuda`.

    Attributes:
        device: Of this process.
        rank: Of this process, from 0.
        count: How many there are.

    Raises:
        ConfigError: The device is not there.
    """

    def __init__(self, device: str = "auto") -> None:
        if device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"device must be one of auto, cpu, cuda, got {device!r}")
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device='cuda', but torch sees no CUDA device; take --device cpu")
        self._state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
        self.device: torch.device = self._state.device
        self.rank: int = self._state.process_index
        self.count: int = self._state.num_processes
        if self.count > 1:  # gloo's threads, still running at exit, now and then abort the process
            atexit.register(self._state.destroy_process_group)

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until all processes are here."""
        self._state.wait_for_everyone()

    def mean(self, tensors: list[torch.Tensor]) -> None:
        """Set each tensor to its mean over the processes, in one transfer."""
        if self.count == 1 or not tensors:
            return
        flat: torch.Tensor = reduce(torch.cat([tensor.flatten() for tensor in tensors]), "mean")
        for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process."""
        if self.count == 1:
            return flag
        return bool(reduce(torch.tensor(float(flag), device=self.device), "sum").item())

    def columns_of(self, rows: torch.Tensor) -> torch.Tensor:
        """Return this process's columns of (rows, batch), on its device.

        Raises:
            ConfigError: The columns can't be shared out equally.
        """
        if rows.shape[1] % self.count:
            raise ConfigError(f"batch_size={rows.shape[1]} must be divisible by the {self.count} processes")
        return rows[:, self.rank :: self.count].contiguous().to(self.device)
