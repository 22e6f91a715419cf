"""Stand-ins for what is on flash: weights that can be counted and named, and that refuse by name to be read or changed.

Programs find a model's weights by walking modules and parameters. A streamed layer shows them the linear layers that its
family has, under their own names, each with a `StreamedWeight`: right in shape and dtype, so that sums over parameters are
right, and without a byte behind it. Whatever would use its values gets a `ConfigError` that says so, not wrong numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import nn

from flashlm.errors import ConfigError
from flashlm.transformers_seam import Conv1D

# What a tensor tells without its values. Older or newer versions of torch may lack some of it.
_READABLE = (
    *(
        "shape",
        "dtype",
        "device",
        "ndim",
        "layout",
        "requires_grad",
        "grad",
        "grad_fn",
        "is_leaf",
        "itemsize",
        "nbytes",
    ),
    *(
        "is_cpu",
        "is_cuda",
        "is_meta",
        "is_mps",
        "is_xpu",
        "is_sparse",
        "is_quantized",
        "is_nested",
        "is_mkldnn",
        "names",
    ),
)
_CALLABLE = (
    *("size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "get_device", "__len__", "__hash__"),
    *("is_floating_point", "is_complex", "is_contiguous", "has_names", "is_inference", "is_shared"),
)
_ALLOWED = frozenset(
    [getattr(torch.Tensor, name).__get__ for name in _READABLE if hasattr(torch.Tensor, name)]
    + [getattr(torch.Tensor, name) for name in _CALLABLE if hasattr(torch.Tensor, name)]
    + [torch.is_floating_point, torch.is_complex, torch.numel]
)
_CPU = torch.device("cpu")
_REQUIRES_GRAD: Any = torch.Tensor.requires_grad.__set__  # type: ignore[attr-defined]
_GRAD: Any = torch.Tensor.grad.__set__  # type: ignore[union-attr]
_SAME = frozenset([torch.Tensor.detach, torch.detach])


class StreamedWeight(torch.Tensor):
    """A weight that is on flash: name, shape and dtype, no values. It counts as an `nn.Parameter`.

    Args:
        name: Where it is in the model, for messages.
        shape: Its shape in the checkpoint.
        dtype: Its element type in the pack.
    """

    flash_name: str

    @staticmethod
    def __new__(cls, name: str, shape: Sequence[int], dtype: torch.dtype) -> StreamedWeight:
        """Make one."""
        made: StreamedWeight = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=_CPU)
        made.flash_name = name
        made._is_param = True  # what nn.Parameter's own instance check asks for
        made._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers must not fill it
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer what needs no values, refuse the rest."""
        kwargs = kwargs or {}
        first = args[0] if args else None
        if func in _ALLOWED:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if isinstance(first, StreamedWeight):
            if func in _SAME:
                return first
            if func in (_REQUIRES_GRAD, torch.Tensor.requires_grad_):
                if (len(args) > 1 and not args[1]) or kwargs.get("requires_grad") is False:
                    return first
                refuse(first.flash_name, "can't be trained", "a pack is for inference")
            if func == _GRAD and args[1] is None:
                return None
            if func is torch.Tensor.copy_ and args[1] is first:  # a model's own state dict, loaded again
                return first
        called = str(torch.overrides.resolve_name(func) or func).removesuffix(".__get__").removesuffix(".__set__")
        refuse(_name_of(args, kwargs), f"can't be used by {called}")

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        """Refuse what comes from below Python's functions."""
        refuse(_name_of(args, kwargs or {}), f"can't be used by {func}")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"StreamedWeight({self.flash_name}, {tuple(self.shape)}, {self.dtype})"

    def __format__(self, spec: str) -> str:
        return repr(self)

    def __deepcopy__(self, memo: Any) -> NoReturn:
        refuse(self.flash_name, "can't be copied")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse(self.flash_name, "can't be saved")


def refuse(name: str, what: str, why: str = "its values are on flash") -> NoReturn:
    """Raise the error of a streamed weight.

    Raises:
        ConfigError: Always.
    """
    raise ConfigError(
        f"{name} is streamed and {what}: {why}. Work on the checkpoint that the pack was made from, and convert it again"
    )


def _name_of(args: Any, kwargs: dict[str, Any]) -> str:
    waiting = [*args, *kwargs.values()]
    while waiting:
        value = waiting.pop(0)
        if isinstance(value, StreamedWeight):
            return value.flash_name
        if isinstance(value, list | tuple):
            waiting += value
    return "a weight"


class Unhookable(nn.Module):
    """A module whose hooks would not see what its name promises."""

    flash_name: str

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: the hook would never be called, or with something else.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            f"{self.flash_name} is streamed and never runs by itself, so a hook on it would not see its values:"
            " hook the module around it"
        )

    register_forward_pre_hook = register_forward_hook
    register_full_backward_hook = register_forward_hook
    register_full_backward_pre_hook = register_forward_hook
    register_backward_hook = register_forward_hook


class StreamedActivation(Unhookable, nn.Identity):
    """Stands for an activation whose work a streamed layer has done, and hands its input on."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.flash_name = name


class _Placeholder(Unhookable):
    """What linear stand-ins share."""

    passes_through: bool
    has_bias: bool
    out_features: int

    def _set_up(self, name: str, shape: Sequence[int], dtype: torch.dtype, *, has_bias: bool) -> None:
        self.flash_name = name
        self.passes_through = False
        self.has_bias = has_bias
        self._is_hf_initialized = True
        self.register_parameter("weight", StreamedWeight(f"{name}.weight", shape, dtype))  # type: ignore[arg-type]
        self.register_parameter("bias", None)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias"):
            refuse(f"{self.flash_name}.{name}", "can't be replaced")
        super().__setattr__(name, value)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Hand the input on where the layer around it has done the work; else refuse.

        Raises:
            ConfigError: It was called by itself.
        """
        hidden_states: torch.Tensor = args[0]
        if not self.passes_through or hidden_states.shape[-1] != self.out_features:
            raise ConfigError(
                f"{self.flash_name} is streamed and never runs by itself: call the feed-forward layer that it belongs to"
            )
        return hidden_states

    def _apply(self, fn: Any, recurse: bool = True) -> _Placeholder:
        return self  # the layer around it has checked `fn`


class StreamedLinear(_Placeholder, nn.Linear):
    """Stands for an `nn.Linear` (out_features, in_features) whose weight is on flash."""

    def __init__(self, name: str, in_features: int, out_features: int, dtype: torch.dtype, *, has_bias: bool) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self._set_up(name, (out_features, in_features), dtype, has_bias=has_bias)

    def extra_repr(self) -> str:
        """Show its shape in `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.has_bias}"


class StreamedConv1D(_Placeholder, Conv1D):  # type: ignore[misc]  # transformers is untyped here
    """Stands for GPT-2's `Conv1D` (in_features, out_features) whose weight is on flash."""

    def __init__(self, name: str, in_features: int, out_features: int, dtype: torch.dtype, *, has_bias: bool) -> None:
        nn.Module.__init__(self)
        self.nx = in_features
        self.nf = self.out_features = out_features
        self._set_up(name, (in_features, out_features), dtype, has_bias=has_bias)

    def __repr__(self) -> str:
        return f"StreamedConv1D(nf={self.nf}, nx={self.nx})"
