"""From the tokens of one answer to text that may be sent while the answer grows."""

from __future__ import annotations

from collections.abc import Callable

from .engine import Delta, Sampling, TokenLogprob

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # decoded from a part of a character's bytes


class GrowingAnswer:
    """The text of one answer, token by token. All pieces together are what the pipeline returns.

    Args:
        decode: From ids to text, without special tokens.
        sampling: For the limit and the stop strings.
        end_ids: Tokens that end an answer.
        prompt_tokens: Positions of the input.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], sampling: Sampling, end_ids: set[int], prompt_tokens: int
    ) -> None:
        self.decode, self.sampling, self.end_ids, self.prompt_tokens = decode, sampling, end_ids, prompt_tokens
        self.ids: list[int] = []
        self.sent = ""
        self.finished = False

    def push(self, token_id: int, logprob: TokenLogprob | None = None) -> Delta:
        """The piece that a token adds."""
        self.ids.append(token_id)
        text = self.decode(self.ids)
        found = [position for position in map(text.find, self.sampling.stop) if position >= 0]
        if found or token_id in self.end_ids:
            reason = "stop"
        else:
            reason = "length" if len(self.ids) >= self.sampling.max_tokens else None
        self.finished = reason is not None
        text = (text[: min(found)] if found else text).strip()
        if not self.finished:
            text = self._certain(text)
        new, self.sent = text[len(self.sent) :], max(text, self.sent, key=len)
        return Delta(
            text=new,
            finish_reason=reason,
            prompt_tokens=self.prompt_tokens if self.finished else None,
            completion_tokens=len(self.ids),
            logprobs=(logprob,) if logprob is not None else (),
        )

    def _certain(self, text: str) -> str:
        """The part that later tokens cannot change: no half character at its end, no start of a stop string."""
        text = text.rstrip(_INCOMPLETE)
        for stop in self.sampling.stop:
            longest = min(len(stop) - 1, len(text))
            held = next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
            text = text[: len(text) - held]
        return text.rstrip()


__all__ = ["GrowingAnswer"]
