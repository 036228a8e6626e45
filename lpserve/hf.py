"""Checkpoints without the weights of absent parts, for transformers: `import lpserve.hf` adds them.

    import lpserve.hf
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("pruned")

Such a checkpoint (`lpserve export --slim`) is one of its original's class whose config names
modules that are absent. They have no weights: what stands for them returns zeros, or the layer's
residual where the module adds that itself. Its `model_type` is `lpserve`, so that transformers
alone refuses it with a clear message instead of making weights up.

Classes are made for the original's config and model as they are asked for: a config that is the
original's in all but its name, and a model that is the original's without the modules. Attention
that is absent has no keys and values in a cache. transformers counts the tokens in a cache by the
first layer of each kind; where that one's attention is absent, the next layer of its kind takes its
place in the cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from lpserve.errors import InputError
from lpserve.model.architecture import ABSENT_KEY, BASE_KEY, MODEL_TYPE


class AbsentModule(nn.Module):
    """Stands for a module without weights.

    Args:
        width: of its result.
        others: how many other outputs come with it in a tuple, all None; None: it comes alone.
        residual: the argument that is returned in place of zeros.
    """

    def __init__(self, width: int, others: int | None, residual: int | str | None) -> None:
        super().__init__()
        self._width, self._others, self._residual = width, others, residual

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._residual is not None:
            key = self._residual
            found = args[key] if isinstance(key, int) else kwargs[key]
        else:
            given = next(
                value
                for value in (*args, *kwargs.values())
                if isinstance(value, torch.Tensor) and value.is_floating_point()
            )
            found = given.new_zeros((*given.shape[:-1], self._width))
        return found if self._others is None else (found, *[None] * self._others)


class SlimConfig(PreTrainedConfig):
    """The config of such a checkpoint; reading one gives a config of the original's own class."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """See `PreTrainedConfig.from_dict`."""
        base = config_dict.get(BASE_KEY)
        if not isinstance(base, str) or not isinstance(config_dict.get(ABSENT_KEY), dict):
            raise InputError(
                f"a config of model_type {MODEL_TYPE} must have {BASE_KEY} and "
                f"{ABSENT_KEY}: export it again"
            )
        return config_class(base).from_dict(config_dict, **kwargs)


@cache
def config_class(base: str) -> Any:
    """The class of configs whose original has `model_type` base."""
    if base not in CONFIG_MAPPING:
        raise InputError(f"{BASE_KEY} {base!r} is no model_type that transformers knows")
    original = CONFIG_MAPPING[base]

    def from_dict(cls: Any, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        # the original's own code may ask for its model_type
        found = super(made, cls).from_dict({**config_dict, "model_type": base}, **kwargs)
        one = found[0] if isinstance(found, tuple) else found
        one.model_type = base
        return found

    def reduce(self: Any) -> Any:
        return _unpickled, (base, self.__dict__)

    made: Any = type(
        f"Slim{original.__name__}",
        (original,),
        {
            "__doc__": f"{original.__name__} with absent modules.",
            "__module__": __name__,
            "__reduce__": reduce,
            "model_type": MODEL_TYPE,
            "from_dict": classmethod(from_dict),
        },
    )
    model = AutoModelForCausalLM._model_mapping[original]
    AutoModelForCausalLM.register(made, _model_class(model, made))
    return made


def _unpickled(base: str, state: dict[str, Any]) -> Any:
    """A config as it was pickled: its class is made anew in each process."""
    made = config_class(base)
    found = made.__new__(made)
    found.__dict__.update(state)
    return found


def _model_class(original: Any, config: Any) -> Any:
    """A class of models that are the original's without absent modules."""

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        super(made, self).__init__(config, *args, **kwargs)
        leave_out(self, getattr(config, ABSENT_KEY))

    # transformers converts the weights of its own classes alone
    made: Any = type(
        original.__name__,
        (original,),
        {
            "__doc__": f"{original.__name__} with absent modules.",
            "__module__": original.__module__,
            "__init__": init,
            "config_class": config,
        },
    )
    return made


def leave_out(model: nn.Module, absent: Mapping[str, Mapping[str, Any]]) -> None:
    """Put `AbsentModule`s in place of modules, and give attention that is left its place in the
    cache.

    Args:
        absent: module -> the form of what stands for it.

    Raises:
        InputError: the model has no such module, or no attention is left of the first layer's kind.
    """
    for name, form in absent.items():
        parent, _, child = name.rpartition(".")
        try:
            holder = model.get_submodule(parent)
            holder.get_submodule(child)
        except AttributeError:
            raise InputError(f"{type(model).__name__} has no module {name}") from None
        holder.add_module(child, AbsentModule(form["width"], form["others"], form["residual"]))
    _place_in_cache(model, absent)


def _place_in_cache(model: nn.Module, absent: Mapping[str, Any]) -> None:
    """For each kind of layers: if the first one has no state in a cache, the next that has one
    takes its place."""
    if not absent:
        return
    layers = model.get_submodule(next(iter(absent)).rpartition(".")[0].rpartition(".")[0])
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    kinds = getattr(text, "layer_types", None) or [""] * len(list(layers.children()))
    cached = [
        [
            module
            for module in layer.modules()
            if type(getattr(module, "layer_idx", None)) is int and module is not layer
        ]
        for layer in layers.children()
    ]
    if any(cached) and not any(
        c for c, kind in zip(cached, kinds, strict=True) if kind == kinds[0]
    ):
        raise InputError(
            "no attention (or other mixer) of the first layer's kind is left, by which "
            "transformers counts the tokens in a cache"
        )
    for kind in dict.fromkeys(kinds):
        of_kind = [number for number, one in enumerate(kinds) if one == kind]
        left = [number for number in of_kind if cached[number]]
        if left and left[0] != of_kind[0]:
            for module in cached[left[0]]:
                vars(module)["layer_idx"] = of_kind[0]


AutoConfig.register(MODEL_TYPE, SlimConfig)
