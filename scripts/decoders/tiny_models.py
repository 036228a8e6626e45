"""Tiny random models of every decoder of transformers, and what a mask's loss must be.

The reference uses nothing of lpserve: the model with the dropped layers and their entries of the
configuration deleted, and, where a model cannot be so cut, with layers that hand their state on.

Shapes: N windows, T tokens.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml
from torch import nn

TABLE: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("configs.yaml").read_text())
NUM_LAYERS, LENGTH = 6, 26
DEFAULT = "(default)"
PER_LAYER = (
    "layer_types",
    "layers_block_type",
    "mlp_layer_types",
    "block_types",
    "no_rope_layers",
    "attention_layers",
    "layer_rope_theta",
    "num_attention_heads_per_layer",
    "num_key_value_heads_per_layer",
    "indexer_types",
    "activation_sparsity_pattern",
    "intermediate_size",
    "moe_topk",
    "num_experts",
    "per_layer_config",
    "hybrid_layer_pattern",
    "sliding_window_pattern",
)
"""Keys that hold an entry a layer in some configuration."""


def all_names() -> list[str]:
    """Every causal decoder of transformers, then the other forms of the table."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    plain = [n for n in known if n not in TABLE["composite"] and n not in TABLE["encoders"]]
    forms = [name for name in TABLE["models"] if ":" in name]
    return [
        *plain,
        *forms,
        *TABLE["older"],
        *TABLE["multimodal"],
        "fuyu",
        "git",
        *TABLE["encoders"],
    ]


def build_config(name: str, *, for_vllm: bool = False) -> Any:
    """The configuration of that name."""
    if name in TABLE["older"]:
        return build_config(TABLE["older"][name]["of"], for_vllm=for_vllm)
    if name in TABLE["multimodal"]:
        keys = copy.deepcopy(TABLE["multimodal"][name])
        return transformers.CONFIG_MAPPING[keys.pop("model_type")](**keys)
    base = name.split(":")[0]
    own = TABLE["models"].get(name, TABLE["models"].get(base, {}))
    if for_vllm:
        own = own | TABLE["vllm_models"].get(name, {})
    kind = transformers.CONFIG_MAPPING[base]
    alias = getattr(kind, "attribute_map", {})
    fields = {field.name for field in dataclasses.fields(kind)}
    keys = {}
    for key, value in {**TABLE["small"], **own}.items():
        if value == DEFAULT:
            keys.pop(alias.get(key, key), None)
        elif key in own:
            keys[key] = value
        elif alias.get(key, key) in fields:
            keys[alias.get(key, key)] = value
    return kind(**copy.deepcopy(keys))


def is_multimodal(name: str) -> bool:
    return name in TABLE["multimodal"]


def make(name: str, folder: Path, *, for_vllm: bool = False) -> None:
    """A random model of that name, saved in float32."""
    torch.manual_seed(1)
    kind: Any = (
        transformers.AutoModelForImageTextToText
        if is_multimodal(name)
        else transformers.AutoModelForCausalLM
    )
    model = kind.from_config(build_config(name, for_vllm=for_vllm)).float().eval()
    _draw_weights(model)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config = type(model.generation_config)()
    model.save_pretrained(folder)
    if name in TABLE["older"]:
        path = folder / "config.json"
        keys = json.loads(path.read_text())
        for key in TABLE["older"][name]["leave_out"]:
            keys.pop(key, None)
        path.write_text(json.dumps(keys | TABLE["older"][name]["add"], indent=1))
    if name in TABLE["extra_layer"]:
        _add_a_layer(folder / "model.safetensors")


def _draw_weights(model: nn.Module) -> None:
    """Weights that let every layer matter, norms and biases included."""
    torch.manual_seed(7)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and name.endswith("A_log"):  # decays: the models' own start
                steps = torch.arange(1, weight.shape[-1] + 1).float()
                weight.copy_(torch.log(steps).expand_as(weight))
            elif weight.dim() > 1:
                nn.init.normal_(weight, std=0.15)
            else:
                weight.add_(torch.randn_like(weight) * 0.1)


def _add_a_layer(path: Path) -> None:
    """The layer for predicting further tokens, which transformers leaves out."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    last, more = f"layers.{NUM_LAYERS - 1}.", f"layers.{NUM_LAYERS}."
    tensors |= {n.replace(last, more): t.clone() for n, t in tensors.items() if last in n}
    tensors[f"model.{more}eh_proj.weight"] = torch.randn(128, 256)
    save_file(tensors, path, metadata={"format": "pt"})


def load(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The saved model, as transformers loads it."""
    kind: Any = (
        transformers.AutoModelForImageTextToText
        if is_multimodal(name)
        else transformers.AutoModelForCausalLM
    )
    config = json.loads((folder / "config.json").read_text())
    text = config.get("text_config") or {}
    # transformers' SDPA drops soft caps without a word
    capped = config.get("attn_logit_softcapping") or text.get("attn_logit_softcapping")
    more = {"attn_implementation": "eager"} if capped else {}
    model = kind.from_pretrained(folder, dtype=dtype, local_files_only=True, **more).eval()
    if getattr(model.config, "rescale_every", 0):
        model.config.rescale_every = 0  # RWKV's guard against overflow of float16, as in the engine
    return model


def layer_list(model: Any) -> tuple[str, int]:
    """Path and length of the decoder's list of layers, by the habits of transformers' models."""
    text = model.config.get_text_config()
    count = int(text.num_layers if text.model_type == "longcat_flash" else text.num_hidden_layers)
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    outer = [n for n in lists if not any(n.startswith(f"{other}.") for other in lists)]
    others = ("vision", "visual", "audio", "mtp")
    decoder = [n for n in outer if not any(word in n for word in others)]
    usual = [
        n for n in decoder if n.rsplit(".", 1)[-1] in ("layers", "h", "blocks", "block", "layer")
    ]
    return (usual or decoder)[0], count


