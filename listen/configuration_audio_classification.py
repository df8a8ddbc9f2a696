"""Configuration of the classifier of speech that LiSTEN's encoders carry: which encoder, which head, which labels."""

import math
from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_adapter import StrictConfig
from .configuration_listen import BackbonesConfigMixin
from .geometry_listen import speech_geometry

_AUTO_MAP = {
    "AutoConfig": "configuration_audio_classification.ListenAudioClassificationConfig",
    "AutoModelForAudioClassification": "modeling_audio_classification.ListenForAudioClassification",
    "AutoFeatureExtractor": "feature_extraction_audio_classification.ListenAudioClassificationFeatureExtractor",
}


class ListenAudioClassificationConfig(BackbonesConfigMixin, StrictConfig):
    """A frozen speech encoder under a time- and layer-wise Transformer (TLTR; Gong et al. 2023, arXiv 2307.03183).

    The defaults are the paper's TL-TR-512 for Whisper large. Labels are given as `id2label`, `label2id` follows.

    Args:
        speech_config: Config of the speech encoder: Whisper, or another audio encoder that `geometry_listen` knows.
        base_models: Where the encoder comes from, `{"speech_encoder": {"base_model_name_or_path": ...,
            "revision": ...}}`. Set, checkpoints hold the head alone; `None`, they are self-contained.
        hidden_size: Width of the head; the encoder's states are projected to it.
        num_time_heads: Attention heads over the time steps of a layer; divides `hidden_size`.
        num_layer_heads: Attention heads over the layers; divides `hidden_size`.
        intermediate_size: Width of the feed-forward network of both Transformer layers.
        dropout: Dropout in the head while training.
        step_seconds: Time that is averaged into one step before the head, rounded to whole frames of the encoder.
        label_smoothing: Share of the target that is spread evenly over all labels while training.
        class_weights: Weight of each label in the loss, in the order of their ids; `None` weighs all alike.
        pad_to_30s: Whether Whisper sees every clip padded to 30 s, as it was trained, in place of its true length.
            Other encoders have no such setting.

    Raises:
        ValueError: an unknown field, or values that cannot work together, named with the fix.
    """

    model_type = "listen_audio_classification"
    sub_configs_defaults = {"speech_config": SubConfigSpec(config_class=AutoConfig, model_type="whisper")}

    speech_config: dict | PreTrainedConfig | None = None
    base_models: dict | None = None
    hidden_size: int = 512
    num_time_heads: int = 1
    num_layer_heads: int = 8
    intermediate_size: int = 2048
    dropout: float = 0.1
    step_seconds: float = 0.4
    label_smoothing: float = 0.0
    class_weights: list[float] | None = None
    pad_to_30s: bool = False
    auto_map: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        # only when empty: a checkpoint may point to code in another repository
        self.auto_map = self.auto_map or dict(_AUTO_MAP)
        self._check_head()
        self._check_loss()
        self._check_base_models()

    @classmethod
    def from_backbones(
        cls, speech_encoder: str, labels: Sequence[str], revision: str = "main", **kwargs: Any
    ) -> "ListenAudioClassificationConfig":
        """A config for an encoder named by Hub id or folder; only its `config.json` is read.

        Args:
            speech_encoder: A checkpoint of the encoder.
            labels: Names of the classes, in the order of their ids.
            revision: Revision of the encoder.
            **kwargs: Other fields of the config.

        Raises:
            ValueError: fewer than two labels, or one of them twice.
        """
        if len(labels) < 2 or len(set(labels)) != len(labels):
            raise ValueError(f"labels={list(labels)} must be two or more different names")
        return cls(
            speech_config=AutoConfig.from_pretrained(speech_encoder, revision=revision),
            base_models={"speech_encoder": {"base_model_name_or_path": str(speech_encoder), "revision": revision}},
            id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
            **kwargs,
        )

    def step_frames(self, frame_seconds: float) -> int:
        """Encoder frames of `frame_seconds` that one step averages, at least 1."""
        return max(1, round(self.step_seconds / frame_seconds))

    def _check_head(self) -> None:
        speech_geometry(self.speech_config)  # raises where it is no audio encoder
        if self.pad_to_30s and self.speech_config.model_type != "whisper":
            raise ValueError(
                f"pad_to_30s=True is for Whisper only, not for {self.speech_config.model_type}; set it to False"
            )
        for name in ("hidden_size", "num_time_heads", "num_layer_heads", "intermediate_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("num_time_heads", "num_layer_heads"):
            if self.hidden_size % getattr(self, name):
                raise ValueError(
                    f"hidden_size={self.hidden_size} is not a multiple of {name}={getattr(self, name)}; change one"
                )
        if self.step_seconds <= 0:
            raise ValueError(f"step_seconds={self.step_seconds} must be above 0")

    def _check_loss(self) -> None:
        for name in ("dropout", "label_smoothing"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1)")
        weights = self.class_weights
        if weights is None:
            return
        if len(weights) != self.num_labels or not all(math.isfinite(w) and w >= 0 for w in weights):
            raise ValueError(
                f"class_weights={weights} must be {self.num_labels} numbers of at least 0, one for each label"
            )

    def _check_base_models(self) -> None:
        if self.base_models is None:
            return
        spec = self.base_models.get("speech_encoder")
        if set(self.base_models) != {"speech_encoder"} or not (spec or {}).get("base_model_name_or_path"):
            raise ValueError(
                f"base_models={self.base_models} must name 'speech_encoder' alone, with 'base_model_name_or_path', a "
                "Hub id or a folder"
            )


ListenAudioClassificationConfig.register_for_auto_class()

__all__ = ["ListenAudioClassificationConfig"]
