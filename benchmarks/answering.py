"""Answers against the bare LLM: time to the first token, decoding, and the share of pool and placeholders."""

from __future__ import annotations

import torch

from .harness import Figure, both_figures, rate_figure, time_figure
from .models import Setting

DECODED_BATCHES = (1, 8, 64)


def first_token(setting: Setting) -> list[Figure]:
    """Time to the first token against a bare prefill of as many positions plus the encoders."""
    options, model = setting.options, setting.model
    audio = setting.audio(options.batch, options.seconds)
    inputs = setting.inputs(audio)
    embeds = setting.embeddings(inputs["input_ids"])
    length = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}

    def bare() -> None:
        model.encode_audio(**audio)
        mask = inputs["attention_mask"]
        model.language_model.generate(inputs_embeds=embeds, attention_mask=mask, **length)

    ours, floor = setting.compare(ours=lambda: model.generate(**inputs, **audio, **length), bare=bare)
    return both_figures("first_token", ours, floor, 1.10)


def decoding(setting: Setting) -> list[Figure]:
    """Greedy answers with stored encoder frames against `generate` of the bare LLM, for batches of 1, 8 and 64."""
    options, model, figures = setting.options, setting.model, []
    tokens = options.new_tokens
    length = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    for batch in DECODED_BATCHES[: options.batches]:
        audio = setting.audio(1, options.seconds)
        one = {**setting.inputs(audio), **setting.encoded(audio)}
        inputs = {name: tensor.repeat(batch, *[1] * (tensor.dim() - 1)) for name, tensor in one.items()}
        mask, embeds = inputs["attention_mask"], setting.embeddings(inputs["input_ids"])
        ours, bare = setting.compare(
            ours=lambda inputs=inputs: model.generate(**inputs, **length),
            bare=lambda mask=mask, embeds=embeds: model.language_model.generate(
                inputs_embeds=embeds, attention_mask=mask, **length
            ),
        )
        name, made = f"decoding.batch_{batch}", batch * tokens
        figures += both_figures(name, ours, bare, 1 / 0.97)
        figures.append(rate_figure(f"{name}.tokens", made, ours, made, bare, "tokens/s", 0.97))
    return figures


def static_cache(setting: Setting) -> list[Figure]:
    """The greedy answer of one row with a static cache against the growing one; on a GPU, static means CUDA graphs."""
    options, model = setting.options, setting.model
    tokens, audio = options.new_tokens, setting.audio(1, options.seconds)
    inputs = {**setting.inputs(audio), **setting.encoded(audio)}
    length = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    static, growing = setting.compare(
        static=lambda: model.generate(**inputs, **length, cache_implementation="static"),
        growing=lambda: model.generate(**inputs, **length),
    )
    return both_figures("static_cache", static, growing)


def pool(setting: Setting) -> list[Figure]:
    """Query, pool and filling of placeholders as a share of the prefill of the bare LLM."""
    options, model = setting.options, setting.model
    audio = setting.audio(options.batch, options.seconds)
    inputs, encoded = setting.inputs(audio), model.encode_audio(**audio)
    embeds = setting.embeddings(inputs["input_ids"])
    with torch.no_grad():
        ready = model.get_audio_features(encoded=encoded).pooler_output  # (total, text width)
    model.adapters.connect = lambda *_: ready  # the connector is left out
    try:
        ours, bare = setting.compare(
            ours=torch.no_grad()(lambda: model.embed(**inputs, encoded=encoded)),
            bare=torch.no_grad()(lambda: model.language_model(inputs_embeds=embeds, logits_to_keep=1)),
        )
    finally:
        del model.adapters.connect
    return [time_figure("pool", ours, bare, 0.01)]
