"""What a run is scored on, from its config: windows or questions, checked before a model loads.

Knows configs, tokenizers and a checkpoint's headers; no engine.
"""

from __future__ import annotations

from lpserve.config import RunConfig, WindowConfig, is_task
from lpserve.data.corpora import WindowRequest, check_no_overlap, cut_windows
from lpserve.data.items import ItemSet
from lpserve.data.tasks import cut_item_sets
from lpserve.data.windows import TokenWindows
from lpserve.errors import InputError
from lpserve.model.architecture import read_architecture
from lpserve.model.checkpoint import Checkpoint
from lpserve.utility import Utility, utility_named


def cut_run_items(config: RunConfig) -> tuple[ItemSet, ItemSet]:
    """The calibration and held-out items of a run, not yet compared with the model or each other.

    Raises:
        InputError: texts or tasks cannot be used, or the utility is not defined on them.
    """
    config.check_unused_keys(num_fewshot=True)
    sides = cut_item_sets(
        _request(config),
        config.model,
        include_path=config.include_path,
        num_fewshot=config.num_fewshot,
    )
    calibration, heldout = (ItemSet.concatenate(corpora) for corpora in sides)
    check_utility(utility_named(config.utility), calibration, heldout)
    return calibration, heldout


def cut_run_windows(config: WindowConfig) -> tuple[TokenWindows, TokenWindows]:
    """The calibration and held-out windows of a config whose corpora are texts.

    Raises:
        InputError: a corpus is a task, or a text cannot be used.
    """
    for name, path in [*config.calibration.items(), *config.heldout.items()]:
        if is_task(path):
            raise InputError(f"{name!r} is a task: only lpserve run and lpserve sweep take tasks")
    return cut_windows(_request(config), config.model)


def check_utility(utility: Utility, *item_sets: ItemSet) -> None:
    """Raise InputError where a utility is not defined on questions."""
    for items in item_sets:
        if items.questions is not None:
            items.questions.check(utility)


def check_disjoint(calibration: ItemSet, heldout: ItemSet) -> None:
    """Raise InputError where the two sides share windows, or long runs of text.

    Questions of one task begin with the same examples, so that on questions shared runs of text
    are legal and only equal windows count.
    """
    if calibration.questions is None or heldout.questions is None:
        check_no_overlap(calibration.windows, heldout.windows)
        return
    common = set(calibration.windows.window_hashes) & set(heldout.windows.window_hashes)
    if common:
        raise InputError(
            f"{len(common)} answers are in calibration and held-out alike; use different tasks"
        )


def check_windows(checkpoint: Checkpoint, windows: TokenWindows) -> None:
    """Raise InputError where windows do not fit a model's positions or vocabulary."""
    check_length(checkpoint, windows.length)
    vocab = read_architecture(checkpoint).vocab_size
    largest_id = int(windows.tokens_NT.max())
    if vocab is not None and largest_id >= vocab:
        raise InputError(
            f"token id {largest_id} is outside the model's vocabulary of {vocab}: "
            "the windows were made with another tokenizer"
        )


def check_length(checkpoint: Checkpoint, length: int) -> None:
    """Raise InputError where windows of so many tokens do not fit a model's positions."""
    architecture = read_architecture(checkpoint)
    limit = architecture.max_positions
    if limit is not None and length > limit:
        raise InputError(
            f"windows of {length} tokens are longer than the model's {limit} positions "
            f"({architecture.positions_key}); use --length {limit} or less"
        )


def _request(config: WindowConfig) -> WindowRequest:
    return WindowRequest(
        calibration=config.calibration,
        heldout=config.heldout,
        num_windows=config.num_windows,
        heldout_windows=config.heldout_windows,
        length=config.length,
        seed=config.window_seed,
        bos=config.bos,
        field=config.text_field,
    )
