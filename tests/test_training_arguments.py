"""Arguments from YAML and the command line."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from fixtures_repository import LAUNCHES, name_of

from listen.data.targets import KINDS
from listen.training import ArgumentError, build_arguments, build_config, parse_arguments, read_config
from listen.training.arguments import SECTIONS
from listen.training.classifier_arguments import CLASSIFIER_SECTIONS
from listen.training.help import answer_questions, argument_parser
from listen.training.values import field_names

EXAMPLES = Path(__file__).parent.parent / "examples" / "configs"
CONFIGS = sorted(
    path
    for path in EXAMPLES.rglob("*.yaml")
    if "classifier" not in path.stem and path.parent.name not in ("compare", "accelerate")
)  # those are other scripts' and accelerate's
BACKBONES = ["--model.speech_encoder", "s", "--model.language_model", "l"]


@pytest.fixture()
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {speech_encoder: s, language_model: l, prompt_pool: {pool_size: 50, num_prompts: 20}}\n"
        "data: {train: [a.jsonl, {path: b.json, tasks: [er]}], mixing: equal}\n"
        "training: {learning_rate: 1e-4, max_steps: 10}\n"
    )
    return path


def test_a_file_is_read_and_overridden(config: Path) -> None:
    run = parse_arguments(
        ["--config", str(config), "--training.max_steps=20", "--model.prompt_pool.pool_size", "60", "--use_cpu",
         "--learning_rate", "2e-5", "--data.mixing_weights", "{asr: 1, er: 2.5}", "--training.warmup_steps", "-0"]
    )  # fmt: skip
    assert (run.training.learning_rate, run.training.max_steps, run.training.use_cpu) == (2e-5, 20, True)
    assert run.model.prompt_pool == {"pool_size": 60, "num_prompts": 20}
    assert run.data.mixing_weights == {"asr": 1, "er": 2.5}
    assert [(s.path, s.format, s.tasks) for s in run.data.train] == [
        ("a.jsonl", "manifest", None),
        ("b.json", "salmonn", ["er"]),
    ]
    assert run.raw["training"]["max_steps"] == 20


def test_later_files_win(config: Path, tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text("training: {max_steps: 5}\n")
    run = parse_arguments(["--config", str(config), "--config", str(tmp_path / "more.yaml")])
    assert (run.training.max_steps, run.training.learning_rate) == (5, 1e-4)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--training.lerning_rate", "1"], r"unknown argument training.lerning_rate; did you mean learning_rate\?"),
        (["--lerning_rate", "1"], r"unknown argument --lerning_rate; did you mean training.learning_rate\?"),
        (["--modle.lora", "1"], r"unknown argument --modle.lora"),
        (["--data.mixing", "even"], "data.mixing='even' is unknown; choose one of proportional"),
        (
            ["--data.train", "{path: a.jsonl, formt: manifest}"],
            r"unknown argument data.train: formt; did you mean format\?",
        ),
        (["--data.train", "{path: a.jsonl, format: xml}"], "format='xml' is unknown; choose one of manifest"),
        (["--data.train", "{path: a.jsonl, task: er}"], "a.jsonl: task='er' has no meaning for format='manifest'"),
        (["--training.min_prompts", "0"], "training.min_prompts=0 must be at least 1"),
        (["--training.label_smoothing_factor", "0.1"], "label_smoothing_factor"),
        (
            ["--model.checkpoint", "x"],
            "brings its own backbones and settings; leave out speech_encoder, language_model",
        ),
        (["--model.dtype.x", "1", "--model.dtype.x.y", "2"], "which has no fields"),
        (["max_steps", "5"], "expected --name before 'max_steps'"),
        (["--training.learning_rate", "'1e-4'"], "training.learning_rate='1e-4' must be a number"),
        (["--training.max_steps", "1.5"], "training.max_steps=1.5 must be a whole number"),
        (["--training.use_cpu", "flase"], "training.use_cpu='flase' must be true or false"),
        (["--data.join_tasks", "sv"], "data.join_tasks='sv' must be a list, each item text"),
        (["--data.join_tasks", "[svv]"], r"data.join_tasks: unknown task 'svv'. Did you mean 'sv'\?"),
        (["--data.train", "{path: a.jsonl, tasks: asr}"], "data.train: tasks='asr' must be a list"),
        (["--data.train", "{path: a.jsonl, tasks: [asrr]}"], "a.jsonl: tasks: unknown task 'asrr'"),
        (["--data.train", "{path: a.jsonl, split: dev}"], "a.jsonl: split='dev' has no meaning for format='manifest'"),
        (["--data.max_eval_rows", "0"], "data.max_eval_rows=0 must be at least 1"),
        (["--model.revisions", "{speech: v2}"], "model.revisions names .'speech'.; the backbones are speech_encoder"),
        (["--model.trainable", "[]"], "model.trainable=.. names no part"),
        (["--model.lora", "8"], "model.lora=8 must be a mapping or null"),
        (
            ["--training.train_sampling_strategy", "group_by_lenght"],
            "'group_by_lenght' is unknown; choose one of random",
        ),
        (["--training.optim", "adamm"], "section training: adamm is not a valid OptimizerNames"),
        (["--training.gradient_accumulation_steps", "0"], "gradient_accumulation_steps=0 must be at least 1"),
        (["--training.bf16", "atuo"], "training.bf16='atuo' must be true, false or auto"),
        (["--training.neftune_noise_alpha", "5"], "neftune_noise_alpha does nothing here"),
    ],
)
def test_a_wrong_argument_is_named_with_the_fix(argv: list[str], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        parse_arguments([*BACKBONES, *argv])


@pytest.mark.parametrize("instructions", ["avx512_bf16", "amx_bf16", "bf16", "sve_bf16", "avx512_f"])
def test_bf16_is_used_where_the_cpu_has_it_in_hardware(instructions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, instructions: True})
    run = parse_arguments([*BACKBONES, "--use_cpu", "--bf16", "auto"])
    assert run.training.bf16 is (instructions != "avx512_f")


def test_values_take_the_types_of_their_fields() -> None:
    argv = ["--max_steps", "1e2", "--save_strategy", "no", "--resume_from_checkpoint", "--data.train", "a.jsonl"]
    run = parse_arguments([*BACKBONES, "--use_cpu", *argv])
    assert (type(run.training.max_steps), run.training.max_steps) == (int, 100)
    assert run.training.save_strategy == "no" and run.training.resume_from_checkpoint is True
    assert [source.path for source in run.data.train] == ["a.jsonl"]


def test_unknown_keys_of_a_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("trainig: {max_steps: 5}\n")
    with pytest.raises(ArgumentError, match=r"unknown argument trainig; did you mean training\?"):
        parse_arguments(["--config", str(path)])
    path.write_text("- a\n")
    with pytest.raises(ArgumentError, match="must hold the sections model, data, training"):
        parse_arguments(["--config", str(path)])
    path.write_text("a: [\n")
    with pytest.raises(ArgumentError, match="is not valid YAML"):
        parse_arguments(["--config", str(path)])


@pytest.mark.parametrize("name", ["pad_to_30s", "revisions.language_model", "connector_from"])
def test_settings_that_a_checkpoint_brings_are_refused(name: str) -> None:
    with pytest.raises(ArgumentError, match=f"brings its own backbones and settings; leave out {name.split('.')[0]}"):
        parse_arguments(["--model.checkpoint", "x", f"--model.{name}", "false" if name == "pad_to_30s" else "y"])


def test_other_names_of_tasks_become_those_of_the_rows() -> None:
    assert parse_arguments([*BACKBONES, "--data.join_tasks", "[speaker, asr]"]).data.join_tasks == ["sv", "asr"]


def test_something_must_be_named_to_train() -> None:
    with pytest.raises(ArgumentError, match="model.speech_encoder and model.language_model"):
        build_arguments({})
    assert build_arguments({"model": {"checkpoint": "x"}}).model.checkpoint == "x"


def test_a_recipe_may_say_only_what_differs_from_another(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.yaml").write_text(
        "model: {prompt_pool: {pool_size: 50, num_prompts: 2}}\ndata: {train: [a, b]}\n"
    )
    (tmp_path / "middle.yaml").write_text("extends: base.yaml\nmodel: {preset: p, prompt_pool: {pool_size: 60}}\n")
    (tmp_path / "sub" / "last.yaml").write_text("extends: ../middle.yaml\nmodel: {preset: null}\ndata: {train: [c]}\n")
    assert read_config(tmp_path / "sub" / "last.yaml") == {
        "model": {"preset": None, "prompt_pool": {"pool_size": 60, "num_prompts": 2}},
        "data": {"train": ["c"]},
    }


def test_recipes_that_extend_nothing_real_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: ./a.yaml\n")
    with pytest.raises(ArgumentError, match=r"extend each other in a circle: .*a\.yaml -> .*b\.yaml -> .*a\.yaml"):
        read_config(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("extends: [b.yaml]\n")
    with pytest.raises(ArgumentError, match=r"a\.yaml: extends=\['b.yaml'\] must be the path of one recipe"):
        read_config(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("extends: c.yaml\n")
    with pytest.raises(FileNotFoundError, match=r"c\.yaml"):
        read_config(tmp_path / "a.yaml")


def differences(one: object, other: object, name: str = "") -> dict[str, object]:
    """Dotted names of what `other` has in place of what `one` has; `None` stands for what one of them lacks."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return {} if one == other else {name: other}
    pairs = {key: differences(one.get(key), other.get(key), f"{name}.{key}".strip(".")) for key in {**one, **other}}
    return {key: value for found in pairs.values() for key, value in found.items()}


