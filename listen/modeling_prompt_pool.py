"""The prompt pool of LiSTEN (arXiv 2505.18517): trained key-value pairs from which each input selects its prompts."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import EllipsisType

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig

from .language_models_listen import check_later


@dataclass
class PromptSelection:
    """What the pool chose for a batch.

    Attributes:
        indices: `(batch, k)` pool positions, best first; the pool writes -1 where a row asks for fewer.
        scores: `(batch, k)` score of each under the strategy, ones where it has none; 0 where a row asks for fewer.
        weights: `(batch, k)` factors for the values, or `None` for values as they are.
        key_loss: `(batch,)` the pull between query and chosen keys, zero where the strategy has none.
    """

    indices: torch.Tensor
    scores: torch.Tensor
    weights: torch.Tensor | None
    key_loss: torch.Tensor


@dataclass
class PromptRequest:
    """What a strategy chooses for.

    Attributes:
        query: `(batch, width)` in fp32, without its running mean where the pool centres it.
        keys: `(pool, width)` in fp32, or `None` where the strategy has none.
        k: Prompts to choose for each row.
        valid: `(batch, k)`, true on the places that a row fills: rows may ask for fewer.
        task_ids: `(batch,)`, or `None`.
        dropped: `(pool,)`, true for keys that leave the ranking, by score dropout.
    """

    query: torch.Tensor
    keys: torch.Tensor | None
    k: int
    valid: torch.Tensor
    task_ids: torch.Tensor | None
    dropped: torch.Tensor


class SelectionStrategy(nn.Module):
    """Chooses prompts; it has no parameters of its own.

    Args:
        config: A `ListenPromptPoolConfig`.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()

    def forward(self, request: PromptRequest) -> PromptSelection:
        """Choose `request.k` prompts for each query; the places that are not `request.valid` are ignored."""
        raise NotImplementedError


