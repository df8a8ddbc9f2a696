"""Metric values against hand-computed numbers and against the libraries they wrap."""

from __future__ import annotations

import math
from pathlib import Path

import evaluate
import numpy as np
import pytest
import sacrebleu
from sklearn.metrics import balanced_accuracy_score, f1_score

from listen.evaluation import metrics
from listen.evaluation.metrics import (
    CiderD,
    Classification,
    EventF1,
    ExactMatch,
    Rouge,
    RowMetric,
    Translation,
    Verification,
    WordErrorRate,
)
from listen.evaluation.metrics.label_parser import UNPARSABLE, LabelParser
from listen.evaluation.metrics.verification import equal_error_rate

FOLDER = Path(metrics.__file__).parent
MODULES = {
    "word_error_rate": WordErrorRate,
    "translation": Translation,
    "classification": Classification,
    "verification": Verification,
    "exact_match": ExactMatch,
    "rouge": Rouge,
    "cider_d": CiderD,
    "event_f1": EventF1,
}
EXAMPLES = {
    "word_error_rate": (["a cat sat", ""], ["the cat sat", "yes"]),
    "translation": (["我爱你", "他在家"], [["我爱她", "我爱你们"], ["他在家"]]),
    "classification": (["happy", "sad"], ["happy", "angry"]),
    "verification": (["yes", "no"], ["yes", "yes"]),
    "exact_match": (["the dog", "cat"], [["dog", "cat"], ["bird"]]),
    "rouge": (["the dog", "cat"], [["a dog", "cat"], ["bird"]]),
    "cider_d": (["a dog barks", "rain falls"], [["the dog barks"], ["rain falls down", "it rains"]]),
    "event_f1": (["a dog barks", "rain falls"], [["dog"], ["rain", "cat"]]),
}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No metric may reach for the network."""
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)


@pytest.mark.parametrize("name", MODULES)
def test_loaded_from_its_file_equals_the_import(name):
    predictions, references = EXAMPLES[name]
    loaded = evaluate.load(str(FOLDER / f"{name}.py")).compute(predictions=predictions, references=references)
    imported = MODULES[name]().compute(predictions=predictions, references=references)
    assert loaded == pytest.approx(imported, nan_ok=True)
    assert set(MODULES[name].names) <= set(imported)


def test_every_metric_file_is_listed():
    shared = {"__init__", "label_parser", "row_metric"}
    assert {path.stem for path in FOLDER.glob("*.py")} - shared == set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_compute_is_the_aggregate_of_all_rows(name):
    metric: RowMetric = MODULES[name]()
    predictions, references = EXAMPLES[name]
    rows = metric.row_statistics(predictions, references)
    assert rows.shape[0] == len(predictions) and rows.dtype == np.float64
    assert metric.aggregate(rows) == pytest.approx(
        metric.compute(predictions=predictions, references=references), nan_ok=True
    )


@pytest.mark.parametrize("name", MODULES)
def test_no_predictions_raise(name):
    with pytest.raises(ValueError, match="no predictions"):
        MODULES[name]().compute(predictions=[], references=[])


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"event_f1"}))
def test_an_example_without_reference_raises(name):
    with pytest.raises(ValueError, match="example 1 has no reference|example 1 has 0 reference"):
        MODULES[name]().compute(predictions=["yes", "yes"], references=[["yes"], []])


@pytest.mark.parametrize("name", MODULES)
def test_unequal_lengths_raise(name):
    with pytest.raises(ValueError):
        MODULES[name]().compute(predictions=["yes"], references=["yes", "no"])


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"cider_d"}))
def test_an_empty_prediction_is_wrong_but_no_error(name):
    predictions, references = EXAMPLES[name]
    metric = MODULES[name]()
    value = metric.compute(predictions=[""] * len(predictions), references=references)
    worst = {"wer": 1.0, "cer": 1.0}
    assert all(value[n] == worst.get(n, 0.0) for n in metric.names if not math.isnan(value[n]))


# word error rate


def test_wer_and_cer_by_hand():
    # "the cat sat" -> "the bat": 1 substitution + 1 deletion of 3 words; 1 + 4 (" sat") of 11 characters
    # "go home" -> "go home now": 1 insertion of 2 words; 4 (" now") of 7 characters
    value = WordErrorRate().compute(predictions=["The bat.", "go home now"], references=["the cat sat", "Go home!"])
    assert value == pytest.approx({"wer": 3 / 5, "cer": 9 / 18})


def test_wer_normalises_as_whisper_does():
    same = [("I'm ten years old", "i am 10 years old"), ("um, Mr. Smith", "mister smith"), ("two nine six", "296")]
    for prediction, reference in same:
        assert WordErrorRate().compute(predictions=[prediction], references=[reference])["wer"] == 0.0


def test_wer_spelling_mapping_and_normalizers():
    example = {"predictions": ["the colour"], "references": ["the color"]}
    assert WordErrorRate().compute(**example)["wer"] == 0.5
    assert WordErrorRate().compute(**example, spelling_mapping={"colour": "color"})["wer"] == 0.0
    raw = {"predictions": ["I'm ten"], "references": ["i am 10"]}
    assert WordErrorRate().compute(**raw, normalizer="none")["wer"] == 1.0
    with pytest.raises(ValueError, match="normalizer='English'"):
        WordErrorRate().compute(**raw, normalizer="English")


def test_wer_of_empty_references_counts_insertions_and_is_nan_alone():
    value = WordErrorRate().compute(predictions=["noise here", "a b c d"], references=["", "a b c d"])
    assert value["wer"] == 2 / 4
    assert math.isnan(WordErrorRate().compute(predictions=["noise"], references=["um"])["wer"])


def test_wer_takes_the_nearest_reference():
    assert WordErrorRate().compute(predictions=["a b"], references=[["x y", "a b"]])["wer"] == 0.0


# translation


@pytest.mark.parametrize("tokenize", ["zh", "char", "13a"])
def test_translation_equals_sacrebleu(tokenize):
    predictions = ["年轻的医生在花园里找到了一个红色的篮子", "他 loves 北京", "", "昨天农民卖了一把吉他"]
    references = ["年轻的老师在花园里找到了一个蓝色的篮子", "她 loves 北京。", "空", "昨天农民卖了一把吉他"]
    value = Translation().compute(predictions=predictions, references=references, tokenize=tokenize)
    assert value["bleu"] == pytest.approx(sacrebleu.corpus_bleu(predictions, [references], tokenize=tokenize).score)
    assert value["chrf"] == pytest.approx(sacrebleu.corpus_chrf(predictions, [references]).score)
    assert 0 < value["chrf"] < 100


def test_translation_with_different_numbers_of_references_equals_sacrebleu():
    predictions, references = EXAMPLES["translation"]
    streams = [["我爱她", "他在家"], ["我爱你们", None]]
    value = Translation().compute(predictions=predictions, references=references)
    assert value["bleu"] == pytest.approx(sacrebleu.corpus_bleu(predictions, streams, tokenize="zh").score)
    assert value["chrf"] == pytest.approx(sacrebleu.corpus_chrf(predictions, streams).score)


def test_translation_of_one_long_sentence_by_hand():
    # 7 characters, the fifth replaced: 6/7 unigrams, 4/6 bigrams, 2/5 trigrams, 1/4 4-grams, no brevity penalty
    value = Translation().compute(predictions=["一二三四九六七"], references=["一二三四五六七"])
    assert value["bleu"] == pytest.approx(100 * (6 / 7 * 4 / 6 * 2 / 5 * 1 / 4) ** 0.25)


def test_translation_refuses_what_it_cannot_score():
    with pytest.raises(ValueError, match="tokenize='chinese'"):
        Translation().compute(predictions=["a"], references=["a"], tokenize="chinese")
    with pytest.raises(ValueError, match="example 0 has an empty reference"):
        Translation().compute(predictions=["a"], references=[" "])


# classification


def test_classification_by_hand():
    # happy: 2 of 3 right, sad: 0 of 1 (unparsable), angry: 1 of 1
    value = Classification().compute(
        predictions=["Happy.", "The speaker sounds happy!", "sad", "happy or sad", "ANGRY"],
        references=["happy", "happy", "happy", "sad", "angry"],
    )
    assert value == pytest.approx({"accuracy": 3 / 5, "uar": (2 / 3 + 0 + 1) / 3, "unparsable_rate": 1 / 5})


def test_uar_equals_scikit_learn_without_unparsable_answers():
    rng = np.random.default_rng(0)
    truths, answers = rng.choice(["a", "b", "c"], size=(2, 100))
    value = Classification().compute(predictions=list(answers), references=list(truths))
    assert value["uar"] == pytest.approx(balanced_accuracy_score(truths, answers))


def test_a_label_that_no_reference_holds_can_be_answered_wrongly():
    value = Classification().compute(predictions=["fearful"], references=["happy"], labels=["fearful", "happy"])
    assert value == {"accuracy": 0.0, "uar": 0.0, "unparsable_rate": 0.0}


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("happy", "happy"),
        (" Very-Happy! ", "very happy"),
        ("It is sad, so sad.", "sad"),
        ("sadly", None),
        ("", None),
        ("happy, not sad", None),
        ("The person is very happy", "very happy"),
        ("unhappy", None),
    ],
)
def test_label_parser_reads_one_label_or_none(text, label):
    parser = LabelParser(["happy", "very happy", "sad"])
    assert parser(text) == (UNPARSABLE if label is None else parser.index_of(label))


def test_label_parser_refuses_labels_that_read_alike():
    with pytest.raises(ValueError, match="'Sad!'"):
        LabelParser(["sad", "Sad!"])


# verification


def test_verification_by_hand():
    value = Verification().compute(
        predictions=["Yes.", "no", "yes", "perhaps", "no, yes"],
        references=["yes", "no", "no", "yes", "yes"],
        scores=[2.0, -1.0, 1.0, 0.5, 3.0],
    )
    # best first: yes 3, yes 2, no 1, yes .5, no -1. Between the ROC points (0, 2/3) and (1/2, 2/3) a third of the yes
    # is refused throughout, and the accepted no rise from none to half: they meet at 1/3.
    assert value == pytest.approx({"accuracy": 2 / 5, "eer": 1 / 3, "unparsable_rate": 2 / 5})


@pytest.mark.parametrize(
    ("truths", "scores", "expected"),
    [
        ([1, 1, 0, 0], [2, 1, -1, -2], 0.0),
        ([0, 0, 1, 1], [2, 1, -1, -2], 1.0),
        ([1, 0, 1, 0], [1, 1, 1, 1], 0.5),
        ([1, 1, 0, 0], [3, 1, 2, 0], 0.5),
        ([1, 1, 1, 1, 0, 0, 0, 0], [8, 7, 6, 3, 4, 2, 1, 0], 0.25),
    ],
)
def test_equal_error_rate_by_hand(truths, scores, expected):
    assert equal_error_rate(np.array(truths), np.array(scores, dtype=float)) == pytest.approx(expected)


def test_equal_error_rate_of_two_normals_is_their_overlap():
    rng = np.random.default_rng(0)
    truths = np.repeat([0, 1], 20_000)
    scores = rng.normal(size=truths.size) + 2.0 * truths
    assert equal_error_rate(truths, scores) == pytest.approx(0.1587, abs=0.006)  # Phi(-1)


def test_equal_error_rate_is_nan_where_undefined():
    one_class = Verification().compute(predictions=["yes"], references=["yes"], scores=[1.0])
    no_scores = Verification().compute(predictions=["yes", "no"], references=["yes", "no"])
    assert math.isnan(one_class["eer"]) and math.isnan(no_scores["eer"])
    assert one_class["accuracy"] == no_scores["accuracy"] == 1.0


def test_verification_refuses_other_references_and_wrong_score_counts():
    with pytest.raises(ValueError, match="example 0: reference .*maybe"):
        Verification().compute(predictions=["yes"], references=["maybe"])
    with pytest.raises(ValueError, match="2 scores for 1 predictions"):
        Verification().compute(predictions=["yes"], references=["yes"], scores=[1.0, 2.0])


# exact match, ROUGE


def test_exact_match_ignores_case_punctuation_and_articles():
    value = ExactMatch().compute(
        predictions=["The garden.", "in garden", "two nine six", "a"],
        references=[["garden", "a garden"], ["in the garden"], ["two nine"], ["the"]],
    )
    assert value["exact_match"] == 2 / 4
    signs = ExactMatch().compute(predictions=["", "?", " ? "], references=["?", "!", "?"])
    assert signs["exact_match"] == 1 / 3  # nothing but signs is not nothing


def test_rouge_by_hand():
    # "the dog runs fast" and "a dog runs" share two words, one pair of words, and a common subsequence of two words:
    # F1 of 2 of 4 and 2 of 3, of 1 of 3 and 1 of 2, and again of 2 of 4 and 2 of 3
    value = Rouge().compute(predictions=["The dog runs fast"], references=[["a dog runs", "cat"]])
    assert value == pytest.approx({"rouge_1": 4 / 7, "rouge_2": 2 / 5, "rouge_l": 4 / 7})


def test_rouge_takes_the_best_reference_for_each_of_the_three():
    # the first has all the words, the second more of them in order
    value = Rouge().compute(predictions=["a b c d"], references=[["d c b a", "a b c x y"]])
    assert value == pytest.approx({"rouge_1": 1.0, "rouge_2": 2 * (2 / 3 * 2 / 4) / (2 / 3 + 2 / 4), "rouge_l": 2 / 3})


def test_rouge_refuses_a_reference_that_it_cannot_read():
    with pytest.raises(ValueError, match="example 0: ROUGE cannot read"):
        Rouge().compute(predictions=["红色"], references=["红色"])


# CIDEr-D


def test_cider_of_single_words_by_hand():
    # Each reference word is in one of two documents: idf = log 2. Unigrams match fully in the first example and for
    # one of two words in the second, cosine 1 / (1 * sqrt 2) with candidate "rain" against reference "rain falls".
    # Higher n-grams: none in one-word texts; the second differs by one bigram: penalty exp(-1 / 72).
    metric = CiderD()
    rows = metric.row_statistics(["barking", "rain"], ["Barking!", "rain falls"])[:, 0]
    assert rows == pytest.approx([10 / 4, 10 / 4 * math.exp(-1 / 72) / math.sqrt(2)])
    value = metric.compute(predictions=["barking", "rain"], references=["Barking!", "rain falls"])
    assert value["cider"] == pytest.approx(rows.mean())


def test_cider_averages_over_references_and_clips_repeats():
    # document frequency of "dog" and "cat" is 1 of 2; "dog dog" against "dog": min(2, 1) * 1 / (2 * 1) = 1/2 unigram
    # cosine, one bigram more: exp(-1/72). Against "cat" nothing. The mean over the two references halves it.
    rows = CiderD().row_statistics(["dog dog", "x"], [["dog", "cat"], ["y"]])[:, 0]
    assert rows == pytest.approx([10 * 0.5 * (0.5 * math.exp(-1 / 72)) / 4, 0.0])


def test_cider_of_perfect_captions_of_four_words_is_ten():
    texts = ["a dog barks loudly", "rain falls on roofs"]
    assert CiderD().compute(predictions=texts, references=texts)["cider"] == pytest.approx(10.0)


def test_cider_equals_the_reference_implementation():
    # values of pycocoevalcap 1.2 on the same texts without punctuation
    predictions = ["a man is walking on a gravel path", "rain falls heavily on the roof, birds sing", "a dog barks"]
    references = [
        ["a man walks on a gravel path", "someone is walking on gravel"],
        ["heavy rain falls on a roof"],
        ["a dog is barking", "the dog barks loudly", "a dog barks twice"],
    ]
    rows = CiderD().row_statistics(predictions, references)[:, 0]
    assert rows == pytest.approx([3.70990122, 1.80466064, 3.57294606], abs=1e-8)


def test_cider_of_a_single_example_is_nan():
    assert math.isnan(CiderD().compute(predictions=["a dog"], references=["a dog"])["cider"])


# event F1


def test_event_f1_by_hand():
    # dog: tp 1, fp 1; rain: tp 1; cat: fn 1. micro 2*2 / (2*2 + 1 + 1); macro over dog 2/3, rain 1, cat 0
    value = EventF1().compute(
        predictions=["A dog barks while rain falls.", "a dog"], references=[["dog", "rain"], ["cat"]]
    )
    assert value == pytest.approx({"event_f1": 4 / 6, "event_f1_macro": (2 / 3 + 1 + 0) / 3})


@pytest.mark.parametrize("average", ["micro", "macro"])
@pytest.mark.parametrize("size", [1, 2, 40])  # in few examples, most events neither occur nor are named
def test_event_f1_equals_scikit_learn(average: str, size: int):
    occurring, named = np.random.default_rng(0).random((2, size, 5)) < 0.2
    value = EventF1().aggregate(np.concatenate([occurring, named], axis=1).astype(float))
    expected = f1_score(occurring, named, average=average, zero_division=np.nan)
    assert value["event_f1" if average == "micro" else "event_f1_macro"] == pytest.approx(expected, nan_ok=True)


def test_event_f1_of_one_event_counts_no_true_negatives():
    value = EventF1().compute(predictions=["silence"] * 3, references=[["dog"], [], []])
    assert value == {"event_f1": 0.0, "event_f1_macro": 0.0}


def test_event_f1_without_any_event_is_nan():
    assert all(math.isnan(value) for value in EventF1().aggregate(np.zeros((3, 4))).values())


def test_event_f1_reads_phrases_as_whole_words():
    phrases = {"dog": ["dog barks", "barking"], "car": ["car"]}
    value = EventF1().compute(
        predictions=["Barking; a scar.", "The dog, barks"], references=[["dog"], ["dog"]], phrases=phrases
    )
    assert value["event_f1"] == 1.0


def test_event_f1_takes_examples_without_event_and_refuses_none_at_all():
    value = EventF1().compute(predictions=["silence", "a dog"], references=[[], ["dog"]])
    assert value["event_f1"] == 1.0
    with pytest.raises(ValueError, match="no example has an event"):
        EventF1().compute(predictions=["a"], references=[[]])
    with pytest.raises(ValueError, match="event '!' has no phrase"):
        EventF1().compute(predictions=["a"], references=[["!"]])
