"""Files that hold sets of layers: plans, and what other tools write.

`read_sets` reads a plan (`plan.json`, or a run folder), EvoPress' `layer_drop_config.txt`
(Sieberling et al., arXiv 2410.14649: one line for each layer, `none`, `attn`, `mlp` or `attn+mlp`),
a mergekit recipe (passthrough slices of one model), the `block_configs` of Puzzletron's models, and
plain lists of layer numbers and of parts such as `7.attention`, one set for each line.

What could be meant in two ways is refused with both readings, never read as the nearest form.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from lpserve.errors import InputError, first_line
from lpserve.inputs.documents import json_value, yaml_value
from lpserve.inputs.files import read_document
from lpserve.inputs.rules import PART_NAME
from lpserve.inputs.shapes import converted
from lpserve.model.architecture import MOST_LAYERS, read_architecture
from lpserve.model.checkpoint import read_checkpoint
from lpserve.model.players import (
    ATTENTION,
    FULL_LAYER,
    MLP,
    has_groups,
    num_layers_of,
    player_label,
    players_from,
    removed_parts,
)
from lpserve.plan.layer_sets import LayerSet, layer_set, set_name
from lpserve.plan.plan import load_plan
from lpserve.types import Player

_DROPPED = {
    frozenset(["none"]): "",
    frozenset(["attn"]): f".{ATTENTION}",
    frozenset(["mlp"]): f".{MLP}",
    frozenset(["attn", "mlp"]): FULL_LAYER,
}
"""EvoPress' words for what a layer loses, in any order and case."""
_ASSIGNED = re.compile(
    r"(?:export\s+)?(?P<name>[A-Za-z_]\w*)\s*=\s*(?P<quote>[\"']?)(?P<value>.*)(?P=quote)"
)
_HALVES = re.compile(r"(?i)(?:self_)?(?:attn|attention|mha|mlp|ffn)")
_RECIPE_KEYS = {
    *("slices", "merge_method", "dtype", "out_dtype", "name"),
    *("tokenizer_source", "tokenizer", "chat_template"),
}
"""Keys of a mergekit recipe that leave copied layers as they are."""


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
    text = read_document(path)
    if path.suffix == ".json":
        return _from_json(path, text, num_players, model_hash)
    if path.suffix in (".yaml", ".yml"):
        return [_from_mergekit(text, num_players, str(path))]
    dropped = [_DROPPED.get(_words(line)) for line in text.splitlines() if line.strip()]
    if dropped and None not in dropped:
        return [_from_drop_words(dropped, num_players, path)]
    return _from_lists(text, num_players, str(path))


def _words(line: str) -> frozenset[str]:
    return frozenset(word.strip() for word in line.lower().split("+"))


def _from_json(path: Path, text: str, num_players: int, model_hash: str | None) -> list[LayerSet]:
    """The sets of a plan, of an object name -> numbers, of a list of lists, or of one list."""
    data = json_value(text, str(path))
    if isinstance(data, dict) and "plans" in data:
        plan = load_plan(path)
        players = players_from(plan.players)
        removed_by: dict[str, list[int | str]] = {}
        for entry in plan.plans:
            sets = [entry.removed, *(other.removed for other in entry.alternatives)]
            for number, removed in enumerate(sets):
                label = plan.label(entry) if plan.target_cost else f"-{entry.num_removed}"
                name = f"plan {label}" + f" #{number}" * (number > 0)
                removed_by[name] = _names(players, removed)
        if num_layers_of(players) != num_players and not has_groups(players):
            raise InputError(
                f"{path} is a plan for a model of {num_layers_of(players)} layers; this one has "
                f"{num_players}"
            )
        if model_hash is not None and plan.model_hash != model_hash:
            raise InputError(
                f"{path} is a plan for another model ({plan.model}), or for other weights of it"
            )
        return [
            layer_set(name, removed, num_players, str(path)) for name, removed in removed_by.items()
        ]
    if isinstance(data, dict) and "block_configs" in data:
        return [_from_block_configs(data["block_configs"], num_players, path)]
    if isinstance(data, dict):
        named = {str(name): _numbers_of(value, path) for name, value in data.items()}
    else:
        rows = data if isinstance(data, list) and data and isinstance(data[0], list) else [data]
        lists = [_numbers_of(row, path) for row in rows]
        named = {set_name(numbers): numbers for numbers in lists}
    return [_file_set(name, row, num_players, str(path)) for name, row in named.items()]


