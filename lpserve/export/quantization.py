"""Layer numbers in a checkpoint's quantization settings.

Quantizers name modules in many places: lists of modules that stay as they are
(`modules_to_not_convert`, `ignore`, `exclude_modules`), keys of settings for single modules, and
targets, as names, as globs, or as regular expressions (`re:` in compressed-tensors, `+:` and `-:`
in GPTQModel). Layers that move take their numbers along: a name is renumbered, and a pattern that
would match other modules than before is replaced by the names of those that it matched.

The result is held against the tensors: a module that has scales must not be left as it is, and one
that lacks them, where other layers have them, must be.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lpserve.errors import InputError

SECTIONS = ("quantization_config", "quantization", "compression_config")
"""Keys of config.json under which quantizers write."""
FILES = (
    "quantize_config.json",
    "quant_config.json",
    "quantization_config.json",
    "hf_quant_config.json",
)
"""Files of their own that quantizers write beside config.json."""
SKIP_LISTS = (
    "modules_to_not_convert",
    "ignore",
    "ignored_layers",
    "ignored_modules",
    "exclude",
    "exclude_modules",
    "llm_int8_skip_modules",
    "skip_modules",
)
"""Lists of modules that stay as they are."""
_SCALES = (
    "weight_scale",
    "weight_scale_inv",
    "weight_packed",
    "weight_scale_2",
    "qweight",
    "scales",
    "qzeros",
    "SCB",
)
"""Last words of the tensors that only a quantized module has."""
_MARKS = ("re:", "+:", "-:")
"""What stands before a regular expression."""


@dataclass(frozen=True, slots=True)
class Renumbering:
    """Which layers stay, and the modules of a checkpoint.

    Args:
        tensors: names of all tensors of the original checkpoint.
        prefix: of the layers' tensors, such as `model.layers.`.
        kept: the layers that stay, sorted.
    """

    tensors: Sequence[str]
    prefix: str
    kept: Sequence[int]

    def new_name(self, name: str) -> str | None:
        """A module's or tensor's name in the pruned model; None: it goes with its layer."""
        layer = self.layer_of(name)
        if layer is None:
            return name
        if layer not in self.kept:
            return None
        _, dot, rest = name[len(self.prefix) :].partition(".")
        return f"{self.prefix}{self.kept.index(layer)}{dot}{rest}"

    def layer_of(self, name: str) -> int | None:
        """The number of the layer that a module or tensor belongs to; None: to none."""
        index = name.removeprefix(self.prefix).partition(".")[0]
        return int(index) if name.startswith(self.prefix) and index.isdigit() else None

    def modules(self) -> list[str]:
        """Every module that has a tensor, and all that hold one of them."""
        found: set[str] = set()
        for name in self.tensors:
            parts = name.split(".")[:-1]
            found.update(".".join(parts[:end]) for end in range(1, len(parts) + 1))
        return sorted(found)


def renumbered(settings: Any, numbers: Renumbering, where: str) -> Any:
    """Quantization settings of the pruned model.

    Args:
        settings: content of one of `SECTIONS` or `FILES`.
        where: its file and key, for messages.

    Raises:
        InputError: a pattern is no regular expression, or one stands where names cannot.
    """
    return _Renumberer(numbers, where).walked(settings)


class _Renumberer:
    def __init__(self, numbers: Renumbering, where: str) -> None:
        self._numbers = numbers
        self._where = where
        self._modules = numbers.modules()
        word = re.escape(numbers.prefix.rstrip(".").rpartition(".")[2])
        self._layer = re.compile(rf"(?P<before>(?:^|\.){word}\.)(?P<index>\d+)(?=\.|$)")

    def walked(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {
                new: self.walked(inner)
                for key, inner in value.items()
                for new in (self._names(key) if isinstance(key, str) else [key])
            }
        if isinstance(value, list):
            return [
                new
                for item in value
                for new in (self._names(item) if isinstance(item, str) else [self.walked(item)])
            ]
        if isinstance(value, str):
            names = self._names(value)
            if len(names) != 1:
                raise InputError(
                    f"{self._where}: {value!r} names layers by their numbers, and stands where "
                    "only one name can: the pruned model cannot say it"
                )
            return names[0]
        return value

    def _names(self, text: str) -> list[str]:
        """What stands for a name or pattern in the pruned model: nothing, one, or several."""
        mark = next((m for m in _MARKS if text.startswith(m)), "")
        if not mark and not set(text) & set("*?[\\^$("):
            return self._renumbered_name(text)
        matches = _matcher(text, self._where)
        before = [name for name in self._modules if matches(name)]
        after = sorted(n for name in before if (n := self._numbers.new_name(name)) is not None)
        present = sorted(
            n for name in self._modules if (n := self._numbers.new_name(name)) is not None
        )
        if after == [name for name in present if matches(name)]:
            return [text]
        if mark in ("", "re:"):
            return after
        return [f"{mark}^{re.escape(name)}$" for name in after]

    def _renumbered_name(self, text: str) -> list[str]:
        gone = False

        def new(match: re.Match[str]) -> str:
            nonlocal gone
            index = int(match["index"])
            if index not in self._numbers.kept:
                gone = True
                return match[0]
            return f"{match['before']}{self._numbers.kept.index(index)}"

        changed = self._layer.sub(new, text)
        return [] if gone else [changed]


def _matcher(text: str, where: str) -> Any:
    """A function of a module's name, for a name, a glob, or a marked regular expression."""
    mark = next((m for m in _MARKS if text.startswith(m)), "")
    if not mark and not set(text) & set("\\^$("):
        return lambda name: fnmatch.fnmatchcase(name, text)
    try:
        pattern = re.compile(text[len(mark) :])
    except re.error as error:
        raise InputError(f"{where}: {text!r} is no regular expression ({error})") from None
    return lambda name: pattern.match(name) is not None


