"""What reaches the Hub: a card, code, trained weights, names of backbones; no folder of this machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from fixtures_tokenizers import build_tokenizer
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import EvalResult
from transformers import AutoConfig, AutoModel, TrainingArguments
from transformers.utils import hub

from listen import ListenConfig, ListenForConditionalGeneration, ListenPipeline, ListenProcessor
from listen.training.push import ModelFolderTrainer

BACKBONES = ("speech_encoder", "audio_encoder", "language_model")
IDS = {name: f"someone/{name}" for name in BACKBONES}
TEMPLATE = "---\nlibrary_name: transformers\n---\nThis model card has been automatically generated.\n"


class FakeHub:
    """Keeps what is uploaded, by path in the repository."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.card = TEMPLATE  # what transformers makes, or what the repository has already

    def create_repo(self, repo_id: str, **_: Any) -> Any:
        return type("Repo", (), {"repo_id": repo_id})

    def create_commit(self, operations: list[Any], **_: Any) -> None:
        self.files = {op.path_in_repo: Path(op.path_or_fileobj).read_bytes() for op in operations}

    def upload_folder(self, folder_path: str, ignore_patterns: list[str], **_: Any) -> None:
        files = [p for p in Path(folder_path).rglob("*") if not any(p.match(pattern) for pattern in ignore_patterns)]
        self.files = {p.relative_to(folder_path).as_posix(): p.read_bytes() for p in files if p.is_file()}


@pytest.fixture()
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr(hub, "hf_api", lambda: fake)
    for module in ("trainer", "modeling_utils", "configuration_utils", "processing_utils"):
        monkeypatch.setattr(f"transformers.{module}.hf_api", lambda: fake, raising=False)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *_, **__: ModelCard(fake.card))
    monkeypatch.setattr("transformers.modeling_utils.create_and_tag_model_card", lambda *_, **__: ModelCard(fake.card))
    return fake


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, model = tmp_path_factory.mktemp("backbones"), tiny_model()
    for name in BACKBONES:
        getattr(model, name).save_pretrained(folder / name)
    return folder


def fresh(backbones: Path) -> ListenForConditionalGeneration:
    torch.manual_seed(5)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    config = ListenConfig.from_backbones(
        *(str(backbones / name) for name in ("speech_encoder", "language_model", "audio_encoder")),
        connector_config=sizes,
        prompt_pool_config={"pool_size": 12, "num_prompts": 4},
        audio_token_id=100,
        prompt_token_id=101,
    )
    return ListenForConditionalGeneration.from_backbones(config)


def pushes(model: ListenForConditionalGeneration, folder: Path) -> Iterator[Any]:
    """Each way of pushing a model."""
    yield lambda: model.push_to_hub("me/mine")
    yield lambda: model.save_pretrained(folder, push_to_hub=True, repo_id="me/mine")
    yield lambda: model.config.push_to_hub("me/mine")
    yield lambda: model.config.save_pretrained(folder, push_to_hub=True, repo_id="me/mine")


def test_folders_of_this_machine_are_never_pushed(backbones: Path, tmp_path: Path, fake_hub: FakeHub) -> None:
    model = fresh(backbones)
    for push in pushes(model, tmp_path):
        with pytest.raises(ValueError, match=r"language_model': '/.*backbones=\{.*save_full=True"):
            push()
    config = ListenConfig.from_backbones(**{name: str(backbones / name) for name in BACKBONES})
    processor = ListenProcessor.from_backbones(config, build_tokenizer(95))
    with pytest.raises(ValueError, match="are not published"):
        ListenPipeline(model=model, processor=processor).push_to_hub("me/mine")
    assert fake_hub.files == {}


def test_a_pushed_repository_names_backbones_by_their_ids(backbones: Path, fake_hub: FakeHub) -> None:
    model = fresh(backbones)
    model.push_to_hub("me/mine", backbones=IDS)
    bases = json.loads(fake_hub.files["config.json"])["base_models"]
    assert {name: spec["base_model_name_or_path"] for name, spec in bases.items()} == IDS
    assert all(spec["fingerprint"].startswith("v2:") for spec in bases.values())
    assert not any(str(backbones).encode() in content for content in fake_hub.files.values())
    assert str(backbones) in model.config.base_models["language_model"]["base_model_name_or_path"]
    data = ModelCard(fake_hub.files["README.md"].decode()).data
    assert sorted(data.base_model) == sorted(IDS.values()) and data.base_model_relation == "adapter"
    assert (data.pipeline_tag, data.library_name) == ("audio-text-to-text", "transformers")
    assert b"model='me/mine', trust_remote_code=True" in fake_hub.files["README.md"]


def test_a_whole_model_is_pushed_alone(backbones: Path, tmp_path: Path, fake_hub: FakeHub) -> None:
    fresh(backbones).save_pretrained(tmp_path, save_full=True, push_to_hub=True, repo_id="me/mine")
    assert json.loads(fake_hub.files["config.json"])["base_models"] is None
    assert ModelCard(fake_hub.files["README.md"].decode()).data.base_model is None


