"""dtype and devices: names of the dtype, devices without float64, offloading, other processes and threads, kernels."""

from __future__ import annotations

import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from conftest import clip, make_inputs, tiny_config, tiny_model
from fixtures_encoders import encoder_inputs, random_encoder
from fixtures_training import check_compiled, small_corpus, tiny_processor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, CompileConfig, pipeline
from transformers.modeling_layers import GradientCheckpointingLayer

from listen import ListenConfig, ListenForConditionalGeneration, ListenPipeline, ListenProcessor
from listen.configuration_listen import BACKBONES
from listen.data import ListenCollator, load_manifest
from listen.modeling_connector import resample_frames
from listen.training.arguments import ListenTrainingArguments
from listen.training.trainer import ListenTrainer

MINIATURE = Path(__file__).resolve().parents[1] / "model_cards" / "listen-tiny"
HALF = {"speech_encoder": torch.bfloat16, "audio_encoder": torch.bfloat16, "language_model": torch.bfloat16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Backbones with checkpoints of their own beside a checkpoint of the adapter, and one that holds everything."""
    root = tmp_path_factory.mktemp("checkpoints")
    model = tiny_model()
    model.save_pretrained(root / "whole")
    model.config.base_models = {name: {"base_model_name_or_path": str(root / name)} for name in BACKBONES}
    for name in BACKBONES:
        getattr(model, name).save_pretrained(root / name)
    model._after_attaching(None)
    model.save_pretrained(root / "adapter")
    return root


def dtypes(model: ListenForConditionalGeneration) -> dict[str, torch.dtype]:
    return {name: getattr(model, name).dtype for name in BACKBONES}


# ---------------------------------------------------------------------- dtype


@pytest.mark.parametrize("kind", ["whole", "adapter"])
@pytest.mark.parametrize("asked", [torch.bfloat16, "bfloat16"])
def test_torch_dtype_is_dtype(folder: Path, kind: str, asked: Any) -> None:
    assert dtypes(ListenForConditionalGeneration.from_pretrained(folder / kind, torch_dtype=asked)) == HALF
    assert dtypes(AutoModel.from_pretrained(folder / kind, torch_dtype=asked)) == HALF
    assert dtypes(ListenForConditionalGeneration.from_pretrained(folder / kind, dtype=asked, torch_dtype=asked)) == HALF


def test_torch_dtype_is_dtype_for_fresh_models_and_pipelines(folder: Path) -> None:
    config = ListenConfig.from_pretrained(folder / "adapter")
    assert dtypes(ListenForConditionalGeneration.from_backbones(config, torch_dtype=torch.bfloat16)) == HALF
    listen = pipeline("audio-llm", str(MINIATURE), trust_remote_code=True, torch_dtype=torch.bfloat16)
    assert dtypes(listen.model) == HALF


def test_two_different_dtypes_are_refused(folder: Path) -> None:
    both = {"torch_dtype": torch.float16, "dtype": torch.bfloat16}
    config = ListenConfig.from_pretrained(folder / "adapter")
    for load in (
        lambda: ListenForConditionalGeneration.from_pretrained(folder / "whole", **both),
        lambda: ListenForConditionalGeneration.from_pretrained(folder / "adapter", **both),
        lambda: ListenForConditionalGeneration.from_backbones(config, **both),
        lambda: AutoModel.from_pretrained(folder / "whole", **both),
        lambda: AutoModel.from_config(tiny_config(), **both),
    ):
        with pytest.raises(ValueError, match=r"torch_dtype=torch.float16 and dtype=torch.bfloat16 differ"):
            load()
    model = tiny_model()
    with pytest.raises(ValueError, match=r"torch_dtype=torch.float16, but the model is in torch.float32"):
        ListenPipeline(model=model, processor=tiny_processor(model.config), torch_dtype=torch.float16)


# ---------------------------------------------------------------------- devices without float64


class NoFloat64(TorchDispatchMode):
    """Fails where a tensor of float64 is made, as Apple's MPS does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(item, torch.Tensor) and item.dtype == torch.float64:
                raise TypeError(f"{func} makes float64")
        return out


@pytest.mark.parametrize("pool", [{}, {"strategy": "residual"}, {"center_query": True}])
def test_training_needs_no_float64(tmp_path: Path, pool: dict) -> None:
    model = tiny_model(prompt_pool_config={"pool_size": 12, "num_prompts": 4, **pool}).train()
    collator = ListenCollator(tiny_processor(model.config), train=True)
    args = ListenTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    trainer = ListenTrainer(model=model, args=args, data_collator=collator)
    batch = collator(list(load_manifest(small_corpus(tmp_path, num_rows=2))))
    with NoFloat64():
        trainer.compute_loss(model, batch).backward()
        trainer.log({"loss": 1.0})
    assert {"lm_loss", "key_loss", "pool_usage_entropy"} <= trainer.state.log_history[-1].keys()


def test_one_process_trains_on_one_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`nn.DataParallel` of the Trainer would split chunks of audio and rows of text apart."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    warnings: list[str] = []
    monkeypatch.setattr("listen.training.resumable.logger.warning", warnings.append)
    model = tiny_model()
    collator = ListenCollator(tiny_processor(model.config), train=True)
    args = ListenTrainingArguments(output_dir=str(tmp_path), report_to="none", per_device_train_batch_size=4)
    trainer = ListenTrainer(model=model, args=args, data_collator=collator)
    assert trainer.args.n_gpu == 1 and trainer.args.train_batch_size == 4
    assert "one of 2 GPUs; for all of them, start the command with accelerate launch --num_processes 2" in warnings[0]


def test_generation_and_encoders_of_other_rates_need_no_float64() -> None:
    with NoFloat64():
        model = tiny_model()
        inputs = make_inputs(model, [[clip(0.5)]])
        answer = model.generate(**inputs, max_new_tokens=2)
        frames, _ = resample_frames(torch.randn(2, 12, 3), torch.ones(2, 12, dtype=torch.long), Fraction(6, 5))
    assert (answer.shape[1], frames.shape) == (inputs["input_ids"].shape[1] + 2, (2, 10, 3))


@pytest.mark.parametrize("step", [Fraction(6, 5), Fraction(5, 12), Fraction(7, 3), Fraction(320, 441)])
def test_resampled_frames_are_exact_means_over_their_time(step: Fraction) -> None:
    states = torch.randn(2, 1500, 4, generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(1500) < torch.tensor([[1500], [701]])).long()
    found, found_mask = resample_frames(states, mask, step)
    for row, count in enumerate((1500, 701)):
        for new in (0, 1, 17, int(found_mask[row].sum()) - 1):
            start, end = new * step, min((new + 1) * step, Fraction(count))
            shares = [
                float(max(Fraction(0), min(end, old + 1) - max(start, Fraction(old))) / (end - start))
                for old in range(count)
            ]
            exact = torch.tensor(shares, dtype=torch.float64) @ states[row, :count].double()
            torch.testing.assert_close(found[row, new].double(), exact, atol=1e-6, rtol=1e-6)


# ---------------------------------------------------------------------- other processes, offloading, threads


def test_a_pickled_model_is_the_same(model: ListenForConditionalGeneration) -> None:
    inputs = make_inputs(model, [[clip(1.0)]])
    restored = pickle.loads(pickle.dumps(model))
    assert torch.equal(restored(**inputs).logits, model(**inputs).logits)
    assert list(restored.state_dict()) == list(model.state_dict())


@pytest.mark.slow
def test_workers_of_a_pipeline_get_no_model(model: ListenForConditionalGeneration) -> None:
    model.speech_encoder.no_pickle = lambda: None  # as for encoders that cannot be pickled
    listen = ListenPipeline(model=model, processor=tiny_processor(model.config))
    clips = [{"array": clip(0.5, seed).numpy(), "sampling_rate": 16000} for seed in range(3)]
    options = {"task": "asr", "batch_size": 2, "max_new_tokens": 3}
    default = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("spawn", force=True)
    try:
        found = listen(clips, num_workers=1, **options)
    finally:
        multiprocessing.set_start_method(default, force=True)
    assert found == listen(clips, **options)


PLACES = {"speech_encoder": "cpu", "audio_encoder": "disk", "language_model": "cpu", "adapters": "cpu"}


@pytest.mark.parametrize("kind", ["whole", "adapter"])
@pytest.mark.parametrize(
    "changed", [{}, {"speech_encoder": "disk"}, {"audio_encoder": "cpu", "language_model": "disk"}]
)
def test_an_offloaded_model_is_the_same(folder: Path, tmp_path: Path, kind: str, changed: dict) -> None:
    model = tiny_model()
    inputs = make_inputs(model, [[clip(1.0)]])
    offloaded = ListenForConditionalGeneration.from_pretrained(
        folder / kind, device_map={**PLACES, **changed}, offload_folder=tmp_path
    )
    parts = {name: [w.device.type for w in getattr(offloaded, name).parameters()] for name in BACKBONES}
    for name, place in {**PLACES, **changed}.items():
        if name in parts and place == "disk":
            assert set(parts[name]) == {"meta"}
    torch.testing.assert_close(offloaded(**inputs).logits, model(**inputs).logits)


def test_weights_that_are_fetched_layer_by_layer_give_the_same(model: ListenForConditionalGeneration) -> None:
    inputs = make_inputs(model, [[clip(1.0)]])
    expected = model(**inputs).logits
    cpu_offload(model, execution_device="cpu")
    torch.testing.assert_close(model(**inputs).logits, expected)


@torch.no_grad()
def test_threads_encode_as_one(tmp_path: Path) -> None:
    encoder = random_encoder("wav2vec2-base")  # its group norm has to know the lengths of a batch
    generator = torch.Generator().manual_seed(0)
    batches = [encoder_inputs(encoder.config, torch.randint(800, 4000, (3,), generator=generator).tolist())
               for _ in range(12)]  # fmt: skip
    alone = [encoder(*batch).last_hidden_state for batch in batches]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(4):
            together = pool.map(lambda batch: encoder(*batch).last_hidden_state, batches)
            assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_the_adapter_of_a_generation_is_the_one_at_its_start(model: ListenForConditionalGeneration) -> None:
    model.add_adapter(adapter_name="other")
    model.eval()
    inputs = make_inputs(model, [[clip(1.0)]])
    settings = {"max_new_tokens": 6, "do_sample": False, "use_cache": False}
    expected = model.generate(**inputs, **settings)
    model.set_adapter("other")
    assert not torch.equal(model.generate(**inputs, **settings), expected)
    model.set_adapter("default")

    def switch(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        model.set_adapter("other")  # as another thread may, between two steps
        return scores

    assert torch.equal(model.generate(**inputs, **settings, logits_processor=[switch]), expected)


# ---------------------------------------------------------------------- attention kernels and checkpointing


def kernels(model: ListenForConditionalGeneration) -> dict[str, str]:
    parts = {name: getattr(model, name).config for name in BACKBONES}
    parts |= {f"{name}'s connector": adapter.connector.attention_config for name, adapter in model.adapters.items()}
    return {name: config._attn_implementation for name, config in {"model": model.config, **parts}.items()}


@pytest.mark.parametrize("connector", ["window_qformer", "conv_rotary"])
def test_the_attention_kernel_reaches_every_part(tmp_path: Path, folder: Path, connector: str) -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    model = ListenForConditionalGeneration(tiny_config(connector_config={"type": connector, **sizes}))
    assert set(kernels(model).values()) == {"sdpa"}
    model.add_adapter(adapter_name="other")
    model.set_attn_implementation("eager")
    assert set(kernels(model).values()) == {"eager"}
    model.save_pretrained(tmp_path)
    loaded = ListenForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert set(kernels(loaded).values()) == {"eager"}
    inputs = make_inputs(loaded, [[clip(1.0)], [clip(0.7)]])
    real = inputs["attention_mask"].bool()
    expected = loaded(**inputs).logits[real]
    loaded.set_attn_implementation("sdpa")
    torch.testing.assert_close(loaded(**inputs).logits[real], expected, atol=1e-4, rtol=1e-4)
    base = ListenConfig.from_pretrained(folder / "adapter")
    fresh = ListenForConditionalGeneration.from_backbones(base, attn_implementation="eager")
    assert set(kernels(fresh).values()) == {"eager"}


def test_parts_that_need_an_additive_mask_run_sdpa(model: ListenForConditionalGeneration) -> None:
    model.set_attn_implementation("flex_attention")
    asked = {"model", "speech_encoder", "language_model"}
    assert {name for name, kernel in kernels(model).items() if kernel == "flex_attention"} == asked
    assert {kernel for name, kernel in kernels(model).items() if name not in asked} == {"sdpa"}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("fast", "fast"),
        ({"text_config": "eager", "speech_config": "fast"}, "fast"),
        ({"text_config": "eager", "connector_config": "fast"}, "fast"),
        ({"text_config": "eager", "ears": "sdpa"}, "ears"),
        ("flash_attention_3", "Flash"),  # not installed here
    ],
)
def test_a_kernel_that_a_part_cannot_run_changes_nothing(
    model: ListenForConditionalGeneration, asked: Any, message: str
) -> None:
    before = kernels(model)
    with pytest.raises((ValueError, ImportError), match=message):
        model.set_attn_implementation(asked)
    assert kernels(model) == before


