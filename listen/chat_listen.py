"""Chat messages with audio content: as plain text for any chat template, and as clips."""

import os
import re
from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import count
from typing import Any

from transformers.utils.chat_template_utils import _get_template_variables

from .arguments_listen import is_idle, unknown_name
from .placeholders_listen import AUDIO_TOKEN
from .sources_listen import AUDIO_TYPES

# For LLMs that come without a chat template.
DEFAULT_CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ 'USER: ' + message['content'] + '\n' }}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{ 'ASSISTANT: ' }}{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}{{ '\n' }}"
    "{%- else -%}{{ message['content'] + '\n' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
)

# Position of the recordings in an instruction, or of a text in place of them; without it they come first.
INPUT_FIELD = "{input}"

_PROBE = 7_304_118_526_000  # a number that no template contains
_AUDIO_KEYS = ("audio", "array", "raw", "bytes", "path", "url")  # the first one given counts: rows may add a path


def split_keywords(
    kwargs: dict[str, Any], known: Collection[str], template: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keywords of a call (`known`) and variables of the template.

    Raises:
        TypeError: a keyword that is neither.
        ValueError: the template cannot be parsed.
    """
    try:
        variables = _get_template_variables(template)
    except Exception as error:  # of jinja2, which only templates import
        raise ValueError(f"the chat template {template!r:.80} cannot be read ({error}); give another one") from error
    options: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for name, value in kwargs.items():
        if name in known or name in variables:
            (options if name in known else others)[name] = value
        elif not is_idle(name, value, [*known, *variables]):
            raise TypeError(unknown_name(f"keyword {name!r}", name, {*known, *variables}))
    return options, others


def as_conversations(conversation: Any) -> tuple[list[list[dict[str, Any]]], bool]:
    """A list of conversations, and whether the caller gave a list of them.

    Raises:
        ValueError: neither a list of messages nor a list of conversations.
    """
    if hasattr(conversation, "messages"):
        return [conversation.messages], False
    if not isinstance(conversation, (list, tuple)) or not conversation:
        raise ValueError(f"a conversation is a list of messages with at least one, not {conversation!r:.80}")
    if isinstance(conversation[0], dict):
        return [list(conversation)], False
    conversations = [getattr(messages, "messages", messages) for messages in conversation]
    for messages in conversations:
        if not isinstance(messages, (list, tuple)) or not messages:
            raise ValueError(f"each conversation is a list of messages with at least one, not {messages!r:.80}")
    return conversations, True


def plain_message(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its content as a string, with `<|audio|>` for each clip.

    Raises:
        ValueError: not a message, or content that is neither text nor audio.
    """
    if not isinstance(message, dict):
        raise ValueError(f"a message is a dict with 'role' and 'content', not {message!r:.80}")
    if not isinstance(message.get("role"), str):
        raise ValueError(f"the message {message!r:.80} has no 'role'; give 'user', 'assistant' or 'system'")
    if message.get("content") is None and not message.get("tool_calls"):
        raise ValueError(f"the message {message!r:.80} has no 'content'; give a string, or a list of texts and clips")
    message = {key: value for key, value in message.items() if value is not None}
    content = message.get("content", "")
    if isinstance(content, (list, tuple)):
        message["content"] = "".join(_plain_item(item) for item in content)
    elif not isinstance(content, str):
        raise ValueError(f"content {content!r:.120} cannot be read; give a string, or a list of texts and clips")
    return message


def _plain_item(item: Any) -> str:
    if isinstance(item, str):
        return item
    kind = item.get("type") if isinstance(item, dict) else None
    if isinstance(kind, str) and kind in AUDIO_TYPES:
        return AUDIO_TOKEN
    if kind == "text" and isinstance(item.get("text"), str):
        return item["text"]
    raise ValueError(f"content {item!r:.120} cannot be read; give {{'type': 'text', 'text': ...}} or 'type': 'audio'")


def fit_template(
    messages: list[dict[str, Any]], render: Callable[[list[list[dict[str, Any]]]], tuple[list[str], Any]]
) -> list[dict[str, Any]]:
    """The messages, with content as a list of one text for those that the template reads in no other form.

    Found by rendering numbers in place of the texts, as templates may trim texts or change their case. A message whose
    number is rendered from a list only, and without the list around it, needs a list.

    Args:
        messages: What `plain_message` makes.
        render: Renders conversations by the template, texts first in its result; may fail.
    """
    probes, numbers = [], {}
    for index, message in enumerate(messages):
        if isinstance(message.get("content"), str):
            numbers[index] = str(_PROBE + index)
            message = {**message, "content": numbers[index]}
        probes.append(message)
    rendered = _rendered_or_empty(probes, render)
    lost = {index for index, number in numbers.items() if number not in rendered}
    if not lost:
        return messages
    rendered = _rendered_or_empty(_with_lists(probes, lost), render).replace('"', "'")
    read = {i for i in lost if numbers[i] in rendered and f"'text': '{numbers[i]}'" not in rendered}
    return _with_lists(messages, read)


def _rendered_or_empty(messages: list[dict[str, Any]], render: Callable[[list], tuple[list[str], Any]]) -> str:
    try:
        return render([messages])[0][0]
    except Exception:  # of any type: a template's own error, which rendering the messages themselves raises again
        return ""


def answer_start(messages: list[dict[str, Any]], text: str, render: Callable[..., tuple[list[str], Any]]) -> int:
    """Where the last answer starts in a rendered conversation; the text's length where it ends without one.

    Args:
        messages: What `plain_message` makes.
        text: The conversation, rendered as a whole.
        render: As in `fit_template`; it also takes `add_generation_prompt`.
    """
    if messages[-1]["role"] != "assistant" or not messages[-1].get("content"):
        return len(text)
    before = fit_template(messages[:-1], render)
    prompt = _rendered_or_empty(before, partial(render, add_generation_prompt=True)) if before else ""
    if prompt and text.startswith(prompt):
        return len(prompt)
    # some templates render an assistant's turn differently from the start of one for generation
    found = text.rfind(messages[-1]["content"].strip())
    return found if found >= 0 else len(text)


def _with_lists(messages: list[dict[str, Any]], indices: set[int]) -> list[dict[str, Any]]:
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]} if index in indices else message
        for index, message in enumerate(messages)
    ]


