"""From samples to the frames of a speech encoder, computed in one place for model, connector and processor.

Everything follows from the encoder's config: the strided steps of its features and its convolutions, hence the number
of frames of a clip and the time between them. Lengths are integers and rates fractions, so that the processor's
placeholders and the model's frames are counted separately and still agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from math import ceil, prod
from operator import itemgetter
from typing import Any

from transformers import PreTrainedConfig

SAMPLING_RATE = 16000  # of all supported encoders
_FBANK = ((400, 160, 0),)  # Kaldi's framing: 25 ms every 10 ms, wholly inside the clip
_LONGEST_SECONDS = 30.0

Step = tuple[int, int, int]


@dataclass(frozen=True)
class EncoderGeometry:
    """Steps from samples to frames.

    Attributes:
        features: `(kernel, stride, padding)` of each step of the feature extractor; none if the encoder reads samples.
        encoder: The same for the encoder's own steps.
        frames_per_step: Frames of one step: 1, the frequency patches of a spectrogram transformer, or SEW's pooling.
        chunk_seconds: Maximum length of audio that the encoder takes.
    """

    features: tuple[Step, ...]
    encoder: tuple[Step, ...]
    frames_per_step: int = 1
    chunk_seconds: float = _LONGEST_SECONDS

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> EncoderGeometry:
        """The geometry that `to_dict` wrote, with JSON lists as tuples."""
        steps = {name: tuple(map(tuple, fields[name])) for name in ("features", "encoder")}
        return cls(**{**fields, **steps})

    def to_dict(self) -> dict[str, Any]:
        """Plain fields for JSON."""
        fields = asdict(self)
        return {name: [*map(list, value)] if isinstance(value, tuple) else value for name, value in fields.items()}

    def num_inputs(self, num_samples: int) -> int:
        """Positions of the encoder's input for a piece of audio."""
        return _after(self.features, num_samples)

    def num_outputs(self, num_inputs: int) -> int:
        """Frames that the encoder returns for so many input positions."""
        return _after(self.encoder, num_inputs) * self.frames_per_step

    def num_frames(self, num_samples: int) -> int:
        """Frames of a piece of audio."""
        return _after((*self.features, *self.encoder), num_samples) * self.frames_per_step

    @property
    def frame_samples(self) -> Fraction:
        """Samples from one frame to the next."""
        strides = map(itemgetter(1), (*self.features, *self.encoder))
        return Fraction(prod(strides), self.frames_per_step)

    @property
    def frame_seconds(self) -> float:
        """Time from one frame to the next."""
        return float(self.frame_samples / SAMPLING_RATE)

    @property
    def min_samples(self) -> int:
        """Samples of one frame."""
        length = 1
        for kernel, stride, padding in reversed((*self.features, *self.encoder)):
            length = max((length - 1) * stride + kernel - 2 * padding, 1)
        return length


def speech_geometry(config: PreTrainedConfig) -> EncoderGeometry:
    """The geometry of a speech encoder.

    Raises:
        ValueError: the config is not one of a supported speech encoder.
    """
    if config.model_type not in _FAMILIES:
        raise ValueError(
            f"speech_config model_type={config.model_type!r} is no supported speech encoder; "
            f"choose one of {', '.join(_FAMILIES)}"
        )
    return _FAMILIES[config.model_type](config)


def speech_width(config: PreTrainedConfig) -> int:
    """Width of a speech encoder's frames, after the adapter that some checkpoints of the wav2vec2 family have."""
    adapted = getattr(config, "add_adapter", False) and getattr(config, "output_hidden_size", None)
    return adapted or config.hidden_size


def audio_step(speech: EncoderGeometry, patch_size: int, num_mel_bins: int) -> Fraction:
    """BEATs tokens per frame of the speech encoder."""
    beats = Fraction(_FBANK[0][1] * patch_size, num_mel_bins // patch_size)  # samples from one token to the next
    return speech.frame_samples / beats


def num_resampled(frames: int, step: Fraction) -> int:
    """Frames that remain of `frames` when one is kept for each `step` of them; the last step may be incomplete."""
    return ceil(frames / step)


def _after(steps: Sequence[Step], length: int) -> int:
    """Length after strided steps, as `torch.nn.Conv1d` computes it; 0 for too short an input."""
    for kernel, stride, padding in steps:
        length = max((length + 2 * padding - kernel) // stride + 1, 0)
    return length


def _whisper(config: PreTrainedConfig) -> EncoderGeometry:
    """A frame of log-mel for each whole 10 ms, then a convolution of kernel 3, stride 2 and padding 1."""
    return EncoderGeometry(((160, 160, 0),), ((3, 2, 1),), chunk_seconds=config.max_source_positions / 50)


def _waveform(config: PreTrainedConfig) -> EncoderGeometry:
    """Unpadded convolutions over samples; `transformers`' `_get_feat_extract_output_lengths`."""
    convolutions = tuple(
        (kernel, stride, 0) for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True)
    )
    return EncoderGeometry((), (*convolutions, *_adapter(config, padding=1)))


def _squeezed(config: PreTrainedConfig) -> EncoderGeometry:
    """SEW pools frames for its layers and expands them again after."""
    squeeze = config.squeeze_factor
    return EncoderGeometry((), (*_waveform(config).encoder, (squeeze, squeeze, 0)), frames_per_step=squeeze)


def _stacked_fbank(config: PreTrainedConfig) -> EncoderGeometry:
    """Wav2Vec2-BERT stacks two frames of the filter bank into one position, 20 ms."""
    padding = config.adapter_stride // 2
    return EncoderGeometry((*_FBANK, (2, 2, 0)), _adapter(config, padding))


def _adapter(config: PreTrainedConfig, padding: int) -> tuple[Step, ...]:
    if not getattr(config, "add_adapter", False):
        return ()
    return ((config.adapter_kernel_size, config.adapter_stride, padding),) * config.num_adapter_layers


def _spectrogram(config: PreTrainedConfig) -> EncoderGeometry:
    """Overlapping patches of AST; all frequencies of one moment follow each other, as in BEATs."""
    frequencies = (config.num_mel_bins - config.patch_size) // config.frequency_stride + 1
    return EncoderGeometry(
        _FBANK,
        ((config.patch_size, config.time_stride, 0),),
        frames_per_step=frequencies,
        chunk_seconds=min(config.max_length / 100, _LONGEST_SECONDS),
    )


def _moonshine(config: PreTrainedConfig) -> EncoderGeometry:
    """Three unpadded convolutions over samples, 24 ms."""
    return EncoderGeometry((), ((127, 64, 0), (7, 3, 0), (3, 2, 0)))


_FAMILIES: dict[str, Callable[[PreTrainedConfig], EncoderGeometry]] = {
    "whisper": _whisper,
    **dict.fromkeys(("wav2vec2", "wav2vec2-conformer", "hubert", "wavlm", "unispeech", "unispeech-sat"), _waveform),
    "data2vec-audio": _waveform,
    **dict.fromkeys(("sew", "sew-d"), _squeezed),
    "wav2vec2-bert": _stacked_fbank,
    "audio-spectrogram-transformer": _spectrogram,
    "moonshine": _moonshine,
}

__all__ = [
    "SAMPLING_RATE",
    "EncoderGeometry",
    "audio_step",
    "num_resampled",
    "speech_geometry",
    "speech_width",
]
