"""BERTScore of answers over any local text model, without a further dependency."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .metrics.row_metric import RowMetric, reference_lists

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Text:
    """Unit-length hidden states of a text, `(tokens, width)`, and a mask of its own tokens, `(tokens,)`."""

    states: torch.Tensor
    is_word: torch.Tensor


class BertScore(RowMetric):
    """BERTScore (Zhang et al., arXiv 1904.09675, equations 1 to 3): greedy cosine matching of hidden states.

    Each token of the answer is matched with the most similar one of the reference, and vice versa: the means of the
    cosines are precision and recall, and F1 combines them. As in the authors' `bert-score` with idf off and without
    rescaling to a baseline; tokens that the tokenizer adds, such as CLS, can be matched but do not count in the means.
    With several references, the one with the highest F1 counts. Values are fractions, and comparable only for the same
    model and layer.

    Args:
        model: any text model of transformers; of an encoder-decoder only the encoder is used. It is set to eval mode.
        tokenizer: its tokenizer.
        layer: layer of the hidden states, 0 for the input embeddings; the last one by default. `bert-score` uses layer
            17 of roberta-large, 9 of bert-base-uncased, 5 of distilbert-base-uncased.
        batch_size: texts of a batch.

    Raises:
        ValueError: the model has no such layer, or `batch_size` is below 1.
    """

    names = ("bertscore", "bertscore_precision", "bertscore_recall")

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        layer: int | None = None,
        batch_size: int = 32,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        depth = model.config.get_text_config().num_hidden_layers
        if layer is not None and not 0 <= layer <= depth:
            raise ValueError(f"layer={layer} must lie in 0..{depth}, the layers of {model.config.model_type}")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        self.model = (model.get_encoder() if model.config.is_encoder_decoder else model).eval()
        self.tokenizer = tokenizer
        self.layer = layer
        self.batch_size = batch_size
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token  # always masked

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        layer: int | None = None,
        batch_size: int = 32,
        device: torch.device | str = "cpu",
        dtype: str | torch.dtype = "auto",
    ) -> BertScore:
        """The metric over a model folder or a Hub id.

        Args:
            path: folder or id, of an encoder or a decoder.
            layer: see the class.
            batch_size: see the class.
            device: where the model runs.
            dtype: dtype of its weights.
        """
        model = AutoModel.from_pretrained(path, dtype=dtype).to(device)
        return cls(model, AutoTokenizer.from_pretrained(path), layer, batch_size)

    def row_statistics(self, predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> np.ndarray:
        """`(examples, 3)`: F1, precision and recall of each example; 0 for an empty prediction.

        Raises:
            ValueError: an example without reference, or an empty one.
        """
        lists = reference_lists(references)
        for index, options in enumerate(lists):
            if not all(option.strip() for option in options):
                raise ValueError(f"example {index} has an empty reference; give its text")
        pairs = list(zip(predictions, lists, strict=True))
        rows: list[tuple[float, float, float]] = []
        for start in range(0, len(pairs), self.batch_size):
            some = pairs[start : start + self.batch_size]
            texts = self._embed(text for prediction, options in some for text in (prediction, *options))
            for prediction, options in some:
                rows.append(max(_match(texts[prediction], texts[option]) for option in options))
        return np.array(rows, dtype=np.float64)

    def aggregate(self, rows: np.ndarray) -> dict[str, float]:
        """Means `{"bertscore", "bertscore_precision", "bertscore_recall"}` of a set of examples."""
        return {name: float(value) for name, value in zip(self.names, rows.mean(axis=0), strict=True)}

    def _embed(self, texts: Iterable[str]) -> dict[str, _Text]:
        """Unit hidden states of each text; each text is encoded once, in batches of similar length."""
        ordered = sorted(set(texts), key=lambda text: (len(text), text))
        embedded: dict[str, _Text] = {}
        for start in range(0, len(ordered), self.batch_size):
            some = ordered[start : start + self.batch_size]
            embedded |= dict(zip(some, self._run(some), strict=True))
        return embedded

    @torch.no_grad()
    def _run(self, texts: list[str]) -> list[_Text]:
        encoded = self._tokenize(texts)
        is_real = encoded["attention_mask"].bool()  # (batch, tokens), padded on the right
        if not is_real.any():
            return [_Text(torch.zeros(0, 1), torch.zeros(0)) for _ in texts]
        inputs = {name: encoded[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        states = self.model(**inputs, output_hidden_states=True).hidden_states[-1 if self.layer is None else self.layer]
        states = torch.nn.functional.normalize(states.float(), dim=-1).cpu()  # (batch, tokens, width)
        is_word = 1.0 - encoded["special_tokens_mask"].float()  # (batch, tokens)
        return [_Text(states[i, real], is_word[i, real]) for i, real in enumerate(is_real)]

    def _tokenize(self, texts: list[str]) -> dict[str, torch.Tensor]:
        # byte-level tokenizers encode the first word of a text differently from the same word within it
        if getattr(self.tokenizer, "add_prefix_space", None) is False:
            texts = [f" {text.strip()}" if text.strip() else "" for text in texts]
        limit = self._longest()
        options = {"padding": True, "padding_side": "right", "return_tensors": "pt", "verbose": False}
        encoded = self.tokenizer(texts, return_special_tokens_mask=True, **options)
        too_long = int((encoded["attention_mask"].sum(-1) > limit).sum()) if limit else 0
        if too_long:
            logger.warning(
                "%d texts are longer than the %d tokens of the BERTScore model and are truncated", too_long, limit
            )
            cut = {"truncation": True, "max_length": limit}
            encoded = self.tokenizer(texts, return_special_tokens_mask=True, **cut, **options)
        return encoded

    def _longest(self) -> int | None:
        """Maximum tokens of a text; `None` if neither tokenizer nor model has a limit."""
        if self.tokenizer.model_max_length < 1_000_000:  # transformers writes 1e30 for unknown
            return self.tokenizer.model_max_length
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)


def _match(prediction: _Text, reference: _Text) -> tuple[float, float, float]:
    """F1, precision and recall of one pair; 0 if one has no words."""
    if not prediction.is_word.any() or not reference.is_word.any():
        return 0.0, 0.0, 0.0
    cosines = prediction.states @ reference.states.T  # (tokens of the prediction, tokens of the reference)
    precision = _mean(cosines.amax(dim=1), prediction.is_word)
    recall = _mean(cosines.amax(dim=0), reference.is_word)
    total = precision + recall
    return (2 * precision * recall / total if total > 0 else 0.0), precision, recall


def _mean(values: torch.Tensor, weights: torch.Tensor) -> float:
    """Weighted mean of `(tokens,)`."""
    return float((values * weights).sum() / weights.sum())
