"""Checkpoints without the weights of absent parts (`lpserve.hf`), in vLLM: a plugin of it.

`register` is the entry point that vLLM calls in each of its processes, so that `vllm serve DIR`
knows such checkpoints where lpserve is installed. A model is its original's class of vLLM without
the absent modules: what stands for them returns zeros, and attention among them has no keys and
values in the cache, since vLLM makes room for the layers that it finds in its forward context.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import nn

from lpserve.errors import EngineError
from lpserve.hf import AbsentModule
from lpserve.model.architecture import ABSENT_KEY, SLIM_PREFIX


def register() -> None:
    """Make such checkpoints known to vLLM; importing `lpserve.hf` has told transformers."""
    from vllm import ModelRegistry

    for name in list(ModelRegistry.get_supported_archs()):
        if name.endswith("ForCausalLM") and not name.startswith(SLIM_PREFIX):
            ModelRegistry.register_model(f"{SLIM_PREFIX}{name}", f"{__name__}:{SLIM_PREFIX}{name}")


def __getattr__(name: str) -> Any:
    """The classes that `register` names, made as they are asked for."""
    if not name.startswith(SLIM_PREFIX):
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return _slim_class(name.removeprefix(SLIM_PREFIX))


@cache
def _slim_class(name: str) -> Any:
    from vllm import ModelRegistry

    base = ModelRegistry.models[name].load_model_cls()

    def init(self: Any, *, vllm_config: Any, prefix: str = "", **kwargs: Any) -> None:
        super(made, self).__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
        config = vllm_config.model_config.hf_config
        leave_layers_out(self, getattr(config, ABSENT_KEY), vllm_config.compilation_config)

    made: Any = type(
        f"{SLIM_PREFIX}{name}",
        (base,),
        {"__doc__": f"{name} with absent modules.", "__module__": __name__, "__init__": init},
    )
    return made


def leave_layers_out(
    model: nn.Module, absent: Mapping[str, Mapping[str, Any]], compilation: Any
) -> None:
    """Put `AbsentModule`s in place of modules, and take these out of vLLM's forward context.

    Modules of layers that another pipeline rank holds are passed over.

    Args:
        absent: module -> the form of what stands for it, and its name in the files (`in_files`).

    Raises:
        EngineError: vLLM's model has no such module.
    """
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.models.utils import PPMissingLayer

    gone: set[nn.Module] = set()
    for name, form in absent.items():
        layer_name, _, child = name.rpartition(".")
        try:
            layer = model.get_submodule(layer_name)
            if isinstance(layer, PPMissingLayer):
                continue
            if not hasattr(layer, child):
                child = form["in_files"]  # which vLLM's names follow where transformers' do not
            module = layer.get_submodule(child)
        except AttributeError:
            raise EngineError(
                f"{type(model).__name__} of vLLM has no module {layer_name}.{child}, which is "
                "absent: serve an export in which absent parts are zeros"
            ) from None
        gone.update(module.modules())
        # vLLM's linear layers return a bias too, its other modules the result alone
        others = 1 if isinstance(module, LinearBase) else None
        layer.add_module(child, AbsentModule(form["width"], others, None))
    context = compilation.static_forward_context
    for key in [key for key, layer in context.items() if layer in gone]:
        del context[key]
        if key in compilation.static_all_moe_layers:
            compilation.static_all_moe_layers.remove(key)