LORA = {"r": 8, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}
SOFT_PROMPT = {"strategy": "fixed", "pool_size": 20, "num_prompts": 20, "stochastic": False}
SOFT_PROMPT = {f"prompt_pool.{name}": value for name, value in SOFT_PROMPT.items()}


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("soft-prompt-baseline", SOFT_PROMPT),
        ("lora-baseline", {"prompt_pool.pool_size": 0, "lora": LORA}),
        ("listen-0.4m", {"preset": "listen-0.4m", "connector_from": "runs/listen-llama3-8b/model"}),
    ],
)
def test_baselines_differ_from_the_paper_in_what_they_are_baselines_of(name: str, model: dict) -> None:
    paper, baseline = (read_config(EXAMPLES / f"{recipe}.yaml") for recipe in ("listen-llama3-8b", name))
    expected = {f"model.{key}": value for key, value in model.items()}
    assert differences(paper, baseline) == {**expected, "training.output_dir": f"runs/{name}"}


FROM_BASELINE = {
    "model.checkpoint": "runs/speech_emotion/baseline1/model",
    "model.preset": None,
    "model.speech_encoder": None,
    "model.language_model": None,
}
POOL = {
    "model.prompt_pool": {"pool_size": 100, "num_prompts": 20, "key_loss_type": "relative", "key_loss_weight": 1.0},
    "model.trainable": ["adapter"],
    "training.layerwise_lr_decay": 1.0,
    "training.ddp_find_unused_parameters": False,
}
DISTILL = {"training.alignment": "distill", "training.distill_temperature": 1.0}