def test_one_part_is_switched_alone(model: ListenForConditionalGeneration) -> None:
    model.set_attn_implementation({"connector_config": "eager"})
    assert {name for name, kernel in kernels(model).items() if kernel == "eager"} == {"default's connector"}
    assert model.config.connector_config._attn_implementation == "eager"


def test_checkpointing_works_whether_it_is_turned_on_before_or_after_train(
    model: ListenForConditionalGeneration,
) -> None:
    def active() -> list[bool]:
        layers = [m for m in model.language_model.modules() if isinstance(m, GradientCheckpointingLayer)]
        return [layer.gradient_checkpointing and layer.training for layer in layers]

    model.train()
    model.activation_checkpointing_enable()
    assert all(active())
    model.activation_checkpointing_disable()
    assert not any(module.training for module in model.language_model.modules())
    model.eval()
    model.activation_checkpointing_enable()
    assert not any(active())
    model.train()
    assert all(active())


def test_the_miniature_loads_in_half_precision() -> None:
    model = ListenForConditionalGeneration.from_pretrained(MINIATURE, torch_dtype=torch.bfloat16)
    processor = ListenProcessor.from_pretrained(MINIATURE)
    listen = ListenPipeline(model=model, processor=processor)
    assert listen(str(MINIATURE / "samples" / "speech.wav"), task="asr")[0]["generated_text"].startswith("the doctor")