def _numbers_of(value: Any, path: Path) -> list[int | str]:
    """Layer numbers of a JSON list, in which tools write 3 also as 3.0 and "3"."""
    if not isinstance(value, list):
        raise InputError(f"{path}: {value!r} is no list of layer numbers")
    numbers: list[int | str] = []
    for item in value:
        if isinstance(item, str) and re.match(PART_NAME, item):
            numbers.append(item)
            continue
        if isinstance(item, bool) or not re.fullmatch(r"-?\d{1,9}(?:\.0)?", str(item)):
            raise InputError(f"{path}: {item!r} is no layer number")
        numbers.append(int(float(item)))
    return numbers


def _file_set(name: str, removed: Sequence[int | str], num_players: int, source: str) -> LayerSet:
    """A set as a file names it; one of all layers is no set to remove."""
    found = layer_set(name, removed, num_players, source)
    if len(found.removed) == num_players:
        raise InputError(
            f"{source}: {name!r} removes every layer; an order of removal is no set: write its "
            "first layers, as many as are to go"
        )
    return found


def _from_drop_words(dropped: list[str | None], num_players: int, path: Path) -> LayerSet:
    """The set of EvoPress' `layer_drop_config.txt`."""
    if len(dropped) != num_players:
        raise InputError(f"{path} speaks of {len(dropped)} layers; the model has {num_players}")
    removed = [
        layer if what == FULL_LAYER else f"{layer}{what}"
        for layer, what in enumerate(dropped)
        if what
    ]
    return _file_set(path.stem, removed, num_players, str(path))


def _from_block_configs(blocks: Any, num_players: int, path: Path) -> LayerSet:
    """The parts that Puzzletron's search left out: those whose block says `no_op`.

    Raises:
        InputError: a block is changed in another way: what it makes is no set of removed parts.
    """
    source = f"{path}: block_configs"
    checked = converted(blocks, list[dict[str, Any]], source)
    if len(checked) != num_players:
        raise InputError(f"{source} speaks of {len(checked)} layers; the model has {num_players}")
    removed: list[int | str] = []
    for layer, block in enumerate(checked):
        gone = []
        for word, part in (("attention", ATTENTION), ("ffn", MLP)):
            settings = block.get(word) or {}
            if not isinstance(settings, dict) or settings.get("replace_with_linear"):
                raise InputError(f"{source}: the {word} of layer {layer} is replaced, not removed")
            gone += [part] * bool(settings.get("no_op"))
        removed += [layer] if len(gone) == 2 else [f"{layer}.{part}" for part in gone]
    return _file_set(path.stem, removed, num_players, str(path))


def _names(players: Sequence[Player], removed: Sequence[int]) -> list[int | str]:
    """Removed players as layer sets name them."""
    whole, parts = removed_parts(players, removed)
    return [*sorted(whole), *(player_label(part) for part in parts)]


def _from_mergekit(text: str, num_players: int, source: str) -> LayerSet:
    """The layers that the slices of a mergekit recipe leave out."""
    recipe = yaml_value(text, source)
    try:
        parts = [only for part in recipe["slices"] for (only,) in [part["sources"]]]
        models = {str(part["model"]) for part in parts}
        ranges = [tuple(map(int, part["layer_range"])) for part in parts]
        if any(abs(end) > MOST_LAYERS for ends in ranges for end in ends):
            raise ValueError(f"a layer_range beyond {MOST_LAYERS:,}")
        kept = [layer for low, high in ranges for layer in range(low, high)]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        reason = first_line(error)
        raise InputError(
            f"{source} is no mergekit recipe of slices of one model each ({reason})"
        ) from None
    _check_copies(recipe, source)
    if any(low < 0 for low, _ in ranges):
        raise InputError(f"{source}: a layer_range begins below 0; number layers from the front")
    if len(models) != 1 or any(b <= a for a, b in pairwise(kept)):
        raise InputError(
            f"{source}: slices must be of one model, in order, none twice; it merges "
            f"{len(models)} models"
        )
    if not kept or kept[-1] >= num_players:
        raise InputError(
            f"{source} keeps layers up to {kept[-1] if kept else '?'}; the model has {num_players}"
        )
    (model,) = models
    _check_depth(model, num_players, source)
    removed = sorted(set(range(num_players)) - set(kept))
    if not removed:
        raise InputError(f"{source} keeps every layer of the model: it removes none")
    return LayerSet(Path(source).stem, tuple(removed))


