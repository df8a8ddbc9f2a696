"""From text or chat messages with audio to the inputs of a LiSTEN model.

Texts hold one `<|audio|>` for each clip, whatever the LLM. The processor replaces it by one id for each audio embedding
of the clip, and puts k prompt ids first. Neither id needs a row in the LLM's embedding matrix: they are the tokenizer's
own placeholders where it has them, else reserved tokens of its vocabulary, else ids added above it.
"""

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from operator import index
from typing import Any

import numpy as np
import torch
from transformers import (
    BatchFeature,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    SequenceFeatureExtractor,
)
from transformers.utils import logging
from transformers.utils.chat_template_utils import render_jinja_template

from .arguments_listen import (
    GROUPS,
    KEYWORDS,
    KINDS,
    TOKENIZER_KEYWORDS,
    check_features_alone,
    check_kinds,
    is_idle,
    unknown_name,
)
from .audio_listen import flat_clips, load_clips
from .chat_listen import (
    DEFAULT_CHAT_TEMPLATE,
    answer_start,
    as_conversations,
    check_counts,
    clips_or_none,
    fit_template,
    numbered_messages,
    place_audio,
    plain_message,
    split_keywords,
)
from .configuration_adapter import ListenConnectorConfig, check_padding
from .feature_extraction_listen import feature_extractor_for
from .language_models_listen import check_context, context_limit
from .placeholders_listen import AUDIO_TOKEN, PROMPT_TOKEN, check_unicode, place_token, prepare_padding, tokenizer_for
from .tasks_listen import TASK_ALIASES, TASK_INSTRUCTIONS, known_tasks

logger = logging.get_logger(__name__)

_MOST_POSITIONS = 2**22  # that a text is padded to: more than any LLM reads, and what fits into memory


