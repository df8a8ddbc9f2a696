"""Training steps on stored encoder features against steps that run the frozen encoders each time.

    python benchmarks/cached_features.py --preset listen-tiny --seconds 5 --batch 16

Encoders are frozen, so the features of a clip never change: `forward` takes it in place of the features. The model is
the preset's with random weights; the step is forward, backward and AdamW.
"""

from collections.abc import Callable

import torch
from harness import Measurement, arguments, compare, report

from listen import ListenConfig, ListenForConditionalGeneration
from listen.modeling_connector import WindowQFormer

FRAMES_PER_SECOND = 100
INSTRUCTION, RESPONSE = 12, 12  # tokens


def training_step(model: ListenForConditionalGeneration, labels: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Makes a step that takes the model's inputs by keyword and returns the loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    def step(**inputs: torch.Tensor) -> torch.Tensor:
        loss = model(**inputs, labels=labels, logits_to_keep=RESPONSE + 1).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def text_inputs(model: ListenForConditionalGeneration, connector: WindowQFormer, chunks: int, frames: int) -> dict:
    """Input ids with prompts and one clip of `frames` encoder frames a row, and labels on the response."""
    config = model.config
    embeddings = int(connector.lengths(torch.tensor([frames])))
    prompts = [config.prompt_token_id] * config.prompt_pool_config.num_prompts
    before = prompts + [config.audio_token_id] * embeddings
    text = torch.randint(3, config.get_text_config().vocab_size, (chunks, INSTRUCTION + RESPONSE))
    ids = torch.cat([torch.tensor(before).expand(chunks, -1), text], dim=1)  # (chunks, sequence)
    labels = ids.clone()
    labels[:, :-RESPONSE] = -100
    return {"input_ids": ids, "labels": labels}


def main(given: list[str] | None = None) -> list[Measurement]:
    """Runs the comparison and prints its table."""
    options = arguments(__doc__, given, preset="listen-tiny", seconds=5.0, batch=16)
    config = ListenConfig.from_preset(options.preset)
    vocabulary = config.get_text_config().vocab_size
    config.audio_token_id, config.prompt_token_id = vocabulary, vocabulary + 1
    model = ListenForConditionalGeneration(config).to(options.device).train()
    frames = round(options.seconds * FRAMES_PER_SECOND)
    features = {
        "input_features": torch.randn(options.batch, config.speech_config.num_mel_bins, frames, device=options.device),
        "input_values": torch.randn(options.batch, frames, config.audio_config.num_mel_bins, device=options.device),
    }
    encoded = dict(model.encode_audio(**features))
    longest = max(mask.sum(-1).max().item() for name, mask in encoded.items() if name.endswith("_mask"))
    text = text_inputs(model, model.adapters["default"].connector, options.batch, longest)
    text = {name: tensor.to(options.device) for name, tensor in text.items()}
    step = training_step(model, text.pop("labels"))
    variants = {
        "encoders in every step": lambda: step(**text, **features),
        "stored encoder features": lambda: step(**text, **encoded),
    }
    rows = compare(variants, options.device, options.repeats)
    report(f"Training step of {options.preset}, {options.batch} clips of {options.seconds:g} s", rows, options.device)
    return rows


if __name__ == "__main__":
    main()
