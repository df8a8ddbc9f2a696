"""Whether the prompt pool is used or has collapsed: statistics of a logging window, and warnings.

There are two kinds of collapse: all queries are similar, so that every input selects the same prompts and the pool acts
as one soft prompt of k tokens; or all keys are similar, so that the selection has no meaning.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

QUERY_COSINE_LIMIT = 0.98
KEY_COSINE_LIMIT = 0.95
USED_LIMIT = 1.25  # prompts in use, as a multiple of the largest k; near 1 all inputs select the same ones
LEAST_ROWS = 32  # with fewer rows, the prompts in use cannot be judged


@dataclass(frozen=True)
class PoolHealth:
    """How a pool was used in a window of training.

    Attributes:
        used_share: share of the P prompts that at least one row selected.
        usage_entropy: entropy of the selections over log(P): 1 for uniform use, 0 for a single prompt.
        query_cosine: mean cosine between the queries of different rows; NaN for pools without a query.
        key_cosine: mean cosine between different keys; NaN for pools without keys.
        num_rows: number of rows.
        largest_k: most prompts that one row selected.
        pool_size: P.
    """

    used_share: float
    usage_entropy: float
    query_cosine: float
    key_cosine: float
    num_rows: int
    largest_k: int
    pool_size: int

    def as_logs(self) -> dict[str, float]:
        """Metrics for the log; those that a pool does not have are left out."""
        figures = {
            "pool_used_share": self.used_share,
            "pool_usage_entropy": self.usage_entropy,
            "pool_query_cosine": self.query_cosine,
            "pool_key_cosine": self.key_cosine,
        }
        return {name: value for name, value in figures.items() if not math.isnan(value)}

    def warnings(self) -> dict[str, str]:
        """Signs of collapse: short name -> message."""
        found = {}
        used, wide_enough = self.used_share * self.pool_size, self.pool_size >= 2 * self.largest_k
        is_known = not math.isnan(self.query_cosine) and wide_enough and self.num_rows >= LEAST_ROWS
        if is_known and used <= USED_LIMIT * self.largest_k:
            found["usage"] = (
                f"all inputs select nearly the same prompts ({used:.0f} of {self.pool_size} in use, k up to "
                f"{self.largest_k}): the pool acts as one soft prompt. Try center_query, keys_from_rows or another "
                "key_loss_weight"
            )
        if self.query_cosine > QUERY_COSINE_LIMIT:
            found["queries"] = f"queries are nearly equal (mean cosine {self.query_cosine:.3f}); try center_query"
        if self.key_cosine > KEY_COSINE_LIMIT:
            found["keys"] = (
                f"keys have collapsed (mean cosine {self.key_cosine:.3f}): key_loss_weight is probably too large"
            )
        return found


class PoolMonitor:
    """Accumulates the statistics of `PoolHealth` in constant memory.

    Args:
        pool: a `ListenPromptPool`.
    """

    def __init__(self, pool: torch.nn.Module) -> None:
        self.pool = pool
        self.reset()

    @property
    def key_loss_is_sum(self) -> bool:
        """Whether a row's key loss is a sum over its selected prompts, as in the paper, and not a mean or one norm."""
        config = self.pool.config
        return config.strategy == "similarity" and config.key_loss_type in ("distance", "similarity")

    def reset(self) -> None:
        """Start a new window."""
        self.counts = torch.zeros(self.pool.config.pool_size)  # (pool,), float32: MPS has no float64
        self.query_sum = torch.zeros(self.pool.width)  # (width,)
        self.num_rows = 0
        self.largest_k = 0

    @torch.no_grad()
    def add(self, indices: torch.Tensor, query: torch.Tensor) -> None:
        """Add one batch.

        Args:
            indices: `(batch, k)` selected prompts, -1 where a row has a smaller k.
            query: `(batch, width)`.
        """
        selected = indices[indices >= 0].cpu()
        self.counts += torch.bincount(selected, minlength=len(self.counts))
        if self.pool.config.center_query:
            query = query - self.pool.query_mean
        self.query_sum += F.normalize(query.float(), dim=-1).sum(0).cpu()
        self.num_rows += len(indices)
        self.largest_k = max(self.largest_k, int((indices >= 0).sum(-1).max()))

    def state(self) -> torch.Tensor:
        """All statistics as one vector."""
        head = torch.tensor([self.num_rows, self.largest_k], dtype=torch.float32)
        return torch.cat([head, self.counts, self.query_sum])

    def load(self, state: torch.Tensor) -> None:
        """Go on with statistics that `state` gave."""
        size = len(self.counts)
        self.num_rows, self.largest_k = int(state[0]), int(state[1])
        self.counts, self.query_sum = state[2 : 2 + size].cpu(), state[2 + size :].cpu()  # (pool,), (width,)

    def health(self, states: torch.Tensor | None = None) -> PoolHealth:
        """Metrics of the window.

        Args:
            states: `(processes, n)`, the `state()` of each process; this one alone by default.
        """
        states = (self.state()[None] if states is None else states).cpu()
        total, size = merged(states), len(self.counts)
        num_rows, counts, query_sum = int(total[0]), total[2 : 2 + size], total[2 + size :]
        share = counts / counts.sum().clamp_min(1)  # (pool,)
        entropy = -(share * share.clamp_min(1e-12).log()).sum().item()
        keys = self.pool.part("keys")
        return PoolHealth(
            used_share=(counts > 0).float().mean().item(),
            usage_entropy=entropy / math.log(size) if size > 1 else 0.0,
            query_cosine=mean_cosine(query_sum, num_rows) if keys is not None else float("nan"),
            key_cosine=_key_cosine(keys) if keys is not None else float("nan"),
            num_rows=num_rows,
            largest_k=int(total[1]),
            pool_size=size,
        )


def merged(states: torch.Tensor) -> torch.Tensor:
    """The states of `PoolMonitor` of several processes `(processes, n)` as that of one `(n,)`."""
    total = states.sum(0)
    total[1] = states[:, 1].max()  # largest k
    return total


def mean_cosine(unit_sum: torch.Tensor, count: int) -> float:
    """Mean cosine between all pairs of different vectors, from the sum of `count` unit vectors: `(width,)`.

    `|sum u|^2 = count + sum over pairs of u_i . u_j`, so no pair has to be formed.
    """
    if count < 2:
        return float("nan")
    return (unit_sum.square().sum().item() - count) / (count * (count - 1))


@torch.no_grad()
def _key_cosine(keys: torch.Tensor) -> float:
    unit = F.normalize(keys.detach().float(), dim=-1)  # (pool, width)
    return mean_cosine(unit.sum(0), len(unit))
