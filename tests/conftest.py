"""Tiny random models with the real architecture, for all tests."""

from __future__ import annotations

import pytest
import torch

from listen.configuration_listen import ListenConfig
from listen.feature_extraction_listen import ListenFeatureExtractor
from listen.modeling_listen import ListenForConditionalGeneration

VOCABULARY = 99
AUDIO_ID, PROMPT_ID = 100, 101  # above the vocabulary: the hardest case


def tiny_config(**overrides: object) -> ListenConfig:
    """A config of under a million parameters whose placeholders lie above the LLM's vocabulary."""
    fields = {
        "speech_config": {
            "model_type": "whisper",
            "d_model": 32,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "decoder_layers": 1,
            "decoder_attention_heads": 2,
            "decoder_ffn_dim": 64,
            "num_mel_bins": 80,
            "vocab_size": 60,
            "pad_token_id": 0,
        },
        "audio_config": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "patch_embed_dim": 16,
        },
        "connector_config": {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64},
        "prompt_pool_config": {"pool_size": 12, "num_prompts": 4},
        "text_config": {
            "model_type": "llama",
            "vocab_size": VOCABULARY,
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        "audio_token_id": AUDIO_ID,
        "prompt_token_id": PROMPT_ID,
    }
    return ListenConfig(**{**fields, **overrides})


def tiny_model(seed: int = 0, **overrides: object) -> ListenForConditionalGeneration:
    """A random model in eval mode; weights are spread out so that outputs differ clearly."""
    torch.manual_seed(seed)
    model = ListenForConditionalGeneration(tiny_config(**overrides))
    with torch.no_grad():
        for parameter in [*model.language_model.parameters(), *model.adapters.default.connector.parameters()]:
            parameter.mul_(5.0 if parameter.dim() > 1 else 1.0)
    return model.eval()


@pytest.fixture()
def model() -> ListenForConditionalGeneration:
    """A fresh tiny random model."""
    return tiny_model()


@pytest.fixture(scope="session")
def shared_model() -> ListenForConditionalGeneration:
    """A tiny random model that no test may change."""
    return tiny_model()


def clip(seconds: float, seed: int = 0) -> torch.Tensor:
    """Noise of `seconds`, `(samples,)` at 16 kHz."""
    return 0.1 * torch.randn(int(16000 * seconds), generator=torch.Generator().manual_seed(seed))


def make_inputs(
    model: ListenForConditionalGeneration,
    rows: list[list[torch.Tensor]],
    num_prompts: int | list[int] = 3,
    text: list[list[int]] | None = None,
) -> dict[str, torch.Tensor]:
    """Model inputs for rows of clips, each row `[prompts][BOS][clips][text]`, left-padded.

    Args:
        model: Counts the audio embeddings.
        rows: Clips of each row.
        num_prompts: Prompts of each row, or of all.
        text: Ids that end each row; some that tell the rows apart by default.
    """
    extractor = ListenFeatureExtractor()
    clips = [c.numpy() for row in rows for c in row]
    audio = dict(extractor(clips, sampling_rate=16000, return_tensors="pt")) if clips else {}
    lengths = iter(model.get_audio_features(**audio).lengths.tolist() if clips else [])
    counts = num_prompts if isinstance(num_prompts, list) else [num_prompts] * len(rows)
    ids = []
    for i, row in enumerate(rows):
        heard = [AUDIO_ID for c in row for _ in range(extractor.num_chunks(len(c))) for _ in range(next(lengths))]
        ids.append([PROMPT_ID] * counts[i] + [1, *heard, *(text[i] if text else [10 + i, 7, 8, 9])])
    longest = max(map(len, ids))
    audio["input_ids"] = torch.tensor([[0] * (longest - len(r)) + r for r in ids])
    audio["attention_mask"] = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in ids])
    return audio