class Synchronisations(TorchDispatchMode):
    """Counts operations that make the host wait for a device: values that are read, and shapes that depend on them."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = [i for i in args[1] if i is not None] if name == "index" else []
        if name in self.WAITING or any(i.dtype == torch.bool for i in indices):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def synchronisations(call: Any) -> list[str]:
    with Synchronisations() as counted:
        call()
    return counted.found


@pytest.mark.parametrize("in_vocabulary", [False, True])
def test_decoding_waits_for_the_device_no_more_than_the_bare_llm(in_vocabulary: bool) -> None:
    """Each further token of `generate` costs as many synchronisations as in the LLM's own `generate`."""
    ids = {"audio_token_id": 90, "prompt_token_id": 91} if in_vocabulary else {}
    model = tiny_model()
    inputs = make_inputs(model, [[clip(0.5)], [clip(0.9)]])
    if ids:
        for name, new in ids.items():
            inputs["input_ids"][inputs["input_ids"] == getattr(model.config, name)] = new
            setattr(model.config, name, new)
    text = {"input_ids": torch.full_like(inputs["input_ids"], 7), "attention_mask": inputs["attention_mask"]}

    def per_token(run: Any, given: dict) -> int:
        short, long = (
            synchronisations(lambda n=n: run(**given, max_new_tokens=n, min_new_tokens=n, do_sample=False))
            for n in (3, 7)
        )
        return len(long) - len(short)

    assert synchronisations(lambda: torch.ones(1).item()) == ["_local_scalar_dense"]
    ours, bare = per_token(model.generate, inputs), per_token(model.language_model.generate, text)
    assert ours <= bare


