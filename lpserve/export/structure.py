"""Whether a pruned config still describes the layers that stay, seen on models without weights.

The original and the pruned model are built on torch's meta device. Each kept layer must be of the
same structure as the layer at its new position, everything outside the layers must have kept its
shape, and layers that share weights must have shared them before.

Imports torch and transformers late.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpserve.errors import LpserveError, first_line
from lpserve.model.loading import build_untrained, transformers_library
from lpserve.model.local import FROM_FOLDER

_BOOKKEEPING = ("store_full_length_kv",)
"""Attributes that say what a layer leaves behind, not what it computes: Gemma 4's last layer of a
kind keeps its keys and values for layers that share them, which `is_kv_shared_layer` names."""

_NUMBERS = ("layer_idx", "layer_id", "layer_number")
"""Attributes that hold a layer's number, or that of one of its halves."""


class CannotExpress(Exception):
    """Why a config cannot describe the kept layers at their new positions."""


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A model without weights.

    Args:
        model: the module.
        num_layers: how many layers it has.
    """

    model: Any
    num_layers: int

    def lists(self) -> dict[str, Any]:
        """Its lists of that many modules, by path."""
        from torch import nn

        return {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == self.num_layers
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all that a checkpoint holds, shared tensors under every name."""
        return {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}

    def cache_failure(self) -> str | None:
        """How a forward pass with a cache fails, for a reason that is not the missing weights; None
        if it does not."""
        import torch

        ids = torch.ones((1, 4), dtype=torch.long, device="meta")
        try:
            with torch.no_grad():
                self.model.eval()(input_ids=ids, use_cache=True)
        except (MemoryError, RuntimeError):  # what cannot be computed without weights
            return None
        except Exception as error:  # whatever a model's code may raise
            return f"{type(error).__name__}: {first_line(error)}"
        return None

    def shared(self) -> dict[str, int]:
        """Which parameter stands behind each name."""
        return {n: id(p) for n, p in self.model.named_parameters(remove_duplicate=False)}


def build_skeleton(config: Mapping[str, Any], path: str, num_layers: int) -> Skeleton:
    """Build the model of a config.json without its weights.

    Args:
        config: content of config.json.
        path: the checkpoint's folder, for messages.
        num_layers: that it has.

    Raises:
        CannotExpress: transformers cannot build it.
    """
    import torch

    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "config.json").write_text(json.dumps(config))
        try:
            loaded = transformers_library().AutoConfig.from_pretrained(scratch, **FROM_FOLDER)
            with torch.device("meta"):
                return Skeleton(build_untrained(config, path, loaded), num_layers)
        except LpserveError:
            raise
        except Exception as error:  # whatever a config's or model's code may raise
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise CannotExpress(f"transformers cannot build it ({reason})") from error


def check_kept_layers(old: Skeleton, new: Skeleton, kept: Sequence[int]) -> str:
    """Check that the new model is the old one with the kept layers alone.

    Args:
        kept: layers of the old model, in the order of the new one's.

    Returns:
        The path of the layers' list.

    Raises:
        CannotExpress: it is not.
    """
    old_lists, new_lists = old.lists(), new.lists()
    common = [name for name in old_lists if name in new_lists]
    outer = [n for n in common if not any(n.startswith(f"{o}.") for o in common)]
    if len(outer) != 1:
        raise CannotExpress(
            f"{len(outer)} lists of {old.num_layers} layers become lists of {new.num_layers}; "
            "need exactly one"
        )
    path = outer[0]
    for position, layer in enumerate(kept):
        difference = _difference(old_lists[path][layer], new_lists[path][position], layer, position)
        if difference:
            raise CannotExpress(
                f"layer {layer} cannot stand at position {position}: {difference} differs there, "
                "and the config cannot say otherwise"
            )
    _compare_outside(old, new, path)
    _compare_shared(old, new, path, kept)
    failure = new.cache_failure()
    if failure is not None and old.cache_failure() is None:
        raise CannotExpress(
            f"transformers could not generate with a cache ({failure}), as it does with all layers"
        )
    return path


