"""Named sets of removed layers, from plans and from what other tools write.

`read_sets` reads a plan (`plan.json`, or a run folder), EvoPress' `layer_drop_config.txt`
(Sieberling et al., arXiv 2410.14649: one line for each layer, `none` or `attn+mlp`), a mergekit
recipe (passthrough slices of one model), and plain lists of layer numbers, one set for each line.

Numbers are 0-based layers of the original model, and every layer is one player: a plan whose
players are parts of layers is refused. Knows no engine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from lpserve.errors import InputError, first_line
from lpserve.masks import without
from lpserve.model.players import players_from, removed_layers
from lpserve.plan.plan import load_plan
from lpserve.types import BoolArray

DROP_WORDS = ("none", "attn", "mlp", "attn+mlp")
"""The words of EvoPress, one for each layer: the parts that are removed."""


@dataclass(frozen=True, slots=True)
class LayerSet:
    """Named layers to remove."""

    name: str
    removed: tuple[int, ...]
    """0-based, sorted."""

    def mask(self, num_players: int) -> BoolArray:
        """The mask that keeps all other layers, `bool[P]`, True = kept."""
        return without(num_players, self.removed)


def layer_set_masks(sets: Sequence[LayerSet], num_players: int) -> BoolArray:
    """The mask of every set, `bool[M, P]`, True = kept."""
    return np.array([layer_set.mask(num_players) for layer_set in sets], dtype=bool)


def full_model() -> LayerSet:
    """The set that removes nothing."""
    return LayerSet("all layers", ())


def layer_set(name: str, removed: Sequence[Any], num_players: int, source: str) -> LayerSet:
    """A set of checked layer numbers.

    Raises:
        InputError: something is no layer number of this model, or repeats; names `source`.
    """
    numbers = []
    for item in removed:
        if isinstance(item, bool) or not isinstance(item, int):
            raise InputError(f"{source}: {item!r} is no layer number")
        if not 0 <= item < num_players:
            raise InputError(
                f"{source}: layer {item} is not one of 0..{num_players - 1}, the model's layers"
            )
        numbers.append(item)
    if len(set(numbers)) != len(numbers):
        raise InputError(f"{source}: a layer comes twice in {numbers}")
    return LayerSet(name, tuple(sorted(numbers)))


def mask_set(text: str, num_players: int, source: str) -> LayerSet:
    """A set from a mask written as 0 and 1, first layer first, 1 = kept.

    Raises:
        InputError: it is not one digit 0 or 1 for each layer; names `source`.
    """
    if not re.fullmatch("[01]+", text) or len(text) != num_players:
        raise InputError(
            f"{source}: {text!r} is no mask of {num_players} layers: give one 0 (removed) or 1 "
            "(kept) for each"
        )
    removed = [i for i, bit in enumerate(text) if bit == "0"]
    return LayerSet(set_name(removed), tuple(removed))


def read_sets(path: str | Path, num_players: int, model_hash: str | None = None) -> list[LayerSet]:
    """The sets of a plan, a run folder, or another tool's file.

    Args:
        num_players: number of layers of the model that the sets are for.
        model_hash: of that model, where it is known: a plan for another model is refused.

    Raises:
        InputError: the file is missing or unreadable, is for another model or another number of
            layers, or removes parts of layers.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "plan.json"
    if path.suffix == ".json":
        return _from_json(path, num_players, model_hash)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text: {error}") from None
    if path.suffix in (".yaml", ".yml"):
        return [_from_mergekit(text, num_players, str(path))]
    words = [line.strip() for line in text.splitlines() if line.strip()]
    if words and all(word in DROP_WORDS for word in words):
        return [_from_drop_words(words, num_players, path)]
    return _from_lists(text, num_players, str(path))


