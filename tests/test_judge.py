"""The judge: strict reading of verdicts, over real HTTP and with a real model that judges badly."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures_endpoint import serve_chat
from fixtures_tokenizers import build_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from listen.data.chat_models import EndpointChatModel, LocalChatModel
from listen.evaluation.judge import RUBRICS, JudgeItem, judge_responses, parse_score, scored

ITEMS = [JudgeItem(f"words number {i} {{response}}", "happy" if i % 2 else "sad", f"answer {i}.") for i in range(6)]


@pytest.mark.parametrize(
    ("verdict", "score"),
    [
        ("Score: 7", 7),
        ("It fits.\n\nScore: 10", 10),
        ("It fits.\n**Score: 8/10**", 8),
        ("score = 1.", 1),
        ("Final score: 9", 9),
        ("4", 4),
        ("<think>Score: 2</think>\nGood.\nScore: 6", 6),
        ("Score: 5\nScore: 5", 5),
        ("Score: 5\nScore: 6", None),
        ("Score: 11", None),
        ("Score: 0", None),
        ("Score: -3", None),
        ("Score: 7.5", None),
        ("Score: 8/5", None),
        ("Score: high", None),
        ("I would give it 7 of 10", None),
        ("The score: 7 seems fair", None),
        ("Score: 3 or 4", None),
        ("11", None),
        ("9" * 5000, None),
        ("Score: " + "9" * 5000, None),
        ("Score: \u00b2", None),
        ("\u0667", 7),
        ("Score: 7\x00", None),
        ("\n" * 200_000 + "Score: 7", 7),
        ("Score: 7" + " " * 200_000, 7),
        (" \n" * 100_000 + "Score" + " " * 100_000, None),
        ("", None),
    ],
)
def test_a_verdict_names_one_whole_score_or_none(verdict: str, score: int | None) -> None:
    assert parse_score(verdict) == score


def reply(body: dict) -> tuple[int, str]:
    """Quality is the number of the answer plus one; the emotion of one item gets no score and another no verdict."""
    (message,) = body["messages"]
    number = int(re.search(r"answer (\d)", message["content"])[1])
    if "Judge the answer alone" in message["content"]:
        return 200, f"It is answer {number}. It is fine.\nScore: {number + 1}"
    if number == 2:
        return 200, "I cannot say."
    return (400, "no") if number == 3 else (200, f"Score: {9 if 'happy' in message['content'] else 3}")


def test_an_endpoint_judges_and_what_has_no_score_is_counted() -> None:
    with serve_chat(reply) as server:
        judge = EndpointChatModel(server.url, "judge", max_retries=0, concurrency=3)
        found = judge_responses(judge, ITEMS, batch_size=4, num_resamples=50, progress=False)
    assert found.scores[:, 0].tolist() == [1, 2, 3, 4, 5, 6]
    assert np.array_equal(found.scores[:, 1], [3, 9, np.nan, np.nan, 3, 9], equal_nan=True)
    assert found.values == {"quality": 3.5, "emotion": 6.0}
    assert found.unparsable == {"quality": 0, "emotion": 1} and found.failed == {"quality": 0, "emotion": 1}
    assert [count for error, count in found.errors.items() if "HTTPError" in error] == [1]
    assert found.verdicts[2]["emotion"] == "I cannot say." and found.verdicts[3]["emotion"] is None
    low, high = found.intervals["quality"]
    assert 1 <= low < 3.5 < high <= 6 and found.settings["judge"]["model"] == "judge"


def test_each_answer_is_judged_for_one_thing_at_a_time_in_a_drawn_order() -> None:
    asked = {}
    for seed in (0, 0, 1):
        with serve_chat(reply) as server:
            judge_responses(
                EndpointChatModel(server.url, "judge", max_retries=0, concurrency=1),
                ITEMS,
                seed=seed,
                progress=False,
                num_resamples=0,
            )
        asked.setdefault(seed, []).append([body["messages"][0]["content"] for body in server.requests])
    (first, again), (other,) = asked[0], asked[1]
    assert first == again != other and sorted(first) == sorted(other) and len(set(first)) == 12
    numbers = [int(re.search(r"answer (\d)", text)[1]) for text in first]
    assert numbers != sorted(numbers)
    quality = next(text for text in first if "Judge the answer alone" in text and "answer 1" in text)
    assert '"words number 1 {response}"' in quality and "happy" not in quality  # only one rubric tells the emotion
    assert all(body["temperature"] == 0.0 for body in server.requests)


def test_a_model_that_writes_nonsense_gives_no_scores(tmp_path) -> None:
    torch.manual_seed(0)
    template = "{% for m in messages %}{{ '<s>' + m['content'] }}{% endfor %}"
    tokenizer = build_tokenizer(template=template)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=4096, eos_token_id=2, **sizes)
    )
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    judge = LocalChatModel(str(tmp_path), max_new_tokens=4)
    found = judge_responses(judge, ITEMS[:2], num_resamples=10, progress=False)
    assert found.unparsable == {"quality": 2, "emotion": 2} and found.failed == {"quality": 0, "emotion": 0}
    assert all(map(math.isnan, found.values.values())) and found.intervals == {}


def test_rubrics_ask_for_the_form_that_is_read() -> None:
    assert set(RUBRICS) == {"quality", "emotion"}
    for text in RUBRICS.values():
        assert "Score: N" in text and parse_score(text.replace("Score: N", "\nScore: 7")) == 7
    assert "{emotion}" in RUBRICS["emotion"] and "{emotion}" not in RUBRICS["quality"]


def test_known_scores_are_summed_up_alike() -> None:
    found = scored(np.array([[1.0, 10.0], [3.0, np.nan]]), {"judge": "rules"}, num_resamples=20)
    assert found.values == {"quality": 2.0, "emotion": 10.0} and found.settings == {"judge": "rules"}
    assert found.intervals["emotion"] == (10.0, 10.0)


def test_nothing_to_judge_is_an_error() -> None:
    with serve_chat(reply) as server, pytest.raises(ValueError, match="0 items"):
        judge_responses(EndpointChatModel(server.url, "judge"), [], progress=False)


def test_verdicts_are_stored_as_they_come_and_asked_for_once(tmp_path: Path) -> None:
    """The first call ends after two batches; the second one asks for the rest, and for what failed."""

    class Interrupted(Exception):
        pass

    class Ending(EndpointChatModel):
        batches = 2

        def answer(self, conversations, seed=0):
            self.batches -= 1
            if self.batches < 0:
                raise Interrupted
            return super().answer(conversations, seed)

    options = {"batch_size": 3, "num_resamples": 0, "progress": False}
    with serve_chat(reply) as server:
        straight = judge_responses(EndpointChatModel(server.url, "judge"), ITEMS, **options)
        asked = len(server.requests)
        with pytest.raises(Interrupted):
            judge_responses(Ending(server.url, "judge"), ITEMS, folder=tmp_path, **options)
        stored = len((tmp_path / "verdicts.jsonl").read_text().splitlines())
        assert stored in (5, 6)  # one of all requests fails
        with (tmp_path / "verdicts.jsonl").open("a") as file:
            file.write('{"key": "cut o')
        found = [
            judge_responses(EndpointChatModel(server.url, "judge"), ITEMS, folder=tmp_path, **options) for _ in range(2)
        ]
        assert len(server.requests) == asked + 12 + (6 - stored) + 1  # the failed one is asked for again
        judge_responses(EndpointChatModel(server.url, "other"), ITEMS, folder=tmp_path, **options)
        assert len(server.requests) == asked + 12 + (6 - stored) + 1 + 12  # another judge has its own verdicts
    for judgement in found:
        assert np.array_equal(judgement.scores, straight.scores, equal_nan=True)
        assert judgement.verdicts == straight.verdicts and judgement.failed == straight.failed
