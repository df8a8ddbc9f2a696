"""What generation needs beyond transformers: audio that is encoded once, and placeholder ids that no processor sees."""

import warnings
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, ProcessorMixin
from transformers.generation.candidate_generator import (
    AssistedCandidateGenerator,
    CandidateGenerator,
    EarlyExitCandidateGenerator,
    PromptLookupCandidateGenerator,
)
from transformers.masking_utils import create_masks_for_generate
from transformers.utils import logging

from .adapter_listen import BASE_ADAPTER, chunk_rows
from .feature_extraction_listen import ListenFeatureExtractor
from .language_models_listen import check_cache, check_input, context_limit, is_outdated
from .outputs_listen import EncodedAudio

logger = logging.get_logger(__name__)

_ENCODED = tuple(EncodedAudio.__annotations__)
AUDIO_INPUTS = (*ListenFeatureExtractor.model_input_names, *_ENCODED)
_PREFILL_ONLY = (*_ENCODED, "query_mask", "task_ids", "adapter_names")
# for stop strings and assistants, whom `generate` passes them on to; counts of a batch before it is expanded
_NOT_FORWARDED = ("tokenizer", "assistant_tokenizer", "num_audio", "num_prompts")
# names of `torch.cpu.get_capabilities`, of x86 and ARM
_INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}


def cpu_has_bf16() -> bool:
    """Whether the CPU has instructions for bf16. Without them, torch computes it in software, many times slower."""
    return cpu_computes(torch.bfloat16)


def cpu_computes(dtype: torch.dtype) -> bool:
    """Whether the CPU has instructions for weights of this dtype; without, bf16 and fp16 are computed in software."""
    capabilities = torch.cpu.get_capabilities()
    return dtype not in _INSTRUCTIONS or any(capabilities.get(name, False) for name in _INSTRUCTIONS[dtype])


def warn_of_slow_weights(dtype: torch.dtype) -> None:
    """Say once, in training or in generation, that weights in bf16 or fp16 are slow on this CPU."""
    logger.warning_once(
        f"this CPU computes {'fp16' if dtype == torch.float16 else 'bf16'} in software, and reads audio and prompts "
        "several times slower than in float32; load the model in float32: dtype='float32', --dtype float32, or "
        "model.dtype=float32 in a recipe"
    )


