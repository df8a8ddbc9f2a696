"""The converter of published BEATs files as a module, and models made with it."""

from __future__ import annotations

from listen.commands import convert_beats
from listen.modeling_beats import BeatsForAudioClassification, BeatsModel


def from_checkpoint(checkpoint: dict, attention: str = "sdpa") -> BeatsModel | BeatsForAudioClassification:
    """Model in eval mode with the weights of a checkpoint in the published format."""
    config = convert_beats.convert_config(checkpoint["cfg"])
    config._attn_implementation = attention
    model_class = BeatsForAudioClassification if checkpoint["cfg"]["finetuned_model"] else BeatsModel
    model = model_class(config).eval()
    convert_beats.load_weights(model, convert_beats.convert_weights(checkpoint["model"]))
    return model