@pytest.mark.parametrize(
    ("system", "expected"),
    [
        *((name, FROM_BASELINE) for name in ("baseline2", "v1", "v2", "v3")),
        ("distill", FROM_BASELINE | DISTILL),
        ("pool_alignment", POOL),
    ],
)
def test_systems_of_behavioural_alignment_differ_from_baseline_1_as_stated(system: str, expected: dict) -> None:
    baseline, recipe = (read_config(EXAMPLES / "speech_emotion" / f"{name}.yaml") for name in ("baseline1", system))
    found = differences(baseline, recipe)
    trained, evaluated = (found.pop(f"data.{part}") for part in ("train", "eval"))
    assert [path.replace("_train/", "_dev/") for path in trained] == evaluated
    assert found == {**expected, "training.output_dir": f"runs/speech_emotion/{system}"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path: Path) -> None:
    run = parse_arguments(["--config", str(path), "--bf16", "false"])
    assert run.data.train and run.training.output_dir.startswith("runs/")


@pytest.mark.parametrize(
    ("system", "kinds"),
    [
        ("baseline1", ["repeat", "response_untagged"]),
        ("baseline2", ["repeat", "response_untagged"]),
        ("v1", ["repeat", "response"]),
        ("v2", ["repeat", "response", "speech_caption"]),
        ("v3", ["repeat", "response", "speech_caption", "ser"]),
        ("pool_alignment", ["repeat", "response", "speech_caption", "ser"]),
        ("distill", ["repeat", "response"]),
    ],
)
def test_the_systems_of_behavioural_alignment_differ_in_their_targets(system: str, kinds: list[str]) -> None:
    run = parse_arguments(["--config", str(EXAMPLES / "speech_emotion" / f"{system}.yaml"), "--bf16", "false"])
    assert [Path(source.path).stem for source in run.data.train] == kinds
    assert {Path(source.path).parent.name.split("_")[0] for source in run.data.train} == {
        "neutral" if system == "baseline1" else "emotion"
    }
    assert set(kinds) <= set(KINDS) and run.data.mixing == "equal"
    training = run.training
    assert (training.adam_beta1, training.adam_beta2, training.learning_rate) == (0.9, 0.98, 3e-5)
    assert (training.warmup_steps, training.weight_decay) == (20000, 0.0)
    assert training.alignment == ("distill" if system == "distill" else "lm")


