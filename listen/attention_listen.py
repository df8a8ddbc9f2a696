"""Attention kernels: which one each part of a model runs, and switching all parts at once."""

from typing import Any

from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def additive_attention(requested: str | None) -> str | None:
    """The kernel that BEATs and the connector run for `requested`: flash and flex attention become `"sdpa"`.

    BEATs' position bias is an additive mask, which only eager attention and sdpa take. The connector is in fp32, which
    flash attention does not take. An unknown name is returned as it is: transformers refuses it.
    """
    if requested in (None, "eager") or requested not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        return requested if not str(requested).startswith("flash_attention") else "sdpa"
    return "sdpa"


class SwitchableAttention:
    """`set_attn_implementation` for a `PreTrainedModel` of several parts: all of them are switched, or none.

    The model provides `attention_parts()`.
    """

    def attention_parts(self) -> dict[str, list[nn.Module]]:
        """Modules with attention, by the name of their sub-config; each has a `set_attn_implementation`."""
        raise NotImplementedError

    def set_attn_implementation(
        self, attn_implementation: str | dict[str, str], allow_all_kernels: bool = False
    ) -> None:
        """As upstream, but BEATs and the connector run sdpa in place of flash and flex attention.

        Args:
            attn_implementation: Kernel of all parts, or of some by the names of their sub-configs:
                `{"text_config": "flash_attention_2"}`.
            allow_all_kernels: As upstream.

        Raises:
            ValueError: an unknown kernel or part, or a part that cannot run the kernel; no part is switched then.
            ImportError: a kernel that is not installed; no part is switched then.
        """
        parts, asked = self.attention_parts(), attn_implementation
        asked = asked if isinstance(asked, dict) else dict.fromkeys(["", *parts], asked)
        unknown = asked.keys() - parts.keys() - {""}
        if unknown:
            raise ValueError(f"attn_implementation names the parts {sorted(unknown)}; known: {', '.join(parts)}")
        before = [(config, config._attn_implementation) for config in _configs(self)]
        try:
            for name in parts.keys() & asked.keys():
                for module in parts[name]:
                    module.set_attn_implementation(asked[name], allow_all_kernels=allow_all_kernels)
                    taken = _attention_config(module)._attn_implementation
                    getattr(self.config, name)._attn_implementation_internal = taken
        except (ValueError, ImportError):
            for config, attention in before:
                config._attn_implementation_internal = attention
            raise
        self.config._attn_implementation_internal = asked.get("", self.config._attn_implementation)


def _configs(model: Any) -> list[PreTrainedConfig]:
    """The configs that name a kernel: of all modules of a model, and its sub-configs."""
    inside = [_attention_config(module) for module in model.modules()]
    ours = [getattr(model.config, name) for name in model.config.sub_configs]
    return [config for config in (*inside, *ours) if isinstance(config, PreTrainedConfig)]


def _attention_config(module: nn.Module) -> PreTrainedConfig | None:
    return getattr(module, "attention_config", getattr(module, "config", None))


__all__ = ["SwitchableAttention", "additive_attention"]