def check_scales(settings: Any, tensors: Iterable[str], prefix: str, where: str) -> None:
    """Raise InputError where quantization settings and the tensors contradict each other.

    Args:
        settings: of a model.
        tensors: names of its tensors.
        prefix: of the layers' tensors.
        where: file and key of the settings, for messages.
    """
    names = list(tensors)
    scaled = {n.rpartition(".")[0] for n in names if n.rpartition(".")[2] in _SCALES}
    if not scaled:
        return
    skips = [_skip(text, where) for text in _skipped(settings)]

    def inside(name: str) -> str:
        return name[len(prefix) :].partition(".")[2] if name.startswith(prefix) else name

    quantized_somewhere = {inside(name) for name in scaled}
    for module in sorted({n.rpartition(".")[0] for n in names if n.endswith(".weight")} | scaled):
        skipped = any(skip(module) for skip in skips)
        if module in scaled and skipped:
            raise InputError(
                f"{where} leaves {module} unquantized, and the files hold scales of it: the "
                "checkpoint contradicts itself"
            )
        plain = module not in scaled and inside(module) in quantized_somewhere
        if skips and plain and not skipped:
            raise InputError(
                f"{where} does not leave {module} unquantized, and the files hold no scales of "
                "it, as they do in other layers: the checkpoint contradicts itself"
            )


def _skipped(settings: Any) -> Iterator[str]:
    """Names and patterns of modules that stay as they are."""
    if not isinstance(settings, dict):
        return
    for key, value in settings.items():
        if key in SKIP_LISTS and isinstance(value, list):
            yield from (item for item in value if isinstance(item, str))
        elif key == "dynamic" and isinstance(value, dict):
            yield from (name for name in value if str(name).startswith("-:"))
        else:
            yield from _skipped(value)


def _skip(text: str, where: str) -> Any:
    matches = _matcher(text, where)
    # a name stands for all that it holds, and may leave out what comes before it
    return lambda name: matches(name) or name.startswith(f"{text}.") or f".{text}." in f".{name}."
