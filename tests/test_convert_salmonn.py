"""Published SALMONN files convert exactly, load and generate; wrong ones are refused with the reason."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import clip, tiny_model
from fixtures_backbones import save_backbones
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from salmonn_reference import FULL, LORA_ALPHA, LORA_RANK, TINY, embed, synthetic_checkpoint, tensor_shapes
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor, LlamaConfig, LlamaTokenizer

from listen import ListenConfig, ListenForConditionalGeneration, ListenProcessor
from listen.commands import convert_salmonn
from listen.data.features import EncodedRecording, collate_features
from listen.data.precompute import _encode_batch
from listen.feature_extraction_listen import ListenFeatureExtractor
from listen.modeling_beats import BeatsModel
from listen.outputs_listen import EncodedAudio

TOKENS = 88  # of 30 s
LORA = "llama_model.base_model.model.model.layers.{}.self_attn.{}_proj.lora_{}.default.weight"


def write(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_backbones(tmp_path_factory.mktemp("backbones"))


@pytest.fixture(scope="module")
def converted(paths: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """A tiny checkpoint of the published format, and the folder made of it."""
    folder = tmp_path_factory.mktemp("salmonn")
    checkpoint = synthetic_checkpoint(**TINY)
    convert_salmonn.convert(
        write(folder / "salmonn_v9.pth", checkpoint), folder / "out", convert_salmonn.Backbones(**paths)
    )
    return checkpoint, folder / "out"


@pytest.fixture(scope="module")
def model(converted: tuple[dict, Path]) -> ListenForConditionalGeneration:
    return ListenForConditionalGeneration.from_pretrained(converted[1])


@pytest.fixture(scope="module")
def processor(converted: tuple[dict, Path]) -> ListenProcessor:
    return AutoProcessor.from_pretrained(converted[1])


def encoder_frames(widths: tuple[int, int], lengths: list[int]) -> EncodedAudio:
    """Random frames of Whisper, 30 s whatever the clip, and of BEATs for clips of `lengths` frames."""
    generator = torch.Generator().manual_seed(0)
    speech = torch.randn(len(lengths), 1500, widths[0], generator=generator)
    audio = torch.randn(len(lengths), max(lengths), widths[1], generator=generator)
    real = torch.tensor(lengths)[:, None]
    return EncodedAudio(
        speech_hidden_states=speech,
        speech_hidden_states_mask=torch.arange(1500) < real,
        audio_hidden_states=audio,
        audio_hidden_states_mask=torch.arange(max(lengths)) < real,
    )


# ---------------------------------------------------------------------- audio embeddings equal SALMONN's


@torch.no_grad()
def test_embeddings_of_a_batch_equal_the_reference(converted: tuple, model: ListenForConditionalGeneration) -> None:
    encoded = encoder_frames((32, 32), [1496, 40, 0])
    heard = model.get_audio_features(encoded=encoded)
    assert heard.lengths.tolist() == [TOKENS] * 3
    for row, found in enumerate(heard.pooler_output.split(TOKENS)):
        audio = encoded.audio_hidden_states[row, : [1496, 40, 0][row]]
        expected = embed(converted[0], encoded.speech_hidden_states[row], audio)
        torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_embeddings_of_full_size_equal_the_reference(tmp_path: Path) -> None:
    LlamaConfig(hidden_size=FULL["text"], intermediate_size=64, num_hidden_layers=2).save_pretrained(tmp_path / "llm")
    checkpoint = synthetic_checkpoint(**{**FULL, "lora_width": 0})
    checkpoint["config"] = {"model": {"lora": False}}
    source = write(tmp_path / "salmonn.pth", checkpoint)
    backbones = convert_salmonn.Backbones(language_model=str(tmp_path / "llm"))
    config = convert_salmonn.convert(source, tmp_path / "out", backbones)
    assert config.base_models["speech_encoder"]["base_model_name_or_path"] == "openai/whisper-large-v2"
    assert config.base_models["audio_encoder"]["base_model_name_or_path"] == "./beats"
    model = ListenForConditionalGeneration(config, init_backbones=()).eval()
    model.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    encoded = encoder_frames((1280, 768), [1496])
    found = model.get_audio_features(encoded=encoded).pooler_output
    assert found.shape == (TOKENS, FULL["text"])
    chosen = [0, 1, 43, 86, 87]
    expected = embed(checkpoint, encoded.speech_hidden_states[0], encoded.audio_hidden_states[0], only=chosen)
    assert expected.std() > 0.5
    torch.testing.assert_close(found[chosen].double(), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_other_windows_are_read_from_the_checkpoint(paths: dict[str, str], tmp_path: Path) -> None:
    checkpoint = synthetic_checkpoint(**TINY, queries=2, layers=3)
    told = {"second_per_window": 0.5, "second_stride": 0.25, "lora_alpha": 16}
    checkpoint |= {"config": {"model": told}, "optimizer": {"state": {}}, "scaler": None, "epoch": 3}
    convert(checkpoint, tmp_path, paths)
    model = ListenForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert model.config.lora_config["lora_alpha"] == 16
    encoded = encoder_frames((32, 32), [100])
    found = model.get_audio_features(encoded=encoded).pooler_output
    expected = embed(checkpoint, encoded.speech_hidden_states[0], encoded.audio_hidden_states[0], 0.5, 0.25)
    assert expected.shape == (2 * ((1500 - 25) // 12 + 1), 48)
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_checkpoint_without_beats_and_lora(paths: dict[str, str], tmp_path: Path) -> None:
    checkpoint = synthetic_checkpoint(**{**TINY, "audio": 0, "lora_width": 0})
    without = {name: path for name, path in paths.items() if name != "audio_encoder"}
    convert(checkpoint, tmp_path, without, with_lora=False)
    model = ListenForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert model.audio_encoder is None and model.config.lora_config is None
    speech = encoder_frames((32, 32), [100]).speech_hidden_states
    found = model.get_audio_features(encoded=EncodedAudio(speech, torch.ones(1, 1500))).pooler_output
    torch.testing.assert_close(found.double(), embed(checkpoint, speech[0]), atol=1e-4, rtol=0)
    with pytest.raises(convert_salmonn.ConversionError, match="ln_audio.weight"):
        convert(checkpoint, tmp_path, paths, with_lora=False)


# ---------------------------------------------------------------------- LoRA equals PEFT's


@torch.no_grad()
def test_lora_equals_that_of_peft(converted: tuple, model: ListenForConditionalGeneration, paths: dict) -> None:
    llm = AutoModelForCausalLM.from_pretrained(paths["language_model"])
    config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    peft = get_peft_model(llm, config).eval()
    ids = torch.tensor([[1, 5, 9, 33, 60]])
    plain = peft(input_ids=ids).logits
    prefix = "llama_model."
    lora = {name.removeprefix(prefix): t for name, t in converted[0]["model"].items() if name.startswith(prefix)}
    assert not peft.load_state_dict(lora, strict=False).unexpected_keys
    expected = peft(input_ids=ids).logits
    assert (expected - plain).abs().max() > 0.1
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-4)


def test_lora_names_of_old_peft_are_understood(converted: tuple) -> None:
    weights = converted[0]["model"]
    old = {name.replace(".default.", "."): tensor for name, tensor in weights.items()}
    assert convert_salmonn.published_weights({"model": old}).keys() == weights.keys()


# ---------------------------------------------------------------------- the folder


def test_folder_loads_and_generates(converted: tuple, model: ListenForConditionalGeneration, processor: object) -> None:
    loaded, info = AutoModel.from_pretrained(converted[1], output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert loaded.config.pad_to_30s and loaded.config.connector_config.salmonn_compat
    assert loaded.config.prompt_pool_config is None
    heard = {"type": "audio", "array": clip(1.3).numpy(), "sampling_rate": 16000}
    content = [heard, {"type": "text", "text": "Please describe the audio."}]
    chats = [[{"role": "user", "content": content[:1] * count + content[1:]}] for count in (1, 2)]
    for chat, count in zip(chats, (1, 2), strict=True):
        inputs = processor.apply_chat_template(chat, tokenize=True, add_generation_prompt=True)
        assert (inputs["input_ids"] == loaded.config.audio_token_id).sum() == count * TOKENS
        short = loaded.generate(**inputs, max_new_tokens=3, min_new_tokens=3)
        assert short.shape[1] == inputs["input_ids"].shape[1] + 3
        beams = loaded.generate(**inputs, max_new_tokens=3, min_new_tokens=3, num_beams=3)
        assert beams.shape == short.shape
    both = processor.apply_chat_template(chats, tokenize=True, add_generation_prompt=True)
    assert torch.equal(loaded.generate(**both, max_new_tokens=3, min_new_tokens=3)[1, -3:], short[0, -3:])
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(
        tensor.numel() for tensor in converted[0]["model"].values()
    )


@pytest.mark.parametrize(("seconds", "chunks"), [(0.01, 1), (1.3, 1), (30.0, 1), (30.5, 2), (61.0, 3)])
def test_every_30_seconds_count_88(processor: ListenProcessor, seconds: float, chunks: int) -> None:
    assert processor.num_audio_embeddings(int(16000 * seconds)) == chunks * TOKENS


@torch.no_grad()
def test_beats_hears_the_clip_alone(model: ListenForConditionalGeneration, processor: object, paths: dict) -> None:
    """A short clip beside a long one: its BEATs frames are those of the clip, and zeros follow."""
    features = processor.feature_extractor([clip(1.0).numpy(), clip(3.0, 1).numpy()], sampling_rate=16000)
    assert features["input_features"].shape[-1] == 3000
    alone = processor.feature_extractor(clip(1.0).numpy(), sampling_rate=16000)
    audio = BeatsModel.from_pretrained(paths["audio_encoder"]).eval()(alone["input_values"]).last_hidden_state
    speech = model.speech_encoder(features["input_features"][:1]).last_hidden_state
    expected = model.get_audio_features(
        encoded=EncodedAudio(speech, torch.ones(1, 1500), audio, torch.ones(audio.shape[:2]))
    ).pooler_output
    found = model.get_audio_features(**features).pooler_output[:TOKENS]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_stored_features_keep_the_padding(model: ListenForConditionalGeneration, processor: object) -> None:
    features = processor.feature_extractor(clip(1.3).numpy(), sampling_rate=16000)
    (stored,) = _encode_batch(model, processor.feature_extractor, [20800], features)
    assert isinstance(stored, EncodedRecording) and stored.speech_frames == (1500,)
    again = model.get_audio_features(encoded=EncodedAudio(**collate_features([stored])))
    assert again.lengths.tolist() == [TOKENS]
    direct = model.get_audio_features(**features).pooler_output
    torch.testing.assert_close(again.pooler_output, direct, atol=1e-4, rtol=1e-4)


def test_prompt_is_that_of_salmonn(processor: ListenProcessor) -> None:
    content = [{"type": "audio", "audio": clip(1.0).numpy()}, {"type": "text", "text": "What is said?"}]
    chat = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert text == "USER: <Speech><|audio|> </Speech> What is said?\nASSISTANT:"
    spaced = [{"role": "user", "content": "<|audio|> What is said?"}, {"role": "assistant", "content": "yes"}]
    ending = "ASSISTANT: yes</s>\n"
    assert processor.apply_chat_template(spaced) == text.removesuffix("ASSISTANT:") + ending
    assert processor.instruction("asr") == "Recognize the speech and give me the transcription."


@pytest.mark.parametrize("legacy", [False, True])
def test_text_beside_the_audio_has_the_ids_of_salmonn(converted: tuple[dict, Path], legacy: bool) -> None:
    """It tokenises what stands before the audio and what stands behind each on its own, as the beginning of a word."""
    before, behind = "USER: <Speech>", "</Speech> What is said?\nASSISTANT:"
    symbols = ["<unk>", "<s>", "</s>", *sorted({"\u2581", *before, *behind})]
    tokenizer = LlamaTokenizer({symbol: i for i, symbol in enumerate(symbols)}, legacy=legacy)
    alone = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, behind)]
    config = ListenConfig.from_pretrained(converted[1])
    config.audio_token_id = config.prompt_token_id = None
    processor = ListenProcessor.from_backbones(config, tokenizer, chat_template=convert_salmonn.CHAT_TEMPLATE)
    chat = [{"role": "user", "content": "<|audio|> What is said?"}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(text, clip(1.0).numpy(), sampling_rate=16000, add_special_tokens=False)
    assert inputs["input_ids"][0].tolist() == [*alone[0], *[config.audio_token_id] * TOKENS, *alone[1]]


def test_card_says_what_it_is(converted: tuple) -> None:
    card = (converted[1] / "README.md").read_text()
    learned = sum(tensor.numel() for tensor in converted[0]["model"].values())
    assert card.startswith("---\n") and "`salmonn_v9.pth`" in card and f"{learned:,} parameters" in card
    assert "88 audio embeddings" in card and "r = 8) on q_proj, v_proj" in card


def test_without_a_tokenizer_the_template_lies_in_the_folder(
    converted: tuple, paths: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "config.json").write_bytes((Path(paths["language_model"]) / "config.json").read_bytes())
    config = convert(converted[0], tmp_path, {**paths, "language_model": str(tmp_path / "llm")})
    assert config.audio_token_id is None and not (tmp_path / "out" / "tokenizer.json").exists()
    template = (tmp_path / "out" / "chat_template.jinja").read_text()
    model = ListenForConditionalGeneration.from_pretrained(
        tmp_path / "out", backbones={"language_model": paths["language_model"]}
    )
    processor = ListenProcessor.from_backbones(model.config, chat_template=template)
    inputs = processor("USER: <Speech><|audio|></Speech> Hi\nASSISTANT:", audio=clip(1.0).numpy(), sampling_rate=16000)
    assert model(**inputs).logits.isfinite().all()


def test_backbones_inside_the_folder_move_with_it(converted: tuple, paths: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    BeatsModel.from_pretrained(paths["audio_encoder"]).save_pretrained(out / "beats")
    others = {name: path for name, path in paths.items() if name != "audio_encoder"}
    config = convert(converted[0], tmp_path, others)
    assert config.base_models["audio_encoder"]["base_model_name_or_path"] == "./beats"
    out.rename(tmp_path / "moved")
    assert ListenForConditionalGeneration.from_pretrained(tmp_path / "moved").audio_encoder is not None


def test_two_arguments_are_enough_for_the_published_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = tensor_shapes(**{**FULL, "text": 5120, "lora_width": 0})
    for layer in range(40):
        for name in ("q", "v"):
            shapes |= {LORA.format(layer, name, "A"): (8, 5120), LORA.format(layer, name, "B"): (5120, 8)}
    weights = {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}  # one value each on disk
    source = write(tmp_path / "salmonn_v1.pth", {"model": weights})
    monkeypatch.setattr(sys, "argv", ["convert_salmonn.py", str(source), str(tmp_path / "out")])
    convert_salmonn.main()
    assert {name: tuple(t.shape) for name, t in published(tmp_path / "out").items()} == shapes
    config = ListenConfig.from_pretrained(tmp_path / "out")
    places = {name: spec["base_model_name_or_path"] for name, spec in config.base_models.items()}
    assert places == {
        "speech_encoder": "openai/whisper-large-v2",
        "audio_encoder": "./beats",
        "language_model": "lmsys/vicuna-13b-v1.1",
    }


def published(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a converted folder under their published names."""
    weights = load_file(folder / "model.safetensors")
    return {convert_salmonn.published_name(name): tensor for name, tensor in weights.items()}