class SimilaritySelection(SelectionStrategy):
    """The k keys of highest cosine similarity to the query; their values as they are (LiSTEN, sec. 2).

    With `gate_temperature` the values are weighted by `k softmax(cosine / gate_temperature)` over the k chosen.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.loss_type = config.key_loss_type
        self.temperature = config.gate_temperature

    def forward(self, request: PromptRequest) -> PromptSelection:
        """`scores` are cosines; the norms are safe at zero, as in Learning to Prompt (arXiv 2112.08654)."""
        query, keys = request.query, request.keys
        scores = F.normalize(query, dim=-1, eps=1e-6) @ F.normalize(keys, dim=-1, eps=1e-6).T  # (batch, pool)
        # equal keys keep their order: the last digits of a cosine differ between a batch and a single row
        ranked = scores.round(decimals=5).masked_fill(request.dropped, -torch.inf)  # (batch, pool)
        indices = ranked.argsort(dim=-1, descending=True, stable=True)[:, : request.k]  # (batch, k)
        if self.loss_type == "similarity":
            losses = -scores.softmax(-1).gather(1, indices)  # (batch, k)
        elif self.loss_type == "distance":
            losses = (query[:, None] - keys[indices]).norm(dim=-1)  # (batch, k)
        else:  # the keys move to the query; the query is left to the next-token loss
            target, count = query.detach(), request.valid.sum(-1, keepdim=True).clamp_min(1)  # (batch, 1)
            size = target.norm(dim=-1, keepdim=True).clamp_min(1e-6)  # (batch, 1)
            losses = (target[:, None] - keys[indices]).norm(dim=-1) / (size * count)  # (batch, k)
        chosen, valid, weights = scores.gather(1, indices), request.valid, None  # (batch, k)
        if self.temperature is not None:
            shares = (chosen / self.temperature).masked_fill(~valid, -torch.inf).softmax(-1).nan_to_num()  # (batch, k)
            weights = shares * valid.sum(-1, keepdim=True)
        return PromptSelection(indices, chosen, weights, (losses * valid).sum(-1))


class AttentionSelection(SelectionStrategy):
    """The k keys of highest scaled dot-product attention weight; values scaled by their renormalised weight.

    The weights sum to k over the chosen prompts, so that uniform attention leaves the values as they are. The keys
    are trained through the weights; there is no key loss.
    """

    def forward(self, request: PromptRequest) -> PromptSelection:
        """`scores` are attention weights over the whole pool."""
        query, keys, valid = request.query, request.keys, request.valid
        logits = query @ keys.T / keys.shape[1] ** 0.5  # (batch, pool)
        scores = logits.masked_fill(request.dropped, -torch.inf).softmax(-1)  # (batch, pool)
        # equal keys keep their order, as in `SimilaritySelection`; rounded weights of a large pool would all be equal
        cosines = (F.normalize(query, dim=-1) @ F.normalize(keys, dim=-1).T).round(decimals=5)  # (batch, pool)
        ranked = (cosines * keys.norm(dim=-1)).masked_fill(request.dropped, -torch.inf)  # (batch, pool)
        indices = ranked.argsort(dim=-1, descending=True, stable=True)[:, : request.k]  # (batch, k)
        scores = scores.gather(1, indices)  # (batch, k)
        chosen = scores * valid
        total = chosen.sum(-1, keepdim=True).clamp_min(1e-12)  # zero for a row that asks for no prompts
        weights = chosen / total * valid.sum(-1, keepdim=True)  # (batch, k)
        return PromptSelection(indices, scores, weights, query.new_zeros(len(query)))


class ResidualSelection(SelectionStrategy):
    """Greedy residual quantisation of the query: each choice is the unused key nearest to what is left of it.

    `r_0 = q`, `r_{j+1} = r_j - k_i`; the key loss is `||q - sum of the selected keys||`, or, with
    `key_loss_type="relative"`, its ratio to `||q||` with `q` detached.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.is_relative = config.key_loss_type == "relative"

    def forward(self, request: PromptRequest) -> PromptSelection:
        """`scores` are minus the distance of each choice to the residual it was chosen for."""
        query, keys, valid = request.query, request.keys, request.valid
        if self.is_relative:
            query = query.detach()  # nothing else here passes a gradient to it
        used = request.dropped.expand(len(query), -1)  # (batch, pool)
        residual, indices, scores = query, [], []
        for step in range(request.k):
            distances = torch.cdist(residual[:, None], keys[None])[:, 0]  # (batch, pool)
            index = distances.masked_fill(used, torch.inf).argmin(-1, keepdim=True)  # (batch, 1)
            indices.append(index)
            scores.append(-distances.gather(1, index))
            used = used.scatter(1, index, True)
            residual = residual - keys[index[:, 0]] * valid[:, step : step + 1]  # (batch, width)
        size = query.norm(dim=-1).clamp_min(1e-6) if self.is_relative else 1.0  # (batch,)
        key_loss = residual.norm(dim=-1) * valid.any(-1) / size
        return PromptSelection(torch.cat(indices, 1), torch.cat(scores, 1), None, key_loss)


class FixedSelection(SelectionStrategy):
    """The first k prompts, the same for every input: a classic soft prompt (control)."""

    def forward(self, request: PromptRequest) -> PromptSelection:
        """`scores` are ones."""
        indices = torch.arange(request.k, device=request.query.device).expand(len(request.query), -1)  # (batch, k)
        return _without_scores(indices, request.query)


