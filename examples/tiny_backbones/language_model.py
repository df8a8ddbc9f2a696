"""The miniature language model: a Llama that learns from text alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import trange
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tiny_backbones.soft_text import FIRST_ADVERSARIAL, NUM_ADVERSARIAL, ExampleWriter, SoftBatch, collate, write_row


def make_language_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return an untrained Llama of about 2.7 M parameters."""
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 32) * 32, hidden_size=224, intermediate_size=640, num_hidden_layers=4,
        num_attention_heads=7, num_key_value_heads=7, max_position_embeddings=2048, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.05, attention_dropout=0.0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def embed(
    model: LlamaForCausalLM, batch: SoftBatch, generator: torch.Generator, adversarial: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the embeddings (batch, length, dim) of a soft batch, noise and `adversarial` (number, dim) included."""
    table = model.get_input_embeddings().weight
    if adversarial is None:
        adversarial = table.new_zeros(NUM_ADVERSARIAL, table.shape[1])
    ids, weights = (torch.from_numpy(array).flatten(0, 1) for array in (batch.ids, batch.weights))  # (positions, depth)
    ids = torch.where(ids < FIRST_ADVERSARIAL, ids, ids - FIRST_ADVERSARIAL + len(table))
    everything = torch.cat([table, adversarial])
    sums = F.embedding_bag(ids, everything, mode="sum", per_sample_weights=weights)  # (positions, dim)
    embeds = sums.view(*batch.noise.shape, -1)  # (batch, length, dim)
    rms = table.detach().pow(2).mean().sqrt()
    noise = torch.randn(embeds.shape, generator=generator) * torch.from_numpy(batch.noise)[..., None]
    return embeds + rms * noise


class AdversarialVectors(torch.nn.Module):
    """Vectors in clips that are trained to raise the loss of the model, which so learns to ignore them.

    A connector can put any vector into every clip. This makes it hard for one to unlock a skill in that way.
    """

    def __init__(self, model: LlamaForCausalLM, learning_rate: float = 5e-3) -> None:
        super().__init__()
        table = model.get_input_embeddings().weight.detach()
        self.vectors = torch.nn.Parameter(table[torch.randint(len(table), (NUM_ADVERSARIAL,))].clone())  # (number, dim)
        self.optimizer = torch.optim.Adam([self.vectors], lr=learning_rate, maximize=True)

    @torch.no_grad()
    def step(self, longest: float) -> None:
        """Gradient ascent on the loss of the last backward pass; no vector gets longer than `longest`."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.vectors *= (longest / self.vectors.norm(dim=1, keepdim=True)).clamp(max=1.0)


def response_loss(
    model: LlamaForCausalLM, batch: SoftBatch, generator: torch.Generator, adversarial: torch.Tensor | None = None
) -> torch.Tensor:
    """Next-token loss of the responses; a token of an n-token response weighs 1 / sqrt(n), so that "yes" counts."""
    mask = torch.from_numpy(batch.attention_mask)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    hidden = model.model(
        inputs_embeds=embed(model, batch, generator, adversarial),
        attention_mask=mask,
        position_ids=positions,
        use_cache=False,
    ).last_hidden_state  # (batch, length, dim)
    labels = torch.from_numpy(batch.labels)[:, 1:]
    rows, columns = (labels != -100).nonzero(as_tuple=True)
    logits = model.lm_head(hidden[rows, columns])  # (num_labels, vocab)
    losses = F.cross_entropy(logits.float(), labels[rows, columns], reduction="none")
    weights = torch.bincount(rows, minlength=len(labels)).float().rsqrt()[rows]
    return (losses * weights).sum() / weights.sum()


def train_language_model(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, durations: dict[str, float], seed: int,
    steps: int, learning_rate: float, easy_start: bool, batch_size: int = 64, report_every: int = 500,
    make_writer: type[ExampleWriter] = ExampleWriter,
) -> None:  # fmt: skip
    """Train `model` in place on what `make_writer` draws, reporting accuracies on fresh texts (`score_language_model`).

    With `easy_start` the first half of the steps leads from clean words to full difficulty.
    """
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    writer = make_writer(durations, rng)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine_schedule(step, steps, warmup=100))
    batches, adversary = length_batches(writer, tokenizer, batch_size), AdversarialVectors(model)
    bar = trange(steps, desc="language model")
    for step in bar:
        if easy_start:
            writer.difficulty = min(1.0, max(0.0, step / steps - 0.12) / 0.38)
        batch = next(batches)
        with torch.autocast("cpu", torch.bfloat16):
            loss = response_loss(model, batch, generator, adversary.vectors)
        loss.backward()
        adversary.step(longest=float(model.get_input_embeddings().weight.detach().norm(dim=1).median()))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % report_every == 0:
            scores = score_language_model(model, tokenizer, durations, seed=seed + 1, make_writer=make_writer)
            bar.write(f"step {step + 1} loss {loss.item():.3f} " + " ".join(f"{k} {v:.2f}" for k, v in scores.items()))
    model.eval()


def length_batches(
    writer: ExampleWriter, tokenizer: PreTrainedTokenizerFast, batch_size: int, pool: int = 10
) -> Iterator[SoftBatch]:
    """Endless batches; `pool` of them are drawn at once and share out their rows by length, so that few are padded."""
    while True:
        rows = [write_row(writer.draw(), tokenizer, writer.rng) for _ in range(pool * batch_size)]
        rows.sort(key=len)
        for number in writer.rng.permutation(pool):
            yield collate(rows[number * batch_size : (number + 1) * batch_size])


@torch.no_grad()
def score_language_model(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, durations: dict[str, float], seed: int,
    examples_per_task: int = 64, make_writer: type[ExampleWriter] = ExampleWriter,
) -> dict[str, float]:  # fmt: skip
    """Share of fresh examples whose whole response has the highest probability token by token, for each task."""
    writer = make_writer(durations, np.random.default_rng(seed))
    generator, scores = torch.Generator().manual_seed(seed), Counter()
    model.eval()
    for task in writer.scored:
        batch = collate([write_row(writer.draw(task), tokenizer, writer.rng) for _ in range(examples_per_task)])
        mask = torch.from_numpy(batch.attention_mask)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(
                inputs_embeds=embed(model, batch, generator), attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=False,
            ).logits  # (batch, length, vocab)  # fmt: skip
        labels = torch.from_numpy(batch.labels)[:, 1:]
        right = (logits[:, :-1].argmax(-1) == labels) | (labels == -100)
        scores[task] = right.all(1).float().mean().item()
    model.train()
    return dict(scores)


def cosine_schedule(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then a cosine down to 3 % of the peak."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))
