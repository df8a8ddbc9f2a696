"""Configuration of an adapter: its connector and its prompt pool."""

import difflib
from typing import Any

from transformers import PreTrainedConfig
from transformers.generation import GenerationConfig

STRATEGIES = ("similarity", "attention", "residual", "fixed", "random", "task")
QUERY_STRATEGIES = ("similarity", "attention", "residual")
KEY_LOSSES = ("relative", "distance", "similarity")
PROMPT_FORMS = ("input", "layers")
QUERY_SOURCES = ("all", "text")
VALUE_STARTS = ("mean", "vocabulary")
CONNECTORS = ("window_qformer", "conv_rotary")

# the only type of connector that uses a field
_FIELDS_OF_CONNECTORS = {
    "window_seconds": "window_qformer",
    "num_queries": "window_qformer",
    "salmonn_compat": "window_qformer",
    "stride_seconds": "window_qformer",
    "embedding_seconds": "conv_rotary",
    "kernel_size": "conv_rotary",
}
_LAYERS_OF_CONNECTORS = {"window_qformer": 2, "conv_rotary": 1}


class StrictConfig(PreTrainedConfig):
    """A config that refuses unknown fields: a misspelt setting must not be ignored in silence."""

    def __post_init__(self, **kwargs: Any) -> None:
        known = {"name_or_path", "torch_dtype", "num_labels", "attn_implementation", "output_attentions", "model_type"}
        known |= set(GenerationConfig._get_default_generation_params())
        unknown = [name for name in kwargs if name not in known and not name.startswith("_")]
        if unknown:
            fields = sorted(self.__dataclass_fields__)
            close = difflib.get_close_matches(unknown[0], fields, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known fields: {', '.join(type(self).__annotations__)}"
            raise ValueError(f"{type(self).__name__} has no field {unknown[0]!r}; {hint}")
        super().__post_init__(**kwargs)


class ListenConnectorConfig(StrictConfig):
    """The connector, which turns encoder frames into audio embeddings.

    Args:
        type: `"window_qformer"`, a window-level Q-Former (SALMONN, arXiv 2310.13289, sec. 3), or `"conv_rotary"`, a
            convolution and rotary Transformer layers (SpeechEmotionLlama, arXiv 2410.01162).
        window_seconds: For `window_qformer`: length of one window, rounded to whole frames of the speech encoder. A
            third of a second is 17 frames of 20 ms, SALMONN's `round(1500 * 0.333333 / 30)`.
        num_queries: For `window_qformer`: learned queries, hence audio embeddings, per window.
        salmonn_compat: For `window_qformer`: whether clips are encoded exactly as in SALMONN, for its checkpoints:
            padded to 30 s with the padding attended to, and without the last partial window. Every 30 s give 88
            embeddings, silent or not. Needs `ListenConfig.pad_to_30s`.
        stride_seconds: For `window_qformer` with `salmonn_compat`: time from one window to the next, where windows may
            overlap; `window_seconds` by default.
        embedding_seconds: For `conv_rotary`: time from one audio embedding to the next, a whole number of encoder
            frames. The paper's 80 ms are a stride of 2 over its frames of 40 ms, and of 4 over frames of 20 ms.
        kernel_size: For `conv_rotary`: kernel of the convolution, in encoder frames; `2 * stride - 1` by default, which
            covers half of each neighbouring stride.
        hidden_size: Width of its layers.
        num_hidden_layers: Transformer layers; by default 2 in `window_qformer`, each with cross-attention to the frames
            of a window, and 1 in `conv_rotary`.
        num_attention_heads: Attention heads; must divide `hidden_size`.
        intermediate_size: Width of its feed-forward layers.
        dropout: Dropout on its hidden states and attention weights while training.

    Raises:
        ValueError: an unknown field, an unknown `type`, a field that the type does not use, a size below 1, heads
            that do not divide the width, or a stride without `salmonn_compat`.
    """

    model_type = "listen_connector"

    type: str = "window_qformer"
    window_seconds: float = 1 / 3
    num_queries: int = 1
    salmonn_compat: bool = False
    stride_seconds: float | None = None
    embedding_seconds: float = 0.08
    kernel_size: int | None = None
    hidden_size: int = 768
    num_hidden_layers: int | None = None
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    dropout: float = 0.1

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.type not in CONNECTORS:
            raise ValueError(f"connector type={self.type!r} is unknown; choose one of {', '.join(CONNECTORS)}")
        self._check_fields()
        for name in ("window_seconds", "embedding_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"connector {name}={getattr(self, name)} must be above 0")
        if self.num_hidden_layers is None:
            self.num_hidden_layers = _LAYERS_OF_CONNECTORS[self.type]
        for name in ("num_queries", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"connector {name}={getattr(self, name)} must be at least 1")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"connector hidden_size={self.hidden_size} is not a multiple of "
                f"num_attention_heads={self.num_attention_heads}; change one of them"
            )
        self._check_stride()

    def _check_stride(self) -> None:
        if self.stride_seconds is not None and not self.salmonn_compat:
            raise ValueError(
                f"connector stride_seconds={self.stride_seconds} needs salmonn_compat=True; otherwise windows "
                "do not overlap"
            )
        if self.stride_seconds is not None and self.stride_seconds <= 0:
            raise ValueError(f"connector stride_seconds={self.stride_seconds} must be above 0")

    def settings(self) -> dict[str, Any]:
        """The fields above, without those that transformers adds to every config."""
        return {name: getattr(self, name) for name in type(self).__annotations__ if name != "model_type"}

    def window_frames(self, frame_seconds: float) -> int:
        """Encoder frames of `frame_seconds` per window, at least 1."""
        return self._frames(self.window_seconds, frame_seconds)

    def stride_frames(self, frame_seconds: float) -> int:
        """Encoder frames of `frame_seconds` from one window to the next, at least 1."""
        return self._frames(self.stride_seconds or self.window_seconds, frame_seconds)

    def _frames(self, seconds: float, frame_seconds: float) -> int:
        if self.salmonn_compat:  # in SALMONN's order of operations, so that halves round alike
            return max(1, round(round(30.0 / frame_seconds) * seconds / 30.0))
        return max(1, round(seconds / frame_seconds))

    def embedding_frames(self, frame_seconds: float) -> int:
        """Encoder frames of `frame_seconds` per embedding of `conv_rotary`: the stride of its convolution.

        Raises:
            ValueError: `embedding_seconds` is no whole number of frames.
        """
        frames = self.embedding_seconds / frame_seconds
        if round(frames) < 1 or abs(frames - round(frames)) > 1e-3:
            raise ValueError(
                f"connector embedding_seconds={self.embedding_seconds} is {frames:.3f} frames of the speech encoder, "
                f"which come every {frame_seconds} s; choose a multiple of that"
            )
        return round(frames)

    def num_embeddings(self, frames: int, frame_seconds: float) -> int:
        """Number of audio embeddings of one chunk.

        Args:
            frames: Real encoder frames of the chunk; with `salmonn_compat`, padded ones too.
            frame_seconds: Seconds from one frame to the next.
        """
        if self.type == "conv_rotary":
            return -(-frames // self.embedding_frames(frame_seconds))
        size = self.window_frames(frame_seconds)
        if not self.salmonn_compat:  # windows follow each other, the last one may be short
            return -(-frames // size) * self.num_queries
        return max(0, (frames - size) // self.stride_frames(frame_seconds) + 1) * self.num_queries

    def _check_fields(self) -> None:
        for name, reader in _FIELDS_OF_CONNECTORS.items():
            value = getattr(self, name)
            if reader != self.type and value != type(self).__dataclass_fields__[name].default:
                raise ValueError(f"connector {name}={value} is only used by type={reader!r}, not by {self.type!r}")


class ListenPromptPoolConfig(StrictConfig):
    """The pool of learned key-value prompts (LiSTEN, arXiv 2505.18517).

    Args:
        pool_size: P, the number of key-value pairs.
        num_prompts: K, the prompts selected at inference.
        train_prompts: Largest k drawn in training, with `stochastic`; `num_prompts` by default.
        form: What a prompt is: `"input"`, one embedding before the input (the paper), or `"layers"`, one hidden unit
            beside every layer of the LLM (beyond the paper, see `layer_prompts_listen`), which the LLM does not read.
        strategy: How prompts are selected: `"similarity"`, `"attention"`, `"residual"`, or the controls `"fixed"`
            (a classic soft prompt), `"random"` and `"task"`.
        key_loss_type: `"relative"`, the mean of ||q - k_i|| / ||q|| over the selected keys, with q detached: it moves
            the keys alone, and its size does not depend on k or on the LLM's width. `"distance"`, the sum of
            ||q - k_i|| (the paper), or `"similarity"`, minus the sum of the selected softmax similarities (the authors'
            code): both move queries too, hence the connector.
        key_loss_weight: alpha, the weight of the key loss beside the next-token loss.
        stochastic: Whether training draws k uniformly from 1..`train_prompts` for each batch.
        score_dropout: Share of the keys, drawn at random, that a training batch cannot select.
        gate_temperature: With `strategy="similarity"`, weights prompts by `k softmax(cosines / gate_temperature)`,
            so that the next-token loss trains the keys; `None` takes them as they are (the paper).
        center_query: Whether a running mean is subtracted from the query before it is compared with the keys; off in
            the paper. It keeps all keys in use when the queries of all tasks are similar.
        query_momentum: Momentum of that running mean, with `center_query`.
        tasks: Names of the tasks that own a part of the pool, with `strategy="task"`.
        shared_fraction: Fraction of the pool that all tasks share, with `strategy="task"`.
        query_source: The embeddings whose mean is the query: `"all"`, audio and text (the paper), or `"text"` alone. In
            a mean of all, many audio embeddings outweigh a short instruction, and the query hardly depends on the task.
        value_start: Where new values start: at the `"mean"` of the LLM's input embeddings, plus small noise (the
            authors' code), or at those of random tokens, `"vocabulary"` (Lester et al., arXiv 2104.08691).
        frozen_prompts: Number of pairs, the first ones, that are never trained, nor is the running mean of the query
            with them: those of the pool that this one was grown from, see `AdapterMixin.grow_pool`.

    Raises:
        ValueError: an unknown field, strategy, source, start or key loss, or values that cannot work together.
    """

    model_type = "listen_prompt_pool"

    pool_size: int = 400
    num_prompts: int = 160
    train_prompts: int | None = None
    form: str = "input"
    strategy: str = "similarity"
    key_loss_type: str = "relative"
    key_loss_weight: float = 1.0
    stochastic: bool = True
    score_dropout: float = 0.0
    gate_temperature: float | None = None
    center_query: bool = False
    query_momentum: float = 0.99
    tasks: list[str] | None = None
    shared_fraction: float = 0.4
    query_source: str = "all"
    value_start: str = "mean"
    frozen_prompts: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        check_choice("prompt pool form", self.form, PROMPT_FORMS)
        check_choice("prompt pool strategy", self.strategy, STRATEGIES)
        check_choice("prompt pool key_loss_type", self.key_loss_type, KEY_LOSSES)
        check_choice("prompt pool query_source", self.query_source, QUERY_SOURCES)
        check_choice("prompt pool value_start", self.value_start, VALUE_STARTS)
        if self.form == "layers" and self.value_start != "mean":
            raise ValueError(f"value_start={self.value_start!r} has no effect with form='layers'; leave it out")
        if not 1 <= self.num_prompts <= self.pool_size:
            raise ValueError(
                f"num_prompts={self.num_prompts} must lie in 1..pool_size={self.pool_size}; "
                "lower num_prompts or enlarge the pool"
            )
        for name in ("score_dropout", "shared_fraction", "query_momentum"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"prompt pool {name}={getattr(self, name)} must lie in [0, 1)")
        if self.gate_temperature is not None and (self.strategy != "similarity" or self.gate_temperature <= 0.0):
            raise ValueError(
                f"gate_temperature={self.gate_temperature} must be above 0 and needs strategy='similarity'"
            )
        if self.strategy == "task":
            self._check_tasks()
        if self.frozen_prompts:
            self._check_frozen_prompts()
        if self.train_prompts is not None:
            self._check_train_prompts(self.train_prompts)

    @property
    def uses_query(self) -> bool:
        """Whether the strategy compares a query with keys."""
        return self.strategy in QUERY_STRATEGIES

    @property
    def most_prompts(self) -> int:
        """Largest k that a row can ask for."""
        return self.num_per_task + self.num_shared if self.strategy == "task" else self.pool_size

    @property
    def num_shared(self) -> int:
        """Prompts that all tasks share, with `strategy="task"`."""
        return round(self.pool_size * self.shared_fraction)

    @property
    def num_per_task(self) -> int:
        """Prompts of each task alone, with `strategy="task"`."""
        return (self.pool_size - self.num_shared) // len(self.tasks or [None])

    def _check_tasks(self) -> None:
        if not self.tasks:
            raise ValueError("strategy='task' needs `tasks`, the names of the tasks that own a part of the pool")
        if self.num_per_task < 1 or self.num_prompts > self.most_prompts:
            raise ValueError(
                f"num_prompts={self.num_prompts}, but each of {len(self.tasks)} tasks reaches {self.most_prompts} of "
                f"pool_size={self.pool_size} prompts ({self.num_per_task} of its own); lower num_prompts"
            )

    def _check_frozen_prompts(self) -> None:
        if not self.uses_query:
            raise ValueError(
                f"frozen_prompts={self.frozen_prompts} needs a strategy with keys, not {self.strategy!r}: only a query "
                "can choose between old and new prompts"
            )
        if not 0 < self.frozen_prompts < self.pool_size:
            raise ValueError(
                f"frozen_prompts={self.frozen_prompts} must lie in 0..{self.pool_size - 1}, below pool_size"
            )

    def _check_train_prompts(self, train_prompts: int) -> None:
        if not self.stochastic:
            raise ValueError(f"train_prompts={train_prompts} has no effect with stochastic=False; leave it out")
        if not 1 <= train_prompts <= self.most_prompts:
            raise ValueError(f"train_prompts={train_prompts} must lie in 1..{self.most_prompts}, the pool's prompts")


def check_padding(connector_config: PreTrainedConfig, pad_to_30s: bool) -> None:
    """Refuse a connector that needs padded clips where clips are not padded.

    Raises:
        ValueError: `salmonn_compat` without `pad_to_30s`.
    """
    if connector_config.salmonn_compat and not pad_to_30s:
        raise ValueError(
            "a connector with salmonn_compat=True needs clips padded to 30 s, but pad_to_30s=False; set "
            "pad_to_30s=True, or salmonn_compat=False"
        )


def check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value that is none of the choices.

    Raises:
        ValueError: it is not.
    """
    if value not in choices:
        raise ValueError(f"{what}={value!r} is unknown; choose one of {', '.join(choices)}")


__all__ = ["StrictConfig", "ListenConnectorConfig", "ListenPromptPoolConfig", "check_choice", "check_padding"]
