"""BEATs audio encoder (Chen et al. 2022, arXiv 2212.09058): log-mel patches -> Transformer with relative positions.

The formulas, for input `x` of `F` frames and `M` mel bins, patches of `p` x `p`, width `d`, `N` layers, `H` heads:

1.  Patches: a convolution of kernel and stride `p` without bias; flattened time-major, so token `t * M/p + f` holds
    band `f` of time step `t`. Then LayerNorm, and a linear map to `d` unless the widths are equal.
2.  Position: `h = LayerNorm(x + GELU(conv(x)))`; the grouped convolution has weights `g * v / ||v||`, one norm for
    each tap of the kernel, and its last output is dropped if the kernel is even. Padded tokens are zero before it.
3.  Layers (post-norm): `h = LN(a * h + Attn(h))`, `h = LN(a * h + FFN(h))` with `a = (2N) ** 0.25` (deep norm).
4.  Attention: `softmax(q k / sqrt(d/H) + gate * bias)`. The bias of a head depends on the bucket of `j - i` alone and
    is computed once for all layers. The gate of query `i` reads its unscaled projection `u = W_q h_i + b_q`, head by
    head: eight outputs of a linear map are summed in two groups of four, `(s, r) = sigmoid(sums)`, and
    `gate = s * (r * c - 1) + 2` with a learned `c` for each head.
5.  Buckets: the `B/2` of a direction are one for each distance below `B/4`, then logarithmic up to `max_distance`.

The published implementation divides the scores by 32, subtracts their row maximum and multiplies by 32 again before
the bias is added. A softmax does not change when a constant is added to a row, so this only protects half precision
sums. It is left out here, as fused attention and the eager path accumulate in float32.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_listen import additive_attention
from .configuration_beats import BeatsConfig

# Its exponential is zero beside any score; finite in float16, so that a row of padding alone gives no NaN.
_PADDING_SCORE = -3e4
# read by `capture_outputs`, or passed by the Trainer to every model
_KNOWN_KWARGS = {"output_hidden_states", "output_attentions", "use_cache"}


def relative_position_buckets(
    num_tokens: int, num_buckets: int, max_distance: int, device: torch.device
) -> torch.Tensor:
    """Bucket of each signed distance from `-(num_tokens - 1)` to `num_tokens - 1` (T5, Raffel et al. 2020, both ways).

    Returns:
        `torch.LongTensor` of shape `(2 * num_tokens - 1,)`: the bucket of `key position - query position`.
    """
    offsets = torch.arange(1 - num_tokens, num_tokens, device=device)  # (2 * tokens - 1,)
    per_direction = num_buckets // 2
    exact = per_direction // 2
    distance = offsets.abs()
    # always in float32, so that the integer part is right
    growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (growth * (per_direction - exact)).long()).clamp(max=per_direction - 1)
    return torch.where(distance < exact, distance, far) + (offsets > 0).long() * per_direction


def official_token_mask(padding_mask: torch.Tensor, num_frames: int, num_tokens: int) -> torch.Tensor:
    """Token mask by the rule of the published implementation, to reproduce its results on padded batches.

    The rule takes samples to frames, then frames to tokens: drop the surplus at the end, view the rest as
    `(target length, -1)`, and call a target padding if all that it covers is padding. As time and bands are counted
    together, the last time step can be masked for some bands only. [`BeatsModel`] masks whole time steps by default
    (`output_mask`); pass this mask as `token_mask=` for the published rule.

    Args:
        padding_mask: `(batch, samples)` boolean, True at padded samples.
        num_frames: frames of the filter bank.
        num_tokens: tokens of the encoder, `8 * (num_frames // 16)` for the published shape.

    Returns:
        `(batch, num_tokens)` boolean, True at real tokens.

    Raises:
        ValueError: `padding_mask` is not two-dimensional or is shorter than the target.
    """
    if padding_mask.dim() != 2 or padding_mask.shape[1] < num_frames or num_frames < num_tokens:
        raise ValueError(
            f"official_token_mask needs (batch, samples) with samples >= frames >= tokens, got "
            f"{tuple(padding_mask.shape)}, {num_frames} frames and {num_tokens} tokens."
        )
    for length in (num_frames, num_tokens):
        surplus = padding_mask.shape[1] % length
        padding_mask = padding_mask[:, : padding_mask.shape[1] - surplus].unflatten(1, (length, -1)).all(-1)
    return ~padding_mask


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention: `(batch, heads, tokens, width)` and an additive mask in, `(batch, tokens, heads, width)` out."""
    scores = torch.matmul(query * scaling, key.transpose(-1, -2))  # (batch, heads, tokens, tokens)
    weights = nn.functional.softmax(scores + attention_mask, dim=-1, dtype=torch.float32).to(value.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class BeatsPatchEmbedding(nn.Module):
    """Embeds square patches: `(batch, frames, mel bins)` -> `(batch, tokens, hidden_size)`, time-major."""

    def __init__(self, config: BeatsConfig) -> None:
        super().__init__()
        width, patch = config.patch_embed_dim, config.patch_size
        self.convolution = nn.Conv2d(1, width, kernel_size=patch, stride=patch, bias=False)
        self.layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        same = width == config.hidden_size
        self.projection = nn.Identity() if same else nn.Linear(width, config.hidden_size)

    def forward(self, input_values: torch.Tensor) -> torch.Tensor:
        """Embed the patches; frames after the last whole patch are dropped."""
        patches = self.convolution(input_values.unsqueeze(1))  # (batch, width, steps, bands)
        patches = patches.flatten(2).transpose(1, 2)  # (batch, steps * bands, width)
        return self.projection(self.layer_norm(patches))


class BeatsPositionalConvolution(nn.Conv1d):
    """Weight-normed grouped convolution over time: `(batch, tokens, hidden_size)` both ways."""

    def __init__(self, config: BeatsConfig) -> None:
        width, kernel = config.hidden_size, config.conv_pos
        super().__init__(width, width, kernel, padding=kernel // 2, groups=config.conv_pos_groups)
        nn.utils.parametrizations.weight_norm(self, name="weight", dim=2)
        # torch's class for it and its hook (for names of old checkpoints, which loading translates) cannot be pickled
        self.__class__ = BeatsPositionalConvolution
        self._load_state_dict_pre_hooks.clear()

    @property
    def weight(self) -> torch.Tensor:
        """`(hidden_size, hidden_size / groups, kernel)`, the directions times their norms."""
        return self.parametrizations.weight()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The positional embedding of each token."""
        # Always in float32: a sum over thousands of products, and oneDNN's bfloat16 kernels on AMX processors return
        # garbage for this convolution when a group has few channels (seen with torch 2.13, groups of 4 and 8).
        with torch.autocast(hidden_states.device.type, enabled=False):
            positions = nn.functional.conv1d(
                hidden_states.transpose(1, 2).float(),
                self.parametrizations.weight().float(),
                self.bias.float(),
                padding=self.padding,
                groups=self.groups,
            )  # (batch, hidden_size, tokens + 1 if the kernel is even)
        positions = nn.functional.gelu(positions[..., : hidden_states.shape[1]])
        return positions.transpose(1, 2).to(hidden_states.dtype)


class BeatsAttention(nn.Module):
    """Self-attention with a relative position bias, gated by the query (WavLM, Chen et al. 2021)."""

    is_causal = False

    def __init__(self, config: BeatsConfig) -> None:
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.gate_proj = nn.Linear(self.head_dim, 8)
        self.gate_scale = nn.Parameter(torch.empty(1, self.num_heads, 1, 1))

    def forward(
        self, hidden_states: torch.Tensor, position_bias: torch.Tensor, padding_bias: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend within `(batch, tokens, hidden_size)`.

        `position_bias` is `(1, heads, tokens, tokens)`; `padding_bias` `(batch, 1, 1, tokens)` is 0 at real tokens and
        very low at padded ones.
        """
        by_head = (self.num_heads, self.head_dim)
        query = self.q_proj(hidden_states).unflatten(-1, by_head).transpose(1, 2)  # (batch, heads, tokens, head_dim)
        key = self.k_proj(hidden_states).unflatten(-1, by_head).transpose(1, 2)  # (batch, heads, tokens, head_dim)
        value = self.v_proj(hidden_states).unflatten(-1, by_head).transpose(1, 2)  # (batch, heads, tokens, head_dim)
        sums = self.gate_proj(query).unflatten(-1, (2, 4)).sum(-1)  # (batch, heads, tokens, 2)
        select, reset = torch.sigmoid(sums).chunk(2, dim=-1)  # 2 x (batch, heads, tokens, 1)
        gate = select * (reset * self.gate_scale - 1.0) + 2.0  # (batch, heads, tokens, 1)
        # One pass writes the whole additive mask; its dtype must be the query's, which autocast may have changed.
        dtype = query.dtype
        mask = torch.addcmul(padding_bias.to(dtype), gate.to(dtype), position_bias.to(dtype))
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.config.attention_dropout if self.training else 0.0
        context, weights = attend(
            self, query, key, value, mask, dropout=dropout, scaling=self.head_dim**-0.5
        )  # (batch, tokens, heads, head_dim)
        return self.out_proj(context.flatten(2)), weights


class BeatsResidualLinear(nn.Linear):
    """A linear map of the feed-forward network, with a class of its own for the initialisation of deep norm."""


class BeatsLayer(GradientCheckpointingLayer):
    """Post-norm Transformer layer with deep norm: `(batch, tokens, hidden_size)` both ways."""

    def __init__(self, config: BeatsConfig) -> None:
        super().__init__()
        self.residual_scale = (2 * config.num_hidden_layers) ** 0.25 if config.deep_norm else 1.0
        self.attention = BeatsAttention(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.intermediate = BeatsResidualLinear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.output = BeatsResidualLinear(config.intermediate_size, config.hidden_size)
        self.output_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.activation_dropout = nn.Dropout(config.activation_dropout)

    def forward(
        self, hidden_states: torch.Tensor, position_bias: torch.Tensor, padding_bias: torch.Tensor
    ) -> torch.Tensor:
        """Apply the layer; the biases are those of [`BeatsAttention.forward`]."""
        attended, _ = self.attention(hidden_states, position_bias, padding_bias)
        hidden_states = self.attention_norm(self.residual_scale * hidden_states + self.dropout(attended))
        inner = self.activation_dropout(self.activation(self.intermediate(hidden_states)))
        return self.output_norm(self.residual_scale * hidden_states + self.dropout(self.output(inner)))


class BeatsPreTrainedModel(PreTrainedModel):
    """What both BEATs models share: initialisation, loading and attention kernels."""

    config_class = BeatsConfig
    base_model_prefix = "beats"
    main_input_name = "input_values"
    input_modalities = ("audio",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["BeatsLayer"]
    _supports_sdpa = True
    _can_record_outputs = {"hidden_states": BeatsLayer, "attentions": BeatsAttention}

    def set_attn_implementation(self, attn_implementation: str, allow_all_kernels: bool = False) -> None:
        """As upstream, but sdpa in place of kernels that take no additive mask, as on loading a whole model."""
        super().set_attn_implementation(additive_attention(attn_implementation), allow_all_kernels)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # For code outside the library, transformers only visits modules with parameters of their own.
        gain = (8 * self.config.num_hidden_layers) ** -0.25  # DeepNet's, for weights on the residual path
        if isinstance(module, BeatsAttention):
            init.ones_(module.gate_scale)
            if self.config.deep_norm:
                init.xavier_normal_(module.q_proj.weight)
                init.xavier_normal_(module.k_proj.weight)
                init.xavier_normal_(module.v_proj.weight, gain=gain)
                init.xavier_normal_(module.out_proj.weight, gain=gain)
        elif isinstance(module, BeatsResidualLinear) and self.config.deep_norm:
            init.xavier_normal_(module.weight, gain=gain)
        elif isinstance(module, ParametrizationList):
            self._init_weight_norm(module)

    def _init_weight_norm(self, weight: ParametrizationList) -> None:
        """Normal directions with their norms as magnitudes: the product is normally distributed."""
        magnitude = weight.original0  # (1, 1, kernel)
        direction = weight.original1  # (hidden_size, hidden_size / groups, kernel)
        init.normal_(direction, std=math.sqrt(4.0 / (self.config.conv_pos * self.config.hidden_size)))
        init.copy_(magnitude, direction.norm(dim=(0, 1), keepdim=True))


class BeatsModel(BeatsPreTrainedModel):
    """BEATs encoder: normalised Kaldi filter banks in, 50 tokens a second out.

    Numerically equal to the published implementation (microsoft/unilm, beats) for all its checkpoints; see the module
    docstring for the formulas and `examples/convert_beats.py` for loading them.
    """

    # the head of a fine-tuned checkpoint, when only the encoder is loaded
    _keys_to_ignore_on_load_unexpected = [r"^classifier\."]

    def __init__(self, config: BeatsConfig) -> None:
        super().__init__(config)
        self.patch_embedding = BeatsPatchEmbedding(config)
        self.position_convolution = nn.Sequential(OrderedDict(convolution=BeatsPositionalConvolution(config)))
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.relative_position_bias = nn.Embedding(config.num_buckets, config.num_attention_heads)
        self.layers = nn.ModuleList([BeatsLayer(config) for _ in range(config.num_hidden_layers)])
        self.patches_per_step = config.patches_per_step
        self.gradient_checkpointing = False
        self.post_init()

    def output_mask(self, input_values_mask: torch.Tensor) -> torch.Tensor:
        """Real tokens for a mask over frames: `(batch, frames)` of 0/1 -> `(batch, 8 * (frames // 16))` boolean.

        A time step is real if all its `patch_size` frames are, so that no real token depends on padding.
        """
        patch = self.config.patch_size
        steps = input_values_mask.shape[1] // patch
        whole = input_values_mask[:, : steps * patch].bool().unflatten(1, (steps, patch)).all(-1)  # (batch, steps)
        return whole.repeat_interleave(self.patches_per_step, dim=1)

    def position_bias(self, num_tokens: int, device: torch.device | None = None) -> torch.Tensor:
        """Relative position bias shared by all layers: `(1, heads, query tokens, key tokens)`."""
        config = self.config
        buckets = relative_position_buckets(num_tokens, config.num_buckets, config.max_distance, device)
        by_offset = self.relative_position_bias(buckets).transpose(0, 1)  # (heads, 2 * tokens - 1)
        # window w starts at offset w - (tokens - 1): it is the row of query tokens - 1 - w
        row, step = by_offset.stride()  # unfold, which has the same result, would compile anew for each length
        windows = by_offset.as_strided((len(by_offset), num_tokens, num_tokens), (row, step, step))
        return windows.flip(1).unsqueeze(0)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_values: torch.Tensor,
        input_values_mask: torch.Tensor | None = None,
        token_mask: torch.Tensor | None = None,
        **kwargs: object,
    ) -> BaseModelOutput:
        """Encode filter banks.

        Args:
            input_values: `(batch, frames, num_mel_bins)`, Kaldi log-mel, already normalised.
            input_values_mask: `(batch, frames)`, 1 at real frames; `None` means that all are real.
            token_mask: `(batch, tokens)`, 1 at real tokens, in place of `input_values_mask`, for another rule than
                `output_mask` ([`official_token_mask`]).
            **kwargs: `output_hidden_states`, `output_attentions`.

        Returns:
            `BaseModelOutput` with `last_hidden_state` `(batch, 8 * (frames // 16), hidden_size)`. Rows equal those of
            the clip alone at real tokens; padded tokens hold finite values without meaning.

        Raises:
            ValueError: shapes do not fit, the clip is shorter than one patch, or both masks are given.
            TypeError: an unknown argument.
        """
        unknown = sorted(set(kwargs) - _KNOWN_KWARGS)
        if unknown:
            raise TypeError(f"BeatsModel got unknown arguments {unknown}; masks are input_values_mask or token_mask.")
        token_mask = self._checked_token_mask(input_values, input_values_mask, token_mask)
        hidden_states = self.patch_embedding(input_values.to(self.dtype))  # (batch, tokens, hidden_size)
        hidden_states = hidden_states.masked_fill(~token_mask.unsqueeze(-1), 0.0)
        hidden_states = self.layer_norm(hidden_states + self.position_convolution(hidden_states))
        hidden_states = self.dropout(hidden_states)
        position_bias = self.position_bias(hidden_states.shape[1], hidden_states.device)  # (1, heads, tokens, tokens)
        padding_bias = (~token_mask).to(hidden_states.dtype)[:, None, None, :] * _PADDING_SCORE  # (batch, 1, 1, tokens)
        for layer in self.layers:
            hidden_states = layer(hidden_states, position_bias, padding_bias)
        return BaseModelOutput(last_hidden_state=hidden_states)

    def _checked_token_mask(
        self, input_values: torch.Tensor, input_values_mask: torch.Tensor | None, token_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Check all shapes and return the boolean `(batch, tokens)` mask to use."""
        bins, patch = self.config.num_mel_bins, self.config.patch_size
        if input_values.dim() != 3 or input_values.shape[2] != bins:
            raise ValueError(
                f"BeatsModel needs input_values (batch, frames, {bins}), got shape {tuple(input_values.shape)}."
            )
        batch, frames = input_values.shape[:2]
        if frames < patch:
            raise ValueError(f"BeatsModel needs at least {patch} frames, got {frames}; pad the clip.")
        tokens = frames // patch * self.patches_per_step
        if input_values_mask is not None and token_mask is not None:
            raise ValueError("BeatsModel takes input_values_mask or token_mask, not both.")
        if token_mask is None and input_values_mask is None:
            return torch.ones(batch, tokens, dtype=torch.bool, device=input_values.device)
        mask, length = (token_mask, tokens) if token_mask is not None else (input_values_mask, frames)
        if tuple(mask.shape) != (batch, length):
            raise ValueError(f"BeatsModel needs a mask of shape {(batch, length)}, got {tuple(mask.shape)}.")
        return token_mask.bool() if token_mask is not None else self.output_mask(input_values_mask)


class BeatsForAudioClassification(BeatsPreTrainedModel):
    """BEATs with the head of its fine-tuned checkpoints: a linear map of each token, averaged over real tokens."""

    accepts_loss_kwargs = False  # its loss is a mean, so the Trainer divides it by the number of accumulated batches

    def __init__(self, config: BeatsConfig) -> None:
        super().__init__(config)
        self.beats = BeatsModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_values: torch.Tensor,
        input_values_mask: torch.Tensor | None = None,
        token_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: object,
    ) -> SequenceClassifierOutput:
        """Score the labels; arguments as in [`BeatsModel.forward`].

        Args:
            labels: `(batch, num_labels)` of 0/1: several may be 1, as in AudioSet (binary cross-entropy).

        Returns:
            `SequenceClassifierOutput` with `logits` `(batch, num_labels)`; their sigmoid is what the published
            implementation returns.
        """
        outputs = self.beats(input_values, input_values_mask, token_mask, **kwargs)
        scores = self.classifier(self.dropout(outputs.last_hidden_state))  # (batch, tokens, num_labels)
        mask = self.beats._checked_token_mask(input_values, input_values_mask, token_mask).unsqueeze(-1)
        logits = scores.masked_fill(~mask, 0.0).sum(1) / mask.sum(1).clamp(min=1)  # (batch, num_labels)
        loss = None
        if labels is not None:
            loss = nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = ["BeatsForAudioClassification", "BeatsModel", "BeatsPreTrainedModel", "official_token_mask"]
