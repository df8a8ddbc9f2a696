"""What all LiSTEN models share: capabilities, initialisation, and frozen backbones that stay frozen."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init

from .adapter_listen import AdapterMixin
from .attention_listen import SwitchableAttention
from .configuration_listen import BACKBONES, ListenConfig
from .language_models_listen import train_frozen
from .layer_prompts_listen import checkpoint_with_prompts
from .modeling_connector import WindowQFormer
from .modeling_prompt_pool import ListenPromptPool


class ListenPreTrainedModel(SwitchableAttention, AdapterMixin, PreTrainedModel):
    """What all LiSTEN models share: capabilities, initialisation, and frozen backbones that stay frozen."""

    config: ListenConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("audio", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["adapters"]

    @property
    def dtype(self) -> torch.dtype:
        """The LLM's dtype; trainable parameters are in fp32, whatever the backbones are in."""
        language_model = getattr(self, "language_model", None)
        return language_model.dtype if language_model is not None else super().dtype

    @classmethod
    def is_custom_code(cls) -> bool:
        """Return False so that parameter-free modules are initialised too (Falcon-H1 buffers)."""
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, WindowQFormer):
            init.normal_(module.query_tokens, mean=0.0, std=0.02)
        elif isinstance(module, ListenPromptPool):
            if module.config.form == "layers":  # at first the LLM is as it was
                init.normal_(module.reads, mean=0.0, std=module.reads.shape[-1] ** -0.5)
                init.zeros_(module.writes)
            else:
                init.normal_(module.values, mean=0.0, std=0.02)
            if module.keys is not None:
                init.normal_(module.keys, mean=0.0, std=0.01)
            if module.config.center_query:
                init.zeros_(module.query_mean)

    def train(self, mode: bool = True) -> "ListenPreTrainedModel":
        """Put trainable modules into training mode; frozen backbones stay in eval mode, without dropout."""
        super().train(mode)
        self._set_frozen_modes(mode)
        return self

    def _set_frozen_modes(self, mode: bool) -> None:
        for name, backbone in self.frozen_backbones():
            backbone.eval()
            if name == "language_model" or requires_gradients(backbone):  # a LoRA may also be on a frozen encoder
                train_frozen(backbone, mode)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, **kwargs: Any
    ) -> None:
        """As upstream; checkpointed layers inside frozen backbones are put into the mode of the model, and layers that
        are run again have their prompts."""
        run = functools.partial(checkpoint_with_prompts, gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, run, **kwargs)
        self._set_frozen_modes(self.training)

    def attention_parts(self) -> dict[str, list[nn.Module]]:
        """Backbones and connectors, by the names of their sub-configs."""
        parts = {sub: [getattr(self, name)] for name, sub in BACKBONES.items() if getattr(self, name) is not None}
        return {**parts, "connector_config": [adapter.connector for adapter in self.adapters.values()]}

    def frozen_backbones(self) -> Iterator[tuple[str, nn.Module]]:
        """Names and modules of the frozen backbones."""
        for name in BACKBONES:
            backbone = getattr(self, name, None)
            if backbone is not None and name not in self.config.trainable:
                yield name, backbone

    def post_init(self) -> None:
        """As upstream; also notes whether the LLM cannot take back a token, as assisted decoding does.

        FSDP refuses names of layers that the model lacks, such as those of Whisper's decoder.
        """
        super().post_init()
        self._no_split_modules &= {type(module).__name__ for module in self.modules()}
        if getattr(self, "language_model", None) is not None:
            self._is_stateful = self.language_model._is_stateful

    def check_encoders_need_no_features(self) -> None:
        """Refuse to train on encoder frames that were computed before, while an encoder is trained.

        Raises:
            ValueError: a parameter of an encoder requires gradients, and would get none.
        """
        for name in ("speech_encoder", "audio_encoder"):
            encoder = getattr(self, name)
            if encoder is not None and requires_gradients(encoder):
                raise ValueError(
                    f"parameters of the {name} require gradients but get none from frames that were encoded before; "
                    "train on features (input_features), or freeze it"
                )


def requires_gradients(module: nn.Module) -> bool:
    """Whether a parameter of `module` is trained."""
    return any(parameter.requires_grad for parameter in module.parameters())


__all__ = ["ListenPreTrainedModel", "requires_gradients"]
