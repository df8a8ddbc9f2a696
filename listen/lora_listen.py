"""A PEFT LoRA on the frozen LLM: attach, merge, save and load it.

PEFT is imported by name: an import would make transformers ask everybody for it who loads a model from the Hub.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedConfig

from .checkpoint_listen import FrozenBackbonesMixin
from .weights_listen import weight_files

# LoRA fields that the config always holds, fields that do not affect a trained adapter, fields that train the LLM
_LORA_FIELDS = ("r", "lora_alpha", "lora_dropout", "target_modules", "bias", "use_rslora")
_LORA_ORIGIN = ("task_type", "base_model_name_or_path", "revision", "auto_mapping", "peft_version")
_WITHOUT_EFFECT = (*_LORA_ORIGIN, "inference_mode", "init_lora_weights")
_BEYOND_LORA = ("modules_to_save", "trainable_token_indices")
ADAPTERS_OF_THREAD: ContextVar[Mapping["ThreadAdapter", str | None]] = ContextVar(
    "of_thread", default=MappingProxyType({})
)


class ThreadAdapter:
    """The active adapter of a model in the current thread, or coroutine, where it is not the one of all threads.

    It is true where that is none: a LoRA layer that asks for its truth is then disabled.

    Attributes:
        used: Whether a thread ever had its own; else the context variable, which `torch.compile` cannot read, is left
            alone.
    """

    used = False

    def __bool__(self) -> bool:
        return ADAPTERS_OF_THREAD.get().get(self, "") is None

    def rename(self, name: str | None) -> bool:
        """Set the adapter of this thread, if it has its own."""
        own = self in ADAPTERS_OF_THREAD.get()
        if own:
            ADAPTERS_OF_THREAD.set({**ADAPTERS_OF_THREAD.get(), self: name})
        return own

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within it this thread has no adapter."""
        self.used = True
        token = ADAPTERS_OF_THREAD.set({**ADAPTERS_OF_THREAD.get(), self: None})
        try:
            yield
        finally:
            ADAPTERS_OF_THREAD.reset(token)


