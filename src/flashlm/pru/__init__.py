"""The Pyramidal Recurrent Unit (Mehta et al., EMNLP 2018): the module and a language model. Stands beside the engine.

Nothing is imported before it is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashlm.pru.cell import PRUCell
    from flashlm.pru.config import PRUConfig
    from flashlm.pru.grouped import GroupedLinear
    from flashlm.pru.language_model import PRUForCausalLM
    from flashlm.pru.module import PRU
    from flashlm.pru.onnx_export import export_onnx
    from flashlm.pru.pyramid import PyramidalTransform

__all__ = ["PRU", "GroupedLinear", "PRUCell", "PRUConfig", "PRUForCausalLM", "PyramidalTransform", "export_onnx"]

_LAZY = {
    "PRU": "flashlm.pru.module",
    "GroupedLinear": "flashlm.pru.grouped",
    "PRUConfig": "flashlm.pru.config",
    "PRUForCausalLM": "flashlm.pru.language_model",
    "PRUCell": "flashlm.pru.cell",
    "PyramidalTransform": "flashlm.pru.pyramid",
    "export_onnx": "flashlm.pru.onnx_export",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'flashlm.pru' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return __all__