@pytest.mark.parametrize("local", [True, False])
def test_a_card_that_a_person_wrote_stays(backbones: Path, tmp_path: Path, fake_hub: FakeHub, local: bool) -> None:
    own = "---\nlicense: mit\n---\n# Mine\n"
    if local:
        (tmp_path / "README.md").write_text(own)
    else:
        fake_hub.card = own
    model = fresh(backbones)
    model.config.base_models = {name: {"base_model_name_or_path": place} for name, place in IDS.items()}
    model.save_pretrained(tmp_path, push_to_hub=True, repo_id="me/mine")
    assert fake_hub.files["README.md"].decode() == own
    assert (tmp_path / "README.md").read_text() == own


def test_a_card_follows_the_model_until_it_is_edited(backbones: Path, tmp_path: Path) -> None:
    model = fresh(backbones)
    model.card_data = {"license": "cc-by-4.0", "language": ["en", "zh"], "datasets": ["someone/clips"]}
    fresh(backbones).save_pretrained(tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data.license_name == "see-base-models"
    model.save_pretrained(tmp_path)
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.eval_results is None and "license_name" not in data.to_dict()
    scores = {"asr": {"wer": 0.25, "cer": float("nan"), "n": 8}, "details": {"seed": 0}}
    (tmp_path / "metrics.json").write_text(json.dumps(scores))
    loaded = AutoModel.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path)
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.license, data.language, data.datasets) == ("cc-by-4.0", ["en", "zh"], ["someone/clips"])
    (result,) = data.eval_results
    assert isinstance(result, EvalResult)
    assert (result.task_name, result.metric_type, result.metric_value) == ("asr", "wer", 0.25)
    assert str(backbones) not in (tmp_path / "README.md").read_text()
    card = tmp_path / "README.md"
    card.write_text(card.read_text().replace("# ", "# My ", 1))
    edited = card.read_text()
    loaded.save_pretrained(tmp_path)
    assert card.read_text() == edited


# ---------------------------------------------------------------------- paths and revisions


def test_paths_are_absolute_once_loaded(backbones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(backbones.parent)
    model = fresh(Path(backbones.name))
    model.save_pretrained(tmp_path / "saved")
    again = AutoModel.from_pretrained(
        tmp_path / "saved", backbones={"language_model": f"{backbones.name}/language_model"}
    )
    monkeypatch.chdir(tmp_path)
    again.save_pretrained("later")
    for folder in ("saved", "later"):
        bases = json.loads((tmp_path / folder / "config.json").read_text())["base_models"]
        assert bases["language_model"]["base_model_name_or_path"] == (backbones / "language_model").as_posix()


def cached(home: Path, source: Path, repo_id: str, commit: str) -> None:
    """A repository as the Hub's cache holds it."""
    folder = home / f"models--{repo_id.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    shutil.copytree(source, folder / "snapshots" / commit)


def test_revisions_are_commits(backbones: Path, tmp_path: Path) -> None:
    for number, name in enumerate(BACKBONES):
        cached(tmp_path / "cache", backbones / name, IDS[name], str(number) * 40)
    model = fresh(backbones)
    model.save_pretrained(tmp_path / "saved")
    hub_options = {"cache_dir": str(tmp_path / "cache")}
    moved = {name: {"base_model_name_or_path": place, "revision": "main"} for name, place in IDS.items()}
    loaded = AutoModel.from_pretrained(tmp_path / "saved", backbones=moved, **hub_options)
    loaded.save_pretrained(tmp_path / "again")
    bases = json.loads((tmp_path / "again" / "config.json").read_text())["base_models"]
    assert {name: bases[name]["revision"] for name in BACKBONES} == {
        name: str(number) * 40 for number, name in enumerate(BACKBONES)
    }
    assert AutoModel.from_pretrained(tmp_path / "again", **hub_options).config.base_models
    assert AutoConfig.from_pretrained(tmp_path / "again").base_models == bases


def test_a_backbone_that_is_missing_offline_is_named(backbones: Path, tmp_path: Path) -> None:
    fresh(backbones).save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"language_model could not be loaded from 'someone/absent' .*backbones="):
        AutoModel.from_pretrained(tmp_path, backbones={"language_model": "someone/absent"}, cache_dir=tmp_path / "no")


# ---------------------------------------------------------------------- a run


def test_a_run_pushes_the_folder_of_its_model_alone(backbones: Path, tmp_path: Path, fake_hub: FakeHub) -> None:
    arguments = TrainingArguments(
        str(tmp_path / "run"), push_to_hub=True, hub_model_id="me/mine", report_to=[], use_cpu=True
    )
    with pytest.raises(ValueError, match="are not published"):  # before anything is trained
        ModelFolderTrainer(fresh(backbones), arguments)
    model = fresh(backbones)
    model.config.base_models = {name: {"base_model_name_or_path": place} for name, place in IDS.items()}
    trainer = ModelFolderTrainer(model, arguments)
    (tmp_path / "run" / "log.txt").write_text("private")
    trainer._push_from_checkpoint(str(tmp_path / "run"))
    assert fake_hub.files == {}
    trainer.push_to_hub()
    data = {name for name in fake_hub.files if not name.endswith(".py")}
    assert data == {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    assert "model='me/mine'" in fake_hub.files["README.md"].decode()
