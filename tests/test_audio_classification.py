"""The classifier of speech: what it hears, what learns, and what its folders hold."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fixtures_classification import (
    LABELS,
    RATE,
    classifier_config,
    encoder_classifier,
    features,
    noise,
    tiny_classifier,
)
from safetensors.torch import load_file, save_file
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification

from listen import (
    ListenAudioClassificationConfig,
    ListenAudioClassificationFeatureExtractor,
    ListenForAudioClassification,
)

FRESH = """
import sys, torch, transformers
from safetensors.torch import load_file, save_file

clip_file, *folders = sys.argv[1:]
clips = [clip.numpy() for clip in load_file(clip_file).values()]
for folder in folders:
    classify = transformers.pipeline("audio-classification", folder, trust_remote_code=True, device="cpu")
    found = classify(clips) + classify(clips[:2], batch_size=2)
    scores = [[next(r["score"] for r in row if r["label"] == l) for l in ("happy", "sad", "angry")] for row in found]
    save_file({"scores": torch.tensor(scores)}, folder + ".results")
assert not any(name.split(".")[0] == "listen" for name in sys.modules)
"""


@pytest.fixture(scope="module")
def model() -> ListenForAudioClassification:
    return tiny_classifier()


@pytest.fixture(scope="module")
def clips() -> list[np.ndarray]:
    """A short clip, a longer one, and one that takes two chunks."""
    return [noise(0.3, 1), noise(1.7, 2), noise(31.3, 3)]


@torch.no_grad()
def logits(model: ListenForAudioClassification, *clips: np.ndarray) -> torch.Tensor:
    return model(**features(*clips)).logits


# ---------------------------------------------------------------------- hearing


def test_a_batch_gives_what_its_rows_give_alone(model: ListenForAudioClassification, clips: list[np.ndarray]) -> None:
    together = logits(model, *clips)
    alone = torch.cat([logits(model, clip) for clip in clips])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_all_chunks_of_a_long_clip_are_heard(model: ListenForAudioClassification) -> None:
    clip = noise(31.3, 3)
    changed = clip.copy()
    changed[RATE * 30 :] = noise(1.3, 4) * 0.01
    assert (logits(model, clip) - logits(model, changed)).abs().max() > 1e-4


def test_every_layer_of_the_encoder_is_heard(model: ListenForAudioClassification) -> None:
    states, mask = model.encode(**features(noise(1.0)))
    assert states.shape == (1, model.config.speech_config.num_hidden_layers + 1, 3, 32)  # 1 s in steps of 0.4 s
    states.requires_grad_()
    model(layer_states=states, layer_states_mask=mask).logits[0, 0].backward()
    assert (states.grad.abs().amax((0, 2, 3)) > 0).all()
    for layer in range(states.shape[1]):
        silenced = states.detach().clone()
        silenced[:, layer] = 0.0
        assert (model(layer_states=silenced).logits - model(layer_states=states).logits).abs().max() > 1e-4


def test_steps_are_means_of_the_layers(model: ListenForAudioClassification) -> None:
    inputs = features(noise(0.9))
    states, mask = model.encode(**inputs)
    encoded = model.speech_encoder(inputs["input_features"][..., :90], output_hidden_states=True)
    for layer, hidden in enumerate(encoded.hidden_states):  # (1, 45 frames, width), steps of 20, 20 and 5
        expected = torch.stack([part.mean(0) for part in hidden[0].split(20)])
        torch.testing.assert_close(states[0, layer], expected, atol=1e-5, rtol=0)
    assert mask.tolist() == [[True] * 3]


def test_states_computed_once_give_the_same_as_audio(
    model: ListenForAudioClassification, clips: list[np.ndarray]
) -> None:
    states, mask = model.encode(**features(*clips))
    assert mask.sum(1).tolist() == [1, 5, 79]  # 75 steps of the first chunk, 4 of the second
    with torch.no_grad():
        kept = model(layer_states=states, layer_states_mask=mask).logits
    torch.testing.assert_close(kept, logits(model, *clips), atol=1e-6, rtol=0)


def test_whisper_can_hear_30_seconds_and_the_head_the_clip_alone(clips: list[np.ndarray]) -> None:
    padded = tiny_classifier(pad_to_30s=True)
    inputs = features(*clips[:2], pad_to_30s=True)
    states, mask = padded.encode(**inputs)
    assert mask.sum(1).tolist() == [1, 5] and mask.shape[1] == 75
    whole = padded.speech_encoder(inputs["input_features"], output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(states[1, 1, 0], whole[1, :20].mean(0), atol=1e-5, rtol=0)


# ---------------------------------------------------------------------- other encoders
# one for each way of encoding: masked batches, with and without a group norm, by length at the output's frame rate and
# at others, fixed length

KINDS = ("w2v-bert", "wavlm-base", "conformer", "moonshine", "sew", "wav2vec2-adapter", "ast")


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_any_encoder_hears_a_batch_as_its_rows_alone(kind: str) -> None:
    model, extractor = encoder_classifier(kind)
    clips = [noise(0.3, 1), noise(0.9, 2)]
    together = model(**extractor(clips, RATE)).logits
    alone = torch.cat([model(**extractor(clip, RATE)).logits for clip in clips])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    assert (together[0] - together[1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_of_any_encoder_is_heard(kind: str) -> None:
    model, extractor = encoder_classifier(kind)
    states, mask = model.train().encode(**extractor([noise(1.0), noise(0.7)], RATE))
    steps = (4, 3) if kind == "wav2vec2-adapter" else (3, 2)  # of 0.32 s, two of its frames, in place of 0.4 s
    assert states.shape == (2, 3, mask.shape[1], 32) and tuple(mask.sum(1).tolist()) == steps
    states.requires_grad_()
    model(layer_states=states, layer_states_mask=mask, labels=torch.tensor([0, 1])).loss.backward()
    assert (states.grad.abs().amax((0, 2, 3)) > 0).all()
    learning = {name.split(".")[0] for name, weight in model.named_parameters() if weight.requires_grad}
    assert learning == {"classifier"} and not model.speech_encoder.encoder.training


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier_over_any_encoder_is_loaded_as_it_was_saved(kind: str, tmp_path: Path) -> None:
    model, extractor = encoder_classifier(kind, tmp_path / "encoder")
    inputs = extractor(noise(0.6), RATE)
    expected = model(**inputs).logits
    for folder, full in (("head", False), ("full", True)):
        model.save_pretrained(tmp_path / folder, save_full=full)
        extractor.save_pretrained(tmp_path / folder)
        loaded = ListenForAudioClassification.from_pretrained(tmp_path / folder).eval()
        assert torch.equal(loaded(**inputs).logits, expected)
        again = AutoFeatureExtractor.from_pretrained(tmp_path / folder)(noise(0.6), RATE)
        assert torch.equal(again["input_features"], inputs["input_features"])
    assert {key.split(".")[0] for key in load_file(tmp_path / "head" / "model.safetensors")} == {"classifier"}


# ---------------------------------------------------------------------- learning


def test_only_the_head_learns_and_the_encoder_stays_in_eval_mode() -> None:
    model = tiny_classifier().train()
    assert model.classifier.training and not any(m.training for m in model.speech_encoder.modules())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)  # even when it is given all
    model(**features(noise(0.5), noise(0.8)), labels=torch.tensor([0, 2])).loss.backward()
    optimizer.step()
    changed = {name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"classifier"}
    assert all(parameter.grad is not None for parameter in model.classifier.parameters())


def test_the_loss_is_the_weighted_cross_entropy_and_adds_up_over_micro_batches() -> None:
    weights = [0.5, 1.0, 2.0]
    model = tiny_classifier(class_weights=weights)
    inputs, labels = features(noise(0.5, 1), noise(0.7, 2), noise(0.6, 3)), torch.tensor([0, 2, 1])
    with torch.no_grad():
        output = model(**inputs, labels=labels)
        parts = [
            model(**features(noise(seconds, seed)), labels=labels[i : i + 1], num_items_in_batch=3).loss
            for i, (seconds, seed) in enumerate([(0.5, 1), (0.7, 2), (0.6, 3)])
        ]
    plain = -F.log_softmax(output.logits, -1)[torch.arange(3), labels]
    expected = (plain * torch.tensor(weights)[labels]).mean()
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(sum(parts), expected, atol=1e-5, rtol=0)


def test_labels_are_smoothed_in_training_only() -> None:
    model = tiny_classifier(label_smoothing=0.3, dropout=0.0)
    inputs, labels = features(noise(0.5)), torch.tensor([1])
    in_eval, in_training = model(**inputs, labels=labels), model.train()(**inputs, labels=labels)
    torch.testing.assert_close(in_eval.loss, F.cross_entropy(in_eval.logits, labels))
    expected = F.cross_entropy(in_training.logits, labels, label_smoothing=0.3)
    torch.testing.assert_close(in_training.loss, expected)
    assert (in_training.loss - in_eval.loss).abs() > 1e-3


# ---------------------------------------------------------------------- folders


def test_a_checkpoint_holds_the_head_and_names_the_encoder(tmp_path: Path) -> None:
    model = tiny_classifier(tmp_path / "encoder")
    model.save_pretrained(tmp_path / "head")
    keys = set(load_file(tmp_path / "head" / "model.safetensors"))
    assert {key.split(".")[0] for key in keys} == {"classifier"}
    loaded, info = ListenForAudioClassification.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(logits(loaded, noise(0.5)), logits(model, noise(0.5)))
    assert loaded.config.id2label == dict(enumerate(LABELS))
    assert not any(p.requires_grad for p in loaded.speech_encoder.parameters())


def test_a_full_folder_stands_alone(tmp_path: Path) -> None:
    model = tiny_classifier(tmp_path / "encoder")
    model.save_pretrained(tmp_path / "full", save_full=True)
    (tmp_path / "encoder").rename(tmp_path / "elsewhere")
    loaded = AutoModelForAudioClassification.from_pretrained(tmp_path / "full")
    assert torch.equal(logits(loaded, noise(0.5)), logits(model, noise(0.5)))


def test_another_encoder_is_refused(tmp_path: Path) -> None:
    tiny_classifier(tmp_path / "encoder").save_pretrained(tmp_path / "head")
    other = tiny_classifier(seed=1).speech_encoder
    with torch.no_grad():
        other.layer_norm.bias.add_(1.0)
    other.save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match="fingerprint"):
        ListenForAudioClassification.from_pretrained(tmp_path / "head")


def test_a_missing_weight_is_an_error(tmp_path: Path) -> None:
    tiny_classifier(tmp_path / "encoder").save_pretrained(tmp_path / "head")
    weights = load_file(tmp_path / "head" / "model.safetensors")
    del weights["classifier.output.weight"]
    save_file(weights, tmp_path / "head" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks the weights"):
        ListenForAudioClassification.from_pretrained(tmp_path / "head")


def test_the_encoder_may_be_in_half_precision(tmp_path: Path) -> None:
    tiny_classifier(tmp_path / "encoder").save_pretrained(tmp_path / "head")
    model = ListenForAudioClassification.from_pretrained(tmp_path / "head", dtype=torch.bfloat16)
    assert model.speech_encoder.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in model.classifier.parameters()} == {torch.float32}
    reference = ListenForAudioClassification.from_pretrained(tmp_path / "head")
    torch.testing.assert_close(logits(model, noise(0.8)), logits(reference, noise(0.8)), atol=0.1, rtol=0)


def test_a_fresh_process_classifies_with_transformers_own_pipeline(tmp_path: Path, clips: list[np.ndarray]) -> None:
    models = [tiny_classifier(tmp_path / "encoder"), tiny_classifier(seed=1), encoder_classifier("w2v-bert")[0]]
    folders = [tmp_path / "head", tmp_path / "full", tmp_path / "other"]
    extractors = [ListenAudioClassificationFeatureExtractor.from_config(model.config) for model in models]
    for model, extractor, folder in zip(models, extractors, folders, strict=True):
        model.save_pretrained(folder)
        extractor.save_pretrained(folder)
    save_file({str(i): torch.tensor(clip) for i, clip in enumerate(clips)}, tmp_path / "clips.safetensors")
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", FRESH, str(tmp_path / "clips.safetensors"), *map(str, folders)]
    run = subprocess.run(command, cwd="/", env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for model, extractor, folder in zip(models, extractors, folders, strict=True):
        with torch.no_grad():
            expected = model(**extractor([*clips, *clips[:2]], RATE)).logits.softmax(-1)
        torch.testing.assert_close(load_file(f"{folder}.results")["scores"], expected, atol=1e-5, rtol=0)


def test_the_feature_extractor_is_found_by_its_folder(tmp_path: Path) -> None:
    ListenAudioClassificationFeatureExtractor(chunk_seconds=2.0).save_pretrained(tmp_path)
    loaded = AutoFeatureExtractor.from_pretrained(tmp_path)
    assert type(loaded) is ListenAudioClassificationFeatureExtractor
    found = loaded([noise(0.5), noise(4.5)], RATE)
    assert found["chunk_counts"].tolist() == [1, 3]
    assert found["input_features"].shape == (4, 80, 200)
    assert found["input_features_mask"].sum(1).tolist() == [50, 200, 200, 50]


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: classifier_config(hiden_size=3), "did you mean 'hidden_size'"),
        (lambda: classifier_config(speech_config={"model_type": "bert"}), "is no supported speech encoder"),
        (
            lambda: classifier_config(speech_config={"model_type": "hubert"}, pad_to_30s=True),
            "pad_to_30s=True is for Whisper only",
        ),
        (lambda: classifier_config(num_layer_heads=5), "hidden_size=32 is not a multiple of num_layer_heads=5"),
        (lambda: classifier_config(num_time_heads=0), "num_time_heads=0 must be at least 1"),
        (lambda: classifier_config(step_seconds=0.0), "step_seconds=0.0 must be above 0"),
        (lambda: classifier_config(label_smoothing=1.0), r"label_smoothing=1.0 must lie in \[0, 1\)"),
        (lambda: classifier_config(class_weights=[1.0]), "must be 3 numbers"),
        (lambda: classifier_config(base_models={"language_model": {}}), "must name 'speech_encoder' alone"),
        (lambda: ListenAudioClassificationConfig.from_backbones("x", ["sad", "sad"]), "two or more different"),
        (lambda: ListenAudioClassificationFeatureExtractor(num_fbank_bins=128), "leave it out"),
    ],
)
def test_impossible_settings_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_inputs_that_do_not_fit_are_named(model: ListenForAudioClassification) -> None:
    inputs = features(noise(0.4), noise(0.5))
    with pytest.raises(ValueError, match="input_features.*layer_states"):
        model()
    with pytest.raises(ValueError, match=r"chunk_counts=\[1\].* 2 rows"):
        model(**{**inputs, "chunk_counts": torch.tensor([1])})
    with pytest.raises(TypeError, match="unexpected keyword"):
        model(**inputs, input_values=torch.zeros(1))
