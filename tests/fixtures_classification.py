"""Tiny classifiers of speech over random encoders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from conftest import tiny_config, tiny_model
from fixtures_encoders import encoder_config, spread

from listen import (
    ListenAudioClassificationConfig,
    ListenAudioClassificationFeatureExtractor,
    ListenForAudioClassification,
)

LABELS = ("happy", "sad", "angry")
RATE = 16000
_HEAD = {"hidden_size": 32, "num_layer_heads": 4, "intermediate_size": 64}


def classifier_config(**overrides: object) -> ListenAudioClassificationConfig:
    """A head of a few thousand parameters over the encoder of `conftest.tiny_config`."""
    labels = {"id2label": dict(enumerate(LABELS)), "label2id": {label: i for i, label in enumerate(LABELS)}}
    speech = tiny_config().speech_config.to_dict()
    return ListenAudioClassificationConfig(**{"speech_config": speech, **labels, **_HEAD, **overrides})


def tiny_classifier(folder: Path | None = None, seed: int = 0, **overrides: object) -> ListenForAudioClassification:
    """A random classifier in eval mode, its answers spread out; with a folder, over an encoder saved there."""
    torch.manual_seed(seed)
    if folder is None:
        model = ListenForAudioClassification(classifier_config(**overrides)).eval()
    else:
        tiny_model().speech_encoder.save_pretrained(folder)
        config = ListenAudioClassificationConfig.from_backbones(str(folder), LABELS, **{**_HEAD, **overrides})
        model = ListenForAudioClassification.from_backbones(config)
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)
    return model


def encoder_classifier(
    kind: str, folder: Path | None = None
) -> tuple[ListenForAudioClassification, ListenAudioClassificationFeatureExtractor]:
    """A classifier over one of `fixtures_encoders.ENCODERS` and its extractor; with a folder, over one saved there."""
    model = tiny_classifier(speech_config=encoder_config(kind).to_dict())
    spread(model.speech_encoder)
    if folder is not None:
        model.speech_encoder.save_pretrained(folder)
        head = model.classifier.state_dict()
        config = ListenAudioClassificationConfig.from_backbones(str(folder), LABELS, **_HEAD)
        model = ListenForAudioClassification.from_backbones(config)
        model.classifier.load_state_dict(head)
    return model, ListenAudioClassificationFeatureExtractor.from_config(model.config)


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    """A clip at 16 kHz."""
    return (0.1 * np.random.default_rng(seed).standard_normal(round(RATE * seconds))).astype(np.float32)


def features(*clips: np.ndarray, **settings: object) -> dict[str, torch.Tensor]:
    """Inputs of a classifier for clips."""
    return dict(ListenAudioClassificationFeatureExtractor(**settings)(list(clips), RATE))
