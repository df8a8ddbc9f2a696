"""The converter of published BEATs files as a module, and models made with it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from listen.modeling_beats import BeatsForAudioClassification, BeatsModel

_script = Path(__file__).parent.parent / "examples" / "convert_beats.py"
_spec = importlib.util.spec_from_file_location("convert_beats", _script)
convert_beats = importlib.util.module_from_spec(_spec)
sys.modules["convert_beats"] = convert_beats
_spec.loader.exec_module(convert_beats)


def from_checkpoint(checkpoint: dict, attention: str = "sdpa") -> BeatsModel | BeatsForAudioClassification:
    """Model in eval mode with the weights of a checkpoint in the published format."""
    config = convert_beats.convert_config(checkpoint["cfg"])
    config._attn_implementation = attention
    model_class = BeatsForAudioClassification if checkpoint["cfg"]["finetuned_model"] else BeatsModel
    model = model_class(config).eval()
    convert_beats.load_weights(model, convert_beats.convert_weights(checkpoint["model"]))
    return model
