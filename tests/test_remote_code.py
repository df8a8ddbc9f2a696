"""A saved folder is all that a fresh machine needs: no package, `trust_remote_code=True`, the same numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config, tiny_model
from fixtures_encoders import ENCODERS
from fixtures_tokenizers import LLAMA_3_TEMPLATE, build_tokenizer
from safetensors.torch import load_file, save_file

from listen import ListenForConditionalGeneration, ListenProcessor

CLASSES = ("AutoModel", "AutoModelForCausalLM", "AutoModelForMultimodalLM")
QUESTION = "<|audio|>What is being said?"

# Runs where nothing called `listen` can be imported.
FRESH = """
import sys

class NoPackage:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "listen":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NoPackage())
import torch, transformers
from safetensors.torch import load_file, save_file

def check(folder, clip):
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert config.model_type == "listen" and config.audio_config.model_type == "beats"
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(["<|audio|>What is being said?", "the fox"], clip, 16000)
    output = {"input_ids": inputs["input_ids"]}
    for name in ("AutoModel", "AutoModelForCausalLM", "AutoModelForMultimodalLM"):
        model = getattr(transformers, name).from_pretrained(folder, trust_remote_code=True)
        with torch.no_grad():
            output[name] = model(**inputs).logits
    for number, task in enumerate(["audio-llm", None]):
        listen = transformers.pipeline(task, model=folder, trust_remote_code=True, device="cpu")
        assert listen.task == "audio-llm"
        (answer,) = listen(
            clip, "What is being said?", sampling_rate=16000, return_prompts=True, max_new_tokens=5, do_sample=False
        )
        output[f"pipeline {number}"] = torch.tensor([ord(letter) for letter in answer["generated_text"]])
        output[f"prompts {number}"] = torch.tensor([prompt["index"] for prompt in answer["prompts"]])
    save_file(output, folder + ".results")

clip_file, *folders = sys.argv[1:]
for folder in folders:
    check(folder, load_file(clip_file)["clip"].numpy())
assert not any(name.split(".")[0] == "listen" for name in sys.modules)
"""


def clip() -> np.ndarray:
    return (0.1 * np.random.default_rng(0).standard_normal(20000)).astype(np.float32)


def build(
    folder: Path, adapter_only: bool, **overrides: object
) -> tuple[ListenForConditionalGeneration, ListenProcessor]:
    """A model and its processor, saved in `folder`; adapter-only ones with the backbones in folders inside."""
    config = tiny_config(audio_token_id=None, prompt_token_id=None, **overrides)
    processor = ListenProcessor.from_backbones(config, build_tokenizer(template=LLAMA_3_TEMPLATE))
    model = tiny_model(audio_token_id=config.audio_token_id, prompt_token_id=config.prompt_token_id, **overrides)
    if adapter_only:
        bases = {
            name: str(folder / "backbones" / name) for name in ("speech_encoder", "audio_encoder", "language_model")
        }
        for name, path in bases.items():
            getattr(model, name).save_pretrained(path)
        config.base_models = {name: {"base_model_name_or_path": path} for name, path in bases.items()}
        model = ListenForConditionalGeneration.from_backbones(config)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def run_fresh(tmp_path: Path, folders: list[Path]) -> list[dict[str, torch.Tensor]]:
    """What the folders give in a process that knows nothing but transformers."""
    save_file({"clip": torch.tensor(clip())}, tmp_path / "clip.safetensors")
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", FRESH, str(tmp_path / "clip.safetensors"), *map(str, folders)]
    run = subprocess.run(command, cwd="/", env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [load_file(f"{folder}.results") for folder in folders]


@pytest.mark.slow
def test_a_fresh_process_without_the_package_gives_the_same_numbers(tmp_path: Path) -> None:
    kinds = {
        "full": (False, {}),
        "adapter-only": (True, {}),
        "moonshine": (True, {"speech_config": ENCODERS["moonshine"]}),
        "ast": (False, {"speech_config": ENCODERS["ast"]}),
    }
    made = [build(tmp_path / "made" / kind, alone, **overrides) for kind, (alone, overrides) in kinds.items()]
    moved = (tmp_path / "made").rename(tmp_path / "moved")  # nothing may hang on where it was made
    for (model, processor), results in zip(made, run_fresh(tmp_path, [moved / kind for kind in kinds]), strict=True):
        inputs = processor([QUESTION, "the fox"], clip(), 16000)
        assert torch.equal(results["input_ids"], inputs.input_ids)
        with torch.no_grad():
            output = model(**inputs)
        for name in CLASSES:
            torch.testing.assert_close(results[name], output.logits, atol=1e-5, rtol=0)
        assert torch.equal(results["pipeline 0"], results["pipeline 1"])
        assert torch.equal(results["prompts 0"], results["prompts 1"])
        assert len(set(results["prompts 0"].tolist())) == processor.num_prompts


def test_with_the_package_imported_no_remote_code_is_run(tmp_path: Path) -> None:
    import transformers

    model, processor = build(tmp_path, adapter_only=False)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    loaded = transformers.AutoProcessor.from_pretrained(tmp_path)
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path)
    models = [getattr(transformers, name).from_pretrained(tmp_path) for name in CLASSES]
    for thing in (config, loaded, extractor, *models):
        assert type(thing).__module__.startswith("listen.")
    inputs = loaded([QUESTION, "the fox"], clip(), 16000)
    assert torch.equal(inputs.input_ids, processor([QUESTION, "the fox"], clip(), 16000).input_ids)
    with torch.no_grad():
        for other in models:
            torch.testing.assert_close(other(**inputs).logits, model(**inputs).logits, atol=1e-6, rtol=0)


def test_every_file_that_the_code_needs_is_shipped(tmp_path: Path) -> None:
    """Flat modules import each other by `from .x import`, and only what lies beside them; presets are left out."""
    build(tmp_path, adapter_only=False)
    code = {path.stem: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.py")}
    assert {"modeling_listen", "processing_listen", "pipeline_listen", "configuration_listen"} <= set(code)
    assert "presets_listen" not in code
    root = Path(sys.modules["listen"].__file__).parent
    for name, text in code.items():
        assert text == (root / f"{name}.py").read_text(encoding="utf-8")
        wanted = {line.split()[1][1:] for line in text.splitlines() if line.strip().startswith("from .")}
        assert wanted <= set(code), f"{name} imports {wanted - set(code)}"
