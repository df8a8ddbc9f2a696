"""Behavioural alignment by distillation: the LLM should predict the same tokens from speech as from text.

The teacher is the same frozen LLM without adapters. It reads the words of the recording, with the emotion named, under
the instruction that targets are generated with, and then the response; the student gets the recording. The target at
each position of the response is the teacher's whole distribution instead of a single token (Hinton et al., arXiv
1503.02531).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .trainer import ListenTrainer

_IGNORED = -100


def distillation_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    labels: torch.Tensor,
    temperature: float = 1.0,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """KL(teacher || student) of the next-token distributions at the positions of the response.

    Args:
        student: `(batch, kept positions, vocabulary)` logits.
        teacher: the same, of an input that ends in the same response.
        labels: `(batch, kept positions)`, -100 to ignore; position t is judged by the label at t + 1.
        temperature: both distributions are softened by it; the loss is multiplied by its square, so that gradients
            keep their size (Hinton et al., section 2).
        num_items_in_batch: labels of the whole accumulated batch; those of this one by default.

    Returns:
        Scalar; zero if and only if both agree.

    Raises:
        ValueError: the two differ in positions or vocabulary.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student logits {tuple(student.shape)} and teacher logits {tuple(teacher.shape)} differ")
    judged = labels[:, 1:] != _IGNORED  # (batch, kept - 1)
    mine = F.log_softmax(student[:, :-1][judged].float() / temperature, dim=-1)  # (labels, vocabulary)
    theirs = F.log_softmax(teacher[:, :-1][judged].float() / temperature, dim=-1)
    total = F.kl_div(mine, theirs, reduction="sum", log_target=True) * temperature**2
    return total / (judged.sum() if num_items_in_batch is None else num_items_in_batch)


class DistillationTrainer(ListenTrainer):
    """Trains with `distillation_loss` instead of the next-token loss; the key loss of the pool is unchanged.

    The training collator must return `teacher_input_ids` and `teacher_attention_mask`. Evaluation reports the
    next-token loss on the responses, so that runs of both kinds can be compared.

    Args:
        temperature: see `distillation_loss`.
        lm_weight: weight of the next-token loss that is added.
        **kwargs: see `ListenTrainer`.
    """

    loss_parts = (*ListenTrainer.loss_parts, "distill_loss")

    def __init__(self, *, temperature: float = 1.0, lm_weight: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.temperature, self.lm_weight = temperature, lm_weight

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The distillation loss where the inputs hold those of a teacher, else as `ListenTrainer`."""
        inputs = dict(inputs)
        ids, mask = (inputs.pop(f"teacher_{name}", None) for name in ("input_ids", "attention_mask"))
        if ids is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        kept = inputs["logits_to_keep"]
        teacher = self._teacher_logits(model, ids, mask, kept)  # (batch, kept, vocabulary)
        _, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        labels = inputs["labels"][:, -kept:]
        distilled = distillation_loss(outputs.logits[:, -kept:], teacher, labels, self.temperature, num_items_in_batch)
        self.add_part("distill_loss", distilled)
        loss = distilled
        if self.lm_weight:
            loss = loss + self.lm_weight * outputs.lm_loss
        if outputs.key_loss is not None:
            loss = loss + self._key_weight(model) * outputs.key_loss
        loss = loss * self._scale(num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _teacher_logits(self, model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor, kept: int) -> torch.Tensor:
        """Logits of the base LLM. It runs before the student: switching LoRA off and on touches its parameters."""
        base = self.accelerator.unwrap_model(model)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)  # (batch, sequence); padding shifts nothing
        with base.disable_adapter():
            return base(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=kept).logits

    def _key_weight(self, model: torch.nn.Module) -> float:
        base = self.accelerator.unwrap_model(model)
        return base.adapters[base.active_adapter].prompt_pool.config.key_loss_weight

    def _scale(self, num_items_in_batch: torch.Tensor | int | None) -> int:
        """Gradients are averaged over processes, but each has its share of a sum: as `Trainer.compute_loss` does it."""
        summed = self.args.average_tokens_across_devices and num_items_in_batch is not None
        return self.accelerator.num_processes // self.get_tp_size() if summed else 1
