"""BERTScore against values worked out by hand, on models whose hidden states are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fixtures_tokenizers import build_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5Model,
)

from listen.evaluation.bert_score import BertScore
from listen.evaluation.confidence import bootstrap_intervals

# directions of the words; their mean is 0, so that BERT's LayerNorm keeps them
VECTORS = {
    "[PAD]": [0.0, 0.0, 0.0, 0.0],
    "[UNK]": [1.0, 1.0, -1.0, -1.0],
    "[CLS]": [1.0, 0.0, 0.0, -1.0],
    "[SEP]": [1.0, 0.0, 0.0, -1.0],
    "glad": [1.0, -1.0, 0.0, 0.0],
    "table": [0.0, 0.0, 1.0, -1.0],
    "happy": [1.0, -1.0, 1.0, -1.0],  # cosine of 1 / sqrt 2 to both of the others
}
HALF = 0.5**0.5


def word_tokenizer(max_length: int = 32) -> PreTrainedTokenizerFast:
    """One token a word, between CLS and SEP."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VECTORS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=max_length, **names)


@pytest.fixture(scope="module")
def bert() -> BertModel:
    """A random BERT whose input embeddings are `VECTORS`."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 4, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertModel(BertConfig(vocab_size=len(VECTORS), max_position_embeddings=32, **sizes))
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.copy_(torch.tensor(list(VECTORS.values())))
        model.embeddings.position_embeddings.weight.zero_()
        model.embeddings.token_type_embeddings.weight.zero_()
        for parameter in model.encoder.parameters():
            parameter.mul_(10.0 if parameter.dim() > 1 else 1.0)
    return model


@pytest.fixture(scope="module")
def embeddings(bert: BertModel) -> BertScore:
    return BertScore(bert, word_tokenizer(), layer=0)


@pytest.mark.parametrize(
    ("prediction", "reference", "precision", "recall"),
    [
        ("glad", "glad", 1.0, 1.0),
        ("glad", "happy", HALF, HALF),
        ("glad table", "happy", HALF, HALF),
        ("glad table", "glad", (1 + 1 / 2) / 2, 1.0),  # table has 1/2 with SEP, 0 with glad
        ("happy", "glad table", HALF, HALF),
        ("glad glad happy", "glad happy table", 1.0, (1 + 1 + HALF) / 3),
    ],
)
def test_values_by_hand(
    embeddings: BertScore, prediction: str, reference: str, precision: float, recall: float
) -> None:
    value = embeddings.compute(predictions=[prediction], references=[reference])
    f1 = 2 * precision * recall / (precision + recall)
    expected = {"bertscore": f1, "bertscore_precision": precision, "bertscore_recall": recall}
    assert value == pytest.approx(expected, abs=1e-6)


def test_the_best_reference_counts_and_the_mean_is_over_examples(embeddings: BertScore) -> None:
    value = embeddings.compute(predictions=["glad", "table"], references=[["happy", "glad"], ["happy"]])
    assert value["bertscore"] == pytest.approx((1 + HALF) / 2, abs=1e-6)


def test_an_empty_prediction_is_wrong_and_an_empty_reference_an_error(embeddings: BertScore) -> None:
    value = embeddings.compute(predictions=["", "glad"], references=["glad", "glad"])
    assert value == pytest.approx(dict.fromkeys(BertScore.names, 0.5), abs=1e-6)
    with pytest.raises(ValueError, match="example 1 .*empty.*give"):
        embeddings.compute(predictions=["glad", "glad"], references=["glad", " "])


def test_scores_do_not_depend_on_batches(bert: BertModel) -> None:
    predictions = ["glad", "happy table glad", "", "table table", "glad happy happy happy table"]
    references = [["table", "happy glad"], ["glad glad"], ["table"], ["happy"], ["glad happy"]]
    whole, single = (BertScore(bert, word_tokenizer(), batch_size=n) for n in (8, 1))
    rows = whole.row_statistics(predictions, references)
    assert np.allclose(rows, single.row_statistics(predictions, references), atol=1e-6)
    assert len(np.unique(rows[:, 0].round(4))) == len(rows)
    low, high = bootstrap_intervals(whole, rows, num_resamples=50)["bertscore"]
    assert 0 <= low < rows[:, 0].mean() < high <= 1


def test_layers_differ_and_the_last_is_the_default(bert: BertModel) -> None:
    pair = {"predictions": ["glad table"], "references": ["happy glad glad"]}
    values = {layer: BertScore(bert, word_tokenizer(), layer=layer).compute(**pair)["bertscore"] for layer in range(3)}
    assert len({round(value, 4) for value in values.values()}) == 3
    assert BertScore(bert, word_tokenizer()).compute(**pair)["bertscore"] == values[2]


def test_texts_beyond_the_longest_are_cut_and_told(bert: BertModel, caplog: pytest.LogCaptureFixture) -> None:
    short = BertScore(bert, word_tokenizer(max_length=4), layer=0)
    value = short.compute(predictions=["glad glad table table"], references=["glad"])  # CLS glad glad SEP are left
    assert value["bertscore"] == pytest.approx(1.0, abs=1e-6) and "1 texts are longer than the 4 tokens" in caplog.text


def test_wrong_settings_are_refused(bert: BertModel) -> None:
    with pytest.raises(ValueError, match="layer=3 must lie in 0..2"):
        BertScore(bert, word_tokenizer(), layer=3)
    with pytest.raises(ValueError, match="batch_size=0"):
        BertScore(bert, word_tokenizer(), batch_size=0)


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
def test_any_text_model_from_a_folder(kind: str, tmp_path) -> None:
    torch.manual_seed(0)
    tokenizer = build_tokenizer(pad_token=None)
    if kind == "decoder":
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = LlamaModel(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.5, **sizes))
    else:
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
        model = T5Model(T5Config(vocab_size=len(tokenizer), decoder_start_token_id=0, initializer_factor=5.0, **sizes))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    predictions, references = ["the cat sat", "a tall tree", "the cat"], ["the cat sat", "the cat sat", "a tall tree"]
    rows = BertScore.from_pretrained(str(tmp_path), batch_size=8).row_statistics(predictions, references)
    alone = BertScore(AutoModel.from_pretrained(tmp_path), build_tokenizer(), batch_size=1)
    assert np.allclose(rows, alone.row_statistics(predictions, references), atol=1e-5)
    assert rows[0] == pytest.approx([1, 1, 1], abs=1e-5) and (rows[1:] < 0.99).all()
