"""A fast tokenizer: a piece for every word and Chinese character of the corpus, letters or bytes for the rest."""

from __future__ import annotations

import string
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from listen.data.corpus import grammar, prosody, responses, sounds, speakers
from listen.data.tasks import get_task, wordings

SPACE = "▁"
SPECIAL_TOKENS = (
    "<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|audio|>", "<|prompt|>", "<|silence|>"
)  # fmt: skip
# A line break follows every clip, so that two voices can be told apart.
CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'assistant' %}"
    "{{- '<|assistant|>' }}{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{%- elif message['role'] in ['system', 'user'] %}"
    "{%- set content = message['content'].replace('<|audio|>\\n', '<|audio|>') %}"
    "{{- '<|' + message['role'] + '|>' + content.replace('<|audio|>', '<|audio|>\\n') }}"
    "{%- else %}{{ raise_exception('Unknown role ' + message['role']) }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{% endif %}"
)


def build_tokenizer(more_words: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    """Return the tokenizer of the words of corpus and tasks, and of `more_words`.

    Any text can be encoded: what is not a known word falls back to characters, then bytes.
    """
    pieces = [*SPECIAL_TOKENS, *_byte_pieces(), *_characters(), *_words(), *(SPACE + word for word in more_words)]
    pieces = list(dict.fromkeys(pieces))
    # longer pieces first: a word always beats its letters
    scores = [(piece, 0.0 if piece in SPECIAL_TOKENS else -1.0 if len(piece) > 1 else -20.0) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("\n"), "isolated"), pre_tokenizers.Metaspace(SPACE, prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(SPACE, prepend_scheme="always"), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left",
        additional_special_tokens=list(SPECIAL_TOKENS[3:]),
    )  # fmt: skip
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _byte_pieces() -> list[str]:
    return [f"<0x{value:02X}>" for value in range(256)]


def _characters() -> list[str]:
    return [SPACE, "\n", SPACE + "\n", *string.ascii_letters, *string.digits, *string.punctuation, *_chinese()]


def _chinese() -> list[str]:
    tables = (grammar.PERSONS, grammar.ADJECTIVES, grammar.VERBS, grammar.COLOURS, grammar.PLACES, grammar.TIMES)
    texts = [text for table in (*tables, grammar.CALLS, grammar.DIGITS) for text in table.values()]
    texts += [part for pair in grammar.OBJECTS.values() for part in pair] + ["号码的一"]
    return sorted(set("".join(texts)))


def _words() -> list[str]:
    """Every word of sentences, questions, captions, voices, emotions and instructions, with the space before it."""
    texts = [*grammar.spoken_words(), *prosody.EMOTIONS, *sounds.PHRASES.values(), "and then while yes no voice"]
    texts += [*speakers.ACCENTS, *speakers.TIMBRES, *speakers.SIZES, *speakers.REGISTERS, *wordings()]
    texts += [wording for pair in grammar.QUESTIONS.values() for wording in pair]
    texts += [*responses.response_words(), *get_task("ser").labels]
    cleaned = " ".join(texts).replace("{", " ").replace("}", " ")
    for mark in "?!.,:":
        cleaned = cleaned.replace(mark, " ")
    return sorted({SPACE + word for word in cleaned.split() if len(word) > 1} | {SPACE + "a", SPACE + "i"})