class RandomSelection(SelectionStrategy):
    """k prompts drawn without replacement for each input from torch's generator, also at inference (control)."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.pool_size = config.pool_size

    def forward(self, request: PromptRequest) -> PromptSelection:
        """`scores` are ones."""
        draws = torch.rand(len(request.query), self.pool_size, device=request.query.device)  # (batch, pool)
        return _without_scores(draws.topk(request.k, dim=-1).indices, request.query)


class TaskSelection(SelectionStrategy):
    """Each task owns a part of the pool and all share the rest (control).

    Own and shared prompts alternate in proportion to their numbers, so that any k holds both.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.tasks = list(config.tasks)
        self.order = [self._order(config, task) for task in range(len(self.tasks))]

    def forward(self, request: PromptRequest) -> PromptSelection:
        """`scores` are ones.

        Raises:
            ValueError: no `task_ids`, or one outside the known tasks.
        """
        known, task_ids = ", ".join(f"{i}={name}" for i, name in enumerate(self.tasks)), request.task_ids
        if task_ids is None:
            raise ValueError(f"strategy='task' needs task_ids, one a sample; known tasks: {known}")
        if task_ids.min() < 0 or task_ids.max() >= len(self.tasks):
            raise ValueError(f"task_ids={task_ids.tolist()} holds an unknown task; known tasks: {known}")
        order = torch.tensor(self.order, device=request.query.device)  # (tasks, reachable)
        return _without_scores(order[task_ids][:, : request.k], request.query)

    @staticmethod
    def _order(config: PreTrainedConfig, task: int) -> list[int]:
        own, shared = config.num_per_task, config.num_shared
        first = shared + task * own
        # the i-th of n prompts stands at (i + 1/2) / n of the way
        places = [((i + 0.5) / own, first + i) for i in range(own)]
        places += [((i + 0.5) / shared, i) for i in range(shared)]
        return [index for _, index in sorted(places)]


STRATEGIES: dict[str, type[SelectionStrategy]] = {
    "similarity": SimilaritySelection,
    "attention": AttentionSelection,
    "residual": ResidualSelection,
    "fixed": FixedSelection,
    "random": RandomSelection,
    "task": TaskSelection,
}