def _from_json(path: Path, num_players: int, model_hash: str | None) -> list[LayerSet]:
    """The sets of a plan, of an object name -> numbers, of a list of lists, or of one list."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from None
    if isinstance(data, dict) and "plans" in data:
        plan = load_plan(path)
        players = players_from(plan.players)
        removed_layers(players, [player.index for player in players])  # no parts of layers at all
        removed_by = {e.num_removed: removed_layers(players, e.removed) for e in plan.plans}
        if plan.num_players != num_players:
            raise InputError(
                f"{path} is a plan for a model of {plan.num_players} layers; this one has "
                f"{num_players}"
            )
        if model_hash is not None and plan.model_hash != model_hash:
            raise InputError(
                f"{path} is a plan for another model ({plan.model}), or for other weights of it"
            )
        return [
            layer_set(f"plan -{num_removed}", removed, num_players, str(path))
            for num_removed, removed in removed_by.items()
        ]
    if isinstance(data, dict):
        return [
            layer_set(str(n), _as_list(v, path), num_players, str(path)) for n, v in data.items()
        ]
    rows = data if isinstance(data, list) and data and isinstance(data[0], list) else [data]
    return [layer_set(set_name(row), _as_list(row, path), num_players, str(path)) for row in rows]


def _as_list(value: Any, path: Path) -> list[Any]:
    if not isinstance(value, list):
        raise InputError(f"{path}: {value!r} is no list of layer numbers")
    return value


def _from_drop_words(words: list[str], num_players: int, path: Path) -> LayerSet:
    """The set of EvoPress' `layer_drop_config.txt`."""
    if len(words) != num_players:
        raise InputError(f"{path} speaks of {len(words)} layers; the model has {num_players}")
    for layer, word in enumerate(words):
        if word in ("attn", "mlp"):
            raise InputError(
                f"{path} line {layer + 1}: {word!r} removes half of layer {layer}; here layers are "
                "removed whole (EvoPress: --drop_entire_block)"
            )
    removed = [layer for layer, word in enumerate(words) if word == "attn+mlp"]
    return LayerSet(path.stem, tuple(removed))


def _from_mergekit(text: str, num_players: int, source: str) -> LayerSet:
    """The layers that the slices of a mergekit recipe leave out."""
    import yaml

    try:
        recipe = yaml.safe_load(text)
        slices = recipe["slices"]
        kept: list[int] = []
        models = set()
        for part in slices:
            (only,) = part["sources"]
            low, high = only["layer_range"]
            models.add(str(only["model"]))
            kept.extend(range(int(low), int(high)))
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        reason = first_line(error)
        raise InputError(
            f"{source} is no mergekit recipe of slices of one model each ({reason})"
        ) from None
    if len(models) != 1 or any(b <= a for a, b in pairwise(kept)):
        raise InputError(
            f"{source}: slices must be of one model, in order, none twice; it merges "
            f"{len(models)} models"
        )
    if not kept or kept[-1] >= num_players:
        raise InputError(
            f"{source} keeps layers up to {kept[-1] if kept else '?'}; the model has {num_players}"
        )
    removed = sorted(set(range(num_players)) - set(kept))
    return LayerSet(Path(source).stem, tuple(removed))


def _from_lists(text: str, num_players: int, source: str) -> list[LayerSet]:
    """One set for each line: numbers separated by commas, spaces or brackets, after an optional
    `name:`; `#` begins a comment."""
    sets = []
    for number, line in enumerate(text.splitlines(), start=1):
        content = line.split("#")[0].strip()
        if not content:
            continue
        name, found, numbers = content.rpartition(":")
        words = re.split(r"[\s,\[\]()]+", numbers)
        where = f"{source} line {number}"
        try:
            removed = [int(word) for word in words if word]
        except ValueError:
            raise InputError(f"{where}: {numbers.strip()!r} is no list of layer numbers") from None
        sets.append(
            layer_set(name.strip() if found else set_name(removed), removed, num_players, where)
        )
    if not sets:
        raise InputError(f"{source} holds no set of layers")
    return sets


def set_name(removed: Sequence[int]) -> str:
    """The name of a set that was given none: `-3,7`."""
    return "-" + ",".join(map(str, sorted(removed))) if removed else "all layers"
