"""How lm-eval's requests become windows: what the lm-eval models of this package share.

A request (context, continuation) is a window whose continuation is scored; its log-likelihood is
minus the window's NLL, and it is greedy where no position misses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from lpserve.data.windows import TokenWindows
from lpserve.model.architecture import read_architecture
from lpserve.model.checkpoint import read_checkpoint

DEFAULT_MAX_LENGTH = 2048
"""Tokens of a request where the config names no number of positions; lm-eval's own default."""

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""Texts of context and continuation, where known, and their tokens."""
Row = tuple[tuple[int, ...], int]
"""Tokens of a request, and how many of the last are scored."""


def max_input_length(model: str) -> int:
    """Tokens that lm-eval may give a model at once: one less than it has positions, since the last
    scored token is part of a window here."""
    positions = read_architecture(read_checkpoint(model)).max_positions
    return DEFAULT_MAX_LENGTH if positions is None else positions - 1


class RequestsLM(TemplateLM):
    """The tokenizer's side of an lm-eval model.

    Args:
        max_length: the longest request that the model is given, in tokens; longer ones lose their
            beginning.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self._max_length = max_length
        self.cut: set[tuple[int, ...]] = set()
        """Tokens of the requests that lost their beginning, as they were given."""

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text, for lm-eval."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context, for lm-eval."""
        bos = self.tokenizer.bos_token_id
        return bos if bos is not None else self.tokenizer.eos_token_id

    @property
    def max_length(self) -> int:
        """The longest request that the model is given, in tokens."""
        return self._max_length

    @property
    def tokenizer_name(self) -> str:
        """A name of the tokenizer, for lm-eval's caches."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """A text as tokens; BOS is not added to one that begins with it."""
        special: dict[str, bool] = {}
        if add_special_tokens is not None:
            special["add_special_tokens"] = add_special_tokens
        elif string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            special["add_special_tokens"] = False  # the string has its BOS already
        return self.tokenizer.encode(string, **special)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Messages as one text, by the tokenizer's template."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, greedy) of every request, without a progress bar."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def row(self, context: Sequence[int], continuation: Sequence[int]) -> Row:
        """The window of a request, cut to `max_length`."""
        tokens = self.last((*context, *continuation), self._max_length + 1)
        return tokens, min(len(continuation), len(tokens) - 1)

    def last(self, tokens: Sequence[int], count: int) -> tuple[int, ...]:
        """At most `count` of the last tokens; notes in `cut` a request that loses its beginning."""
        kept = tuple(tokens[-count:])
        if len(kept) < len(tokens):
            self.cut.add(kept)
        return kept


def windows_of_rows(rows: Sequence[Row], name: str) -> TokenWindows:
    """Windows of requests, padded to the longest."""
    length = max(len(tokens) for tokens, _ in rows)
    tokens_NT = np.zeros((len(rows), length), dtype=np.int32)
    scored_NT = np.zeros((len(rows), length), dtype=bool)
    for place, (tokens, num_scored) in enumerate(rows):
        tokens_NT[place, : len(tokens)] = tokens
        scored_NT[place, len(tokens) - num_scored : len(tokens)] = True
    return TokenWindows.from_tokens(tokens_NT, scored_NT, name=name)


class _Encoder(RequestsLM):
    """Keeps the windows of the requests it receives; its answers mean nothing."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        super().__init__(tokenizer, max_length)
        self.rows: list[Row] = []

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        self.rows += [self.row(context, continuation) for _, context, continuation in requests]
        return [(0.0, False)] * len(requests)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        raise NotImplementedError


def encoded_rows(requests: Sequence[tuple[str, str]], tokenizer: Any, max_length: int) -> list[Row]:
    """The windows of contexts and continuations, as lm-eval encodes them."""
    encoder = _Encoder(tokenizer, max_length)
    encoder.loglikelihood(
        [
            Instance(request_type="loglikelihood", doc={}, arguments=request, idx=0)
            for request in requests
        ]
    )
    return encoder.rows
