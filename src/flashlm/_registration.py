"""Makes transformers know packs as soon as both it and flashlm are imported, in either order, without importing it here.

transformers has no plug-in list for quantizers: they register by a call after it has been imported. Importing it takes
seconds, which `flashlm --help` should not, so a finder waits for the one module that holds the registry and registers
right after it has run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_REGISTRY = "transformers.quantizers.auto"
_QUANTIZER = "flashlm.engine.quantizer"  # registers itself when it has run


class _RegisteringLoader(Loader):
    """Runs a module with its own loader, then registers."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        import_module(_QUANTIZER)


class _RegistryFinder(MetaPathFinder):
    """Finds the registry module where Python itself would, once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


def register_with_transformers() -> None:
    """Register now if transformers' registry is there, else as soon as it is imported."""
    if _REGISTRY in sys.modules:
        import_module(_QUANTIZER)
    elif not any(isinstance(finder, _RegistryFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegistryFinder())
