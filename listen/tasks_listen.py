"""The test wording of each task: checkpoints carry it, and the task registry of `listen.data` builds on it.

`{question}` is what the user asks, `{input}` the position of the recording; without it the recording comes first.
"""

from collections.abc import Iterable

SER_EMOTIONS = (
    "neutral",
    "angry",
    "disgusted",
    "fearful",
    "happy",
    "sad",
    "surprised",
    "bored",
    "confused",
    "interested",
    "sarcastic",
    "laughing",
    "projected",
    "sleepy",
    "whisper",
)
SER_INSTRUCTION = (
    "Identify the emotional tone of the utterance that is provided. Select from the following options: {options}: "
    "{input}"
)

# The last four are those of behavioural alignment (SpeechEmotionLlama, arXiv 2410.01162), in its own words.
TASK_INSTRUCTIONS = {
    "asr": "What is being said?",
    "er": "Which emotion does the speaker show?",
    "sv": "Do both recordings come from the same speaker? Answer yes or no.",
    "sqa": "{question}",
    "en2zh": "Translate the speech into Chinese.",
    "acap": "Describe the sounds.",
    "voice": "Describe the voice.",
    "first_sound": "Which sound comes first?",
    "response": "{input}",
    "repeat": "Repeat after me in English: {input}",
    "speech_caption": (
        "You will hear a speech utterance spoken by a person. In natural language, provide a caption that faithfully "
        "describes the scenario in which the speech utterance is being spoken. Pay attention to the spoken content, "
        "and make sure to incorporate any emotions expressed in the speech into the caption as needed: {input}"
    ),
    "ser": SER_INSTRUCTION.replace("{options}", ", ".join(SER_EMOTIONS)),
}

TASK_ALIASES = {
    "transcribe": "asr",
    "translate": "en2zh",
    "caption": "acap",
    "emotion": "er",
    "speaker": "sv",
    "question": "sqa",
}
"""Other names of tasks, accepted wherever a task is named, unless a task of that name exists."""


def known_tasks(tasks: Iterable[str]) -> list[str]:
    """The names of tasks, and their other names (`TASK_ALIASES`)."""
    names = list(tasks)
    return [*names, *(alias for alias, name in TASK_ALIASES.items() if name in names)]


__all__ = ["SER_EMOTIONS", "SER_INSTRUCTION", "TASK_ALIASES", "TASK_INSTRUCTIONS", "known_tasks"]
