"""Makes transformers know packs and `pru` models as soon as it and flashlm are imported, in either order.

transformers has no plug-in list: quantizers, configurations and models register by a call after it has been imported.
Importing it takes seconds, which `flashlm --help` should not, so finders wait for the modules that hold its registries
and register right after each has run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

# transformers' module with a registry, or peft's with what adds adapters → ours, which registers itself when it has run
_REGISTRARS = {
    "transformers.quantizers.auto": "flashlm.engine.quantizer",
    "transformers.models.auto.configuration_auto": "flashlm.pru.config",
    "transformers.models.auto.modeling_auto": "flashlm.pru.language_model",
    "peft.tuners.tuners_utils": "flashlm.engine.peft_seam",
}


class _RegisteringLoader(Loader):
    """Runs a module with its own loader, then registers."""

    def __init__(self, loader: Loader, registrar: str) -> None:
        self._loader, self._registrar = loader, registrar

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        import_module(self._registrar)


class _RegistryFinder(MetaPathFinder):
    """Finds a registry module where Python itself would, once."""

    def __init__(self, registry: str) -> None:
        self.registry = registry

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.registry:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader, _REGISTRARS[fullname])
        return spec


def register_with_transformers() -> None:
    """Register now where transformers' registries are there, else as soon as they are imported."""
    waiting = {finder.registry for finder in sys.meta_path if isinstance(finder, _RegistryFinder)}
    for registry, registrar in _REGISTRARS.items():
        if registry in sys.modules:
            import_module(registrar)
        elif registry not in waiting:
            sys.meta_path.insert(0, _RegistryFinder(registry))
