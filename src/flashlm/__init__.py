"""flashlm: run transformers language models that are larger than memory, exactly, from flash.

    import flashlm
    model = flashlm.load("my-pack", dram="6GiB")

After `import flashlm`, `transformers.AutoModelForCausalLM.from_pretrained("my-pack")` works too. Importing flashlm costs
next to nothing: torch and transformers are imported when something needs them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flashlm._registration import register_with_transformers
from flashlm._version import __version__
from flashlm.errors import (
    BudgetError,
    ConfigError,
    FlashError,
    PackError,
    StorageError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from flashlm.conversion.convert import convert
    from flashlm.conversion.verify import verify
    from flashlm.engine.load import load
    from flashlm.engine.quantizer import FlashConfig
    from flashlm.engine.runtime import FlashRuntime
    from flashlm.engine.session import Session, Step

__all__ = [
    "BudgetError",
    "ConfigError",
    "FlashConfig",
    "FlashError",
    "FlashRuntime",
    "PackError",
    "Session",
    "Step",
    "StorageError",
    "UnsupportedModelError",
    "__version__",
    "convert",
    "load",
    "verify",
]

_LAZY = {
    "FlashConfig": "flashlm.engine.quantizer",
    "FlashRuntime": "flashlm.engine.runtime",
    "Session": "flashlm.engine.session",
    "Step": "flashlm.engine.session",
    "convert": "flashlm.conversion.convert",
    "load": "flashlm.engine.load",
    "verify": "flashlm.conversion.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'flashlm' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return __all__


register_with_transformers()
