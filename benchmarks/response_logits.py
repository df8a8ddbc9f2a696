"""The language model's head on response positions only against the head on every position, in a training step.

    python benchmarks/response_logits.py --vocabularies 32000 128256 --batch 4 --context 256 --response 32

Forward and backward through a small random Llama with a head of real size. The loss is the same; its memory is not.
"""

from collections.abc import Callable

import torch
from harness import Measurement, arguments, compare, report

from listen import ListenConfig, ListenForConditionalGeneration

TEXT = {"model_type": "llama", "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8}


def training_step(vocabulary: int, options: object) -> Callable[[int], torch.Tensor]:
    """Makes a step that runs the head on the last `logits_to_keep` positions (0: all) and returns the loss."""
    text = {**TEXT, "vocab_size": vocabulary, "hidden_size": options.width, "intermediate_size": 2 * options.width}
    ids = {"audio_token_id": vocabulary, "prompt_token_id": vocabulary + 1}
    model = ListenForConditionalGeneration(ListenConfig.from_preset("listen-tiny", text_config=text, **ids))
    model = model.to(options.device).train()
    length = options.context + options.response
    input_ids = torch.randint(3, vocabulary, (options.batch, length), device=options.device)
    input_ids[:, : model.config.prompt_pool_config.num_prompts] = model.config.prompt_token_id
    labels = input_ids.clone()
    labels[:, : options.context] = -100

    def step(logits_to_keep: int) -> torch.Tensor:
        loss = model(input_ids=input_ids, labels=labels, logits_to_keep=logits_to_keep).loss
        loss.backward()
        model.zero_grad()
        return loss.detach()

    return step


def main(given: list[str] | None = None) -> list[Measurement]:
    """Runs the comparison for each vocabulary and prints its tables."""
    defaults = {"vocabularies": [32000, 128256], "batch": 4, "context": 256, "response": 32, "width": 512}
    options = arguments(__doc__, given, **defaults)
    everything = []
    for vocabulary in options.vocabularies:
        step = training_step(vocabulary, options)
        # one more position than the response holds: the one before it predicts its first token
        variants = {"all positions": lambda s=step: s(0), "response only": lambda s=step: s(options.response + 1)}
        rows = compare(variants, options.device, options.repeats)
        title = f"Vocabulary {vocabulary}, batch {options.batch}, {options.context} + {options.response} positions"
        report(title, rows, options.device)
        everything += rows
    return everything


if __name__ == "__main__":
    main()
