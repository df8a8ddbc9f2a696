"""Tiny random audio encoders of transformers, of every kind that may stand in Whisper's place."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, PreTrainedConfig

from listen.feature_extraction_listen import extract_speech, speech_features
from listen.geometry_listen import SAMPLING_RATE, speech_geometry
from listen.modeling_speech_encoder import ListenSpeechEncoder, build_speech_encoder

_BODY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
# the convolutions of the real ones, so that lengths are real, with few channels
_WAVE = {
    **_BODY,
    "conv_dim": [8] * 7,
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 20,
}
_LAYER = {**_WAVE, "feat_extract_norm": "layer"}
_CONFORMER = {"conv_depthwise_kernel_size": 7}
_ADAPTER = {"add_adapter": True, "output_hidden_size": 24}

ENCODERS: dict[str, dict[str, Any]] = {
    "wav2vec2": {"model_type": "wav2vec2", "do_stable_layer_norm": True, **_LAYER},
    "wav2vec2-base": {"model_type": "wav2vec2", **_WAVE},
    "wav2vec2-adapter": {"model_type": "wav2vec2", **_LAYER, **_ADAPTER},
    "hubert": {"model_type": "hubert", **_LAYER},
    "wavlm": {"model_type": "wavlm", "num_buckets": 32, **_LAYER},
    "wavlm-base": {"model_type": "wavlm", "num_buckets": 32, **_WAVE},
    "conformer": {"model_type": "wav2vec2-conformer", **_LAYER, **_CONFORMER},
    "w2v-bert": {"model_type": "wav2vec2-bert", "vocab_size": 20, **_BODY, **_CONFORMER},
    "w2v-bert-adapter": {"model_type": "wav2vec2-bert", **_BODY, **_CONFORMER, "add_adapter": True},
    "ast": {"model_type": "audio-spectrogram-transformer", **_BODY},
    "moonshine": {
        "model_type": "moonshine",
        "hidden_size": 32,
        "intermediate_size": 48,
        "encoder_num_hidden_layers": 2,
        "decoder_num_hidden_layers": 1,
        "encoder_num_attention_heads": 2,
        "decoder_num_attention_heads": 2,
        "vocab_size": 20,
    },
    "data2vec": {"model_type": "data2vec-audio", **_WAVE},
    "unispeech": {"model_type": "unispeech", **_LAYER},
    "unispeech-sat": {"model_type": "unispeech-sat", **_LAYER},
    "sew": {"model_type": "sew", "squeeze_factor": 2, **_WAVE},
    "sew-d": {"model_type": "sew-d", "squeeze_factor": 2, **_WAVE},
}
MAIN = ("wav2vec2", "wav2vec2-base", "hubert", "wavlm", "conformer", "w2v-bert", "ast", "moonshine")


def encoder_config(kind: str, **overrides: object) -> PreTrainedConfig:
    """Config of one of `ENCODERS`."""
    return AutoConfig.for_model(**{**ENCODERS[kind], **overrides})


def random_encoder(kind: str, **overrides: object) -> ListenSpeechEncoder:
    """A random encoder in eval mode whose layers do something."""
    torch.manual_seed(0)
    return spread(build_speech_encoder(encoder_config(kind, **overrides)).eval())


@torch.no_grad()
def spread(module: torch.nn.Module) -> Any:
    """Move all weights away from their small starting values."""
    for parameter in module.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def noise(samples: int, seed: int = 0) -> np.ndarray:
    """Broadband noise, float32."""
    return (0.1 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def encoder_inputs(config: PreTrainedConfig, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of noise of these numbers of samples and their mask, as the feature extractor makes them."""
    geometry = speech_geometry(config)
    features = extract_speech(speech_features(config), [noise(length, seed) for seed, length in enumerate(lengths)])
    counts = torch.tensor([geometry.num_inputs(length) for length in lengths])
    return features, (torch.arange(features.shape[1]) < counts[:, None]).long()


__all__ = ["ENCODERS", "MAIN", "SAMPLING_RATE", "encoder_config", "encoder_inputs", "noise", "random_encoder", "spread"]