def check_counts(texts: list[str], counts: list[int] | None, num_clips: int) -> None:
    """One `<|audio|>` for each clip, in each text where `counts` are those of the texts, else over all texts."""
    wanted = [text.count(AUDIO_TOKEN) for text in texts]
    grouped = counts is not None and len(counts) == len(texts)
    given = counts if grouped else num_clips
    if given != (wanted if grouped else sum(wanted)):
        raise ValueError(
            f"the texts hold {wanted} {AUDIO_TOKEN} but {given} clips were given; write one {AUDIO_TOKEN} in the text "
            "for each clip, or use chat messages with audio content, which place them"
        )


def place_input(instruction: str, text: str, separator: str = "") -> str:
    """An instruction with `text` in place of `{input}`; without one, `text` and `separator` come first."""
    if INPUT_FIELD in instruction:
        return instruction.replace(INPUT_FIELD, text)
    return f"{text}{separator}{instruction}"


def place_audio(instruction: str, num_clips: int) -> str:
    """A user's turn as text, with one `<|audio|>` for each clip.

    They replace `{input}` in the instruction; without it they come first. An instruction that already has `<|audio|>`
    is returned unchanged.
    """
    return instruction if AUDIO_TOKEN in instruction else place_input(instruction, AUDIO_TOKEN * num_clips)


def numbered_messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages of a conversation with `Clip 1:` before its first `<|audio|>`, `Clip 2:` before the next, and so on.

    Args:
        messages: What `plain_message` makes.
    """
    numbers = count(1)
    return [
        {**message, "content": re.sub(re.escape(AUDIO_TOKEN), lambda _: _numbered(next(numbers)), message["content"])}
        if isinstance(message.get("content"), str)
        else message
        for message in messages
    ]


def _numbered(number: int) -> str:
    return f"Clip {number}: {AUDIO_TOKEN}\n"


def conversation_clips(messages: Sequence[dict[str, Any]]) -> list[Any]:
    """The clips of a conversation in order, as `ListenProcessor` takes them.

    Raises:
        ValueError: audio content without a clip.
    """
    contents = [message.get("content") for message in messages]
    items = [item for content in contents if isinstance(content, (list, tuple)) for item in content]
    return [_clip(item) for item in items if isinstance(item, dict) and item.get("type") in AUDIO_TYPES]


def _clip(item: dict[str, Any]) -> Any:
    if item["type"] != "audio":  # of the OpenAI API
        if item.get(item["type"]) is None:
            raise ValueError(f"{item['type']} content with the keys {sorted(item)} holds no {item['type']!r}")
        return {item["type"]: item[item["type"]]}
    given = [key for key in _AUDIO_KEYS if item.get(key) is not None]
    if not given:
        raise ValueError(f"audio content with the keys {sorted(item)} holds no clip; give one as {_AUDIO_KEYS}")
    value, rate = item[given[0]], item.get("sampling_rate")
    if given[0] in ("path", "url", "bytes") or isinstance(value, (str, os.PathLike, bytes, dict)):
        return value
    return {"array": value, "sampling_rate": rate} if rate is not None else value


def clips_or_none(conversations: list[list[dict[str, Any]]]) -> list[list[Any]] | None:
    """The clips of each conversation; `None` where none has any."""
    clips = [conversation_clips(messages) for messages in conversations]
    return clips if any(clips) else None


__all__ = [
    "DEFAULT_CHAT_TEMPLATE",
    "INPUT_FIELD",
    "answer_start",
    "check_counts",
    "as_conversations",
    "clips_or_none",
    "conversation_clips",
    "fit_template",
    "numbered_messages",
    "place_audio",
    "place_input",
    "plain_message",
    "split_keywords",
]
