"""What generation needs beyond transformers: logits processors that are blind to placeholder ids."""

import torch
from transformers import LogitsProcessorList


class PlaceholderBlindProcessors(LogitsProcessorList):
    """Runs `processors` on ids in which placeholders, and padding before them, are replaced.

    Processors such as the repetition penalty gather scores by id: there are none above the vocabulary, and padding
    must not make a row's answer depend on its batch mates. The first ordinary id of the row, commonly its BOS, takes
    their place: it is in the row already and never a likely answer. Rows without placeholders are left alone.

    Args:
        processors: What to run.
        placeholder_ids: Ids that stand for audio and prompts.
        pad_token_id: Id of the padding; `None` where there is none.
    """

    def __init__(self, processors: LogitsProcessorList, placeholder_ids: list[int], pad_token_id: int | None) -> None:
        super().__init__(processors)
        self.placeholder_ids = placeholder_ids
        self.pad_token_id = pad_token_id

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: object) -> torch.FloatTensor:
        """`input_ids` `(batch, sequence)`, `scores` `(batch, vocabulary)`."""
        hidden = torch.isin(input_ids, torch.tensor(self.placeholder_ids, device=input_ids.device))  # (batch, seq)
        if self.pad_token_id is not None:
            leading = (input_ids == self.pad_token_id).cumprod(-1).bool()  # (batch, seq)
            hidden |= leading & hidden.any(-1, keepdim=True)
        first = (~hidden).int().argmax(-1, keepdim=True)  # (batch, 1)
        ordinary = torch.where(hidden, input_ids.gather(1, first), input_ids)
        return super().__call__(ordinary, scores, **kwargs)


__all__ = ["PlaceholderBlindProcessors"]