class ListenProcessor(ProcessorMixin):
    """A `ListenFeatureExtractor` and any tokenizer in one processor.

    The tokenizer is changed: it pads on the left, with its end-of-sequence token where it has no padding token, and
    both placeholder ids become special tokens.

    Args:
        feature_extractor: Makes the inputs of both encoders.
        tokenizer: The LLM's.
        chat_template: In place of the tokenizer's; `DEFAULT_CHAT_TEMPLATE` (`USER: ...`, `ASSISTANT: ...`) where
            neither is given.
        audio_token_id: Placeholder id of one audio embedding; chosen if `None`.
        prompt_token_id: Placeholder id of one prompt; chosen if `None`.
        num_prompts: Default k.
        pool_size: Number of prompts in the pool, the maximum of k; unchecked if `None`.
        prompts_in_layers: Whether prompts are in the LLM's layers: it then does not read their placeholders.
        connector: Fields of the model's `ListenConnectorConfig`, which counts the audio embeddings of a clip; its
            defaults if `None`.
        tasks: Names of the tasks that own a part of the pool; a call's `task` then becomes `task_ids`.
        task_instructions: Wording of each task; `TASK_INSTRUCTIONS` by default.
        context_length: Positions of the LLM; a longer input with audio or prompts raises an error before its features
            are computed. Unchecked if `None`.
        max_audio_seconds: Longer clips are cut to it, with a warning; no limit if `None`.
        vocab_size: Rows of the LLM's embedding matrix; ids of tokens that were added above them are refused.

    Raises:
        ValueError: a placeholder id that the tokenizer cannot provide, or no token to pad with.
    """

    audio_token = AUDIO_TOKEN
    prompt_token = PROMPT_TOKEN

    def __init__(
        self,
        feature_extractor: SequenceFeatureExtractor,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | dict[str, str] | None = None,
        audio_token_id: int | None = None,
        prompt_token_id: int | None = None,
        num_prompts: int = 0,
        pool_size: int | None = None,
        prompts_in_layers: bool = False,
        connector: dict[str, Any] | None = None,
        tasks: list[str] | None = None,
        task_instructions: dict[str, str] | None = None,
        context_length: int | None = None,
        max_audio_seconds: float | None = None,
        vocab_size: int | None = None,
    ) -> None:
        template = chat_template or getattr(tokenizer, "chat_template", None) or DEFAULT_CHAT_TEMPLATE
        super().__init__(feature_extractor, tokenizer, chat_template=template)
        prepare_padding(tokenizer, vocab_size)
        self.audio_token_id = place_token(tokenizer, AUDIO_TOKEN, audio_token_id)
        self.prompt_token_id = place_token(tokenizer, PROMPT_TOKEN, prompt_token_id, taken=self.audio_token_id)
        # the names of both ids in the tokenizer's vocabulary
        self._audio_symbol, self._prompt_symbol = tokenizer.convert_ids_to_tokens(
            [self.audio_token_id, self.prompt_token_id]
        )
        self.pool_size = pool_size
        self.prompts_in_layers = prompts_in_layers
        self.num_prompts = self._checked_num_prompts(num_prompts)
        self._connector_config = ListenConnectorConfig(**(connector or {}))
        check_padding(self._connector_config, feature_extractor.pad_to_30s)
        self.connector = self._connector_config.settings()
        self.tasks = list(tasks) if tasks is not None else None
        self.task_instructions = dict(TASK_INSTRUCTIONS if task_instructions is None else task_instructions)
        self.context_length = context_length
        self.max_audio_seconds = max_audio_seconds
        self.vocab_size = vocab_size

    # ------------------------------------------------------------------ making one

    @classmethod
    def from_backbones(
        cls, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None = None, **kwargs: Any
    ) -> "ListenProcessor":
        """The processor that a config needs, over the tokenizer of the LLM in `config.base_models`.

        `config.audio_token_id` and `config.prompt_token_id` are filled in where they are `None`.

        Args:
            config: A `ListenConfig`.
            tokenizer: In place of the one of `config.base_models["language_model"]`.
            **kwargs: Arguments of the processor, in place of those from the config.

        Raises:
            ValueError: no tokenizer found, or placeholder ids that it cannot provide.
        """
        pool = config.prompt_pool_config
        settings = {
            "audio_token_id": config.audio_token_id,
            "prompt_token_id": config.prompt_token_id,
            "num_prompts": pool.num_prompts if pool is not None else 0,
            "pool_size": pool.pool_size if pool is not None else 0,
            "prompts_in_layers": pool is not None and pool.form == "layers",
            "tasks": pool.tasks if pool is not None and pool.strategy == "task" else None,
            "connector": config.connector_config.settings(),
            "context_length": context_limit(config.text_config),
            "vocab_size": config.text_config.get_text_config().vocab_size,
        }
        extractor = feature_extractor_for(config)
        processor = cls(extractor, tokenizer or tokenizer_for(config), **{**settings, **kwargs})
        config.audio_token_id, config.prompt_token_id = processor.audio_token_id, processor.prompt_token_id
        return processor

    # ------------------------------------------------------------------ text and audio to model inputs

    def __call__(
        self,
        text: str | list[str] | np.ndarray | None = None,
        audio: Any = None,
        sampling_rate: int | None = None,
        num_prompts: int | None = None,
        task: str | list[str] | None = None,
        num_samples: list[int] | list[list[int]] | None = None,
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Model inputs for one text or a batch.

        Args:
            text: With one `<|audio|>` for each clip; `None` for the features of the clips alone. A waveform
                `(samples,)` in its place, as models of speech recognition take it, asks for its transcription: the
                result has `instruction_ids` and `instruction_mask`, for which `generate` returns the answer alone.
            audio: One clip, a list of all clips in the order of their placeholders, or a list of clips for each text.
                A clip is anything that `audio_listen.load_waveform` reads: array, tensor, path, URL, bytes,
                `datasets` row.
            sampling_rate: Rate of clips given as raw arrays; files and rows state their own.
            num_prompts: k, for all texts; `self.num_prompts` by default.
            task: Task of each text, or one for all. Becomes `task_ids` where the pool is divided among `tasks`; ignored
                by other pools.
            num_samples: In place of `audio`, the lengths of clips at the extractor's rate, as one list or a list for
                each text. Placeholders are written and no features computed: for clips that were loaded or encoded
                before.
            return_tensors: "pt", "np", or `None` for lists (features stay tensors).
            **kwargs: `max_audio_seconds` in place of the processor's (`inf` for whole clips), `timeout` and `max_bytes`
                of clips at an address, see `audio_listen.load_waveform`, `padding` (`True` by
                default, "max_length", `False`), `max_length`, `pad_to_multiple_of`, `truncation`, `add_special_tokens`
                (by default unless the texts begin with BOS), `return_offsets_mapping`, `return_mm_token_type_ids`,
                `return_text_replacement_offsets`; also inside `text_kwargs`, `audio_kwargs` or `common_kwargs`.

        Returns:
            `input_ids` and `attention_mask` `(batch, sequence)`, padded on the left; with audio `input_features`,
            `input_features_mask`, `input_values`, `input_values_mask` over all chunks of all clips, see
            `ListenFeatureExtractor`; `task_ids` `(batch,)`.

        Raises:
            TypeError: an unknown keyword.
            ValueError: clips and placeholders that do not match, an input that exceeds the LLM's context, or any other
                invalid value.
        """
        if isinstance(text, np.ndarray) and audio is None:
            return self._transcription(text, sampling_rate=sampling_rate, return_tensors=return_tensors, **kwargs)
        options = _flattened(kwargs)
        sampling_rate = options.pop("sampling_rate", sampling_rate)
        return_tensors = options.pop("return_tensors", return_tensors)
        num_prompts, task = options.pop("num_prompts", num_prompts), options.pop("task", task)
        if audio is not None and num_samples is not None:
            raise ValueError("give audio or num_samples, the lengths of clips loaded before, not both")
        limit = options.get("max_audio_seconds")
        limit = self.max_audio_seconds if limit is None else limit
        if return_tensors not in (None, "pt", "np"):
            raise ValueError(f"return_tensors={return_tensors!r:.80} must be 'pt', 'np' or None")
        waveforms, counts = [], None
        if audio is not None:
            fetching = {name: options.get(name) for name in ("timeout", "max_bytes")}
            rate = self.feature_extractor.sampling_rate
            waveforms, counts = load_clips(audio, sampling_rate, rate, limit, **fetching)
        lengths = [*map(len, waveforms)]
        if num_samples is not None:
            nested = num_samples.tolist() if isinstance(num_samples, (np.ndarray, torch.Tensor)) else num_samples
            lengths, counts = flat_clips(nested, np.isscalar)
            try:
                lengths = [*map(index, lengths)]
            except TypeError as error:
                raise ValueError(f"num_samples={num_samples!r:.80} must be whole numbers, one for each clip") from error
            if limit is not None and max(lengths, default=0) > limit * self.feature_extractor.sampling_rate:
                raise ValueError(f"num_samples exceed max_audio_seconds={limit:g}; cut these clips before encoding")
        if text is None:
            check_features_alone(waveforms, num_prompts, task)
            data = {}
        else:
            texts = self._checked_texts(text)
            check_counts(texts, counts, len(lengths))
            k = self._checked_num_prompts(self.num_prompts if num_prompts is None else num_prompts)
            data = self._padded(self._encode(texts, lengths, k, options), k, options)
            data.update(self._task_ids(task, len(texts)))
        if waveforms:
            data.update(self.feature_extractor.extract(waveforms))
        return BatchFeature(data, tensor_type=return_tensors, skip_tensor_conversion=self.skip_tensor_conversion)

    def _transcription(self, waveform: np.ndarray, **kwargs: Any) -> BatchFeature:
        """Inputs of `generate` for the task `"asr"` on a waveform `(samples,)`."""
        messages = [{"role": "user", "content": place_audio(self.instruction("asr"), 1)}]
        inputs = self(self.apply_chat_template(messages, add_generation_prompt=True), waveform, task="asr", **kwargs)
        inputs["instruction_ids"] = inputs.pop("input_ids")  # (1, sequence)
        inputs["instruction_mask"] = inputs.pop("attention_mask")  # (1, sequence)
        return inputs

    def _encode(self, texts: list[str], num_samples: list[int], k: int, options: dict[str, Any]) -> dict[str, list]:
        """Rows of ids without prompts and padding."""
        lengths = {"num_samples": num_samples}
        replacements = [self.replace_audio_token(lengths, index) for index in range(len(num_samples))]
        expanded, offsets = self.get_text_with_replacements(list(texts), audio_replacements=replacements)
        chosen = self._tokenizer_options(texts, k, options)
        try:
            encoded = dict(self.tokenizer(expanded, **chosen))
        except Exception as error:  # of any type: tokenizers come from many packages
            raise ValueError(f"the tokenizer cannot read the texts with {chosen}: {error or type(error)}") from error
        self._check_special_mm_tokens(expanded, encoded, modalities=["audio"])
        if options.get("return_mm_token_type_ids"):
            encoded["mm_token_type_ids"] = self.create_mm_token_type_ids(encoded["input_ids"])
        if options.get("return_text_replacement_offsets"):
            encoded["text_replacement_offsets"] = offsets
        return encoded

    def _tokenizer_options(self, texts: list[str], k: int, options: dict[str, Any]) -> dict[str, Any]:
        chosen = {name: options[name] for name in TOKENIZER_KEYWORDS if options.get(name) is not None}
        if "add_special_tokens" not in chosen:
            chosen["add_special_tokens"] = not self._begin_with_bos(texts)
        if chosen.get("truncation") and options.get("max_length"):
            chosen["max_length"] = options["max_length"] - k
            if chosen["max_length"] < 0:
                raise ValueError(f"max_length={options['max_length']} has no room for num_prompts={k}; raise it")
        return {"padding": False, "return_token_type_ids": False, "return_attention_mask": True, **chosen}

    def _begin_with_bos(self, texts: list[str]) -> bool:
        """Whether the texts start with BOS, as texts rendered by a chat template may."""
        bos = self.tokenizer.bos_token
        having = {bool(bos) and text.startswith(bos) for text in texts}
        if len(having) > 1:
            raise ValueError(f"some texts of the batch begin with {bos!r} and others do not; pass add_special_tokens=")
        return having.pop()

    def replace_audio_token(self, audio_inputs: dict[str, Any], audio_idx: int, **kwargs: Any) -> str:
        """The replacement of the `<|audio|>` of a clip: its symbol once for each audio embedding."""
        return self._audio_symbol * self.num_audio_embeddings(audio_inputs["num_samples"][audio_idx])

    def num_audio_embeddings(self, num_samples: int) -> int:
        """Number of audio embeddings of a clip, over all of its chunks.

        Args:
            num_samples: Length of the clip at the extractor's sampling rate.

        Raises:
            ValueError: `num_samples` is below 1.
        """
        extractor = self.feature_extractor
        if self._connector_config.salmonn_compat:  # padding is encoded too
            num_samples = extractor.num_chunks(num_samples) * extractor.chunk_samples
        seconds = extractor.geometry.frame_seconds
        count = partial(self._connector_config.num_embeddings, frame_seconds=seconds)
        return sum(map(count, extractor.num_encoder_frames(num_samples)))

    def _padded(self, encoded: dict[str, list], k: int, options: dict[str, Any]) -> dict[str, list]:
        """Rows with k prompts in front and padding in front of the prompts."""
        rows = encoded["input_ids"]
        lengths = [k + len(row) for row in rows]
        longest = int(np.argmax(lengths))
        if self.context_length is not None and lengths[longest] > self.context_length:
            num_audio = list(rows[longest]).count(self.audio_token_id)
            check_context(self.context_length, lengths[longest], k, num_audio)
        widths = _padded_widths(lengths, options)
        fills = {  # of prompts and of padding
            "input_ids": (self.prompt_token_id, self.tokenizer.pad_token_id),
            "attention_mask": (0 if self.prompts_in_layers else 1, 0),
            "mm_token_type_ids": (0, 0),
            "offset_mapping": ((0, 0), (0, 0)),
        }
        data = dict(encoded)
        for name in fills.keys() & encoded.keys():
            prompt, padding = fills[name]
            data[name] = [
                [padding] * (width - length) + [prompt] * k + list(row)
                for row, width, length in zip(encoded[name], widths, lengths, strict=True)
            ]
        return data

    # ------------------------------------------------------------------ checks

    def _checked_texts(self, text: Any) -> list[str]:
        texts = [text] if isinstance(text, str) else text
        try:
            joined = "\n".join(texts if isinstance(texts, (list, tuple)) else [None])
        except TypeError as error:
            raise ValueError(f"text must be a string or a list of strings, not {text!r:.80}") from error
        if not texts:
            raise ValueError("text must be a string or a list of strings with at least one, not an empty list")
        if not joined.isascii():
            check_unicode(joined)
        reserved = {PROMPT_TOKEN, self._prompt_symbol, self._audio_symbol} - {AUDIO_TOKEN}
        for symbol in reserved:
            if symbol in joined:
                raise ValueError(
                    f"the text holds {symbol!r}, which only the processor may write; remove it, and use num_prompts= "
                    f"for prompts and {AUDIO_TOKEN!r} for clips"
                )
        return list(texts)

    def _checked_num_prompts(self, num_prompts: int) -> int:
        if isinstance(num_prompts, bool) or not isinstance(num_prompts, (int, np.integer)) or num_prompts < 0:
            raise ValueError(f"num_prompts={num_prompts!r} must be a whole number, 0 or more")
        if self.pool_size is not None and num_prompts > self.pool_size:
            raise ValueError(f"num_prompts={num_prompts}, but the pool holds pool_size={self.pool_size}; ask for fewer")
        return int(num_prompts)

    def _task_ids(self, task: str | list[str] | None, batch_size: int) -> dict[str, torch.Tensor]:
        if task is None or self.tasks is None:
            return {}
        if not isinstance(task, (str, list, tuple)):
            raise ValueError(f"task={task!r:.80} must be the name of a task, or a list with one for each text")
        names = [task] * batch_size if isinstance(task, str) else list(task)
        if len(names) != batch_size:
            raise ValueError(f"task names {len(names)} tasks for {batch_size} texts; give one for each or one for all")
        names = [name if name in self.tasks else TASK_ALIASES.get(str(name), name) for name in names]
        unknown = [name for name in names if name not in self.tasks]
        if unknown:
            raise ValueError(f"task={unknown[0]!r} owns no part of the pool; tasks: {', '.join(self.tasks)}")
        return {"task_ids": torch.tensor([*map(self.tasks.index, names)])}  # (batch,)

    def _check_special_mm_tokens(self, text: list[str], text_inputs: Any, modalities: list[str]) -> None:
        """As upstream, for a symbol that need not be `<|audio|>`: no audio placeholder is lost or added."""
        self.check_ids(text_inputs["input_ids"])
        wanted = [sample.count(self._audio_symbol) for sample in text]
        found = [list(ids).count(self.audio_token_id) for ids in text_inputs["input_ids"]]
        if wanted != found:
            raise ValueError(
                f"the texts hold {wanted} audio embeddings, but {found} are left after tokenization: truncation cut "
                "audio off; raise max_length or shorten the clips"
            )

    def check_ids(self, rows: list[list[int]]) -> None:
        """Raise a `ValueError` for ids in the rows that the LLM has no embedding for, other than placeholders."""
        if self.vocab_size is None or len(self.tokenizer) <= self.vocab_size:
            return
        added = {i for row in rows for i in row if i >= self.vocab_size} - {self.audio_token_id, self.prompt_token_id}
        if added:
            raise ValueError(
                f"the LLM has {self.vocab_size} embeddings, none for {self.tokenizer.convert_ids_to_tokens([*added])}; "
                "take them out of the text, or use the LLM's own tokenizer"
            )

    # ------------------------------------------------------------------ chat

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        tools: list[dict | Callable] | None = None,
        documents: list[dict[str, str]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        return_assistant_tokens_mask: bool = False,
        number_clips: bool = False,
        tokenize: bool = False,
        return_tensors: str | None = "pt",
        return_dict: bool = True,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Render chat messages, and process them with `tokenize=True`.

        Content is a string, or a list of `{"type": "text", "text": ...}` and `{"type": "audio", ...}`, the clip under
        `audio`, `path`, `url`, `bytes`, or `array` with `sampling_rate`. The LLM's template gets it as plain text with
        `<|audio|>`, as a string or a list of one text, whichever it reads; so any template works.

        Args:
            conversation: Messages (`{"role", "content"}`), or a list of conversations.
            chat_template: In place of `self.chat_template`: a template, or the name of one.
            tools: For templates with tools.
            documents: For templates with documents.
            add_generation_prompt: Whether to add the beginning of the assistant's turn.
            continue_final_message: Whether to leave the last message open, for the model to continue it.
            return_assistant_tokens_mask: Whether to add `assistant_masks` `(batch, sequence)`, 1 on the assistant's
                tokens; the template must mark them by `{% generation %}`.
            number_clips: Whether to put `Clip 1:`, `Clip 2:` ... before the clips of a conversation, each on its own
                line, so that the text can refer to them by number.
            tokenize: Whether to return model inputs instead of strings.
            return_tensors: As in `__call__`.
            return_dict: `False` for `input_ids` alone.
            processor_kwargs: Keywords of `__call__`; they may also be among `kwargs`.
            **kwargs: Variables of the template (`enable_thinking=...`).

        Returns:
            The rendered conversation, or a list of them, or the result of `__call__`. For conversations that end with
            an answer, `query_mask` `(batch, sequence)` is 0 from it on: what the prompts are selected by in training.

        Raises:
            TypeError: a keyword that neither the template nor `__call__` accepts.
            ValueError: content that cannot be read, or options that exclude each other.
        """
        template = self._resolve_chat_template(chat_template)
        options, variables = split_keywords({**(processor_kwargs or {}), **kwargs}, {*KEYWORDS, *GROUPS}, template)
        if options and not tokenize:
            raise ValueError(f"{', '.join(sorted(options))}: these need tokenize=True")
        if continue_final_message and (add_generation_prompt or return_assistant_tokens_mask):
            raise ValueError(
                "continue_final_message leaves the last message open; it excludes add_generation_prompt and "
                "return_assistant_tokens_mask"
            )
        conversations, is_batch = as_conversations(conversation)
        plain = [[*map(plain_message, messages)] for messages in conversations]
        if number_clips:
            plain = [numbered_messages(messages) for messages in plain]
        variables = {**self.tokenizer.special_tokens_map, **variables, "tools": tools, "documents": documents}
        render = partial(render_jinja_template, chat_template=template, **variables)
        fitted = [fit_template(messages, render) for messages in plain]
        flags = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
        try:
            texts, spans = render(fitted, return_assistant_tokens_mask=return_assistant_tokens_mask, **flags)
        except Exception as error:  # of any type: of jinja2, the template itself, or an operation in it
            raise ValueError(f"the chat template cannot render these messages: {error or type(error)}") from error
        if not tokenize:
            return texts if is_batch else texts[0]
        marked = {"assistant_masks": spans} if return_assistant_tokens_mask else {}
        k, return_tensors = options.get("num_prompts"), options.pop("return_tensors", return_tensors)
        if (self.num_prompts if k is None else k) and self.tokenizer.is_fast and not any(flags.values()):
            starts = [answer_start(messages, text, render) for messages, text in zip(plain, texts, strict=True)]
            if any(start < len(text) for start, text in zip(starts, texts, strict=True)):
                marked["query_mask"] = [[[start, len(text)]] for start, text in zip(starts, texts, strict=True)]
        inputs = self._with_masks(texts, clips_or_none(conversations), marked, return_tensors, options)
        return inputs if return_dict else inputs["input_ids"]

    def _with_masks(
        self, texts: list[str], clips: Any, marked: dict[str, list], return_tensors: str | None, options: dict[str, Any]
    ) -> BatchFeature:
        """Model inputs with masks `(batch, sequence)`: 1 on spans of the texts, for the query 0 from the span on."""
        if not marked:
            return self(texts, clips, return_tensors=return_tensors, **options)
        if not self.tokenizer.is_fast:
            raise ValueError("return_assistant_tokens_mask needs a fast tokenizer, which gives the position of tokens")
        wanted = {"return_offsets_mapping": True, "return_text_replacement_offsets": True}
        inputs = self(texts, clips, return_tensors=None, **{**options, **wanted})
        for name, spans in marked.items():
            rows = self._adjust_assistant_masks_indices(dict(inputs), spans)["assistant_masks"]
            if name == "query_mask":
                rows = [[1 - seen for seen in accumulate(row, max)] for row in rows]
            inputs[name] = rows
        for name, key in zip(wanted, ("offset_mapping", "text_replacement_offsets"), strict=True):
            if not options.get(name):
                inputs.pop(key)
        return inputs.convert_to_tensors(tensor_type=return_tensors)

    # ------------------------------------------------------------------ tasks and answers

    def instruction(self, task: str, question: str | None = None) -> str:
        """The wording of a task.

        Args:
            task: A key of `task_instructions`, or an alias of one (`TASK_ALIASES`).
            question: For tasks whose wording holds `{question}`, and only for them.

        Raises:
            ValueError: an unknown task, a missing question, or a question for a task without one.
        """
        if isinstance(task, str) and task not in self.task_instructions:
            task = TASK_ALIASES.get(task, task)
        if not isinstance(task, str) or task not in self.task_instructions:
            raise ValueError(unknown_name(f"task {task!r}", str(task), known_tasks(self.task_instructions)))
        wording = self.task_instructions[task]
        if ("{question}" in wording) != bool(question):
            need = f"has its own wording and takes no question, got {question!r}" if question else "needs a question"
            raise ValueError(f"task {task!r} {need}")
        return wording.replace("{question}", question or "")

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **kwargs: Any) -> list[str]:
        """Texts of a batch of ids; see `decode`."""
        return [self.decode(ids, skip_special_tokens=skip_special_tokens, **kwargs) for ids in sequences]

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **kwargs: Any) -> str | list[str]:
        """Text of ids, or texts of a batch of them.

        Ids without a token, such as the -100 of labels and the unused rows of an LLM's vocabulary, are skipped;
        placeholders are special tokens.

        Args:
            token_ids: `(sequence,)` or `(batch, sequence)`.
            skip_special_tokens: Whether to leave special tokens out.
            **kwargs: As the tokenizer's `decode`.
        """
        ids = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
        ids = [ids] if isinstance(ids, int) else ids
        if len(ids) and hasattr(ids[0], "__len__"):
            return self.batch_decode(ids, skip_special_tokens=skip_special_tokens, **kwargs)
        known = [token_id for token_id in ids if 0 <= token_id < self._num_ids]
        return self.tokenizer.decode(known, skip_special_tokens=skip_special_tokens, **kwargs)

    @property
    def _num_ids(self) -> int:
        return max(self.tokenizer.vocab_size, *(token_id + 1 for token_id in self.tokenizer.added_tokens_decoder))