def shared_sources(
    old: Skeleton, new: Skeleton, path: str, kept: Sequence[int], stored: set[str], prefix: str
) -> dict[str, str]:
    """Tensors that layers share and that are stored with a removed one: under which new names they
    must be stored, as `{new tensor name: old tensor name}`.

    Args:
        path: of the layers' list.
        stored: tensor names of the original checkpoint.
        prefix: of the layers' tensors.
    """
    behind, start = old.shared(), f"{path}."
    members: dict[int, list[str]] = {}
    for name, parameter in behind.items():
        members.setdefault(parameter, []).append(name)

    def tensor_name(name: str) -> str:
        return prefix + name[len(start) :] if name.startswith(start) else name

    positions = {str(layer): position for position, layer in enumerate(kept)}
    found: dict[str, str] = {}
    done: set[int] = set()
    for name in new.shared():
        if not name.startswith(start):
            continue
        index, _, rest = name[len(start) :].partition(".")
        group = members.get(behind.get(f"{start}{kept[int(index)]}.{rest}", -1), [])
        if len(group) < 2 or behind[group[0]] in done:
            continue
        done.add(behind[group[0]])
        sources = [other for other in group if tensor_name(other) in stored]
        staying = [
            other
            for other in sources
            if not other.startswith(start) or other[len(start) :].partition(".")[0] in positions
        ]
        if sources and not staying:
            found[tensor_name(name)] = tensor_name(sources[0])
    return found


def _difference(old: Any, new: Any, layer: int, position: int) -> str | None:
    """The first way in which two layers' structures differ, their position left out."""
    parts = list(old.named_modules()), list(new.named_modules())
    for (name, a), (other, b) in zip(*parts, strict=False):
        if name != other or type(a) is not type(b):
            return name or "the layer's class"
        for key, value in vars(a).items():
            simple = isinstance(value, bool | int | float | str | None)
            if (
                simple
                and key not in (*_BOOKKEEPING, *_NUMBERS)
                and not _same(value, vars(b).get(key), layer, position)
            ):
                return f"{name}.{key}".lstrip(".")
    if len(parts[0]) != len(parts[1]):
        return "the number of its modules"
    shapes = [{n: tuple(p.shape) for n, p in one.named_parameters()} for one in (old, new)]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        if shapes[0].get(name) != shapes[1].get(name):
            return name
    return None


def _same(old: Any, new: Any, layer: int, position: int) -> bool:
    """Whether an attribute is the same, or is the layer's own number, counted from 0 or from 1."""
    if type(old) is float and type(new) is float and math.isclose(old, new, rel_tol=1e-12):
        return True
    own_number = (old, new) in ((layer, position), (layer + 1, position + 1))
    return old == new or (type(old) is int and own_number)


def _compare_outside(old: Skeleton, new: Skeleton, path: str) -> None:
    shapes = [
        {name: shape for name, shape in one.shapes().items() if not name.startswith(f"{path}.")}
        for one in (old, new)
    ]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        if shapes[0].get(name) != shapes[1].get(name):
            raise CannotExpress(
                f"{name} has shape {list(shapes[0].get(name, ()))}, and "
                f"{list(shapes[1].get(name, ()))} with the layers removed: it holds a part for "
                "each layer"
            )


def _compare_shared(old: Skeleton, new: Skeleton, path: str, kept: Sequence[int]) -> None:
    behind, start = old.shared(), f"{path}."
    first: dict[int, tuple[str, int]] = {}
    for name, parameter in new.shared().items():
        if not name.startswith(start):
            continue
        index, _, rest = name[len(start) :].partition(".")
        source = f"{start}{kept[int(index)]}.{rest}"
        before = behind.get(source)
        if before is None:
            continue
        other, other_before = first.setdefault(parameter, (source, before))
        if other_before != before:
            raise CannotExpress(
                f"the pruned model shares one weight between {other} and {source}, which the "
                "original keeps apart"
            )
