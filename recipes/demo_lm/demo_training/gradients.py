"""One gradient: forward and backward of a batch, split over threads by windows.

Each thread runs its share with single-threaded operators, and the gradients meet once per step. The usual split, of every
operator over all cores, ends each of hundreds of operators in a barrier; on a machine shared with other processes it waits
there for whichever core they hold (measured: 5.3 CPU-seconds per step against 3.2).
"""

from __future__ import annotations

import ctypes
import math
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from transformers import OPTForCausalLM

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
"""Of glibc's malloc.h."""


def keep_freed_memory() -> None:
    """Ask the C library not to return freed memory to the kernel, where it is glibc.

    Activations are freed and allocated anew every step; by default they come as fresh pages, and their faults took up to
    half of a step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_ARENA_MAX, 1)


def has_fast_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices natively; others emulate it, far below their float32 rate."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def make_threads(num_threads: int) -> ThreadPoolExecutor:
    """Start threads whose torch operators stay on their own thread."""
    return ThreadPoolExecutor(num_threads, initializer=lambda: torch.set_num_threads(1))


class Gradients:
    """Puts the gradient of a batch's mean loss into `.grad`, from equal shares on `num_threads` threads."""

    def __init__(self, model: OPTForCausalLM, threads: ThreadPoolExecutor, num_threads: int, *, bf16: bool) -> None:
        self._model = model
        self._params = list(model.parameters())
        self._threads = threads
        self._num_threads = num_threads
        self._bf16 = bf16

    def compute(self, inputs_bt: torch.Tensor, targets_bt: torch.Tensor) -> float:
        """Set `.grad` of all parameters and return the mean loss, in nats per token.

        `inputs_bt` and `targets_bt` are int64 [windows, tokens]; the threads divide the windows. Shares are summed in
        their order, so the same step gives the same bits.
        """
        shares = zip(inputs_bt.chunk(self._num_threads), targets_bt.chunk(self._num_threads), strict=True)
        jobs = [self._threads.submit(self._share, *share, targets_bt.numel()) for share in shares]
        losses, grads_of_shares = zip(*(job.result() for job in jobs), strict=True)
        for param, *grads in zip(self._params, *grads_of_shares, strict=True):
            param.grad = grads[0]
            for grad in grads[1:]:
                param.grad += grad
        return math.fsum(losses)

    def _share(
        self, inputs_bt: torch.Tensor, targets_bt: torch.Tensor, num_tokens: int
    ) -> tuple[float, tuple[torch.Tensor, ...]]:
        with torch.autocast("cpu", torch.bfloat16, enabled=self._bf16):
            logits_btv = self._model(input_ids=inputs_bt, use_cache=False).logits
        losses = F.cross_entropy(logits_btv.flatten(0, 1).float(), targets_bt.flatten(), reduction="sum")
        loss = losses / num_tokens
        return loss.item(), torch.autograd.grad(loss, self._params)
