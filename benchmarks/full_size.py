"""A whole model with random weights against its own LLM alone: a training step, and an answer.

    python benchmarks/full_size.py --preset listen-llama3-8b --batch 8
    python benchmarks/full_size.py --preset listen-tiny --device cpu --dtype float32

The baseline is the LLM on embeddings of as many positions, given as they are: the cost of audio and prompts is
added to it. A training step runs the encoders, goes backwards through the frozen LLM to the adapter, and updates that.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable

import torch
from harness import MIB, Measurement, arguments, compare, report
from rich.console import Console
from rich.table import Table

from listen import ListenConfig, ListenForConditionalGeneration
from listen.configuration_listen import BACKBONES
from listen.processing_listen import feature_extractor_for


def build(options: Namespace) -> ListenForConditionalGeneration:
    """The preset with random weights on the device: frozen backbones in `dtype`, trainable parameters in float32."""
    config = ListenConfig.from_preset(options.preset)
    if config.audio_token_id is None:
        config.audio_token_id, config.prompt_token_id = (config.get_text_config().vocab_size + i for i in range(2))
    for name, section in BACKBONES.items():
        if getattr(config, section) is not None:
            dtype = torch.float32 if name in config.trainable else getattr(torch, options.dtype)
            getattr(config, section).dtype = dtype
    with torch.device(options.device):
        model = ListenForConditionalGeneration(config)
    model.to(options.device)  # some encoders of transformers make a parameter on the CPU all the same
    model.generation_config.pad_token_id = 0
    return model


def make_inputs(model: ListenForConditionalGeneration, options: Namespace) -> dict[str, torch.Tensor]:
    """A batch of noise with prompts before it and text after it."""
    extractor = feature_extractor_for(model.config)
    clips = [0.1 * torch.randn(round(options.seconds * extractor.sampling_rate)) for _ in range(options.batch)]
    inputs = dict(extractor(clips, sampling_rate=extractor.sampling_rate).to(options.device))
    with torch.no_grad():
        total = int(model.get_audio_features(**inputs).lengths.sum())
    pool = model.config.prompt_pool_config
    prompts = torch.full((options.batch, pool.num_prompts if pool is not None else 0), model.config.prompt_token_id)
    audio = torch.full((options.batch, total // options.batch), model.config.audio_token_id)
    ordinary = min(model.config.audio_token_id, model.config.prompt_token_id)  # ids below stand for text
    text = torch.randint(3, ordinary, (options.batch, options.text))
    inputs["input_ids"] = torch.cat([prompts, audio, text], dim=1).to(options.device)  # (batch, positions)
    return inputs


def training_steps(
    model: ListenForConditionalGeneration, inputs: dict[str, torch.Tensor], options: Namespace
) -> dict[str, Callable[[], object]]:
    """A step of the LLM alone down to its embeddings, and one of the whole model."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-5)
    ids = inputs["input_ids"]
    labels = torch.full_like(ids, -100)
    labels[:, -options.text :] = ids[:, -options.text :]
    kept = options.text + 1  # the position before the text predicts its first token

    def alone() -> None:
        embeds = embeddings(model, ids).requires_grad_()
        logits = model.language_model(inputs_embeds=embeds, use_cache=False, logits_to_keep=kept).logits
        torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), ids[:, -options.text :].flatten()
        ).backward()

    def whole() -> None:
        # all the text is the answer, so some of it has to pick the prompts
        model(
            **inputs, labels=labels, query_mask=torch.ones_like(ids), logits_to_keep=kept, use_cache=False
        ).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return {"LLM alone, training step": alone, f"{options.preset}, training step": whole}


def answers(
    model: ListenForConditionalGeneration, inputs: dict[str, torch.Tensor], options: Namespace
) -> dict[str, Callable[[], object]]:
    """Greedy answers of one length by the LLM alone and by the whole model."""
    length = {"max_new_tokens": options.new_tokens, "min_new_tokens": options.new_tokens, "do_sample": False}
    embeds = embeddings(model, inputs["input_ids"])
    alone = torch.no_grad()(lambda: model.language_model.generate(inputs_embeds=embeds, pad_token_id=0, **length))
    return {"LLM alone, answer": alone, f"{options.preset}, answer": lambda: model.generate(**inputs, **length)}


def embeddings(model: ListenForConditionalGeneration, ids: torch.Tensor) -> torch.Tensor:
    """Random embeddings in the shape of the input, `(batch, positions, width)`."""
    width, dtype = model.config.text_width, model.language_model.dtype
    return 0.02 * torch.randn(*ids.shape, width, dtype=dtype, device=ids.device)


def report_rates(model: ListenForConditionalGeneration, rows: list[Measurement], options: Namespace) -> None:
    """Prints what the times amount to."""
    parameters, step, answer = list(model.parameters()), rows[1], rows[3]
    table = Table("figure", "value", title="Rates of the whole model", title_justify="left")
    table.add_row("parameters", f"{sum(p.numel() for p in parameters):,}")
    table.add_row("trainable", f"{sum(p.numel() for p in parameters if p.requires_grad):,}")
    table.add_row("weights", f"{sum(p.nbytes for p in parameters) / MIB:,.0f} MiB")
    table.add_row("training", f"{options.batch / step.seconds:.2f} samples/s")
    table.add_row("answer", f"{options.batch * options.new_tokens / answer.seconds:.1f} tokens/s, encoding included")
    audio = options.batch * options.seconds
    table.add_row("real-time factor", f"{answer.seconds / audio:.4f} (seconds of work for a second of audio)")
    if options.device.startswith("cuda"):
        table.add_row("peak memory in all", f"{torch.cuda.max_memory_reserved(options.device) / MIB:,.0f} MiB")
    Console(width=120).print(table)


def main(given: list[str] | None = None) -> list[Measurement]:
    """Runs both comparisons and prints their tables."""
    defaults = {"preset": "listen-llama3-8b", "dtype": "bfloat16", "batch": 1, "seconds": 30.0, "text": 64}
    options = arguments(__doc__, given, new_tokens=32, **defaults)
    model = build(options)
    inputs = make_inputs(model, options)
    batch = f"batch {options.batch}, {options.seconds:g} s of audio, {inputs['input_ids'].shape[1]} positions"
    everything = []
    for name, variants in (
        ("Training step", training_steps(model, inputs, options)),
        (f"Answer of {options.new_tokens} tokens", answers(model, inputs, options)),
    ):
        model.train(name == "Training step")
        rows = compare(variants, options.device, options.repeats)
        report(f"{name}, {batch}", rows, options.device)
        everything += rows
    report_rates(model, everything, options)
    return everything


if __name__ == "__main__":
    main()