def difference(model: Any, mask_P: np.ndarray, tokens_NT: torch.Tensor, got_N: np.ndarray) -> float:
    """Largest relative difference of losses `[N]` from the model without the dropped layers.

    From whichever reference is nearer. They differ where a layer does what its place says (RWKV
    halves states at every so many layers, Zamba-2 takes its shared blocks in turn): there a mask
    means that layers hand their state on.
    """
    found = []
    with suppress(Exception):  # whatever a model's code raises when it is cut so
        found.append(_relative(got_N, window_nll(deleted(model, mask_P), tokens_NT)))
    if not found or not found[0] < 1e-5:
        with handing_on(model, mask_P) as cut:
            found.append(_relative(got_N, window_nll(cut, tokens_NT)))
    return min(found)


@contextmanager
def modules_zeroed(model: Any, gone: Any, modules: Any) -> Iterator[None]:
    """The model with parts of layers absent: their modules return zero. Bloom's and MPT's add
    the residual themselves, and return that.

    Args:
        gone: players, each a layer or a part of one.
        modules: of each layer, the child modules that are each of its parts.
    """
    layers = model.get_submodule(layer_list(model)[0])

    def absent(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        several = isinstance(output, tuple | list)
        state = output[0] if several else output
        inside = args[1:2] if model.config.model_type in ("bloom", "mpt") else ()
        residual = next((one for one in inside if one.shape == state.shape), None)
        nothing = torch.zeros_like(state) if residual is None else residual
        # a bias that goes beside the state (GPT-NeoX-Japanese) is the part's, too
        return type(output)([nothing, *[None] * len(output[1:])]) if several else nothing

    def as_given(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        state = args[0] if args else kwargs["hidden_states"]
        return (state, *output[1:]) if isinstance(output, tuple) else state

    handles = []
    for player in gone:
        layer = layers[player.layer]
        if player.part == "layer":
            handles.append(layer.register_forward_hook(as_given, with_kwargs=True))
            continue
        for name in modules[player.layer][player.part]:
            module = layer.get_submodule(name)
            handles.append(module.register_forward_hook(absent, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _relative(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(got / wanted - 1).max())


def window_nll(model: Any, tokens_NT: torch.Tensor) -> np.ndarray:
    """NLL `[N]` in nats, summed over a window."""
    with torch.no_grad():
        logits = model(input_ids=tokens_NT, use_cache=False).logits[:, :-1].double()
    log_p = torch.log_softmax(logits, -1).gather(-1, tokens_NT[:, 1:, None])[..., 0]
    return -log_p.sum(1).numpy()


def deleted(model: Any, mask_P: np.ndarray) -> Any:
    """A copy without the dropped layers and their entries of every configuration in it."""
    copied = copy.deepcopy(model)
    path, count = layer_list(copied)
    keep = np.flatnonzero(mask_P).tolist()
    owner_path, _, name = path.rpartition(".")
    owner = copied.get_submodule(owner_path)
    setattr(owner, name, nn.ModuleList([getattr(owner, name)[i] for i in keep]))
    configs = {}
    for module in copied.modules():
        config = getattr(module, "config", None)
        for one in (config, getattr(config, "text_config", None)):
            if one is not None and not isinstance(one, dict):
                configs[id(one)] = one
    for config in configs.values():
        _cut_config(config, keep, count)
    for key, value in list(vars(owner).items()):
        if isinstance(value, list | tuple) and len(value) == count and not key.startswith("_"):
            setattr(owner, key, type(value)(value[i] for i in keep))
        if key in ("num_hidden_layers", "num_layers", "n_layer") and value == count:
            setattr(owner, key, len(keep))
    return copied


def _cut_config(config: Any, keep: list[int], count: int) -> None:
    counts = ("num_hidden_layers", "num_layers")
    if all(getattr(config, key, None) != count for key in counts):
        return
    for key in PER_LAYER:
        with suppress(Exception):  # properties that raise, or that nobody can set
            value = getattr(config, key, None)
            if isinstance(value, list | tuple) and len(value) == count:
                setattr(config, key, type(value)(value[i] for i in keep))
    for key in counts:
        if getattr(config, key, None) == count:
            with suppress(Exception):
                setattr(config, key, len(keep))


@contextmanager
def handing_on(model: Any, mask_P: np.ndarray) -> Iterator[Any]:
    """The model while its dropped layers return the state that they are given."""
    path, count = layer_list(model)
    layers = model.get_submodule(path)
    outputs: dict[int, Any] = {}

    def remember(index: int) -> Any:
        return lambda module, args, output: outputs.__setitem__(index, output)

    hooks = [layers[i].register_forward_hook(remember(i)) for i in range(count)]
    with torch.no_grad():
        model(input_ids=torch.arange(3, 9)[None], use_cache=False)
    for hook in hooks:
        hook.remove()

    def hand_on(index: int) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            state = args[0] if args else kwargs.get("hidden_states", kwargs.get("hidden"))
            if not isinstance(outputs[index], tuple):
                return state
            if len(outputs[index]) == 3 and args and "state" in kwargs:  # RWKV
                return state, kwargs["state"], None
            return state, *[None] * (len(outputs[index]) - 1)

        return forward

    changed = [layers[i] for i in range(count) if not mask_P[i]]
    for i in np.flatnonzero(~mask_P):
        layers[i].forward = hand_on(int(i))
    try:
        yield model
    finally:
        for layer in changed:
            del layer.forward
