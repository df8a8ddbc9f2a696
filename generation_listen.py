"""What generation needs beyond transformers: logits processors that are blind to placeholder ids."""

import torch
from transformers import LogitsProcessorList


class PlaceholderBlindProcessors(LogitsProcessorList):
    """Runs `processors` on ids in which placeholders above the vocabulary are replaced.

    Processors such as the repetition penalty gather scores by id, and there are none above the vocabulary. The first
    ordinary id of the row, commonly its BOS, takes their place: it is in the row already and never a likely answer.
    """

    def __init__(self, processors: LogitsProcessorList, vocab_size: int) -> None:
        super().__init__(processors)
        self.vocab_size = vocab_size

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: object) -> torch.FloatTensor:
        """`input_ids` `(batch, sequence)`, `scores` `(batch, vocabulary)`."""
        above = input_ids >= self.vocab_size  # (batch, seq)
        first = (~above).int().argmax(-1, keepdim=True)  # (batch, 1)
        ordinary = torch.where(above, input_ids.gather(1, first), input_ids)
        return super().__call__(ordinary, scores, **kwargs)


__all__ = ["PlaceholderBlindProcessors"]