def test_weights_are_unchanged(converted: tuple) -> None:
    found, weights = published(converted[1]), converted[0]["model"]
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


# ---------------------------------------------------------------------- what is refused


def test_a_model_that_does_not_pad_is_named(converted: tuple, processor: ListenProcessor) -> None:
    with pytest.raises(ValueError, match="salmonn_compat=True.*pad_to_30s=True"):
        ListenProcessor(ListenFeatureExtractor(), processor.tokenizer, connector=processor.connector)
    model = tiny_model()
    with pytest.raises(ValueError, match="salmonn_compat=True.*pad_to_30s=True"):
        model._add_listen_adapter("salmonn", ListenConfig.from_pretrained(converted[1]).connector_config, None)
    assert list(model.adapters) == ["default"]


def convert(checkpoint: object, folder: Path, paths: dict[str, str], **options: object) -> object:
    source = write(folder / "salmonn.pth", checkpoint)
    return convert_salmonn.convert(source, folder / "out", convert_salmonn.Backbones(**paths), **options)


def renamed(old: str, new: str) -> Callable[[dict], None]:
    return lambda weights: weights.update({new: weights.pop(old)})


QUERY = "speech_Qformer.bert.encoder.layer.1.crossattention.self.query.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(QUERY), rf"lacks 1 tensors: {QUERY}"),
        (lambda w: w.pop("speech_query_tokens"), "lacks speech_query_tokens; it is truncated"),
        (lambda w: w.pop("ln_speech.weight"), "lacks ln_speech.weight"),
        (lambda w: w.pop("ln_audio.bias"), "lacks 1 tensors: ln_audio.bias"),
        (lambda w: w.pop(LORA.format(1, "v", "B")), r"lacks 1 tensors: llama_model\S+1.self_attn.v_proj.lora_B"),
        (renamed("ln_speech.bias", "ln_speech.beta"), "lacks 1 tensors: ln_speech.bias"),
        (lambda w: w.update({"audio_proj.weight": torch.zeros(2)}), "unexpected 1 tensors: audio_proj.weight"),
        (lambda w: w.update({LORA.format(2, "q", "A"): torch.zeros(8, 48)}), r"unexpected 1 tensors: llama\S+layers.2"),
        (lambda w: w.update({"beats.encoder.x": torch.zeros(2)}), "1 tensors of backbones, such as beats.encoder.x"),
        (lambda w: w.update({QUERY: torch.zeros(24, 23)}), rf"{QUERY} has shape \(24, 23\), .* needs \(24, 24\)"),
        (lambda w: w.update({"speech_query_tokens": torch.zeros(24)}), r"speech_query_tokens has shape \(24,\), 3 dim"),
        (lambda w: w.update({"speech_query_tokens": torch.zeros(1, 1, 25)}), "inconsistent: .*hidden_size=25"),
        (lambda w: w["speech_llama_proj.bias"].fill_(torch.nan), "speech_llama_proj.bias has NaN"),
        (lambda w: w.update({"ln_audio.bias": 3}), r"model\['ln_audio.bias'\] is a int"),
        (lambda w: [w.pop(n) for n in list(w) if "lora_" in n], "lora=True, but .* holds 0 lora_A .* --no-lora"),
    ],
)
def test_wrong_weights_are_named(paths: dict[str, str], tmp_path: Path, change: Callable, message: str) -> None:
    checkpoint = synthetic_checkpoint(**TINY)
    change(checkpoint["model"])
    with pytest.raises(convert_salmonn.ConversionError, match=message):
        convert(checkpoint, tmp_path, paths)
    assert not (tmp_path / "out").exists()


