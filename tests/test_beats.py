"""BEATs equals its plain reference, and a row never depends on its batch mates."""

from __future__ import annotations

import math

import pytest
import torch
from beats_reference import TINY, bucket, encode, official_rule, probabilities, synthetic_checkpoint
from fixtures_beats import from_checkpoint
from transformers import Trainer, TrainingArguments

from listen.configuration_beats import BeatsConfig
from listen.modeling_beats import (
    BeatsModel,
    official_token_mask,
    relative_position_buckets,
)

FRAMES = 70  # 4 time steps of 8 patches, 6 frames left over


def filter_banks(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, 128, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model() -> BeatsModel:
    return from_checkpoint(synthetic_checkpoint(**TINY))


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "variant", [{}, {"deep_norm": False}, {"conv_pos": 7}, {"embed_dim": 32}, {"num_buckets": 320, "max_distance": 800}]
)
def test_equals_the_float64_reference(variant, attention):
    checkpoint = synthetic_checkpoint(**{**TINY, **variant})
    fbank = filter_banks(FRAMES)
    fast = from_checkpoint(checkpoint, attention)(fbank[None]).last_hidden_state[0]
    torch.testing.assert_close(fast.double(), encode(checkpoint, fbank), atol=2e-5, rtol=0)


@torch.no_grad()
def test_equals_the_float64_reference_under_the_official_mask():
    checkpoint = synthetic_checkpoint(**TINY)
    fbank = filter_banks(FRAMES)
    padded = [i >= 7_000 for i in range(11_680)]
    mask = official_token_mask(torch.tensor([padded]), FRAMES, 32)
    assert 0 < mask[0, 16:24].sum() < 8  # a time step that is half masked
    real = [not masked for masked in official_rule(official_rule(padded, FRAMES), 32)]
    assert mask[0].tolist() == real
    fast = from_checkpoint(checkpoint)(fbank[None], token_mask=mask).last_hidden_state[0]
    torch.testing.assert_close(fast.double(), encode(checkpoint, fbank, real), atol=2e-5, rtol=0)