def stored_batch(model: ListenForConditionalGeneration, seconds: tuple[float, ...] = (0.5, 0.9)) -> dict[str, Any]:
    """A training batch on stored features, one clip a row."""
    inputs = make_inputs(model, [[clip(length)] for length in seconds])
    text = {name: inputs.pop(name) for name in ("input_ids", "attention_mask")}
    labels = text["input_ids"].clone()
    labels[:, :-2] = -100
    return {**text, **model.encode_audio(**inputs), "labels": labels, "logits_to_keep": 3}


def placeholder_counts(model: ListenForConditionalGeneration, batch: dict[str, Any]) -> dict[str, int]:
    """What the collator knows of a batch."""
    is_audio, is_prompt = model.placeholder_masks(batch["input_ids"])
    return {"num_audio": int(is_audio.sum()), "num_prompts": int(is_prompt[0].sum())}


def test_a_training_pass_on_stored_features_reads_few_values_from_the_device() -> None:
    """Those that the LLM reads itself, its windows, and five checks of the input; lists of lengths are not counted."""
    model = tiny_model().train()
    batch = stored_batch(model)
    ours = synchronisations(lambda: model(**batch))
    alone = {"input_ids": torch.full_like(batch["input_ids"], 7), "attention_mask": batch["attention_mask"]}
    bare = synchronisations(lambda: model.language_model(**alone, use_cache=False, logits_to_keep=3))
    assert len(ours) - len(bare) <= 6
    assert ours.count("nonzero") <= 1 and "index" not in ours
    counts = placeholder_counts(model, batch)
    assert synchronisations(lambda: model(**batch, **counts)) == bare  # none, where the counts are known