def test_tensors_without_effect_are_left_out(paths: dict[str, str], tmp_path: Path) -> None:
    checkpoint = synthetic_checkpoint(**TINY)
    checkpoint["model"] |= {
        "speech_Qformer.bert.embeddings.position_ids": torch.arange(512)[None],
        "speech_Qformer.bert.encoder.layer.0.intermediate.dense.weight": torch.zeros(40, 24),
        "llama_model.base_model.model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6),
    }
    kept = convert_salmonn.published_weights(checkpoint)
    assert kept.keys() == tensor_shapes(**TINY).keys()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {}}, "has no 'model'; it holds"),
        ([1, 2], "it holds list"),
        ({"model": {}}, "lacks speech_query_tokens; it is truncated or no SALMONN checkpoint"),
        ({"model": {}, "config": {"model": {"window_level_Qformer": False}}}, "window_level_Qformer=False is not"),
    ],
)
def test_files_of_another_kind_are_named(paths: dict[str, str], tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(convert_salmonn.ConversionError, match=message):
        convert(content, tmp_path, paths)


class Intruder:
    """Runs code when a careless reader unpickles it."""

    def __reduce__(self) -> tuple:
        return (sys.exit, ("executed",))


def test_code_and_truncation_are_refused(tmp_path: Path) -> None:
    with pytest.raises(convert_salmonn.ConversionError, match="evil.pth"):
        convert_salmonn.convert(write(tmp_path / "evil.pth", {"model": Intruder()}), tmp_path / "out")
    cut = write(tmp_path / "cut.pth", synthetic_checkpoint(**TINY))
    cut.write_bytes(cut.read_bytes()[:2000])
    (text := tmp_path / "text.pth").write_text("hello")
    for path in (cut, text):
        with pytest.raises(convert_salmonn.ConversionError, match=f"{path.name} is truncated or no PyTorch file"):
            convert_salmonn.convert(path, tmp_path / "out")


def test_backbones_of_another_width_are_named(paths: dict[str, str], tmp_path: Path) -> None:
    others = {name: path for name, path in paths.items() if name != "language_model"}
    with pytest.raises(
        convert_salmonn.ConversionError,
        match=r"speech_llama_proj.weight .* 48,.* lmsys/vicuna-13b-v1.1 .*5120.*--language-model",
    ):
        convert(synthetic_checkpoint(**TINY), tmp_path, others)
    with pytest.raises(convert_salmonn.ConversionError, match="'no/where'.*--download"):
        convert(synthetic_checkpoint(**TINY), tmp_path, {**paths, "language_model": "no/where"})


def test_command_line(
    converted: tuple, paths: dict[str, str], tmp_path: Path, monkeypatch: object, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "salmonn.pth", converted[0])
    options = [word for name, path in paths.items() for word in (f"--{name.replace('_', '-')}", path)]
    monkeypatch.setattr(sys, "argv", ["convert_salmonn.py", str(source), str(tmp_path / "out"), *options])
    convert_salmonn.main()
    assert "SALMONN adapter over" in capsys.readouterr().out and (tmp_path / "out" / "model.safetensors").is_file()
    monkeypatch.setattr(sys, "argv", ["convert_salmonn.py", str(tmp_path / "none.pth"), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stopped:
        convert_salmonn.main()
    assert stopped.value.code == 1 and "There is no file" in capsys.readouterr().err