@torch.no_grad()
@pytest.mark.slow
def test_full_size_equals_the_float64_reference():
    checkpoint = synthetic_checkpoint()
    model = from_checkpoint(checkpoint)
    assert model.num_parameters() == 90_311_792
    fbank = filter_banks(16 * 12)
    fast = model(fbank[None]).last_hidden_state[0]
    torch.testing.assert_close(fast.double(), encode(checkpoint, fbank), atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("change", [{"max_distance": 40}, {"deep_norm": False}])
def test_the_comparison_notices_a_wrong_constant(change):
    checkpoint = synthetic_checkpoint(**TINY)
    wrong = {"cfg": {**checkpoint["cfg"], **change}, "model": checkpoint["model"]}
    fbank = filter_banks(FRAMES)
    difference = from_checkpoint(wrong)(fbank[None]).last_hidden_state[0] - encode(checkpoint, fbank)
    assert difference.abs().max() > 0.01


@torch.no_grad()
def test_the_gate_reads_the_query(model):
    fbank = filter_banks(1, FRAMES)
    before = model(fbank).last_hidden_state
    silenced = BeatsModel(model.config).eval()
    silenced.load_state_dict(model.state_dict())
    for layer in silenced.layers:
        layer.attention.gate_proj.weight.zero_()
    assert (silenced(fbank).last_hidden_state - before).abs().max() > 0.01


@torch.no_grad()
def test_fine_tuned_head_equals_the_reference():
    checkpoint = synthetic_checkpoint(**TINY, finetuned_model=True)
    fbank = filter_banks(FRAMES)
    model = from_checkpoint(checkpoint)
    plain = model(fbank[None]).logits.sigmoid()[0]
    torch.testing.assert_close(plain.double(), probabilities(checkpoint, fbank), atol=1e-5, rtol=0)
    real = [token < 19 for token in range(32)]
    masked = model(fbank[None], token_mask=torch.tensor([real])).logits.sigmoid()[0]
    torch.testing.assert_close(masked.double(), probabilities(checkpoint, fbank, real), atol=1e-5, rtol=0)


@torch.no_grad()
def test_classification_loss_is_binary_cross_entropy_over_labels():
    model = from_checkpoint(synthetic_checkpoint(**TINY, finetuned_model=True))
    labels = torch.tensor([[1, 0, 1, 0, 0]])
    output = model(filter_banks(1, FRAMES), labels=labels)
    chance = torch.where(labels.bool(), output.logits.sigmoid(), 1 - output.logits.sigmoid())
    torch.testing.assert_close(output.loss, -chance.log().mean())


def test_accumulated_batches_train_the_head_as_one_does(tmp_path):
    rows = [{"input_values": filter_banks(32, seed=i), "labels": torch.tensor([i % 2, 1, 0, 0, 1])} for i in range(4)]
    constant = dict.fromkeys(("dropout", "attention_dropout", "predictor_dropout"), 0.0)
    weights = []
    for size in (4, 1):
        model = from_checkpoint(synthetic_checkpoint(**TINY, **constant, finetuned_model=True))
        batches = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size, "max_steps": 1}
        rates = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
        arguments = TrainingArguments(tmp_path, **batches, **rates, use_cpu=True, report_to=[])
        Trainer(model, arguments, train_dataset=rows).train()
        weights.append(model.classifier.weight)
    torch.testing.assert_close(*weights, atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_row_equals_the_clip_alone(attention):
    model = from_checkpoint(synthetic_checkpoint(**TINY), attention)
    lengths = [96, 16, 47, 70]
    fbank = filter_banks(4, 96)
    mask = (torch.arange(96) < torch.tensor(lengths)[:, None]).long()
    fbank[mask == 0] = math.nan  # whatever padding holds must not matter
    batch = model(fbank, mask).last_hidden_state
    counts = model.output_mask(mask).sum(1).tolist()
    assert counts == [8 * (length // 16) for length in lengths]
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        alone = model(fbank[row : row + 1, :length]).last_hidden_state
        assert alone.shape[1] == count
        torch.testing.assert_close(batch[row : row + 1, :count], alone, atol=2e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_row_of_padding_alone_is_finite(dtype, attention):
    model = from_checkpoint(synthetic_checkpoint(**TINY), attention).to(dtype)
    output = model(filter_banks(2, 32), torch.tensor([[1] * 32, [0] * 32])).last_hidden_state
    assert output.dtype == dtype and output.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("way", ["weights", "autocast"])
def test_bfloat16_stays_close(attention, way):
    exact = from_checkpoint(synthetic_checkpoint(**TINY), attention)
    rough = from_checkpoint(synthetic_checkpoint(**TINY), attention)
    rough = rough.to(torch.bfloat16) if way == "weights" else rough
    fbank, mask = filter_banks(2, 64), torch.tensor([[1] * 64, [1] * 40 + [0] * 24])
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        output = rough(fbank, mask).last_hidden_state
    difference = (output.float() - exact(fbank, mask).last_hidden_state).abs()
    assert difference.max() < 0.3 and difference.mean() < 0.03


@torch.no_grad()
def test_positional_convolution_is_right_in_bfloat16_for_small_groups():
    config = BeatsConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=8)
    position = BeatsModel(config).position_convolution
    hidden_states = torch.randn(2, 48, 64, generator=torch.Generator().manual_seed(0))
    exact = position(hidden_states)
    rough = position.to(torch.bfloat16)(hidden_states.bfloat16())
    torch.testing.assert_close(rough.float(), exact, atol=0.02, rtol=0.02)


@torch.no_grad()
def test_attention_weights_and_hidden_states_are_returned_when_asked():
    model = from_checkpoint(synthetic_checkpoint(**TINY), "eager")
    mask = torch.tensor([[1] * 64, [1] * 40 + [0] * 24])
    output = model(filter_banks(2, 64), mask, output_attentions=True, output_hidden_states=True)
    assert len(output.hidden_states) == 4 and len(output.attentions) == 3
    assert output.attentions[0].shape == (2, 4, 32, 32)
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(2, 4, 32))
    assert output.attentions[0][1, :, :, 16:].abs().max() == 0  # nothing attends to padding
    assert isinstance(model(filter_banks(1, 64), return_dict=False), tuple)


@torch.no_grad()
def test_masks_that_say_the_same_give_the_same(model):
    fbank, mask = filter_banks(2, 64), torch.tensor([[1] * 64, [1] * 48 + [0] * 16])
    by_frames = model(fbank, mask).last_hidden_state
    by_tokens = model(fbank, token_mask=model.output_mask(mask)).last_hidden_state
    assert torch.equal(by_frames, by_tokens)
    everything = model(fbank, torch.ones(2, 64)).last_hidden_state
    assert torch.equal(everything, model(fbank).last_hidden_state)


def test_official_rule_masks_within_time_steps():
    samples, frames, tokens = 3 * 16_000, 298, 144
    lengths = torch.tensor([48_000, 32_000, 9_000])
    padding = torch.arange(samples) >= lengths[:, None]
    mask = official_token_mask(padding, frames, tokens)
    for row, length in enumerate(lengths.tolist()):
        by_frame = official_rule([i >= length for i in range(samples)], frames)
        assert mask[row].tolist() == [not padded for padded in official_rule(by_frame, tokens)]
    assert (~mask).sum(1).tolist()[0] == 0 and any(count % 8 for count in mask.sum(1).tolist())


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(320, 800), (16, 20)])
def test_buckets_equal_the_formula(num_buckets, max_distance):
    buckets = relative_position_buckets(1500, num_buckets, max_distance, torch.device("cpu"))
    expected = [bucket(distance, num_buckets, max_distance) for distance in range(-1499, 1500)]
    assert buckets.tolist() == expected


@torch.no_grad()
def test_position_bias_depends_on_the_distance_alone(model):
    bias = model.position_bias(30)  # (1, heads, 30, 30)
    weight = model.relative_position_bias.weight
    for query, key in ((0, 0), (0, 29), (29, 0), (12, 14), (14, 12)):
        index = bucket(key - query, model.config.num_buckets, model.config.max_distance)
        assert torch.equal(bias[0, :, query, key], weight[index])


