"""Makes transformers know packs and `pru` models as soon as it and flashlm are imported, in either order.

transformers has no plug-in list: quantizers, configurations and models register by a call after it has been imported.
Importing it takes seconds, which `flashlm --help` should not, so finders wait for the modules that hold its registries
and register right after each has run. An installed flashlm does this in every interpreter (autoload/waiter.py, which
Python runs at its start and which imports this package only once transformers is imported).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# transformers' module with a registry, or peft's with what adds adapters → ours, which registers itself when it has run
_REGISTRARS = {
    "transformers.quantizers.auto": "flashlm.engine.quantizer",
    "transformers.models.auto.configuration_auto": "flashlm.pru.config",
    "transformers.models.auto.modeling_auto": "flashlm.pru.language_model",
    "peft.tuners.tuners_utils": "flashlm.engine.peft_seam",
}

logger = logging.getLogger(__name__)


class _RegisteringLoader(Loader):
    """Runs a module with its own loader, then registers."""

    def __init__(self, loader: Loader, registrar: str, *, is_quiet: bool) -> None:
        self._loader, self._registrar, self._is_quiet = loader, registrar, is_quiet

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        try:
            import_module(self._registrar)
        except Exception as error:
            if not self._is_quiet:
                raise
            logger.debug("flashlm is installed but can't be used here: %s", error)


class _RegistryFinder(MetaPathFinder):
    """Finds a registry module where the other finders do, once.

    Args:
        registry: Its name.
        is_quiet: Whether nobody asked for flashlm: then what goes wrong with it is no error of the program.
    """

    def __init__(self, registry: str, *, is_quiet: bool) -> None:
        self.registry = registry
        self._is_quiet = is_quiet

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.registry:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None:
            return None
        sys.meta_path.remove(self)
        if spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader, _REGISTRARS[fullname], is_quiet=self._is_quiet)
        return spec


def register_with_transformers() -> None:
    """Register now where transformers' registries are there, else as soon as they are imported."""
    is_quiet = any(getattr(finder, "flashlm_is_waking", False) for finder in sys.meta_path)
    waiting = {finder.registry for finder in sys.meta_path if isinstance(finder, _RegistryFinder)}
    for registry, registrar in _REGISTRARS.items():
        if registry in sys.modules:
            import_module(registrar)
        elif registry not in waiting:
            sys.meta_path.insert(0, _RegistryFinder(registry, is_quiet=is_quiet))
