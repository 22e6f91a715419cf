"""The seam into transformers: a quantizer that swaps feed-forward layers before weights load, and binds them after.

`register` makes `AutoModelForCausalLM.from_pretrained(pack)` work. The budget is decided, and a model that does not fit is
refused, before a single weight is read.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Unpack

from flashlm.engine.opened import OpenedPack
from flashlm.engine.pack_check import check_pack
from flashlm.errors import ConfigError, PackError
from flashlm.pack.manifest import FORMAT_VERSION, RESIDENT_NAME, read_manifest
from flashlm.pack.pack_config import QUANT_METHOD
from flashlm.planner.settings import NAMES, Asked, Settings, make_settings
from flashlm.structure import activations
from flashlm.transformers_seam import (
    AUTO_QUANTIZER_MAPPING,
    HfQuantizer,
    QuantizationConfigMixin,
    accept_loading_attributes,
    register_quantization_config,
    register_quantizer,
)
from flashlm.transformers_seam import check as check_transformers


class FlashConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is untyped here
    """How to load a pack: holds one `Settings`, made here once from what was asked for, or handed over by `load`.

    Without either, as transformers makes it from a pack's config.json, the settings are those of the environment
    (`FLASHLM_DRAM`, `FLASHLM_MODE`, `FLASHLM_CONTEXT`, `FLASHLM_CHECK`) and defaults, made when they are first needed.

    Args:
        settings: Settings that have been made; None makes them.
        opened: The pack, where it has been opened.
        format_version: Version of the pack's format, as its config.json states it.
        quant_method: As config.json states it.
        **asked: What to make settings of: `dram`, `mode`, `context`, `pin`, `plan`, `expert_policy`, `check` and
            `activations` of `planner.settings.Asked`.

    Raises:
        ConfigError: A value that can't be read or is out of range, or an argument that is none of these.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        opened: OpenedPack | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = QUANT_METHOD,
        **asked: Unpack[Asked],
    ) -> None:
        if unknown := sorted(set(asked) - set(NAMES)):
            raise ConfigError(f"FlashConfig has no {', '.join(unknown)}: it takes {', '.join(NAMES)}")
        self.quant_method = QUANT_METHOD
        self.format_version = format_version
        self.opened = opened
        self._settings = make_settings(**asked) if settings is None and asked else settings

    @property
    def settings(self) -> Settings:
        """What the user chose."""
        if self._settings is None:
            self._settings = make_settings()
        return self._settings

    @settings.setter
    def settings(self, settings: Settings) -> None:
        self._settings = settings

    def get(self, name: str, default: Any = None) -> Any:
        """Return an entry: transformers asks so before it knows whether it has this object or config.json's entry."""
        return getattr(self, name, default)

    def get_loading_attributes(self) -> dict[str, Any]:
        """Return what `from_pretrained(quantization_config=...)` changes about a pack."""
        return {"settings": self.settings, "opened": self.opened}

    def to_dict(self) -> dict[str, Any]:
        """Return what belongs in a config.json: nothing that depends on the machine."""
        return {"quant_method": self.quant_method, "format_version": self.format_version}


class FlashQuantizer(HfQuantizer):  # type: ignore[misc]  # transformers is untyped here
    """Puts a pack's streamed layers into a model that transformers builds."""

    quantization_config: FlashConfig

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse what streamed weights can't do, and a transformers that lacks what they need."""
        check_transformers()
        if not self.pre_quantized:
            raise ConfigError("FlashConfig loads packs only: make one with `flashlm convert SOURCE PACK`")
        devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
        if not {str(device) for device in devices} <= {"None", "cpu", "auto"}:
            raise ConfigError(f"device_map={device_map!r}: flashlm computes on the CPU; leave device_map out")

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Return none: a pack's weights have the names and forms that the model wants."""
        return []

    def update_device_map(self, device_map: Any) -> None:
        """Load on the CPU whatever was asked; anything else was refused."""
        return

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from flashlm.engine.prepare import prepare  # with torch and models; this module is imported within transformers

        pack = _pack_folder(kwargs.get("checkpoint_files"))
        folder, manifest = self._checked
        if folder is None or manifest is None or folder.absolute() != pack:  # a name on the hub, or another's config
            manifest = read_manifest(pack)
        self._unbound = prepare(model, pack, manifest, self.quantization_config.settings, dtype=self._dtype)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self._unbound.bind(model)
        return model

    def update_attn_implementation(self, config: Any) -> Any:
        """Look at the pack before the model is built, and say in which file its resident weights are.

        transformers asks every quantizer for this; it is the last word before it looks for weights.

        Raises:
            PackError: The pack is damaged, or `config` is of another model.
            ConfigError: An attention implementation that would be fetched was asked for.
        """
        asked = self.quantization_config
        self._checked = check_pack(
            config, asked.opened, is_checked=asked.settings.is_checked, format_version=asked.format_version
        )
        config.transformers_weights = RESIDENT_NAME
        return config

    def update_dtype(self, dtype: Any) -> Any:
        """Remember what was asked for: a pack has the dtype that it was converted to, and another is refused."""
        self._dtype = dtype
        return dtype

    def is_serializable(self) -> bool:
        """A loaded pack is not saved again: copy the pack's folder."""
        return False

    @property
    def is_trainable(self) -> bool:
        """What a trainer asks first: streamed weights are for inference.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError("a pack is for inference and can't be trained: train the checkpoint, and convert that again")


def _pack_folder(checkpoint_files: list[str] | None) -> Path:
    if not checkpoint_files:
        raise PackError("transformers found no weights in this pack: run `flashlm verify` on it")
    return Path(checkpoint_files[0]).absolute().parent.parent


def register() -> None:
    """Make transformers know packs; this module calls it once. Calling it again does nothing."""
    activations.register()
    if QUANT_METHOD in AUTO_QUANTIZER_MAPPING:
        return
    register_quantization_config(QUANT_METHOD)(FlashConfig)
    register_quantizer(QUANT_METHOD)(FlashQuantizer)
    accept_loading_attributes(FlashConfig)
    # transformers then warns that it did just that, in words which sound as if the settings were ignored.
    warnings.filterwarnings(
        "ignore", message=r"(?s)You passed `quantization_config`.*\['settings', ", category=UserWarning
    )


register()
