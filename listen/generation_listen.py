"""What generation needs beyond transformers: placeholder ids that no processor sees and no answer holds."""

from typing import Any

import torch
from transformers import LogitsProcessorList
from transformers.generation.candidate_generator import CandidateGenerator


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
        placeholders = torch.tensor(self.placeholder_ids, device=input_ids.device)
        return scores.index_fill(-1, placeholders[placeholders < scores.shape[-1]], -torch.inf)


def ordinary_ids(
    input_ids: torch.LongTensor, placeholder_ids: list[int], padding: torch.Tensor | None = None
) -> torch.LongTensor:
    """`input_ids` `(rows, sequence)` with stand-ins for what `PlaceholderBlindProcessors` hides; its arguments."""
    hidden = torch.isin(input_ids, torch.tensor(placeholder_ids, device=input_ids.device))  # (rows, seq)
    if padding is not None:
        padding = padding.to(input_ids.device)
        hidden[:, : padding.shape[1]] |= padding & hidden.any(-1, keepdim=True)
    first = (~hidden).int().argmax(-1, keepdim=True)  # (rows, 1)
    stand_in = input_ids.gather(1, first).masked_fill(hidden.all(-1, keepdim=True), 0)  # (rows, 1)
    return torch.where(hidden, stand_in, input_ids)


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


__all__ = ["PlaceholderBlindProcessors", "PlaceholderFreeCandidates", "ordinary_ids"]
