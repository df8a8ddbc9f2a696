"""Published BEATs files convert exactly; wrong ones are refused with the reason."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from beats_reference import PUBLISHED_CONFIG, TINY, encode, probabilities, synthetic_checkpoint, tensor_shapes
from fixtures_beats import convert_beats

from listen.configuration_beats import BeatsConfig
from listen.modeling_beats import BeatsForAudioClassification, BeatsModel


def write(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


@torch.no_grad()
def test_pretrained_file_becomes_a_loadable_folder(tmp_path):
    checkpoint = synthetic_checkpoint(**TINY)
    source = write(tmp_path / "BEATs_iter9.pt", checkpoint)
    convert_beats.convert(source, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"README.md", "config.json", "model.safetensors"}
    model, info = BeatsModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    fbank = torch.randn(40, 128, generator=torch.Generator().manual_seed(0))
    output = model.eval()(fbank[None]).last_hidden_state[0]
    torch.testing.assert_close(output.double(), encode(checkpoint, fbank), atol=2e-5, rtol=0)
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\n") and "`BEATs_iter9.pt`" in card and f"{model.num_parameters():,} parameters" in card


@torch.no_grad()
def test_fine_tuned_file_keeps_its_head_and_labels(tmp_path):
    checkpoint = synthetic_checkpoint(**TINY, finetuned_model=True)
    checkpoint["label_dict"] = {i: f"/m/{i}" for i in range(5)}
    convert_beats.convert(write(tmp_path / "ft.pt", checkpoint), tmp_path / "out")
    model = BeatsForAudioClassification.from_pretrained(tmp_path / "out").eval()
    assert model.config.id2label == checkpoint["label_dict"] and model.config.num_labels == 5
    fbank = torch.randn(40, 128, generator=torch.Generator().manual_seed(0))
    output = model(fbank[None]).logits.sigmoid()[0]
    torch.testing.assert_close(output.double(), probabilities(checkpoint, fbank), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("finetuned_model", [False, True])
def test_the_code_of_the_card_runs(tmp_path, monkeypatch, finetuned_model):
    checkpoint = synthetic_checkpoint(**TINY, finetuned_model=finetuned_model)
    model = convert_beats.convert(write(tmp_path / "x.pt", checkpoint), tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    found = {"waveform": torch.sin(torch.arange(16_000) / 20)}
    exec((tmp_path / "out" / "README.md").read_text().split("```")[1].removeprefix("python"), found)
    assert type(found["model"]) is type(model) and found["output"][0].shape == (
        (1, 5) if finetuned_model else (1, 48, 32)
    )


def test_published_shape_is_the_default_and_has_250_tensors():
    config = convert_beats.convert_config(PUBLISHED_CONFIG)
    assert config.to_diff_dict() == BeatsConfig().to_diff_dict()
    shapes = tensor_shapes(PUBLISHED_CONFIG)
    assert len(shapes) == 250
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in BeatsModel(config).state_dict().items()}
    assert {convert_beats.rename(name): shape for name, shape in shapes.items()} == expected


def test_values_left_out_take_the_published_defaults():
    needed = {"input_patch_size": 16, "relative_position_embedding": True, "gru_rel_pos": True}
    config = convert_beats.convert_config(needed)
    assert config.max_distance == 1280 and config.deep_norm is False


def test_weight_norm_names_of_new_torch_are_understood():
    weights = synthetic_checkpoint(**TINY)["model"]
    old, new = "encoder.pos_conv.0.weight_{}", "encoder.pos_conv.0.parametrizations.weight.original{}"
    renamed = {**weights}
    for letter, digit in (("g", 0), ("v", 1)):
        renamed[new.format(digit)] = renamed.pop(old.format(letter))
    before, after = convert_beats.convert_weights(weights), convert_beats.convert_weights(renamed)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("layer_norm_first", True),
        ("conv_bias", True),
        ("relative_position_embedding", False),
        ("gru_rel_pos", False),
        ("activation_fn", "glu"),
    ],
)
def test_architectures_that_were_never_published_are_named(option, value):
    with pytest.raises(convert_beats.ConversionError, match=f"cfg.{option}={value!r}"):
        convert_beats.convert_config({**PUBLISHED_CONFIG, option: value})


def test_inconsistent_configuration_is_named():
    with pytest.raises(convert_beats.ConversionError, match="num_attention_heads=7"):
        convert_beats.convert_config({**PUBLISHED_CONFIG, "encoder_attention_heads": 7})


def test_truncated_file_is_named(tmp_path):
    path = write(tmp_path / "cut.pt", synthetic_checkpoint(**TINY))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(convert_beats.ConversionError, match="cut.pt is truncated"):
        convert_beats.convert(path, tmp_path / "out")
    path.write_bytes(b"")
    with pytest.raises(convert_beats.ConversionError, match="cut.pt is truncated"):
        convert_beats.convert(path, tmp_path / "out")


class Intruder:
    """Runs code when a careless reader unpickles it."""

    def __reduce__(self):
        return (sys.exit, ("executed",))


def test_code_in_the_file_is_refused_not_run(tmp_path):
    path = write(tmp_path / "evil.pt", {"cfg": Intruder(), "model": {}})
    with pytest.raises(convert_beats.ConversionError, match=r"evil.pt .*sys.exit$"):
        convert_beats.convert(path, tmp_path / "out")


@pytest.mark.parametrize(
    "content", [b"hello, not a checkpoint", b"<!DOCTYPE html>", b"version https://git-lfs", b"\xff"]
)
def test_a_file_of_other_bytes_is_refused_without_advice_to_run_it(tmp_path, content):
    (tmp_path / "page.pt").write_bytes(content)
    with pytest.raises(convert_beats.ConversionError, match=r"page.pt .*: its bytes are no saved tensors$"):
        convert_beats.convert(tmp_path / "page.pt", tmp_path / "out")


@pytest.mark.parametrize("labels", [None, ["a", "b"], {"a": 0, "b": 1}, {1: "a", 2: "b"}, {0: "a"}])
def test_labels_that_do_not_fit_the_head_become_numbers(labels):
    assert convert_beats.label_names(2, labels) == {0: "LABEL_0", 1: "LABEL_1"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {}}, "has no 'cfg'; it holds"),
        ({"cfg": {}, "state_dict": {}}, "has no 'model'"),
        ([1, 2], "it holds list"),
        ({"cfg": 3, "model": {}}, "'cfg' is a int"),
    ],
)
def test_files_of_another_kind_are_named(tmp_path, content, message):
    with pytest.raises(convert_beats.ConversionError, match=message):
        convert_beats.convert(write(tmp_path / "x.pt", content), tmp_path / "out")


def damaged(change: str) -> dict:
    checkpoint = synthetic_checkpoint(**TINY)
    weights = checkpoint["model"]
    if change == "missing":
        del weights["encoder.layers.1.fc1.weight"]
    elif change == "unknown":
        weights["quantize.embedding.weight"] = torch.zeros(3)
    elif change == "superfluous":
        weights["predictor.weight"] = torch.zeros(5, 32)
    elif change == "shape":
        weights["encoder.layer_norm.weight"] = torch.ones(31)
    elif change == "bias":
        weights["encoder.layers.2.self_attn.relative_attention_bias.weight"] = torch.zeros(16, 4)
    elif change == "nan":
        weights["encoder.layers.0.fc2.bias"][3] = torch.nan
    elif change == "no tensor":
        weights["encoder.layer_norm.bias"] = None
    return checkpoint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "lacks 1 tensors: layers.1.intermediate.weight"),
        ("unknown", "'quantize.embedding.weight' belongs to no BEATs encoder .a BEATs tokenizer"),
        ("superfluous", "unexpected 1 tensors: classifier.weight"),
        ("shape", r"layer_norm.weight has shape \(31,\), its configuration needs \(32,\)"),
        ("bias", "encoder.layers.2.self_attn.relative_attention_bias.weight differs from layer 0"),
        ("nan", "layers.0.output.bias has NaN"),
        ("no tensor", r"model\['encoder.layer_norm.bias'\] is a NoneType"),
    ],
)
def test_wrong_weights_are_named(tmp_path, change, message):
    with pytest.raises(convert_beats.ConversionError, match=message):
        convert_beats.convert(write(tmp_path / "x.pt", damaged(change)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command_line(tmp_path, monkeypatch, capsys):
    source = write(tmp_path / "x.pt", synthetic_checkpoint(**TINY))
    monkeypatch.setattr(sys, "argv", ["convert_beats.py", str(source), str(tmp_path / "out")])
    convert_beats.main()
    assert "BeatsModel with" in capsys.readouterr().out and (tmp_path / "out" / "config.json").is_file()
    monkeypatch.setattr(sys, "argv", ["convert_beats.py", str(tmp_path / "none.pt"), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stopped:
        convert_beats.main()
    assert stopped.value.code == 1 and "There is no file" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["convert_beats.py", str(source), str(source)])
    with pytest.raises(SystemExit) as stopped:
        convert_beats.main()
    assert stopped.value.code == 1 and "Not a directory" in capsys.readouterr().err