class LoraMixin(FrozenBackbonesMixin):
    """One LoRA on the LLM, which is part of every checkpoint."""

    def _load_further(self, source: str, weights: dict[str, Any]) -> None:
        if self.config.lora_config:
            self._attach_lora(self.config.lora_config)
            self._load_lora(source, weights)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Add the LoRA to the LLM's weights, so that it costs no time; `unmerge_adapter` takes it out again.

        A checkpoint that holds everything (`save_full=True`) then has no LoRA any more. One that names its backbones
        holds the LoRA as before.

        Args:
            adapter_names: As in PEFT; all active ones by default.
            safe_merge: Whether to check that the merged weights are finite.

        Raises:
            ValueError: the LLM has no LoRA.
        """
        for layer in self._lora_layers(required=True):
            layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def unmerge_adapter(self) -> None:
        """Take a merged LoRA out of the LLM's weights, which are then what they were but for rounding.

        Raises:
            ValueError: the LLM has no LoRA.
        """
        for layer in self._lora_layers(required=True):
            if layer.merged:
                layer.unmerge()

    def _lora_layers(self, required: bool = False) -> list[Any]:
        """The LLM's layers that have a LoRA."""
        if not getattr(self.language_model, "_hf_peft_config_loaded", False):
            if required:
                raise ValueError("the LLM has no LoRA to merge; add one with add_adapter(LoraConfig(...))")
            return []
        layer = import_module("peft.tuners.lora").LoraLayer
        return [module for module in self.language_model.modules() if isinstance(module, layer)]

    def _holds_lora(self, name: str) -> bool:
        return bool(self.config.lora_config) and name.startswith("language_model.")

    def _whole_state(self, state_dict: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor] | None:
        """As the weights of a plain LLM, with those of the LoRA beside them unless it is merged."""
        state, merged = super()._whole_state(state_dict), {layer.merged for layer in self._lora_layers()}
        if not merged:
            return state
        if len(merged) > 1:
            raise ValueError("the LoRA is merged in some layers only; call merge_adapter() or unmerge_adapter()")
        if merged == {True}:
            self.config.lora_config = None  # `save_pretrained` restores it
        state = self.state_dict() if state is None else state
        return {_plain_name(key): value for key, value in state.items() if merged == {False} or "lora_" not in key}

    def _write_backbone(self, name: str, folder: str) -> None:
        layers = self._lora_layers() if name == "language_model" else []
        if not layers:
            return super()._write_backbone(name, folder)
        if any(layer.merged for layer in layers):
            raise ValueError("the LLM was changed and its LoRA is merged; call unmerge_adapter() before saving")
        state = {_plain_name(key): value for key, value in self.language_model.state_dict().items()}
        self.language_model._hf_peft_config_loaded = False  # it would save the LoRA alone
        try:
            plain = {key: value for key, value in state.items() if "lora_" not in key}
            self.language_model.save_pretrained(folder, state_dict=plain)
        finally:
            self.language_model._hf_peft_config_loaded = True
        return None

    def _attach_lora(self, lora_config: Any, adapter_name: str = "default") -> None:
        if isinstance(lora_config, dict):
            lora_config = import_module("peft").LoraConfig(**lora_config)
        _check_lora(lora_config, adapter_name)
        self.language_model.add_adapter(lora_config)
        self._carry_lora(lora_config)

    def _load_peft(self, source: str, adapter_name: str, hub: dict[str, Any], **kwargs: Any) -> Any:
        lora_config = import_module("peft").PeftConfig.from_pretrained(source, **hub)
        _check_lora(lora_config, adapter_name)
        loaded = self.language_model.load_adapter(source, **kwargs)
        self._carry_lora(lora_config)
        return loaded

    def _carry_lora(self, lora_config: Any) -> None:
        """Record the LLM's LoRA in the config and in checkpoints."""
        self.train(self.training)  # PEFT's layers start in training mode: a loaded model would apply dropout
        usual = type(lora_config)().to_dict()
        self.config.lora_config = {
            name: sorted(value) if isinstance(value, set) else value
            for name, value in lora_config.to_dict().items()
            if name in _LORA_FIELDS or (value != usual.get(name) and name not in _WITHOUT_EFFECT)
        }
        if self.config.base_models:
            # the adapted layers have new names
            self._keys_to_ignore_on_save = self._frozen_keys()

    def _check_same_lora(self, source: str, config: PreTrainedConfig, weights: dict[str, torch.Tensor]) -> None:
        """Refuse an adapter that was trained with another LoRA: the LLM has one, and outputs would differ."""
        theirs = {key: value for key, value in weights.items() if "lora_" in key}
        if not theirs:
            return
        mine = self.state_dict()
        same = all(key in mine and torch.equal(mine[key].cpu(), value) for key, value in theirs.items())
        if not same or config.lora_config != self.config.lora_config:
            raise ValueError(
                f"adapter {source!r} was trained with a LoRA that this model's LLM does not have; load it as a "
                "model of its own with from_pretrained"
            )

    def _load_lora(self, source: str, weights: dict[str, Any]) -> None:
        files = weight_files(source, **weights)
        state = {key: value for file in files for key, value in load_file(file).items() if "lora_" in key}
        wanted = {key for key in self.state_dict() if "lora_" in key}
        if wanted != set(state):
            odd = sorted(wanted ^ set(state))[:5]
            raise ValueError(f"{source!r} holds other LoRA weights than config.lora_config describes: {odd}")
        self.load_state_dict(state, strict=False)


def _plain_name(key: str) -> str:
    """The name that a weight of the LLM has without a LoRA."""
    return key.replace(".base_layer.", ".")


def _check_lora(lora_config: Any, adapter_name: str) -> None:
    """Refuse what checkpoints cannot hold: other PEFT methods, weights of the LLM itself, a second name."""
    if not isinstance(lora_config, import_module("peft").LoraConfig):
        raise ValueError(f"{type(lora_config).__name__} is no LoraConfig, the only PEFT method that checkpoints hold")
    for name in _BEYOND_LORA:
        if getattr(lora_config, name, None):
            raise ValueError(f"{name}={getattr(lora_config, name)}: the LLM itself stays frozen; take it out")
    if adapter_name != "default":
        raise ValueError(f"adapter_name={adapter_name!r}: checkpoints hold one LoRA, 'default'; leave the name out")


__all__ = ["ADAPTERS_OF_THREAD", "LoraMixin", "ThreadAdapter"]
