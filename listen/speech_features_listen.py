"""The feature extractor of transformers that belongs to a speech encoder other than Whisper."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoFeatureExtractor, PreTrainedConfig, SequenceFeatureExtractor
from transformers.utils import cached_file, logging

from .geometry_listen import SAMPLING_RATE, speech_geometry

logger = logging.get_logger(__name__)

# Which class makes the input of which encoder.
_EXTRACTORS = {"wav2vec2-bert": "SeamlessM4TFeatureExtractor", "audio-spectrogram-transformer": "ASTFeatureExtractor"}
_WAVEFORM_EXTRACTOR = "Wav2Vec2FeatureExtractor"
_SETTINGS_FILES = ("preprocessor_config.json", "processor_config.json")
# Where the code that saved an extractor lies is no setting of it.
_ORIGIN = ("auto_map", "processor_class", "name_or_path")


def speech_features(config: PreTrainedConfig, source: str | None = None, **hub: Any) -> dict[str, Any]:
    """Settings of the feature extractor that a speech encoder was trained with.

    Args:
        config: The encoder's config.
        source: Folder or Hub id of its checkpoint. Without one, and for a checkpoint without an extractor, the
            settings are those that transformers gives such a model.
        **hub: `revision`, `subfolder` and the like.

    Raises:
        ValueError: the checkpoint's extractor does not fit the encoder.
    """
    extractor = None
    if source is not None:
        if any(
            cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub) for name in _SETTINGS_FILES
        ):
            extractor = AutoFeatureExtractor.from_pretrained(source, **hub)
        else:
            logger.warning(f"{source} has no {_SETTINGS_FILES[0]}; its features are made as usual for such a model")
    extractor = _usual_extractor(config) if extractor is None else extractor
    _check_fits(config, extractor, source or "the feature extractor")
    return {name: value for name, value in extractor.to_dict().items() if name not in _ORIGIN}


def speech_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """Arguments of `ListenFeatureExtractor` that the speech encoder of a model's config asks for.

    Args:
        config: A config with `speech_config`, `base_models` and `pad_to_30s`.

    Raises:
        ValueError: the extractor beside the encoder's checkpoint does not fit it.
    """
    speech, geometry = config.speech_config, speech_geometry(config.speech_config)
    settings: dict[str, Any] = {"chunk_seconds": geometry.chunk_seconds}
    if speech.model_type == "whisper":
        return {**settings, "feature_size": speech.num_mel_bins, "pad_to_30s": config.pad_to_30s}
    place, options = backbone_place(config, "speech_encoder") or (None, {})
    features = speech_features(speech, place, **options)
    return {**settings, "speech_geometry": geometry.to_dict(), "speech_features": features}


def backbone_place(config: PreTrainedConfig, backbone: str) -> tuple[str, dict[str, str]] | None:
    """Folder or Hub id of a backbone's checkpoint and the options to find it with; `None` where it has no name."""
    spec = (config.base_models or {}).get(backbone)
    if not spec:
        return None
    path, options = spec["base_model_name_or_path"], {"revision": spec.get("revision") or "main"}
    if path.startswith("./"):  # a folder inside the checkpoint
        path, options = config.name_or_path, {**options, "subfolder": path[2:]}
    elif spec.get("subfolder"):
        options["subfolder"] = spec["subfolder"]
    return path, options


def extract_speech(settings: dict[str, Any], chunks: list[np.ndarray]) -> torch.Tensor:
    """Features of pieces of audio, as the encoder takes them.

    Args:
        settings: What `speech_features` gave.
        chunks: One-dimensional float32 arrays.

    Returns:
        `(chunks, samples)` or `(chunks, frames, bins)`, float32, zero where a piece has ended.
    """
    extractor = _extractor(json.dumps(settings, sort_keys=True))
    features = extractor(chunks, sampling_rate=SAMPLING_RATE, padding=True, return_attention_mask=True)
    return torch.from_numpy(np.stack(features[extractor.model_input_names[0]]).astype(np.float32, copy=False))


def check_settings(settings: dict[str, Any]) -> None:
    """Raise a `ValueError` where settings are not those of an extractor that transformers has."""
    name = settings.get("feature_extractor_type")
    known = {_WAVEFORM_EXTRACTOR, *_EXTRACTORS.values()}
    if name not in known:
        raise ValueError(
            f"speech_features: feature_extractor_type={name!r} is unknown; choose {', '.join(sorted(known))}"
        )


@lru_cache(maxsize=8)
def _extractor(settings: str) -> SequenceFeatureExtractor:
    fields = json.loads(settings)
    return getattr(transformers, fields["feature_extractor_type"]).from_dict(fields)


def _usual_extractor(config: PreTrainedConfig) -> SequenceFeatureExtractor:
    if config.model_type == "wav2vec2-bert":
        stride = 2
        return transformers.SeamlessM4TFeatureExtractor(
            feature_size=config.feature_projection_input_dim // stride,
            num_mel_bins=config.feature_projection_input_dim // stride,
            stride=stride,
        )
    if config.model_type == "audio-spectrogram-transformer":
        return transformers.ASTFeatureExtractor(num_mel_bins=config.num_mel_bins, max_length=config.max_length)
    return transformers.Wav2Vec2FeatureExtractor(
        do_normalize=config.model_type != "moonshine", return_attention_mask=True
    )


def _check_fits(config: PreTrainedConfig, extractor: SequenceFeatureExtractor, source: str) -> None:
    kind, wanted = type(extractor).__name__, _EXTRACTORS.get(config.model_type, _WAVEFORM_EXTRACTOR)
    if kind != wanted:
        raise ValueError(f"{source} makes features with {kind}, but {config.model_type} takes those of {wanted}")
    wanted_fields: dict[str, Any] = {"sampling_rate": SAMPLING_RATE}
    if config.model_type == "wav2vec2-bert":
        wanted_fields |= {"stride": 2, "num_mel_bins": config.feature_projection_input_dim // 2}
    if config.model_type == "audio-spectrogram-transformer":
        wanted_fields |= {"num_mel_bins": config.num_mel_bins, "max_length": config.max_length}
    for name, value in wanted_fields.items():
        if getattr(extractor, name) != value:
            raise ValueError(
                f"{source} makes features with {name}={getattr(extractor, name)}, but this {config.model_type} takes "
                f"{name}={value}; give the extractor that belongs to it"
            )


__all__ = ["backbone_place", "check_settings", "extract_speech", "speech_features", "speech_settings"]
