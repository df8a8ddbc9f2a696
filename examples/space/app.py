"""A Space on the Hugging Face Hub: the page of `listen demo`, over the first model that the card README.md names."""

import os
from pathlib import Path

from huggingface_hub import SpaceCard

from listen.demo import LocalAnswers, build_page, launch

MAX_AUDIO_SECONDS = 60  # a Space is public: longer clips are truncated

card = SpaceCard.load(Path(__file__).with_name("README.md"))
demo = build_page(LocalAnswers(os.environ.get("LISTEN_MODEL") or card.data.models[0], None, MAX_AUDIO_SECONDS))

if __name__ == "__main__":
    launch(demo)
