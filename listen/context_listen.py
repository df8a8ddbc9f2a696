"""How many positions an LLM has, and whether an input with audio fits into them."""

from transformers import PreTrainedConfig

_STRETCHED = ("linear", "dynamic", "yarn")


def context_limit(text_config: PreTrainedConfig) -> int | None:
    """Positions of an LLM; `None` for those that name no limit.

    `max_position_embeddings`, or what scaled rotary positions stretch it to. A sliding window narrows what a layer
    looks back upon and not the positions, so it sets no limit; recurrent models and linear biases (ALiBi) have none,
    but for the table of MPT's.

    Args:
        text_config: The LLM's config.
    """
    config = text_config.get_text_config()
    limit = getattr(config, "max_position_embeddings", getattr(config, "max_seq_len", None))
    if limit is None or getattr(config, "alibi", False):
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") not in _STRETCHED:  # others state the stretched length themselves
        return limit
    trained = rope.get("original_max_position_embeddings") or limit
    return max(limit, int(trained * (rope.get("factor") or 1.0)))


def check_context(limit: int | None, positions: int, num_prompts: int, num_audio: int) -> None:
    """Refuse an input with audio or prompts that is longer than the LLM's context.

    Args:
        limit: See `context_limit`.
        positions: Length of the longest row, padding not counted.
        num_prompts: Prompts among them.
        num_audio: Audio embeddings among them.

    Raises:
        ValueError: it does not fit.
    """
    if limit is None or positions <= limit or not num_prompts + num_audio:
        return
    text = positions - num_prompts - num_audio
    raise ValueError(
        f"the input has {positions} positions ({num_prompts} prompts, {num_audio} audio embeddings, {text} of text), "
        f"more than the LLM's context of {limit}; cut the clips with max_audio_seconds=, ask for fewer prompts, or ask "
        "about one part of the audio after the other"
    )


__all__ = ["check_context", "context_limit"]