class ListenPromptPool(nn.Module):
    """P trained key-value pairs and the strategy that selects k of them for a query.

    A value is one embedding, or, with `form="layers"`, a pair of vectors `reads`, `writes` for each layer of the LLM.
    Keys exist only for strategies that compare them with a query, so that every parameter gets a gradient. The parts of
    the first `config.frozen_prompts` pairs are buffers (`frozen_keys`, `frozen_values`, ...), which no optimiser reads.

    Args:
        config: A `ListenPromptPoolConfig`.
        width: Width of the LLM's embeddings, hence of keys and values.
        layers: Number and width of the LLM's layers, for `form="layers"`.
    """

    def __init__(self, config: PreTrainedConfig, width: int, layers: tuple[int, int] = (0, 0)) -> None:
        super().__init__()
        self.config = config
        self.width = width
        trained = config.pool_size - config.frozen_prompts
        if config.form == "layers":
            self.reads = nn.Parameter(torch.empty(trained, *layers))  # (trained, layers, layer width)
            self.writes = nn.Parameter(torch.empty(trained, *layers))  # (trained, layers, layer width)
        else:
            self.values = nn.Parameter(torch.empty(trained, width))  # (trained, width)
        self.keys = nn.Parameter(torch.empty(trained, width)) if config.uses_query else None  # (trained, width)
        if config.frozen_prompts:
            for name, own in list(self.named_parameters()):
                self.register_buffer(f"frozen_{name}", torch.zeros(config.frozen_prompts, *own.shape[1:]))
        if config.center_query:
            self.register_buffer("query_mean", torch.zeros(width))
        self.most_prompts = config.most_prompts
        self.strategy = STRATEGIES[config.strategy](config)

    def forward(
        self,
        query: torch.Tensor,
        counts: torch.Tensor,
        task_ids: torch.Tensor | None = None,
        num_prompts: int | None = None,
    ) -> tuple[torch.Tensor, PromptSelection]:
        """Select prompts for each query; in training, `center_query` moves the running mean towards that of the batch.

        Args:
            query: `(batch, width)` mean of the embeddings before the response, see `query_source`.
            counts: `(batch,)` prompts that each row asks for.
            task_ids: `(batch,)` indices into `config.tasks`, for `strategy="task"`.
            num_prompts: The count of every row, where it is known: it is then not read from the device.

        Returns:
            The prompts of all rows one after the other, `(counts.sum(), width)`, and the selection, `k = max(counts)`.
            Zeros for prompts that are in the LLM's layers: it does not read their placeholders.

        Raises:
            ValueError: a row asks for more prompts than it can reach.
            RuntimeError: the counts are not `num_prompts`.
        """
        asked = counts.tolist() if num_prompts is None else [num_prompts]
        k = max(asked)
        if num_prompts is not None:
            check_later(counts == k, "a row asks for another number of prompts", num_prompts=k)
        if k > self.most_prompts:
            raise ValueError(
                f"the input asks for {k} prompts but the pool can give {self.most_prompts}; lower num_prompts"
            )
        valid = torch.arange(k, device=query.device) < counts[:, None]  # (batch, k)
        dropped = torch.zeros(self.config.pool_size, dtype=torch.bool, device=query.device)  # (pool,)
        if self.training and self.config.score_dropout:
            # out of the ranking: a score of zero would rank above every negative cosine; none where under k would stay
            drawn = torch.rand(self.config.pool_size, device=query.device) < self.config.score_dropout
            dropped = drawn & (self.config.pool_size - drawn.sum() >= k)
        with torch.autocast(query.device.type, enabled=False):  # the ranking must not depend on mixed precision
            query = query.float()  # (batch, width)
            if self.config.center_query:
                if self.training and not self.config.frozen_prompts:  # the old keys fit the old mean
                    with torch.no_grad():
                        self.query_mean.lerp_(query.mean(0), 1.0 - self.config.query_momentum)
                query = query - self.query_mean
            keys = self.part("keys")  # (pool, width)
            keys = keys.float() if keys is not None else None
            selection = self.strategy(PromptRequest(query, keys, k, valid, task_ids, dropped))
            if self.config.form == "layers":
                prompts = query.new_zeros(len(query), k, self.width)
            else:
                prompts = self.part("values")[selection.indices]  # (batch, k, width)
            if selection.weights is not None:
                prompts = prompts * selection.weights[..., None]
        selection.indices = selection.indices.masked_fill(~valid, -1)
        selection.scores = selection.scores.masked_fill(~valid, 0.0)
        return prompts.flatten(0, 1) if min(asked) == k else prompts[valid], selection

    def part(self, name: str, layer: int | EllipsisType = ...) -> torch.Tensor | None:
        """One part of all pairs, frozen ones first.

        Args:
            name: `"keys"`, `"values"`, or, with `form="layers"`, `"reads"` or `"writes"`.
            layer: The layer of the LLM whose `reads` or `writes` are meant; all by default.

        Returns:
            `(pool, width)`, or `(pool, layers, layer width)` for the `reads` or `writes` of all layers; `None` for the
            keys of a strategy that has none.
        """
        own = getattr(self, name)
        if own is None:
            return None
        own = own[:, layer]  # (trained, width) or (trained, layers, layer width)
        if not self.config.frozen_prompts:
            return own
        return torch.cat([getattr(self, f"frozen_{name}")[:, layer], own])

    @torch.no_grad()
    def initialize_values(self, embedding: torch.Tensor) -> None:
        """Start the values from the LLM's input `embedding`.

        Args:
            embedding: `(rows, width)`; with `value_start="mean"` the values are moved to the mean of the rows, with
                `"vocabulary"` the rows, one for each value that is trained, replace them.
        """
        embedding = embedding.float().to(self.values.device)
        if self.config.value_start == "vocabulary":
            self.values.copy_(embedding)
        else:
            self.values += embedding.mean(0)

    @torch.no_grad()
    def initialize_keys(self, queries: torch.Tensor) -> None:
        """Set the keys to some of `queries` `(n, width)`, plus small noise, so that all start in use.

        They are drawn as by k-means++ (Arthur and Vassilvitskii, 2007), so that rare queries get keys too. With
        `center_query` the mean of the queries becomes the running mean. Frozen keys and their mean stay.

        Raises:
            ValueError: the strategy has no keys.
        """
        if self.keys is None:
            raise ValueError(f"strategy={self.config.strategy!r} has no keys to initialise")
        queries = queries.float().to(self.keys.device)
        if self.config.center_query:
            if not self.config.frozen_prompts:
                self.query_mean.copy_(queries.mean(0))
            queries = queries - self.query_mean
        drawn = queries[_spread(F.normalize(queries, dim=-1), len(self.keys))]  # (trained, width)
        self.keys.copy_(drawn + 0.1 * drawn.std() * torch.randn_like(drawn))


