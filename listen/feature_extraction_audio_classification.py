"""Inputs of the classifier: LiSTEN's speech features, the chunks of each clip counted, all rows of one width."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import BatchFeature, PreTrainedConfig
from transformers.utils import TensorType

from .audio_listen import is_one_clip
from .feature_extraction_listen import ListenFeatureExtractor, speech_settings


class ListenAudioClassificationFeatureExtractor(ListenFeatureExtractor):
    """`ListenFeatureExtractor` for `ListenForAudioClassification`, without the filter bank of BEATs.

    A clip of more than `chunk_seconds` takes several rows; `chunk_counts` holds their number, so that the model
    gives one answer for each clip. Rows are padded with zeros to a whole chunk, as `pipeline("audio-classification")`
    needs rows of one width; the model removes padding that all rows share.
    """

    model_input_names = ["input_features", "input_features_mask", "chunk_counts"]

    def __init__(self, num_fbank_bins: int | None = None, **kwargs: object) -> None:
        if num_fbank_bins:
            raise ValueError(f"num_fbank_bins={num_fbank_bins}, but the classifier uses no filter bank; leave it out")
        super().__init__(num_fbank_bins=None, **kwargs)

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> ListenAudioClassificationFeatureExtractor:
        """The extractor that fits a `ListenAudioClassificationConfig`.

        Raises:
            ValueError: the extractor beside the encoder's checkpoint does not fit it.
        """
        return cls(**speech_settings(config))

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
            `BatchFeature` over C chunks of N clips: `input_features` `(C, feature_size, T)` float32, for other
            encoders than Whisper `(C, samples)` or `(C, T, bins)`; `input_features_mask` `(C, T)` int64, 1 on real
            positions, and `chunk_counts` `(N,)` int64.
        """
        features = super().__call__(audio, sampling_rate, return_tensors="pt")
        filled = features["input_features_mask"].shape[1]
        missing = max(self.geometry.num_inputs(self.chunk_samples) - filled, 0)  # none where the length is fixed
        for name, axis in (("input_features", self.time_axis), ("input_features_mask", 1)):
            behind = (0, 0) * (features[name].dim() - 1 - axis)  # axes that follow time
            features[name] = torch.nn.functional.pad(features[name], (*behind, 0, missing))
        clips = [audio] if is_one_clip(audio) else audio
        features["chunk_counts"] = torch.tensor([self.num_chunks(len(clip)) for clip in clips])  # (clips,)
        return BatchFeature(dict(features), tensor_type=return_tensors)


ListenAudioClassificationFeatureExtractor.register_for_auto_class()

__all__ = ["ListenAudioClassificationFeatureExtractor"]
