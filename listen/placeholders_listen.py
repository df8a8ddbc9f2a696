"""The two placeholders of a LiSTEN text, and their ids in the vocabulary of any LLM."""

import math
import re

from transformers import AddedToken, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

logger = logging.get_logger(__name__)

AUDIO_TOKEN = "<|audio|>"
PROMPT_TOKEN = "<|prompt|>"
RESERVED_TOKENS = (
    r"[<\[]\|?(reserved(_special)?(_token)?|unused(_token)?|extra(_id)?|special|control|placeholder|dummy)_?\d+"
    r"(_token)?\|?[>\]]|>>unused_\d+<<|<｜(hy_)?place▁holder▁no▁\d+｜>"
)


def place_token(
    tokenizer: PreTrainedTokenizerBase, token: str, token_id: int | None = None, taken: int | None = None
) -> int:
    """Give a placeholder an id, and make the tokenizer treat that id as a special token.

    Without `token_id`, the first of these: the token itself, if it is in the vocabulary; the unused reserved token of
    the highest id (`RESERVED_TOKENS`); a token added after the vocabulary.

    Args:
        tokenizer: Changed in place.
        token: `<|audio|>` or `<|prompt|>`.
        token_id: The required id.
        taken: An id that is in use.

    Raises:
        ValueError: the tokenizer cannot give the token that id.
    """
    known = tokenizer.convert_ids_to_tokens(token_id) if token_id is not None and token_id < len(tokenizer) else None
    symbol = known or token
    if token_id is None and token not in tokenizer.get_vocab():
        symbol = _free_reserved_token(tokenizer, taken) or token
    if symbol == token or _is_reserved(symbol):  # never an ordinary word
        special = AddedToken(symbol, special=True, normalized=False, lstrip=False, rstrip=False)
        tokenizer.add_tokens([special], special_tokens=True)
    placed = tokenizer.convert_tokens_to_ids(symbol)
    if symbol not in tokenizer.added_tokens_encoder or (token_id is not None and placed != token_id):
        raise ValueError(
            f"{token} must have the id {token_id}, but in this tokenizer of {len(tokenizer)} tokens that is "
            f"{known!r} and {token} would get {tokenizer.convert_tokens_to_ids(token)}; use the tokenizer that the "
            "model was built with, or set the id to None"
        )
    return placed


def _free_reserved_token(tokenizer: PreTrainedTokenizerBase, taken: int | None) -> str | None:
    used = {token for token in tokenizer.special_tokens_map.values() if isinstance(token, str)}
    template = str(getattr(tokenizer, "chat_template", None) or "")
    free = [
        (token_id, token)
        for token, token_id in tokenizer.get_vocab().items()
        if _is_reserved(token) and token_id != taken and token not in used and token not in template
    ]
    # the highest id: later releases of an LLM use the lowest first
    return max(free)[1] if free else None


def _is_reserved(token: str) -> bool:
    return re.fullmatch(RESERVED_TOKENS, token, re.IGNORECASE) is not None


def check_unicode(text: str) -> None:
    """Raise a `ValueError` for half of a surrogate pair, which broken JSON escapes leave and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        part = text[max(0, error.start - 10) : error.start + 10]
        raise ValueError(
            f"the text holds {text[error.start]!r}, half of a surrogate pair, in {part!r}; remove it, or repair the "
            "encoding of the text"
        ) from error


def tokenizer_for(config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the LLM that a config names.

    Raises:
        ValueError: it names none.
    """
    found = config.backbone_place("language_model")
    if found is None:
        raise ValueError("config.base_models names no language_model to take the tokenizer from; pass tokenizer=")
    place, options = found
    return AutoTokenizer.from_pretrained(place, **options)


def prepare_padding(tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None) -> None:
    """Make a tokenizer pad on the left, by a token that the LLM has an embedding for.

    Without such a padding token, its end-of-sequence token is taken: padding is masked, so any token does.

    Args:
        tokenizer: Changed in place.
        vocab_size: Rows of the LLM's embedding matrix; unchecked if `None`.

    Raises:
        ValueError: it has neither.
    """
    tokenizer.padding_side = "left"
    is_added = vocab_size is not None and (tokenizer.pad_token_id or 0) >= vocab_size
    if tokenizer.pad_token_id is None or is_added:
        if tokenizer.eos_token is None or tokenizer.eos_token_id >= (vocab_size or math.inf):
            raise ValueError(
                f"the LLM has no embedding for the pad_token {tokenizer.pad_token!r}, nor for the eos_token "
                f"{tokenizer.eos_token!r} in its place: the tokenizer has neither a pad_token nor an eos_token to pad "
                "with; set tokenizer.pad_token"
            )
        if is_added:
            logger.warning(
                f"the LLM has no embedding for the pad_token {tokenizer.pad_token!r} (id {tokenizer.pad_token_id} of "
                f"{vocab_size}); padding by {tokenizer.eos_token!r}"
            )
        tokenizer.pad_token = tokenizer.eos_token


__all__ = [
    "AUDIO_TOKEN",
    "PROMPT_TOKEN",
    "RESERVED_TOKENS",
    "check_unicode",
    "place_token",
    "prepare_padding",
    "tokenizer_for",
]