def _check_copies(recipe: dict[str, Any], source: str) -> None:
    """Raise InputError where a recipe does more to the layers than copy them."""
    method = recipe.get("merge_method", "passthrough")
    if method != "passthrough":
        raise InputError(f"{source} merges by {method!r}; only passthrough copies layers")
    changed = {str(key) for key in recipe} - _RECIPE_KEYS
    for part in recipe["slices"]:
        changed |= {str(key) for key in part} - {"sources"}
        for only in part["sources"]:
            changed |= {str(key) for key in only} - {"model", "layer_range"}
            if not isinstance(only["model"], str) or "+" in only["model"]:
                changed.add("an adapter")
    if changed:
        raise InputError(
            f"{source} does more than copy layers ({', '.join(sorted(changed))}): what it makes is "
            "no set of removed layers"
        )


def _check_depth(model: str, num_players: int, source: str) -> None:
    """Raise InputError where the recipe's model is at hand and has another number of layers."""
    if not (Path(model) / "config.json").is_file():
        return
    found = read_architecture(read_checkpoint(model)).num_layers
    if found != num_players:
        raise InputError(
            f"{source} is a recipe for {model} of {found} layers; this model has {num_players}"
        )


def _from_lists(text: str, num_players: int, source: str) -> list[LayerSet]:
    """One set for each line: numbers separated by commas, semicolons, spaces or brackets, after an
    optional `name:` or `NAME=`; `#` begins a comment."""
    sets = []
    for number, line in enumerate(text.splitlines(), start=1):
        content = line.split("#")[0].strip()
        if content:
            where = f"{source} line {number}"
            name, numbers = _named(content, where)
            removed = _numbers(numbers, where)
            sets.append(_file_set(name or set_name(removed), removed, num_players, where))
    if not sets:
        raise InputError(f"{source} holds no set of layers")
    return sets


def _named(content: str, where: str) -> tuple[str, str]:
    """A line's name, if it has one, and its numbers."""
    if assigned := _ASSIGNED.fullmatch(content):
        return assigned["name"], assigned["value"]
    name, found, numbers = content.rpartition(":")
    if found and re.fullmatch(r"[\d\s:\[(]+", name):
        raise InputError(
            f"{where}: {content!r} may be a range, or a set named {name.strip()!r} that removes "
            f"{numbers.strip()}: write every number, or a name that is none"
        )
    return name.strip(), numbers


def _numbers(text: str, where: str) -> list[int | str]:
    """The layer numbers in a text; what may be meant otherwise is refused with that meaning."""
    told = text.strip()
    brackets = re.sub(r"[^\[\](){}]", "", told)
    if brackets not in ("", "[]", "()", "{}"):
        raise InputError(
            f"{where}: the brackets of {told!r} do not match, as of a half-open range: write every "
            "number"
        )
    if re.search(r"\d\s*(?:-|\.\.+|\u2013)\s*\d", told):  # \u2013: an en dash
        raise InputError(f"{where}: {told!r} may be a range: write every number")
    numbers: list[int | str] = []
    for word in re.split(r"[\s,;\[\](){}]+", told):
        if re.match(PART_NAME, word):
            numbers.append(word)
            continue
        if _HALVES.match(word):
            raise InputError(f"{where}: {word!r} names no layer: write 7.attention or 7.mlp")
        if re.fullmatch(r"(?:0|[1-9]\d{0,8})(?:\.0)?", word):
            numbers.append(int(float(word)))
        elif re.fullmatch("[01]{2,}", word):
            raise InputError(f"{where}: {word!r} may be a mask: give it by --mask")
        elif word:
            raise InputError(f"{where}: {told!r} is no list of layer numbers")
    return numbers
