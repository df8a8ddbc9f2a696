"""Keywords of the processor: their names, their types, and those of other processors that ask for nothing here."""

import difflib
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

GROUPS = ("common_kwargs", "text_kwargs", "audio_kwargs")
ARGUMENTS = ("text", "audio", "sampling_rate", "num_prompts", "task", "num_samples", "return_tensors")
TOKENIZER_KEYWORDS = ("add_special_tokens", "truncation", "return_offsets_mapping")
AUDIO_KEYWORDS = ("max_audio_seconds", "timeout", "max_bytes")
PADDING_KEYWORDS = ("padding", "max_length", "pad_to_multiple_of")
OFFSET_KEYWORDS = ("return_mm_token_type_ids", "return_text_replacement_offsets")
DONE_ANYWAY = {"padding_side": "left", "return_attention_mask": True}
KINDS = {  # type of each keyword, and how an error names it
    **dict.fromkeys(("max_length", "pad_to_multiple_of", "max_bytes"), (Integral, "a whole number above 0")),
    **dict.fromkeys(("max_audio_seconds", "timeout"), (Real, "a number of seconds above 0")),
    **dict.fromkeys(("add_special_tokens", "return_offsets_mapping", *OFFSET_KEYWORDS), (bool, "True or False")),
}
KEYWORDS = (*ARGUMENTS, *AUDIO_KEYWORDS, *TOKENIZER_KEYWORDS, *PADDING_KEYWORDS, *OFFSET_KEYWORDS)


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that is unknown, with the one that was probably meant."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"{what} is unknown; " + (f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}")


def check_kinds(options: dict[str, Any]) -> None:
    """Raise a `ValueError` for a keyword of another type than `KINDS` names, or a number that is not above 0."""
    for name in options.keys() & KINDS.keys():
        value, (kind, expected) = options[name], KINDS[name]
        is_right = isinstance(value, kind) and (kind is bool or (value > 0 and not isinstance(value, bool)))
        if value is not None and not is_right:
            raise ValueError(f"{name}={value!r:.80} must be {expected}")


def is_idle(name: str, value: Any, known: Sequence[str]) -> bool:
    """Whether a keyword of other processors asks for nothing, or for what is done anyway; not a misspelt one."""
    if value is None or (value is False and not difflib.get_close_matches(name, known, n=1, cutoff=0.8)):
        return True
    if name == "padding_side" and value != "left":
        raise ValueError(f"padding_side={value!r}: inputs are padded on the left; leave it out")
    return name in DONE_ANYWAY and DONE_ANYWAY[name] == value


def check_features_alone(waveforms: list[np.ndarray], num_prompts: int | None, task: Any) -> None:
    """Raise a `ValueError` where a call without text has no audio, or arguments that need a text."""
    if not waveforms:
        raise ValueError("give text, audio or both")
    if num_prompts or task is not None:
        raise ValueError(f"num_prompts={num_prompts!r} and task={task!r} need a text")


__all__ = [
    "GROUPS",
    "KEYWORDS",
    "KINDS",
    "TOKENIZER_KEYWORDS",
    "check_features_alone",
    "check_kinds",
    "is_idle",
    "unknown_name",
]
