"""Classification of speech by a small head over all layers of a frozen speech encoder.

The head is the time- and layer-wise Transformer (TLTR) of Whisper-AT (Gong et al. 2023, arXiv 2307.03183): the states
of each layer are averaged over steps of 0.4 s and projected; one Transformer layer, the same for all layers of the
encoder, attends over the steps of a layer, whose mean is one vector a layer; a second one attends over these vectors,
whose mean gives the scores. Unlike there, the input of the encoder's first layer counts as a layer too, and clips have
their true length: padding is left out of every mean and every attention.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import can_return_tuple

from .attention_listen import SwitchableAttention
from .checkpoint_listen import FrozenBackbonesMixin
from .configuration_audio_classification import ListenAudioClassificationConfig
from .feature_extraction_audio_classification import (  # noqa: F401 (checkpoints carry the files imported here)
    ListenAudioClassificationFeatureExtractor,
)
from .modeling_speech_encoder import build_speech_encoder


class TimeLayerTransformer(nn.Module):
    """TLTR: from states over layers and time steps to scores of the labels.

    Args:
        config: A `ListenAudioClassificationConfig`.
        width: Width of the encoder's states.
    """

    def __init__(self, config: ListenAudioClassificationConfig, width: int) -> None:
        super().__init__()
        self.input_norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, config.hidden_size)
        self.time_layer = _transformer_layer(config, config.num_time_heads)
        self.layer_layer = _transformer_layer(config, config.num_layer_heads)
        self.output_norm = nn.LayerNorm(config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Score the labels.

        Args:
            states: `(clips, layers, steps, width)`.
            mask: `(clips, steps)`, true at real steps, of which each clip has at least one.

        Returns:
            Logits `(clips, labels)`.
        """
        clips, layers = states.shape[:2]
        hidden = self.projection(self.input_norm(states))  # (clips, layers, steps, hidden)
        padding = ~mask.repeat_interleave(layers, dim=0)  # (clips * layers, steps)
        hidden = self.time_layer(hidden.flatten(0, 1), src_key_padding_mask=padding)  # (clips * layers, steps, hidden)
        hidden = _masked_mean(hidden, ~padding).unflatten(0, (clips, layers))  # (clips, layers, hidden)
        hidden = self.layer_layer(hidden).mean(1)  # (clips, hidden)
        return self.output(self.output_norm(hidden))


class ListenForAudioClassification(SwitchableAttention, FrozenBackbonesMixin, PreTrainedModel):
    """A frozen speech encoder under a learned time- and layer-wise Transformer.

    Args:
        config: A `ListenAudioClassificationConfig`.
        init_backbones: Whether to build the encoder; without, it is attached later by `load_backbones`.
    """

    config: ListenAudioClassificationConfig
    base_model_prefix = ""
    main_input_name = "input_features"
    input_modalities = ("audio",)
    accepts_loss_kwargs = True  # Trainer gives num_items_in_batch, so that accumulated gradients are exact
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = ["classifier"]

    def __init__(self, config: ListenAudioClassificationConfig, init_backbones: bool = True) -> None:
        super().__init__(config)
        self.speech_encoder: nn.Module | None = None
        if init_backbones:
            self.speech_encoder = build_speech_encoder(config.speech_config)
        self.classifier = TimeLayerTransformer(config, config.speech_config.hidden_size)
        self.post_init()
        self.freeze()

    def frozen_backbones(self) -> Iterator[tuple[str, nn.Module]]:
        """The encoder, which never learns."""
        if self.speech_encoder is not None:
            yield "speech_encoder", self.speech_encoder

    def freeze(self) -> None:
        """Let exactly the head require gradients."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith("classifier."))

    def train(self, mode: bool = True) -> "ListenForAudioClassification":
        """Put the head into training mode; the encoder stays in eval mode, without dropout."""
        super().train(mode)
        if self.speech_encoder is not None:
            self.speech_encoder.eval()
        return self

    def attention_parts(self) -> dict[str, list[nn.Module]]:
        """The encoder, by the name of its sub-config."""
        return {"speech_config": [self.speech_encoder]} if self.speech_encoder is not None else {}

    @torch.no_grad()
    def encode(
        self,
        input_features: torch.Tensor,
        input_features_mask: torch.Tensor | None = None,
        chunk_counts: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the head reads: the states of all layers, averaged over steps of `config.step_seconds`.

        The encoder is frozen, so that this can be computed once, kept, and given to `forward` again.

        Args:
            input_features: `(chunks, mel bins, frames)` log-mel of Whisper, 100 frames a second; other encoders take
                `(chunks, samples)` or `(chunks, frames, bins)` of their own feature extractors.
            input_features_mask: `(chunks, time)`, 1 on real positions, which come first; all are real by default.
            chunk_counts: `(clips,)` chunks of each clip, in order; one each by default.

        Returns:
            States `(clips, layers, steps, width)` in float32 and their mask `(clips, steps)`, true at real steps.

        Raises:
            ValueError: `chunk_counts` and the rows of `input_features` do not match.
        """
        if input_features_mask is None:
            input_features_mask = self.speech_encoder.full_mask(input_features)
        _check_counts(chunk_counts, len(input_features))
        if not self.config.pad_to_30s:
            input_features, input_features_mask = self.speech_encoder.trim(input_features, input_features_mask)
        encoded = self.speech_encoder(
            input_features.to(self.speech_encoder.dtype),
            None if self.config.pad_to_30s else input_features_mask,
            output_hidden_states=True,
        )
        mask = self.speech_encoder.output_mask(input_features_mask)  # (chunks, encoder frames)
        size = self.config.step_frames(self.speech_encoder.frame_seconds)
        states = torch.stack([_average_steps(layer, mask, size) for layer in encoded.hidden_states], dim=1)
        mask = F.pad(mask, (0, -mask.shape[1] % size)).unflatten(1, (-1, size)).any(-1)  # (chunks, steps)
        return (states, mask) if chunk_counts is None else _join_chunks(states, mask, chunk_counts.tolist())

    @can_return_tuple
    def forward(
        self,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        chunk_counts: torch.Tensor | None = None,
        layer_states: torch.Tensor | None = None,
        layer_states_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> SequenceClassifierOutput:
        """Score the labels of each clip.

        Args:
            input_features: See `encode`.
            input_features_mask: See `encode`.
            chunk_counts: See `encode`.
            layer_states: `(clips, layers, steps, width)` of an earlier `encode`, in place of the features.
            layer_states_mask: `(clips, steps)`, true at real steps; all are by default.
            labels: `(clips,)` label ids; -100 is left out of the loss.
            num_items_in_batch: What the sum of the loss is divided by; the number of labels by default.

        Returns:
            `SequenceClassifierOutput` with `logits` `(clips, labels)` and, with `labels`, the `loss`; a tuple with
            `return_dict=False`.

        Raises:
            ValueError: neither or both of features and states, shapes that do not match, or a parameter of the encoder
                that requires gradients in training: it would get none.
        """
        if self.training and torch.is_grad_enabled():
            self._check_frozen()
        if (input_features is None) == (layer_states is None):
            raise ValueError("give either input_features or layer_states; use the model's own feature extractor")
        if layer_states is None:
            layer_states, layer_states_mask = self.encode(input_features, input_features_mask, chunk_counts)
        elif layer_states_mask is None:
            layer_states_mask = torch.ones_like(layer_states[:, 0, :, 0], dtype=torch.bool)
        weight = self.classifier.output.weight
        logits = self.classifier(layer_states.to(weight.dtype), layer_states_mask.bool())
        loss = None if labels is None else self._loss(logits, labels, num_items_in_batch)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def _check_frozen(self) -> None:
        trained = [name for name, weight in self.named_parameters() if weight.requires_grad]
        if dead := [name for name in trained if name.startswith("speech_encoder.")]:
            raise ValueError(
                f"{len(dead)} parameters of the frozen encoder require gradients but get none, such as {dead[0]!r}; "
                "freeze them (model.freeze()), or keep a LoRA to target_modules of the classifier"
            )

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor, count: torch.Tensor | int | None) -> torch.Tensor:
        """Cross-entropy. Divided by labels and not by their weights: a label counts alike whatever its batch mates."""
        weights = self.config.class_weights
        losses = F.cross_entropy(
            logits.float(),
            labels,
            weight=None if weights is None else logits.new_tensor(weights, dtype=torch.float32),
            reduction="none",
            label_smoothing=self.config.label_smoothing if self.training else 0.0,
        )  # (clips,)
        return losses.sum() / ((labels != -100).sum().clamp(min=1) if count is None else count)


