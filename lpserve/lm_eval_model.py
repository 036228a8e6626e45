"""lm-evaluation-harness over lpserve's engines: requests are scored under masks, none is exported.

A request (context, continuation) is a window whose continuation is scored; its log-likelihood is
minus the window's NLL, and it is greedy where no position misses. All masks of a call are scored
together, so that they share prefixes, and every score is in the store before it counts.

`SetsLM` answers for one of several masks at a time. `LpserveLM` is the same from plain arguments,
under the name `lpserve` in lm-eval's registry (importing this module registers it).

Of the package, this module and `evaluate` alone know lm-eval.
"""

from __future__ import annotations

import atexit
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval import utils as lm_eval_utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from numpy.typing import NDArray

from lpserve.admission import num_players_of
from lpserve.checkpoint import position_limit, read_checkpoint
from lpserve.config import EngineConfig
from lpserve.errors import EngineError, InputError
from lpserve.layer_sets import layer_set, read_sets, whole_model
from lpserve.scoring import ScoringSession
from lpserve.types import BoolArray
from lpserve.windows import TokenWindows, load_tokenizer

REQUESTS_TOGETHER = 4096
"""Requests of one scoring call, sorted by length: padding and memory stay small."""
DEFAULT_MAX_LENGTH = 2048
"""Where the config names no number of positions, as lm-eval has it."""


class NotFiniteError(EngineError):
    """A mask could not be scored on every request, so that tasks have no figure for it."""


Request = tuple[tuple[str, str] | None, list[int], list[int]]


def max_input_length(model: str) -> int:
    """Tokens that lm-eval may give a model at once: one less than it has positions, since the last
    scored token is part of a window here."""
    found = position_limit(read_checkpoint(model).config)
    return DEFAULT_MAX_LENGTH if found is None else found[1] - 1


