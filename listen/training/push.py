"""What goes to the Hub after a run: the folder of the model, and nothing of the run beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers import trainer as upstream

from ..model_card_listen import write_model_card

MODEL_FOLDER = "model"
_NO_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.pkl")  # pickles, such as training_args.bin


class ModelFolderTrainer(Trainer):
    """A `Trainer` that pushes the model's folder once, at the end of a run.

    Upstream pushes the output folder after each checkpoint: logs, pickles and the weights a second time.
    """

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """As upstream, before training.

        Raises:
            ValueError: a backbone of the model is in a folder of this machine.
        """
        self.model.config.check_publishable()
        super().init_hf_repo(*args, **kwargs)

    def save_to_folder(self) -> Path:
        """Save model and processor into their folder of the run; to be called in all processes."""
        folder = Path(self.args.output_dir) / MODEL_FOLDER
        self.save_model(str(folder), _internal_call=True)
        if self.args.should_save:
            (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle, which no model needs
        return folder

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the model into its folder and upload that; arguments as upstream, those of its card are not used."""
        token = token if token is not None else self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        folder = self.save_to_folder()
        if not self.is_world_process_zero():
            return None
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        write_model_card(folder, self.accelerator.unwrap_model(self.model), self.hub_model_id)
        return upstream.hf_api().upload_folder(
            repo_id=self.hub_model_id,
            folder_path=str(folder),
            commit_message=commit_message,
            token=token,
            run_as_future=not blocking,
            ignore_patterns=list(_NO_WEIGHTS),
            revision=revision or self.args.hub_revision,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: checkpoints hold the state of the optimiser, and stay on this machine."""