def _transformer_layer(config: ListenAudioClassificationConfig, num_heads: int) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(
        config.hidden_size,
        num_heads,
        config.intermediate_size,
        config.dropout,
        activation="gelu",
        batch_first=True,
        norm_first=True,
    )


def _masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of `(rows, places, width)` over the places that `(rows, places)` marks; zero where it marks none."""
    total = values.masked_fill(~mask.unsqueeze(-1), 0.0).sum(1)  # (rows, width)
    return total / mask.sum(1, keepdim=True).clamp(min=1)


def _average_steps(states: torch.Tensor, mask: torch.Tensor, size: int) -> torch.Tensor:
    """Means of `size` frames, of the real ones among them: `(chunks, frames, width)` -> `(chunks, steps, width)`."""
    missing = -states.shape[1] % size
    frames = F.pad(states.float(), (0, 0, 0, missing)).unflatten(1, (-1, size))  # (chunks, steps, size, width)
    real = F.pad(mask, (0, missing)).unflatten(1, (-1, size))  # (chunks, steps, size)
    return _masked_mean(frames.flatten(0, 1), real.flatten(0, 1)).unflatten(0, real.shape[:2])


def _check_counts(chunk_counts: torch.Tensor | None, rows: int) -> None:
    if chunk_counts is not None and (int(chunk_counts.sum()) != rows or int(chunk_counts.min()) < 1):
        raise ValueError(
            f"chunk_counts={chunk_counts.tolist()} do not add up to the {rows} rows of input_features, 1 or more each; "
            "give both as the feature extractor made them (a pipeline takes clips of several chunks with batch_size=1)"
        )


def _join_chunks(states: torch.Tensor, mask: torch.Tensor, counts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Put the steps of a clip's chunks one after the other: rows of chunks -> rows of clips."""
    if max(counts) == 1:
        return states, mask
    steps = [row[:, real].transpose(0, 1) for row, real in zip(states, mask, strict=True)]  # (steps, layers, width)
    clips = [torch.cat(group) for group in _grouped(steps, counts)]
    lengths = torch.tensor([len(clip) for clip in clips], device=states.device)
    joined = pad_sequence(clips, batch_first=True).transpose(1, 2)  # (clips, layers, steps, width)
    return joined, torch.arange(joined.shape[2], device=states.device) < lengths[:, None]


def _grouped(items: list[Any], counts: list[int]) -> Iterator[list[Any]]:
    start = 0
    for count in counts:
        yield items[start : start + count]
        start += count


ListenForAudioClassification.register_for_auto_class("AutoModelForAudioClassification")

__all__ = ["ListenForAudioClassification", "TimeLayerTransformer"]
