"""Packaging of LiSTEN: the folder ``listen`` is the package; the modules at the root only re-export from it."""

from pathlib import Path
from shutil import rmtree

from setuptools import find_packages, setup

# Answering, the data and `listen cost`.
REQUIRED = [
    # model and checkpoints
    "torch>=2.11",  # tensors and autograd; the oldest release that transformers 5.23 is run with here
    "transformers>=5.23",  # SubConfigSpec, slice_logits_to_keep, dropping of audio inputs after prefill
    "huggingface_hub>=1.31",  # downloads and uploads of checkpoints; the bound that transformers 5.23 sets itself
    "safetensors>=0.8",  # every file of weights; the bound that transformers 5.23 sets itself
    "peft>=0.20",  # LoRA and relation adapters of checkpoints; the bound that transformers 5.23 sets itself
    "numpy>=2.0",  # waveforms before they become tensors
    "jinja2>=3.1.6",  # chat templates and the HTML report
    # audio
    "soundfile>=0.12",  # reads and writes wav, flac, ogg and mp3 without ffmpeg
    "librosa>=0.10.2",  # brings audioread, which decodes by FFmpeg what soundfile lacks, such as m4a
    "audioread>=3.0",  # that decoder, which is imported directly
    "scipy>=1.13",  # filters of the corpus's sounds; librosa brings it
    "soxr>=0.5",  # resamples in transformers and here, block by block
    "fsspec>=2024.2",  # opens audio behind URLs, as datasets does
    # data
    "accelerate>=1.12",  # devices and processes below transformers, for device_map and the Trainer
    "filelock>=3.30",  # claims and locks in folders that several runs write to; datasets brings it
    "datasets>=4.4",  # manifests, streaming, cached encoder features
    "evaluate>=0.4.6",  # metric modules share its interface
    "pyyaml>=6.0",  # recipes; transformers brings it
    "requests>=2.32",  # LLMs behind an endpoint, with retries; huggingface_hub's client refuses all when offline
    "urllib3>=2.0",  # connections below requests, whose whole duration is bounded here
    "rich>=13.7",  # result tables; huggingface_hub brings it
    "tqdm>=4.66",  # progress bars; transformers brings it
]

EVALUATION = [
    "jiwer>=4.0",  # word and character error rates
    "sacrebleu>=2.4",  # BLEU and chrF with the zh tokeniser
    "rouge-score>=0.1.2",  # ROUGE of free answers
    "nltk>=3.9.1",  # Treebank tokeniser of the caption scores
    "scikit-learn>=1.5",  # recalls, ROC for the equal error rate, clusters of the pool; librosa brings it today
    "matplotlib>=3.9",  # plots of prompt usage and training curves
]
TRAINING = [
    *EVALUATION,  # a run scores its answers
    "jsonargparse>=4.53",  # help of the training commands, from types and docstrings
    "docstring-parser>=0.15",  # reads docstrings of arguments for jsonargparse
    "tensorboard>=2.16",  # default log of losses and pool health
]

EXTRAS = {
    "eval": EVALUATION,
    "train": TRAINING,
    "demo": [
        "gradio>=6.31",  # the page of `listen demo`
        "pandas>=2.2",  # data of its chart; gradio brings it
    ],
    "microphone": [
        "sounddevice>=0.5",  # records for `listen ask --microphone`; on Linux it needs PortAudio beside it
    ],
    "corpus": [
        *TRAINING,
        "espeakng-loader==0.2.4",  # speech of the built-in corpus; espeak-ng is GPL-3.0, hence never a hard dependency
        "tokenizers>=0.23",  # trains the tokeniser of the tiny language model
    ],
    "serve": [
        "fastapi>=0.115",  # routes of the HTTP server
        "pydantic>=2.9",  # checks bodies of requests; fastapi brings it
        "uvicorn>=0.30",  # runs the server
        "python-multipart>=0.0.12",  # uploads of transcriptions
        "prometheus_client>=0.20",  # metrics
    ],
    "ray": [
        "ray>=2.50",  # work on a cluster; datasets brings what its extra "data" needs
    ],
    "quantization": [
        "bitsandbytes>=0.50",  # LLMs held in 4 or 8 bit
        "torchao>=0.18",  # LLMs held in int8, and other types
    ],
    "dev": [
        "hypothesis>=6.140",  # odd inputs for the processor's fuzz test
        "ipykernel>=6.29",  # runs the notebooks
        "nbclient>=0.10",  # likewise, from the tests
        "nbformat>=5.10",  # reads the notebooks
        "openai>=2.0",  # a client for the tests of the server
        "packaging>=24.0",  # reads requirements in the packaging tests
        "playwright>=1.50",  # opens the HTML report in a browser
        "pytest>=8.4",  # tests
        "pytest-xdist>=3.8",  # one test process per core
        "ruff>=0.14",  # lint and formatting
        "setuptools>=70.1",  # builds the wheel that the packaging tests look into
    ],
}


ROOT = Path(__file__).parent
rmtree(ROOT / "build" / "lib", ignore_errors=True)  # modules of an earlier build would be shipped too

setup(
    name="listen-audio-llm",  # `listen` is another project on PyPI; the import stays `listen`
    version="0.1.0",
    description="Audio input for frozen text LLMs by a small trainable adapter, on Hugging Face transformers",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The LiSTEN authors",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    classifiers=[
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Multimedia :: Sound/Audio :: Speech",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    package_dir={"": "."},  # makes the editable install a plain path, which type checkers follow
    packages=find_packages(include=["listen", "listen.*"]),
    py_modules=["listen_command"],  # beside the package, so that `listen --help` need not import torch
    entry_points={"console_scripts": ["listen = listen_command:main"]},
    package_data={"listen": ["py.typed", "recipes/*.yaml", "recipes/*/*.yaml"]},  # a link to examples/configs
    include_package_data=False,
    python_requires=">=3.11",  # set by transformers 5.23; the code itself keeps to Python 3.10
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    zip_safe=False,
)
