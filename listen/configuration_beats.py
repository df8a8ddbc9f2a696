"""Configuration of the BEATs audio encoder (Chen et al. 2022, "BEATs: Audio Pre-Training with Acoustic Tokenizers")."""

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

# Accepted by `PreTrainedConfig` beside its fields, or written to config.json.
_INHERITED_ARGUMENTS = frozenset(
    {
        "attn_implementation",
        "auto_map",
        "custom_pipelines",
        "experts_implementation",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "per_layer_config",
        "torch_dtype",
    }
)
_POSITIVE = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "patch_embed_dim",
    "patch_size",
    "num_mel_bins",
    "conv_pos",
    "conv_pos_groups",
)
_PROBABILITIES = ("hidden_dropout", "attention_dropout", "activation_dropout", "classifier_dropout")


class BeatsConfig(PreTrainedConfig):
    """Shape of a [`BeatsModel`]. The defaults are those of all published checkpoints (iter1 to iter3, AS20K and AS2M).

    Args:
        hidden_size (`int`): Width of the Transformer.
        num_hidden_layers (`int`): Number of Transformer layers.
        num_attention_heads (`int`): Heads per layer; must divide `hidden_size`.
        intermediate_size (`int`): Width of the feed-forward network.
        hidden_act (`str`): Activation of the feed-forward network, a name known to `transformers.activations.ACT2FN`.
        patch_embed_dim (`int`): Width of a patch before it is projected to `hidden_size` (no projection if equal).
        patch_size (`int`): Side of a square patch, in mel bins and in frames; must divide `num_mel_bins`.
        num_mel_bins (`int`): Mel bins of the input filter bank.
        conv_pos (`int`): Kernel size of the convolutional positional embedding, in patches.
        conv_pos_groups (`int`): Groups of that convolution; must divide `hidden_size`.
        num_buckets (`int`): Buckets of the relative position bias, half of them for each direction.
        max_distance (`int`): Distance in patches from which on all positions share the last bucket.
        deep_norm (`bool`): Scale the residual by `(2 * num_hidden_layers) ** 0.25` (DeepNet, Wang et al. 2022).
        layer_norm_eps (`float`): Epsilon of every LayerNorm.
        initializer_range (`float`): Standard deviation of fresh linear and embedding weights.
        hidden_dropout, attention_dropout, activation_dropout, classifier_dropout (`float`): Dropout while training.

    Raises:
        ValueError: a value is out of range, or two values cannot work together.
        TypeError: an argument is unknown.
    """

    model_type = "beats"

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    patch_embed_dim: int = 512
    patch_size: int = 16
    num_mel_bins: int = 128
    conv_pos: int = 128
    conv_pos_groups: int = 16
    num_buckets: int = 320
    max_distance: int = 800
    deep_norm: bool = True
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    activation_dropout: float = 0.0
    classifier_dropout: float = 0.1

    def __post_init__(self, **kwargs: object) -> None:
        unknown = sorted(name for name in kwargs if name not in _INHERITED_ARGUMENTS and not name.startswith("_"))
        if unknown:
            raise TypeError(f"BeatsConfig got unknown arguments {unknown}; its own are {sorted(self.__annotations__)}.")
        super().__post_init__(**kwargs)
        self._check_ranges()
        self._check_divisors()
        self._check_buckets()

    @property
    def patches_per_step(self) -> int:
        """Patches, hence tokens, for every `patch_size` frames: one for each band of `patch_size` mel bins."""
        return self.num_mel_bins // self.patch_size

    def _check_ranges(self) -> None:
        for name in _POSITIVE:
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"BeatsConfig: {name}={getattr(self, name)!r} must be a positive integer.")
        for name in _PROBABILITIES:
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"BeatsConfig: {name}={getattr(self, name)!r} must lie in [0, 1).")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"BeatsConfig: hidden_act={self.hidden_act!r} is unknown; use one of {sorted(ACT2FN)}.")

    def _check_divisors(self) -> None:
        for divisor, name in (
            ("num_attention_heads", "hidden_size"),
            ("conv_pos_groups", "hidden_size"),
            ("patch_size", "num_mel_bins"),
        ):
            if getattr(self, name) % getattr(self, divisor):
                raise ValueError(
                    f"BeatsConfig: {name}={getattr(self, name)} is not a multiple of {divisor}="
                    f"{getattr(self, divisor)}; change one of the two."
                )

    def _check_buckets(self) -> None:
        # Half of the buckets serve each direction: half of those hold one distance each, the others logarithmic ranges.
        if self.num_buckets < 4 or self.num_buckets % 4:
            raise ValueError(f"BeatsConfig: num_buckets={self.num_buckets} must be a positive multiple of 4.")
        if self.max_distance <= self.num_buckets // 4:
            raise ValueError(
                f"BeatsConfig: max_distance={self.max_distance} must exceed num_buckets // 4 = {self.num_buckets // 4}."
            )


__all__ = ["BeatsConfig"]