def test_the_encoders_read_one_value_more() -> None:
    """Where the counts are known: transformers asks whether the mask of an encoder has padding."""
    model = tiny_model().train()
    inputs = make_inputs(model, [[clip(0.5)], [clip(0.9)]])
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    batch = {**inputs, **placeholder_counts(model, inputs), "labels": labels, "logits_to_keep": 3}
    text = {"input_ids": torch.full_like(inputs["input_ids"], 7), "attention_mask": inputs["attention_mask"]}
    bare = synchronisations(lambda: model.language_model(**text, use_cache=False, logits_to_keep=3))
    assert len(synchronisations(lambda: model(**batch))) <= len(bare) + 1


@pytest.mark.parametrize(
    "changed", [{}, {"connector_config": {"type": "conv_rotary", "hidden_size": 32, "num_attention_heads": 2}}]
)
def test_known_counts_change_no_result(changed: dict[str, Any]) -> None:
    model = tiny_model(**changed).train()
    batch = stored_batch(model)

    def run(**counts: int) -> list[torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(0)
        output = model(**batch, **counts)
        output.loss.backward()
        return [output.loss, output.logits, *(weight.grad for weight in model.adapters.parameters())]

    for ours, theirs in zip(run(**placeholder_counts(model, batch)), run(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"num_audio": 0}, ValueError, "num_audio=0 is below the 2 chunks of audio"),
        ({"num_audio": 2}, RuntimeError, "do not fill the audio placeholders"),
        ({"num_audio": 9}, RuntimeError, "do not fill the audio placeholders"),
        ({"num_prompts": 2}, RuntimeError, "num_prompts=2"),
    ],
)
def test_wrong_counts_are_refused(wrong: dict[str, int], error: type[Exception], message: str) -> None:
    model = tiny_model().train()
    batch = stored_batch(model)
    counts = {**placeholder_counts(model, batch), **wrong}
    with pytest.raises(error, match=message):
        model(**batch, **counts)