def test_initialisation_sets_every_parameter(tmp_path):
    config = BeatsConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)
    BeatsModel(config).save_pretrained(tmp_path, state_dict={"layer_norm.bias": torch.zeros(64)})
    torch.manual_seed(3)
    model, info = BeatsModel.from_pretrained(tmp_path, output_loading_info=True)
    assert len(info["missing_keys"]) == len(model.state_dict()) - 1
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    attention, convolution = model.layers[0].attention, model.position_convolution.convolution
    assert torch.equal(attention.gate_scale, torch.ones(1, 4, 1, 1))
    xavier = math.sqrt(2 / (64 + 64))
    assert attention.q_proj.weight.std().item() == pytest.approx(xavier, rel=0.1)
    assert attention.v_proj.weight.std().item() == pytest.approx(xavier * 16**-0.25, rel=0.1)
    assert convolution.weight.std().item() == pytest.approx(math.sqrt(4 / (128 * 64)), rel=0.1)
    assert not convolution.bias.any()
    assert model.patch_embedding.convolution.weight.std().item() == pytest.approx(0.02, rel=0.1)


@torch.no_grad()
def test_saved_and_loaded_is_the_same(tmp_path, model):
    model.save_pretrained(tmp_path)
    loaded, info = BeatsModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name in BeatsConfig.__annotations__:
        assert getattr(loaded.config, name) == getattr(model.config, name)
    fbank = filter_banks(1, FRAMES)
    assert torch.equal(loaded.eval()(fbank).last_hidden_state, model(fbank).last_hidden_state)


@torch.no_grad()
def test_the_encoder_loads_from_a_classifier(tmp_path):
    classifier = from_checkpoint(synthetic_checkpoint(**TINY, finetuned_model=True))
    classifier.save_pretrained(tmp_path)
    encoder, info = BeatsModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    fbank = filter_banks(1, FRAMES)
    assert torch.equal(encoder.eval()(fbank).last_hidden_state, classifier.beats(fbank).last_hidden_state)


def test_gradient_checkpointing_gives_the_same_gradients(model):
    fbank = filter_banks(1, 32)
    gradients = []
    for checkpointing in (False, True):
        copy = BeatsModel(model.config)
        copy.load_state_dict(model.state_dict())
        copy.train()
        for module in copy.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        copy.config.attention_dropout = 0.0
        if checkpointing:
            copy.activation_checkpointing_enable()
        copy(fbank).last_hidden_state.square().sum().backward()
        gradients.append(copy.layers[0].attention.q_proj.weight.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(1, 32, 80),), "128"),
        ((torch.zeros(32, 128),), "input_values"),
        ((torch.zeros(1, 15, 128),), "at least 16 frames, got 15"),
        ((torch.zeros(1, 32, 128), torch.ones(1, 31)), r"\(1, 32\), got \(1, 31\)"),
        ((torch.zeros(1, 32, 128), None, torch.ones(1, 15)), r"\(1, 16\), got \(1, 15\)"),
        ((torch.zeros(1, 32, 128), torch.ones(1, 32), torch.ones(1, 16)), "not both"),
    ],
)
def test_input_that_does_not_fit_raises(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(*arguments)


def test_an_unknown_argument_raises(model):
    with pytest.raises(TypeError, match=r"\['attention_mask'\].*input_values_mask"):
        model(torch.zeros(1, 32, 128), attention_mask=torch.ones(1, 32))


@pytest.mark.parametrize(("samples", "frames", "tokens"), [(100, 200, 10), (1000, 10, 20)])
def test_official_mask_needs_descending_lengths(samples, frames, tokens):
    with pytest.raises(ValueError, match="samples >= frames >= tokens"):
        official_token_mask(torch.zeros(1, samples, dtype=torch.bool), frames, tokens)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 0}, "hidden_size=0 must be a positive integer"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers=1.5"),
        ({"num_attention_heads": 7}, "hidden_size=768 is not a multiple of num_attention_heads=7"),
        ({"conv_pos_groups": 5}, "conv_pos_groups=5"),
        ({"num_mel_bins": 80, "patch_size": 32}, "num_mel_bins=80 is not a multiple of patch_size=32"),
        ({"num_buckets": 30}, "num_buckets=30 must be a positive multiple of 4"),
        ({"max_distance": 80}, "max_distance=80 must exceed num_buckets // 4 = 80"),
        ({"hidden_dropout": 1.0}, "hidden_dropout=1.0"),
        ({"hidden_act": "gellu"}, "hidden_act='gellu' is unknown"),
    ],
)
def test_config_values_that_cannot_work_raise(values, message):
    with pytest.raises(ValueError, match=message):
        BeatsConfig(**values)


def test_config_refuses_unknown_arguments():
    with pytest.raises(TypeError, match="num_layers"):
        BeatsConfig(num_layers=3)