def test_an_unknown_preset_is_refused() -> None:
    run = parse_arguments([*BACKBONES, "--model.preset", "listen-8b"])
    with pytest.raises(ArgumentError, match="model.preset='listen-8b' is unknown; choose one of listen-llama3-8b"):
        build_config(run.model)


@pytest.mark.parametrize("sections", [SECTIONS, CLASSIFIER_SECTIONS], ids=["train", "train-classifier"])
def test_the_help_lists_every_argument_with_its_type_default_and_meaning(sections: dict[str, type]) -> None:
    entries = {action.dest: action for action in argument_parser("", sections)._actions}
    for name in (f"{section}.{field}" for section, kind in sections.items() for field in field_names(kind)):
        assert entries[name].option_strings == [f"--{name}"]
        assert len(entries[name].help) > 10, name
    text = argument_parser("What it does.", sections).format_help()
    assert "What it does." in text and "%%" not in text
    assert "--model.dtype DTYPE" in text and "(type: str, default: auto)" in " ".join(text.split())


def test_the_printed_config_is_a_recipe_of_the_same_run(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    argv = ["--config", str(config), "--training.save_strategy", "no", "--max_steps", "1e2", "--use_cpu"]
    with pytest.raises(SystemExit) as ended:
        answer_questions([*argv, "--print_config"], "")
    assert not ended.value.code
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    printed, given = parse_arguments(["--config", str(tmp_path / "printed.yaml")]), parse_arguments(argv)
    assert (printed.model, printed.data) == (given.model, given.data)
    assert printed.training.to_dict() == given.training.to_dict()
    assert printed.raw["training"]["max_steps"] == 100
    answer_questions(argv, "")  # nothing to answer


@pytest.mark.parametrize("tracker", ["wandb", "mlflow", "trackio"])
def test_a_tracker_that_is_not_installed_is_named(tracker: str) -> None:
    if find_spec(tracker) is not None:
        assert parse_arguments([*BACKBONES, "--report_to", tracker]).training.report_to == [tracker]
        return
    with pytest.raises(ArgumentError, match=f"report_to={tracker}: it is not installed; pip install {tracker}, or"):
        parse_arguments([*BACKBONES, "--report_to", tracker])


def test_a_config_with_an_invalid_value_is_not_printed(config: Path) -> None:
    with pytest.raises(ArgumentError, match="training.max_steps=1.5 must be a whole number"):
        answer_questions(["--config", str(config), "--max_steps", "1.5", "--print_config"], "")


@pytest.mark.parametrize("launch", LAUNCHES, ids=name_of)
def test_launch_configs_are_those_of_accelerate(launch: Path) -> None:
    """accelerate reads them without unknown keys, and each names its own launch line."""
    config = load_config_from_file(str(launch))
    kind = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed_zero3": "DEEPSPEED", "two_nodes": "MULTI_GPU"}[launch.stem]
    assert config.distributed_type == kind
    assert f"accelerate launch --config_file examples/configs/accelerate/{launch.name}" in launch.read_text()
