"""Tiny random backbones on disk, so that runs write adapter-only checkpoints."""

from __future__ import annotations

from pathlib import Path

from conftest import tiny_model
from fixtures_training import character_tokenizer


def save_backbones(folder: Path, seed: int = 0) -> dict[str, str]:
    """Write speech encoder, audio encoder and LLM with its tokenizer; their paths by name."""
    model = tiny_model(seed)
    paths = {name: str(folder / name) for name in ("speech_encoder", "audio_encoder", "language_model")}
    for name, path in paths.items():
        getattr(model, name).save_pretrained(path)
    character_tokenizer().save_pretrained(paths["language_model"])
    return paths


def model_section(paths: dict[str, str], **overrides: object) -> dict[str, object]:
    """Section `model` of arguments for these backbones, with a connector and a pool of a few thousand parameters."""
    return {
        **paths,
        "connector": {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "dropout": 0.0},
        "prompt_pool": {"pool_size": 12, "num_prompts": 4},
        **overrides,
    }
