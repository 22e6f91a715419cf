"""The seam into transformers: a quantizer that swaps feed-forward layers before weights load, and binds them after.

`register` makes `AutoModelForCausalLM.from_pretrained(pack)` work. The budget is decided, and a model that does not fit is
refused, before a single weight is read.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from flashlm.engine.config import Settings, make_settings
from flashlm.engine.pack_check import check_pack
from flashlm.errors import ConfigError, PackError
from flashlm.pack.manifest import FORMAT_VERSION, RESIDENT_NAME
from flashlm.pack.pack_config import QUANT_METHOD
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
    """How to load a pack; what is None comes from `FLASHLM_DRAM`, `FLASHLM_MODE`, `FLASHLM_CONTEXT` or the defaults.

    Args:
        dram: Bound on the whole process, like "6GiB" or a number of bytes.
        mode: "auto", "hybrid", "sparse", "naive" or "experts".
        context: Tokens that the KV cache may hold, of all sequences and beams together.
        pin: Pin no more of the streamed rows than this ("1GiB" or bytes; 0 pins none); None: all that dram leaves.
        plan: File that `flashlm plan --save` wrote; what is None here comes from it.
        expert_policy: What the expert cache of a pack of experts keeps: "auto", "lru", "lfu" or "pinned".
        check: What is held against checksums: "load" (what is read while loading), "all" or "none".
        format_version: Version of the pack's format, as its config.json states it.

    Raises:
        ConfigError: A value that can't be read or is out of range.
    """

    def __init__(
        self,
        dram: str | int | None = None,
        mode: str | None = None,
        context: int | None = None,
        pin: str | int | None = None,
        plan: str | Path | None = None,
        expert_policy: str | None = None,
        check: str | None = None,
        format_version: int = FORMAT_VERSION,
        **unknown: Any,
    ) -> None:
        unknown.pop("quant_method", None)
        if unknown:
            raise ConfigError(
                f"FlashConfig has no {', '.join(sorted(unknown))}: it takes dram, mode, context, pin, plan,"
                " expert_policy and check"
            )
        self.quant_method = QUANT_METHOD
        self.format_version = format_version
        self.dram = dram
        self.mode = mode
        self.context = context
        self.pin = pin
        self.plan = plan
        self.expert_policy = expert_policy
        self.check = check
        self.settings()

    def settings(self) -> Settings:
        """Return the validated settings, environment variables included."""
        return make_settings(self.dram, self.mode, self.context, self.pin, self.plan, self.expert_policy, self.check)

    def get_loading_attributes(self) -> dict[str, Any]:
        """Return what `from_pretrained(quantization_config=...)` may change about a pack."""
        names = ("dram", "mode", "context", "pin", "plan", "expert_policy", "check")
        return {name: getattr(self, name) for name in names}

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
        from flashlm.engine.model import FlashModel

        pack = _pack_folder(kwargs.get("checkpoint_files"))
        self._flash = FlashModel.prepare(model, pack, self.quantization_config.settings(), dtype=self._dtype)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self._flash.bind(model)
        return model

    def update_attn_implementation(self, config: Any) -> Any:
        """Look at the pack before the model is built, and say in which file its resident weights are.

        transformers asks every quantizer for this; it is the last word before it looks for weights.

        Raises:
            PackError: The pack is damaged, or `config` is of another model.
            ConfigError: An attention implementation that would be fetched was asked for.
        """
        check_pack(config, self.quantization_config.settings().check, self.quantization_config.format_version)
        config.transformers_weights = RESIDENT_NAME
        return config

    def update_dtype(self, dtype: Any) -> Any:
        """Remember what was asked: a pack has the dtype that it was converted to, and another is refused."""
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
    warnings.filterwarnings("ignore", message=r"(?s)You passed `quantization_config`.*\['dram', ", category=UserWarning)


register()