# ---------------------------------------------------------------------- reading arguments


def _flattened(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keywords with those inside `text_kwargs` and the like moved to the top.

    Raises:
        TypeError: an unknown keyword, or a group that is no dict.
        ValueError: a keyword given twice, or of another type.
    """
    flat = dict(kwargs)
    for group in GROUPS:
        given = flat.pop(group, None) or {}
        if not isinstance(given, dict):
            raise TypeError(f"{group}={given!r:.80} must be a dict of keywords")
        for name, value in given.items():
            if name in flat:
                raise ValueError(f"{name} was given twice: as a keyword and in {group}")
            flat[name] = value
    for name in flat.keys() - set(KEYWORDS):
        if not is_idle(name, flat.pop(name), KEYWORDS):
            raise TypeError(unknown_name(f"keyword {name!r}", name, KEYWORDS))
    if flat.keys() & KINDS.keys():
        check_kinds(flat)
    return flat


def _padded_widths(lengths: list[int], options: dict[str, Any]) -> list[int]:
    """The width of each row after padding."""
    padding, max_length = options.get("padding", True), options.get("max_length")
    strategy = getattr(padding, "value", padding)
    if strategy in (False, "do_not_pad"):
        return lengths
    if strategy not in (True, "longest", "max_length"):
        raise ValueError(f"padding={padding!r} is unknown; choose True, 'longest', 'max_length' or False")
    if strategy == "max_length" and max_length is None:
        raise ValueError("padding='max_length' needs max_length=")
    width = max(*lengths, max_length) if strategy == "max_length" else max(lengths)
    step = options.get("pad_to_multiple_of") or 1
    padded = -(-width // step) * step
    if padded > max(_MOST_POSITIONS, *lengths):
        raise ValueError(f"max_length={max_length} and pad_to_multiple_of={step} pad to {padded} positions; lower them")
    return [padded] * len(lengths)


ListenProcessor.register_for_auto_class()

__all__ = ["TASK_INSTRUCTIONS", "ListenProcessor", "feature_extractor_for"]
