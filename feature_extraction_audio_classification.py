"""Inputs of the classifier: LiSTEN's speech features, the chunks of each clip counted, all rows of one width."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import BatchFeature, PreTrainedConfig
from transformers.utils import TensorType

from .audio_listen import is_one_clip
from .feature_extraction_listen import ListenFeatureExtractor


class ListenAudioClassificationFeatureExtractor(ListenFeatureExtractor):
    """`ListenFeatureExtractor` for `ListenForAudioClassification`, without the filter bank of BEATs.

    A clip of more than `chunk_seconds` takes several rows; `chunk_counts` tells the model how many, so that it gives
    one answer a clip. Rows are filled with zeros up to a whole chunk, as the batches of
    `pipeline("audio-classification")` need rows of one width; the model cuts off again what no row fills.
    """

    model_input_names = ["input_features", "input_features_mask", "chunk_counts"]

    def __init__(self, num_fbank_bins: int | None = None, **kwargs: object) -> None:
        if num_fbank_bins:
            raise ValueError(f"num_fbank_bins={num_fbank_bins}, but the classifier hears no filter bank; leave it out")
        super().__init__(num_fbank_bins=None, **kwargs)

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> ListenAudioClassificationFeatureExtractor:
        """The extractor that fits a `ListenAudioClassificationConfig`."""
        speech = config.speech_config
        return cls(
            feature_size=speech.num_mel_bins,
            chunk_seconds=speech.max_source_positions / 50,  # the encoder has a position for every 20 ms
            pad_to_30s=config.pad_to_30s,
        )

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(
        self,
        audio: np.ndarray | torch.Tensor | Sequence[float] | Sequence[np.ndarray | torch.Tensor | Sequence[float]],
        sampling_rate: int | None = None,
        return_tensors: str | TensorType | None = "pt",
    ) -> BatchFeature:
        """Turn clips into inputs of the classifier; arguments and errors as in `ListenFeatureExtractor`.

        Returns:
            `BatchFeature` over C chunks of N clips: `input_features` `(C, feature_size, T)` float32,
            `input_features_mask` `(C, T)` int64, 1 on real frames, and `chunk_counts` `(N,)` int64.
        """
        features = super().__call__(audio, sampling_rate, return_tensors="pt")
        missing = self.chunk_samples // self.hop_length - features["input_features"].shape[-1]
        for name in ("input_features", "input_features_mask"):
            features[name] = torch.nn.functional.pad(features[name], (0, missing))  # (chunks, .., frames)
        clips = [audio] if is_one_clip(audio) else audio
        features["chunk_counts"] = torch.tensor([self.num_chunks(len(clip)) for clip in clips])  # (clips,)
        return BatchFeature(dict(features), tensor_type=return_tensors)


ListenAudioClassificationFeatureExtractor.register_for_auto_class()

__all__ = ["ListenAudioClassificationFeatureExtractor"]
