"""The model, the inputs and the baselines that benchmarks share, as the options of the command line ask for them."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch

from listen import ListenConfig, ListenForConditionalGeneration, ListenProcessor
from listen.configuration_listen import BACKBONES
from listen.processing_listen import feature_extractor_for

from .harness import Measurement, compare

MINIATURE = Path(__file__).resolve().parents[1] / "model_cards" / "listen-tiny"


class Setting:
    """What a benchmark runs on.

    Args:
        options: The options of `benchmarks.run`.
    """

    def __init__(self, options: Namespace) -> None:
        self.options = options
        self.device: str = options.device

    @cached_property
    def model(self) -> ListenForConditionalGeneration:
        """The miniature, the backbones in the folders of `--speech` and `--llm`, or a preset with random weights."""
        options = self.options
        if options.speech and options.llm:
            config = ListenConfig.from_backbones(options.speech, options.llm)
            ListenProcessor.from_backbones(config)  # chooses the placeholder ids
            model = ListenForConditionalGeneration.from_backbones(config, dtype=getattr(torch, options.dtype))
        elif options.preset:
            model = random_model(options.preset, self.device, options.dtype)
        else:
            model = ListenForConditionalGeneration.from_pretrained(MINIATURE, dtype=getattr(torch, options.dtype))
        model.generation_config.pad_token_id = 0
        return model.to(self.device).eval()

    @property
    def name(self) -> str:
        """Name of the model, for titles."""
        options = self.options
        folders = [Path(folder).name for folder in (options.speech, options.llm) if folder]
        return " + ".join(folders) or options.preset or MINIATURE.name

    def compare(self, **variants: Callable[[], object]) -> list[Measurement]:
        """Measure all variants in turns, in their order."""
        alone = self.device == "cpu" and torch.get_num_threads() == 1
        clock = time.process_time if alone else time.perf_counter
        return compare(variants, self.device, self.options.repeats, clock)

    def audio(self, batch: int, seconds: float, padded_seconds: float = 0.0) -> dict[str, torch.Tensor]:
        """Features of a batch of noise, with silence up to `padded_seconds`."""
        extractor = feature_extractor_for(self.model.config)
        rate = extractor.sampling_rate
        clips = torch.zeros(batch, round(max(seconds, padded_seconds) * rate))  # (batch, samples)
        clips[:, : round(seconds * rate)] = 0.1 * torch.randn(batch, round(seconds * rate))
        return dict(extractor([*clips.numpy()], sampling_rate=rate, return_tensors="pt").to(self.device))

    def inputs(self, audio: dict[str, torch.Tensor], prompts: int | None = None) -> dict[str, torch.Tensor]:
        """Ids and mask for features or encoder frames of a batch, one clip a row: prompts, audio, text."""
        model = self.model
        with torch.no_grad():
            encoded = model._encoded(**audio)
            per_row = model.get_audio_features(encoded=encoded).lengths.tolist()
        pool, batch = model.config.prompt_pool_config, len(per_row)
        wanted = self.options.prompts if prompts is None else prompts
        count = (pool.num_prompts if wanted is None else wanted) if pool is not None else 0
        before = [[model.config.prompt_token_id] * count + [model.config.audio_token_id] * n for n in per_row]
        ordinary = min(model.config.audio_token_id, model.config.prompt_token_id)  # ids below stand for text
        text = torch.randint(3, max(ordinary, 4), (batch, self.options.text))
        ids = torch.cat([torch.tensor(before), text], dim=1).to(self.device)  # (batch, positions)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def encoded(self, audio: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Encoder frames of features, as they are stored."""
        return dict(self.model.encode_audio(**audio))

    def embeddings(self, ids: torch.Tensor) -> torch.Tensor:
        """Random embeddings in the shape of the input, `(batch, positions, width)`."""
        width, dtype = self.model.config.text_width, self.model.language_model.dtype
        return 0.02 * torch.randn(*ids.shape, width, dtype=dtype, device=ids.device)


def random_model(preset: str, device: str, dtype: str) -> ListenForConditionalGeneration:
    """A preset with random weights on the device: frozen backbones in `dtype`, trainable parameters in float32."""
    config = ListenConfig.from_preset(preset)
    if config.audio_token_id is None:
        config.audio_token_id, config.prompt_token_id = (config.get_text_config().vocab_size + i for i in range(2))
    for name, section in BACKBONES.items():
        if getattr(config, section) is not None:
            kept = torch.float32 if name in config.trainable else getattr(torch, dtype)
            getattr(config, section).dtype = kept
    with torch.device(device):
        model = ListenForConditionalGeneration(config)
    return model.to(device)  # some encoders of transformers make a parameter on the CPU all the same