def test_features_of_other_clips_are_refused_with_known_counts() -> None:
    model = tiny_model().train()
    batch, other = stored_batch(model), stored_batch(model, (0.9, 0.5))
    frames = {name: value for name, value in other.items() if "hidden_states" in name}
    with pytest.raises(RuntimeError, match="do not fill the audio placeholders"):
        model(**{**batch, **frames}, **placeholder_counts(model, batch))


def test_the_collator_counts_placeholders(tmp_path: Path) -> None:
    model = tiny_model().train()
    batch = ListenCollator(tiny_processor(model.config))(list(load_manifest(small_corpus(tmp_path, num_rows=3))))
    assert {name: batch[name] for name in ("num_audio", "num_prompts")} == placeholder_counts(model, batch)


@pytest.mark.slow
def test_the_training_forward_compiles_without_graph_breaks() -> None:
    """The whole forward pass is one graph; its loss and gradients are those of the pass without compilation."""
    model = tiny_model(connector_config={"dropout": 0.0}).train()
    batch = stored_batch(model)
    check_compiled(model, batch | placeholder_counts(model, batch), "aot_eager")


@pytest.mark.slow
def test_batches_of_other_lengths_and_counts_compile_without_graph_breaks() -> None:
    """With the encoders in the graph; the first batch is compiled for its own shape, later ones for any."""
    model = tiny_model(connector_config={"dropout": 0.0}).train()
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
    for seconds, prompts in (((0.5, 0.9), 3), ((0.7, 1.3), 2), ((1.1, 0.4), 1)):
        inputs = make_inputs(model, [[clip(length)] for length in seconds], num_prompts=prompts)
        labels = inputs["input_ids"].clone()
        labels[:, :-2] = -100
        batch = {**inputs, **placeholder_counts(model, inputs), "labels": labels}
        torch.testing.assert_close(compiled(**batch).loss, model(**batch).loss, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_decoding_with_a_static_cache_is_one_graph_compiled_once() -> None:
    """As `generate` compiles it by itself on a GPU, there with CUDA graphs."""
    model, graphs = tiny_model(), []
    inputs = make_inputs(model, [[clip(0.5)], [clip(0.9)]])
    torch._dynamo.reset()
    config = CompileConfig(backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True, mode=None)
    config._compile_all_devices = True
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    compiled = model.generate(**inputs, **settings, cache_implementation="static", compile_config=config)
    assert torch.equal(compiled, model.generate(**inputs, **settings))
    assert len(graphs) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, which reports synchronisations itself")
def test_a_pass_over_a_generated_token_never_waits_for_the_gpu() -> None:
    model = tiny_model()
    inputs = {name: tensor.to("cuda") for name, tensor in make_inputs(model, [[clip(0.5)]]).items()}
    model.to("cuda")
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        token = torch.full((1, 1), 7, device="cuda")
        model(input_ids=token, past_key_values=cache, text_only=True)  # the first call sets up kernels
        torch.cuda.set_sync_debug_mode("error")
        try:
            logits = model(input_ids=token, past_key_values=cache, text_only=True).logits
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert logits.shape[:2] == (1, 1)