class ListenGenerationMixin(GenerationMixin):
    """`generate` for a LiSTEN model: what differs from transformers because of audio, prompts and the LLM inside."""

    def generate(
        self,
        *args: Any,
        instruction_ids: torch.Tensor | None = None,
        instruction_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As upstream, for inputs of `ListenProcessor`.

        Args:
            *args: As upstream.
            instruction_ids: `(batch, sequence)` in place of `input_ids`: the answers are returned without it, as models
                of speech recognition return them.
            instruction_mask: `(batch, sequence)`, its `attention_mask`.
            **kwargs: Model inputs and options, as upstream; a processor as `tokenizer` stands for its tokenizer.
        """
        if isinstance(kwargs.get("tokenizer"), ProcessorMixin):  # `transformers serve` gives it, stop strings need more
            kwargs["tokenizer"] = kwargs["tokenizer"].tokenizer
        if self.device.type == "cpu" and not cpu_computes(self.language_model.dtype):
            warn_of_slow_weights(self.language_model.dtype)
        if instruction_ids is None:
            return super().generate(*args, **kwargs)
        given = kwargs.get("generation_config")
        if "max_length" not in kwargs and not (given and (given.max_new_tokens or given.max_length)):
            kwargs.setdefault("max_new_tokens", self.generation_config.max_new_tokens or 256)  # as in the pipeline
        output = super().generate(*args, input_ids=instruction_ids, attention_mask=instruction_mask, **kwargs)
        length = instruction_ids.shape[1]
        if isinstance(output, torch.Tensor):
            return output[:, length:]  # (batch, answer)
        output.sequences = output.sequences[:, length:]
        return output

    def _supports_default_dynamic_cache(self) -> bool:
        """Whether the LLM takes the cache that transformers makes; MiniMax makes its own."""
        return self.language_model._supports_default_dynamic_cache()

    def _prepare_cache_for_generation(self, generation_config: GenerationConfig, *args: Any, **kwargs: Any) -> None:
        """As upstream, but an LLM without an attention cache is refused rather than fed its last token alone."""
        if generation_config.use_cache is not False:
            check_cache(self.language_model)
        super()._prepare_cache_for_generation(generation_config, *args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> None:
        """Refused, and with it `generate_batch`: its requests are token ids, without audio.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "continuous batching (generate_batch) takes token ids alone, no audio and no prompts; call generate with a "
            "batch of the processor, or model.language_model.generate_batch for text without adapter"
        )

    def generate_batch(self, *args: Any, **kwargs: Any) -> None:
        """Refused, see `init_continuous_batching`."""
        self.init_continuous_batching()

    def create_masks_for_generate(self, **kwargs: Any) -> Any:
        """Masks for static caches, as the LLM makes them: Bloom counts positions by flat ones."""
        create = getattr(self.language_model, "create_masks_for_generate", create_masks_for_generate)
        return create(**{**kwargs, "config": self.language_model.config})

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        is_first_iteration: bool | None = False,
        inputs_embeds: torch.Tensor | None = None,  # named, since `generate` takes it only where it is
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As upstream; encoder frames and what selects the prompts reach the first forward pass alone.

        An empty cache means the first pass too: an assistant's passes are never marked as first, but need the audio.
        """
        cache = kwargs.get("past_key_values")
        if is_outdated(cache, input_ids.shape[1], self.language_model.config):
            cache = kwargs["past_key_values"] = kwargs["next_sequence_length"] = None
            is_first_iteration = True
        whole = kwargs.get("next_sequence_length") in (None, input_ids.shape[1])
        first = is_first_iteration or (whole and cache is not None and cache.get_seq_length() == 0)
        kwargs |= {"is_first_iteration": first, "inputs_embeds": inputs_embeds}
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        # a generated token is never a placeholder, so a pass over one alone needs no search
        inputs["text_only"] = not first and inputs.get("input_ids") is not None and inputs["input_ids"].shape[1] == 1
        dropped = _NOT_FORWARDED if first or not kwargs.get("use_cache", True) else (*_NOT_FORWARDED, *_PREFILL_ONLY)
        return {name: value for name, value in inputs.items() if name not in dropped}

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """As upstream, but clips follow their samples: A, B becomes A, A, B, B by sample, not by clip.

        The encoders run once, before the expansion. The query and the adapters are fixed here: candidates of assisted
        decoding, generated tokens and padding are not part of the query, and another thread may switch adapters.

        Raises:
            ValueError: a row is to have no adapter, but would have the LoRA of the others.
        """
        if input_ids is not None and model_kwargs.get("adapter_names") is None:
            model_kwargs["adapter_names"] = [self.active_adapter or BASE_ADAPTER] * len(input_ids)
        if BASE_ADAPTER in (model_kwargs.get("adapter_names") or ()) and self.active_adapter and self._lora_layers():
            raise ValueError(
                f"adapter_names holds {BASE_ADAPTER!r}, but the LoRA on the LLM works on every row of a batch; give "
                "these rows a batch of their own, within model.disable_adapter()"
            )
        if input_ids is not None and model_kwargs.get("query_mask") is None:
            mask = model_kwargs.get("attention_mask")
            model_kwargs["query_mask"] = mask.clone() if mask is not None else torch.ones_like(input_ids)
        if expand_size == 1:
            return input_ids, model_kwargs
        check_input(self.config, input_ids, model_kwargs.get("attention_mask"))
        audio = {name: model_kwargs.pop(name) for name in AUDIO_INPUTS if name in model_kwargs}
        names = model_kwargs.pop("adapter_names")
        encoded = self._encoded(**audio)
        if encoded is not None:
            lengths = self.adapters.lengths(encoded, names)
            rows = chunk_rows(lengths, self.placeholder_masks(input_ids)[0]).tolist()
            by_row = [[i for i, owner in enumerate(rows) if owner == row] for row in range(max(rows) + 1)]
            encoded = encoded.take([i for chunks in by_row for _ in range(expand_size) for i in chunks])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        model_kwargs["adapter_names"] = [name for name in names for _ in range(expand_size)]
        return input_ids, {**model_kwargs, **(encoded or {})}

    def _validate_generated_length(
        self, generation_config: GenerationConfig, input_ids_length: int, has_default_max_length: bool
    ) -> None:
        """As upstream, and a warning where the answer may run out of the LLM's context.

        Raises:
            ValueError: fewer than one beam.
        """
        if generation_config.num_beams is not None and generation_config.num_beams < 1:
            raise ValueError(f"num_beams={generation_config.num_beams} must be a whole number above 0; 1 is greedy")
        super()._validate_generated_length(generation_config, input_ids_length, has_default_max_length)
        limit = context_limit(self.config.text_config)
        if limit is not None and generation_config.max_length > limit:
            warnings.warn(
                f"{input_ids_length} positions and {generation_config.max_length - input_ids_length} new tokens exceed "
                f"the LLM's context of {limit}: answers degrade, or fail, after {max(limit - input_ids_length, 0)} new "
                "tokens; lower max_new_tokens, or shorten the input",
                UserWarning,
                stacklevel=2,
            )

    def _get_logits_processor(
        self,
        generation_config: GenerationConfig,
        input_ids_seq_length: int | None = None,
        encoder_input_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As upstream, but processors never see placeholders, and answers never hold them."""
        placeholders = self._placeholder_ids
        mask = (kwargs.get("model_kwargs") or {}).get("attention_mask")
        padding = mask == 0 if mask is not None and mask.dim() == 2 else None  # (rows, prompt length)
        if encoder_input_ids is not None and encoder_input_ids.dim() == 2:  # ids, no embeddings
            rows = padding[:: len(padding) // len(encoder_input_ids)] if padding is not None else None
            encoder_input_ids = ordinary_ids(encoder_input_ids, placeholders, rows)
        else:
            padding = None  # ids begin with the answer
        processors = super()._get_logits_processor(generation_config, input_ids_seq_length, encoder_input_ids, **kwargs)
        above = all(token_id >= self.config.get_text_config().vocab_size for token_id in placeholders)
        if not processors and above:
            return processors
        return PlaceholderBlindProcessors(processors, placeholders, padding)

    def _get_candidate_generator(self, *, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        """As upstream, but prompt look-up does not copy placeholders, and an assistant uses its own active adapter.

        Raises:
            ValueError: the assistant's prompts have another form than this model's.
        """
        assistant, names = kwargs.get("assistant_model"), model_kwargs.get("adapter_names")
        if names == [self.active_adapter]:
            model_kwargs = {name: value for name, value in model_kwargs.items() if name != "adapter_names"}
        if isinstance(assistant, ListenGenerationMixin) and self.placeholder_masks(kwargs["input_ids"])[1].any():
            mine, theirs = _prompt_form(self, names), _prompt_form(assistant, model_kwargs.get("adapter_names"))
            if mine is not None and mine != theirs:
                found = "no prompt pool" if theirs is None else f"prompts of form={theirs!r}"
                raise ValueError(
                    f"the input has prompts of form={mine!r}, but the adapter of assistant_model has {found}; give an "
                    "assistant with the same form of prompts, or process the input with num_prompts=0"
                )
        generator = super()._get_candidate_generator(model_kwargs=model_kwargs, **kwargs)
        if isinstance(generator, EarlyExitCandidateGenerator):
            return EarlyExitCandidates(generator)
        if not isinstance(generator, PromptLookupCandidateGenerator):
            return generator
        generator.logits_processor = None
        return PlaceholderFreeCandidates(generator, self._placeholder_ids)

    @property
    def _placeholder_ids(self) -> list[int]:
        ids = self.config.audio_token_id, self.config.prompt_token_id
        return [token_id for token_id in ids if token_id is not None]


def _prompt_form(model: ListenGenerationMixin, names: list[str] | None) -> str | None:
    """Form of the prompts of the adapter of the only row, the active one by default; `None` without a pool."""
    name = names[0] if names else model.active_adapter
    pool = model.adapters[name].prompt_pool if name in model.adapters else None
    return pool.config.form if pool is not None else None


class PlaceholderBlindProcessors(LogitsProcessorList):
    """Runs `processors` on ids in which placeholders, and padding before them, are replaced; forbids placeholders.

    Processors such as the repetition penalty gather scores by id: there are none above the vocabulary, and padding
    must not make a row's answer depend on its batch mates. The first ordinary id of the row, commonly its BOS, takes
    their place: it is in the row already and never a likely answer. Rows without placeholders are left alone.

    A placeholder may also be a reserved token, hence within the vocabulary. Its score becomes -inf: an answer that
    held it would claim audio that is not there.

    Args:
        processors: What to run.
        placeholder_ids: Ids that stand for audio and prompts.
        padding: `(rows, prompt length)`, true on padding; `None` where there is none.
    """

    def __init__(
        self, processors: LogitsProcessorList, placeholder_ids: list[int], padding: torch.Tensor | None = None
    ) -> None:
        super().__init__(processors)
        self.placeholder_ids = placeholder_ids
        self.padding = padding

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: object) -> torch.FloatTensor:
        """`input_ids` `(rows, sequence)`, `scores` `(rows, vocabulary)`."""
        scores = super().__call__(ordinary_ids(input_ids, self.placeholder_ids, self.padding), scores, **kwargs)
        scores = scores.clone()
        for token_id in self.placeholder_ids:
            if token_id < scores.shape[-1]:  # one by one: a tensor of the ids would be copied to the device
                scores[:, token_id] = -torch.inf
        return scores


def ordinary_ids(
    input_ids: torch.LongTensor, placeholder_ids: list[int], padding: torch.Tensor | None = None
) -> torch.LongTensor:
    """`input_ids` `(rows, sequence)` with stand-ins for what `PlaceholderBlindProcessors` hides; its arguments."""
    if not input_ids.shape[1]:  # an answer to embeddings begins without ids
        return input_ids
    hidden = torch.zeros_like(input_ids, dtype=torch.bool)  # (rows, sequence)
    for token_id in placeholder_ids:
        hidden |= input_ids == token_id
    if padding is not None:
        padding = padding.to(input_ids.device)
        hidden[:, : padding.shape[1]] |= padding & hidden.any(-1, keepdim=True)
    first = (~hidden).int().argmax(-1, keepdim=True)  # (rows, 1)
    stand_in = input_ids.gather(1, first).masked_fill(hidden.all(-1, keepdim=True), 0)  # (rows, 1)
    return torch.where(hidden, stand_in, input_ids)


class EarlyExitCandidates(CandidateGenerator):
    """Candidates by the first layers of the LLM: upstream looks for them in the model that the LLM stands in.

    Args:
        generator: Upstream's generator.
    """

    def __init__(self, generator: EarlyExitCandidateGenerator) -> None:
        self.generator = generator

    def get_candidates(self, input_ids: torch.LongTensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        """`input_ids` `(1, sequence)`; the same ids with the proposed ones behind, and their logits."""
        config = self.generator.assistant_model.language_model.config.get_text_config()
        layers, config.num_hidden_layers = config.num_hidden_layers, self.generator.assistant_early_exit
        try:
            return AssistedCandidateGenerator.get_candidates(self.generator, input_ids)
        finally:
            config.num_hidden_layers = layers

    def update_candidate_strategy(
        self, input_ids: torch.LongTensor, scores: torch.FloatTensor, num_matches: int
    ) -> Any:
        """As the generator's."""
        return self.generator.update_candidate_strategy(input_ids, scores, num_matches)


class PlaceholderFreeCandidates(CandidateGenerator):
    """Cuts what `generator` proposes before the first placeholder: prompt look-up copies from the input, audio too.

    Args:
        generator: Proposes how the answer may go on. It must not run logits processors on its own proposals, which may
            lie above the vocabulary; the model that checks them does.
        placeholder_ids: Ids that stand for audio and prompts.
    """

    def __init__(self, generator: CandidateGenerator, placeholder_ids: list[int]) -> None:
        self.generator = generator
        self.placeholder_ids = placeholder_ids

    def get_candidates(self, input_ids: torch.LongTensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        """`input_ids` `(1, sequence)`; the same ids with the proposed ones behind, and their logits if known."""
        candidates, logits = self.generator.get_candidates(input_ids, *args, **kwargs)
        length = input_ids.shape[1]
        placeholders = torch.tensor(self.placeholder_ids, device=input_ids.device)
        allowed = torch.isin(candidates[0, length:], placeholders).cumsum(0) == 0  # (proposed,)
        kept = int(allowed.sum())
        return candidates[:, : length + kept], logits[:, :kept] if logits is not None else None

    def update_candidate_strategy(
        self, input_ids: torch.LongTensor, scores: torch.FloatTensor, num_matches: int
    ) -> Any:
        """As the generator's."""
        return self.generator.update_candidate_strategy(input_ids, scores, num_matches)


__all__ = [
    "AUDIO_INPUTS",
    "ListenGenerationMixin",
    "PlaceholderBlindProcessors",
    "PlaceholderFreeCandidates",
    "cpu_computes",
    "cpu_has_bf16",
    "ordinary_ids",
    "warn_of_slow_weights",
]