class SetsLM(TemplateLM):
    """Answers lm-eval's requests under one of several masks; see the module.

    Args:
        masks_MP: bool [M, P]; all are scored as soon as one is asked for.
        max_length: most tokens of a request that the model is given; longer ones lose their
            beginning.
    """

    def __init__(
        self, session: ScoringSession, tokenizer: Any, masks_MP: BoolArray, *, max_length: int
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.current = 0
        """Row of the mask that is asked about."""
        self._session = session
        self._masks_MP = masks_MP
        self._max_length = max_length
        self._answers: dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return bos if bos is not None else self.tokenizer.eos_token_id

    @property
    def max_length(self) -> int:
        return self._max_length

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        special: dict[str, bool] = {}
        if add_special_tokens is not None:
            special["add_special_tokens"] = add_special_tokens
        elif string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            special["add_special_tokens"] = False  # the string has its BOS already
        return self.tokenizer.encode(string, **special)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        rows = [self._window(context, continuation) for _, context, continuation in requests]
        # a request that repeats is scored once
        order = sorted(set(rows), key=lambda row: (len(row[0]), row))
        found: dict[tuple[tuple[int, ...], int], tuple[float, bool]] = {}
        for start in range(0, len(order), REQUESTS_TOGETHER):
            part = order[start : start + REQUESTS_TOGETHER]
            nll_N, misses_N = self._scored(part)
            for row, nll, misses in zip(part, nll_N.tolist(), misses_N.tolist(), strict=True):
                found[row] = (-nll, misses == 0)
        answers = [found[row] for row in rows]
        for (text, _, _), answer in zip(requests, answers, strict=True):
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, answer)
        return answers

    def _window(
        self, context: Sequence[int], continuation: Sequence[int]
    ) -> tuple[tuple[int, ...], int]:
        """Tokens of a request, and how many of the last are scored."""
        tokens = (*context, *continuation)[-(self._max_length + 1) :]
        return tokens, min(len(continuation), len(tokens) - 1)

    def _scored(
        self, rows: Sequence[tuple[tuple[int, ...], int]]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """NLL and misses `[N]` of the current mask; all masks are scored."""
        length = max(len(tokens) for tokens, _ in rows)
        tokens_NT = np.zeros((len(rows), length), dtype=np.int32)
        scored_NT = np.zeros((len(rows), length), dtype=bool)
        for row, (tokens, num_scored) in enumerate(rows):
            tokens_NT[row, : len(tokens)] = tokens
            scored_NT[row, len(tokens) - num_scored : len(tokens)] = True
        windows = TokenWindows.from_tokens(tokens_NT, scored_NT, name="requests")
        key = windows.content_hash
        if key not in self._answers:
            values = self._session.score(self._masks_MP, windows, ("misses",), stage="requests")
            self._answers[key] = values["nll"], values["misses"]
        nll_MN, misses_MN = self._answers[key]
        if not np.isfinite(nll_MN[self.current]).all():
            raise NotFiniteError("log-likelihoods of requests are not finite under this mask")
        return nll_MN[self.current], misses_MN[self.current]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        parts: list[Request] = []
        counts = []
        for (text,) in (request.args for request in requests):
            windows = lm_eval_utils.get_rolling_token_windows(
                token_list=self.tok_encode(text), prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length, context_len=1,
            )  # fmt: skip
            some = [(None, *lm_eval_utils.make_disjoint_window(pair)) for pair in windows]
            parts.extend(some)
            counts.append(len(some))
        scores = [nll for nll, _ in self._loglikelihood_tokens(parts)]
        bounds = np.cumsum([0, *counts]).tolist()
        return [sum(scores[low:high]) for low, high in pairwise(bounds)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        raise InputError(
            "generation under a mask is not to be had yet: export the checkpoint "
            "(lpserve export) and evaluate it with lm-eval's own models"
        )


@register_model("lpserve")
class LpserveLM(SetsLM):
    """`--model lpserve` of lm-eval, with these `--model_args`:

    Args:
        model: checkpoint folder.
        removed: layers to remove, `3+7+8`; or `plan` with `remove`, the number of layers. None:
            the whole model.
        store: where scores are kept (lpserve-eval.sqlite).
        engine, dtype, device, pool, engines: as for `lpserve run`.
    """

    def __init__(
        self,
        model: str,
        removed: str | int | None = None,
        plan: str | None = None,
        remove: int | None = None,
        store: str = "lpserve-eval.sqlite",
        max_length: int | None = None,
        engine: str = "transformers",
        dtype: str = "float32",
        pool: str = "local",
        engines: int | str = 1,
        device: str | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise InputError(f"--model lpserve has no argument {sorted(unknown)[0]!r}")
        config = EngineConfig(
            model=str(model), engine=engine, dtype=dtype, pool=pool, engines=engines,
            # lm-eval names its own default, a GPU, where none was asked for
            device="auto" if device in (None, "cuda", "cuda:0") else device,
        )  # fmt: skip
        num_players = num_players_of(config)
        if removed is not None and plan is not None:
            raise InputError("--model lpserve: give one of removed and plan")
        chosen = whole_model()
        if removed is not None:
            words = str(removed).split("+")
            if not all(word.strip().isdecimal() for word in words):
                raise InputError(f"--model lpserve: removed is layers such as 3+7: got {removed!r}")
            chosen = layer_set("removed", [int(w) for w in words], num_players, "removed")
        elif plan is not None:
            sets = {len(s.removed): s for s in read_sets(Path(plan), num_players)}
            if remove not in sets:
                raise InputError(f"--model lpserve: plan {plan} removes {sorted(sets)} layers: "
                                 f"give remove=, got {remove!r}")  # fmt: skip
            chosen = sets[remove]
        tokenizer = load_tokenizer(model)
        length = max_length or max_input_length(str(model))
        probe = TokenWindows.from_tokens(np.array([[0, 1]]), name="probe")
        session = ScoringSession(config, probe, store=store, holder="lm-eval", longest=length + 1)
        atexit.register(session.close)
        super().__init__(session, tokenizer, chosen.mask(num_players)[None], max_length=length)