def _spread(directions: torch.Tensor, count: int) -> torch.Tensor:
    """Indices `(count,)` into unit vectors `(n, width)`: each drawn by its distance to the nearest one so far."""
    chosen = [int(torch.randint(len(directions), ()))]
    nearest = directions @ directions[chosen[0]]  # (n,), cosine to the nearest drawn one
    for _ in range(count - 1):
        distances = (1.0 - nearest).clamp_min(1e-6)  # not 0: once all are drawn, any may follow
        chosen.append(int(torch.multinomial(distances, 1)))
        nearest = torch.maximum(nearest, directions @ directions[chosen[-1]])
    return torch.tensor(chosen, device=directions.device)


def _without_scores(indices: torch.Tensor, query: torch.Tensor) -> PromptSelection:
    ones = torch.ones(indices.shape, dtype=query.dtype, device=query.device)
    return PromptSelection(indices, ones, None, query.new_zeros(len(query)))


def pool_query(
    adapters: Mapping[str, nn.Module],
    names: list[str | None],
    embeds: torch.Tensor,
    is_audio: torch.Tensor,
    is_prompt: torch.Tensor,
    attention_mask: torch.Tensor | None,
    query_mask: torch.Tensor | None,
    wait: bool = True,
) -> torch.Tensor:
    """The mean of the text embeddings, and of the audio unless a row's pool leaves it out: what selects the prompts.

    Args:
        adapters: Each with its `prompt_pool`.
        names: Adapter of each row.
        embeds: `(batch, sequence, text width)`.
        is_audio: `(batch, sequence)`.
        is_prompt: `(batch, sequence)`.
        attention_mask: `(batch, sequence)`, 1 on real positions.
        query_mask: `(batch, length)` positions, from the first on, that count; all by default.
        wait: Whether the check of empty rows waits for the device.

    Returns:
        `(batch, text width)` in fp32.

    Raises:
        ValueError: no position is left for a row (without `wait` a `RuntimeError`), or the pass is shorter than
            `query_mask`.
    """
    of_text = []
    for name in names:
        pool = adapters[name].prompt_pool if name in adapters else None
        of_text.append(pool is not None and pool.config.query_source == "text")
    mask = ~is_prompt  # (batch, sequence)
    if any(of_text):
        mask = mask & ~(is_audio & torch.tensor(of_text, device=mask.device)[:, None])
    if attention_mask is not None:
        mask = mask & attention_mask.bool()
    if query_mask is not None and query_mask.shape[1] > mask.shape[1]:
        raise ValueError(
            f"the whole input of {query_mask.shape[1]} positions selects the prompts, but this pass reads "
            f"{mask.shape[1]} of them; generate without prefill_chunk_size"
        )
    if query_mask is not None:  # generation appends positions that the query must not see
        mask = mask & F.pad(query_mask.bool(), (0, mask.shape[1] - query_mask.shape[1]))
    weights = mask[..., None].float()  # (batch, sequence, 1)
    empty = is_prompt.any(-1) & ~mask.any(-1)  # (batch,)
    advice = (
        "nothing to select its prompts by: give audio or text, and labels of -100 before the answer, or the query_mask "
        "of apply_chat_template"
    )
    if not wait:
        check_later(~empty, f"a row has {advice}")
    elif empty.any():
        raise ValueError(f"row {int(empty.long().argmax())} has {advice}")
    return (embeds.float() * weights).sum(1) / weights.sum(1).clamp_min(1.0)


__all__ = ["ListenPromptPool", "PromptRequest", "PromptSelection", "SelectionStrategy", "STRATEGIES", "pool_query"]
