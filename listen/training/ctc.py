"""A start for the connector: connectionist temporal classification (CTC) against the LLM's own input embeddings.

A connector with random weights learns to transcribe very slowly from the next-token loss alone. CTC (Graves et al.,
ICML 2006) gets it there in minutes: audio embeddings become, in order, the input embeddings of the words' tokens, and
of spaces between them. The LLM does not run. This is no part of the LiSTEN paper, whose authors start from a trained
connector. Other runs take the result as `model.connector_from`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..data.collator import ListenCollator
from ..generation_listen import AUDIO_INPUTS
from .datasets import count_tasks
from .trainer import ListenTrainer
from .values import ArgumentError

logger = logging.get_logger(__name__)

WORD_TASKS = ("asr", "repeat")  # their answer is what is said
# Of the softmax. Half of it is the log-odds of the blank against a token, at the blank, for a token at the typical
# distance: large enough for sharp classes, small enough for gradients at the start.
_SHARPNESS = 72.0


class TokenDistances(torch.nn.Module):
    """Log-probabilities of tokens by the distance of audio embeddings to the tokens' input embeddings.

    Class 0 is the blank; class 1 + i is token `ids[i]`.

    Args:
        embeddings: the LLM's input embeddings.
        ids: `(tokens,)`, the tokens to tell apart.
        blank: the token whose embedding is the blank's; the mean embedding of `ids` by default.
    """

    def __init__(self, embeddings: torch.nn.Module, ids: torch.Tensor, blank: int | None = None) -> None:
        super().__init__()
        with torch.no_grad():
            tokens = embeddings(ids).float()  # (tokens, width)
            mean = tokens.mean(0, keepdim=True)  # (1, width)
            rest = mean if blank is None else embeddings(ids.new_tensor([blank])).float()
        centres = torch.cat((rest, tokens))  # (1 + tokens, width)
        spread = (tokens - mean).square().sum(-1).mean()
        self.scale = float(_SHARPNESS / spread)
        classes = ids.new_zeros(embeddings.num_embeddings)  # (vocabulary,), 0 for tokens that are not told apart
        classes[ids] = torch.arange(1, len(ids) + 1, device=ids.device)
        self.register_buffer("centres", centres, persistent=False)
        self.register_buffer("offsets", centres.square().sum(-1) / 2, persistent=False)  # (1 + tokens,)
        self.register_buffer("classes", classes, persistent=False)

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """`(embeddings, width)` -> `(embeddings, 1 + tokens)`."""
        # -|e - c|^2 / 2 without |e|^2 / 2, which all classes share
        return F.log_softmax((embeddings.float() @ self.centres.T - self.offsets) * self.scale, dim=-1)

    def spread(self, embeddings: torch.Tensor, log_probabilities: torch.Tensor) -> torch.Tensor:
        """Mean squared distance to the centres, weighted by their probabilities; 1 is that of tokens to their mean.

        The probabilities alone would let embeddings move away from all tokens, where the LLM cannot read them.

        Args:
            embeddings: `(embeddings, width)`.
            log_probabilities: of these, `(embeddings, 1 + tokens)`.
        """
        means = log_probabilities.detach().exp() @ torch.cat((self.centres, self.offsets[:, None]), dim=-1)
        expected, halves = means[:, :-1], means[:, -1]  # (embeddings, width), (embeddings,)
        embeddings = embeddings.float()
        distances = embeddings.square().sum(-1) - 2 * (embeddings * expected).sum(-1) + 2 * halves  # (embeddings,)
        return distances.mean() * (self.scale / _SHARPNESS)


def ctc_loss(log_probabilities: torch.Tensor, lengths: Sequence[int], targets: Sequence[torch.Tensor]) -> torch.Tensor:
    """Minus the log-probability of the classes of each row, summed over the rows.

    A row with fewer embeddings than its classes need adds nothing.

    Args:
        log_probabilities: `(total, classes)`, the rows one after the other; class 0 is the blank.
        lengths: embeddings of each row.
        targets: classes of each row, `(tokens of the row,)`.
    """
    padded = torch.nn.utils.rnn.pad_sequence(log_probabilities.split(list(lengths)))  # (longest, batch, classes)
    counts = torch.tensor([*map(len, targets)])  # (batch,)
    return F.ctc_loss(
        padded, torch.cat(list(targets)), torch.tensor(lengths), counts, reduction="sum", zero_infinity=True
    )


def warn_of_short_rows(lengths: Sequence[int], targets: Sequence[torch.Tensor]) -> None:
    """Say once that most rows of a batch add nothing to `ctc_loss`, whose arguments these are: it is then near zero."""
    short = sum(len(target) > length for length, target in zip(lengths, targets, strict=True))
    if 2 * short > len(targets):
        logger.warning_once(
            "more than half of the rows of a batch have fewer audio embeddings than their words have tokens, and add "
            "nothing to ctc_loss; give model.connector.num_queries=2, or a smaller window_seconds"
        )


def answer_tokens(dataset: Dataset, collator: ListenCollator) -> torch.Tensor:
    """All tokens of the answers as the collator renders them, sorted, `(tokens,)`, without special ones."""
    before, _, after = collator.render({"role": "user", "content": "?"}, "!")[1].partition("!")
    texts = sorted({before + response.strip() + after for row in dataset["response"] for response in row})
    tokenizer = collator.processor.tokenizer
    found = set().union(*tokenizer(texts, add_special_tokens=False)["input_ids"])
    return torch.tensor(sorted(found.difference(tokenizer.all_special_ids)))


def space_token(tokenizer: PreTrainedTokenizerBase, answers: torch.Tensor) -> int | None:
    """The token of a single space; `None` if there is none, or if the answers hold it.

    It is the blank since a frozen LLM repeats words with spaces between them far better than with the mean embedding,
    which no text contains.
    """
    ids = tokenizer(" ", add_special_tokens=False)["input_ids"]
    return ids[0] if len(ids) == 1 and ids[0] not in answers.tolist() else None


class CtcTrainer(ListenTrainer):
    """Trains the connector by `ctc_loss`, as a mean over the labels, plus the spread around the tokens.

    Evaluation reports the next-token loss of the answers, so that runs of all kinds can be compared.

    Args:
        **kwargs: see `ListenTrainer`.

    Raises:
        ArgumentError: rows of tasks other than `WORD_TASKS`, a stream, a trainable pool or LoRA, or several processes.
    """

    loss_parts = ("ctc_loss", "spread")

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _check(self)
        ids = answer_tokens(self.train_dataset, self.data_collator)
        blank = space_token(self.processing_class.tokenizer, ids)
        self.distances = TokenDistances(self.model.get_input_embeddings(), ids.to(self.args.device), blank)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The CTC loss in training, the next-token loss in evaluation."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        base, labels = self.accelerator.unwrap_model(model), inputs["labels"]
        encoded = base._encoded(**{name: inputs[name] for name in AUDIO_INPUTS if name in inputs})
        embeddings = base.get_audio_features(encoded=encoded).pooler_output  # (total, width)
        lengths = base.placeholder_masks(inputs["input_ids"])[0].sum(-1)  # (batch,)
        with torch.autocast(labels.device.type, enabled=False):
            log_probabilities = self.distances(embeddings)  # (total, 1 + tokens)
            counts, targets = lengths.tolist(), self._targets(labels)
            warn_of_short_rows(counts, targets)
            summed = ctc_loss(log_probabilities, counts, targets)
            spread = self.distances.spread(embeddings, log_probabilities)
        num_labels = (labels >= 0).sum()
        num_items = num_labels if num_items_in_batch is None else num_items_in_batch  # of all accumulated batches
        parts = {"ctc_loss": summed / num_items, "spread": spread * num_labels / num_items}
        for name, value in parts.items():
            self.add_part(name, value)
        loss = sum(parts.values())
        return (loss, None) if return_outputs else loss

    def _targets(self, labels: torch.Tensor) -> list[torch.Tensor]:
        """Classes of the answer of each row, without the special tokens that end the turn."""
        classes = self.distances.classes[labels.clamp_min(0)] * (labels >= 0)  # (batch, sequence)
        return [row[row > 0] for row in classes]


def _check(trainer: CtcTrainer) -> None:
    if trainer.args.world_size > 1:
        raise ArgumentError("training.alignment=ctc runs in one process; it takes minutes, as the LLM does not run")
    if not isinstance(trainer.train_dataset, Dataset):
        raise ArgumentError("training.alignment=ctc needs data that does not stream; give streaming=false and max_rows")
    others = sorted(set(count_tasks(trainer.train_dataset)) - set(WORD_TASKS))
    if others:
        raise ArgumentError(
            f"training.alignment=ctc needs answers that are the words of the recording, but data.train has the tasks "
            f"{', '.join(others)}; give each source tasks={list(WORD_TASKS[:1])}"
        )
    trained = (name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad)
    idle = [name for name in trained if ".prompt_pool." in name or ".lora_" in name]
    if idle:
        raise ArgumentError(
            f"training.alignment=ctc does not train {idle[0]}; give model.prompt_pool.pool_size=0 and no model.lora"
        )
