"""What a run is told by, and no file of it keeps: nets that came with the call, and what is loaded onto the pipeline.

A fingerprint of each is kept, so that a run that goes on with another says so. That is allowed: it is how runs are forked.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from suffuse.layers.low_rank import adapters_of
from suffuse.models.image_adapter import image_adapters_of
from suffuse.models.side_by_side import parts_of

SAMPLED = 16
"""How many values of each tensor are looked at."""
NETS = {"controlnet": "ControlNet", "adapter": "T2I-Adapter"}
"""Arguments and components that are nets, and what people call them."""
ENCODERS = ("text_encoder", "text_encoder_2")
SEVERAL = re.compile(r"_\d+$")
"""What stands after a learnt word in the names of all but its first token."""


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A mark of tensors: of their names, shapes and types, and of `SAMPLED` values of each, evenly spread.

    Weights of another training have another mark, and so have the same weights in another type. Weights of which a few values
    were changed may have the same one: to look at each would take as long as to load them.

    Returns:
        Two marks with a colon between; the second is empty if a tensor is not in memory.
    """
    known = "".join(f"{name}{tuple(tensor.shape)}{tensor.dtype}" for name, tensor in tensors.items())
    if any(tensor.is_meta for tensor in tensors.values()):
        return f"{_mark(known.encode())}:"
    values = [_sample(tensor.detach()) for tensor in tensors.values() if tensor.numel()]
    seen = torch.cat(values).numpy().tobytes() if values else b""
    return f"{_mark(known.encode())}:{_mark(seen)}"


def _sample(tensor: Tensor) -> Tensor:
    # By coordinates, as a view of one row would copy tensors of other layouts whole.
    tensor = tensor if tensor.ndim else tensor[None]
    places = np.linspace(0, tensor.numel() - 1, min(SAMPLED, tensor.numel())).astype(np.int64)
    where = tuple(torch.from_numpy(axis).to(tensor.device) for axis in np.unravel_index(places, tuple(tensor.shape)))
    return tensor[where].float().cpu()


def _mark(octets: bytes) -> str:
    return hashlib.blake2b(octets, digest_size=12).hexdigest()


def _same(one: str, other: str) -> bool:
    (known, values), (others, seen) = one.split(":"), other.split(":")
    return known == others and (values == seen or not values or not seen)


# ---------------------------------------------------------------- of a call


def beside(pipe: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What a call of a pipeline is told by: name → {"weights": fingerprint, "scale": what it counts}."""
    nets = {
        label: model
        for name, label in NETS.items()
        for model in [arguments.get(name) if arguments.get(name) is not None else getattr(pipe, name, None)]
    }
    guidance = arguments.get("guidance")
    nets |= {"worse model": [*guidance.models.values()] if guidance is not None else []}
    told = {label: {"weights": fingerprint(tensors)} for label, model in nets.items() if (tensors := _tensors(model))}
    pictures = image_adapters_of(getattr(pipe, "unet", None))
    if pictures is not None and any(arguments.get(name) is not None for name in ("ip_adapter_image", "ip_adapter_image_embeds")):
        held = {f"{place}.{key}": own for place, one in enumerate(pictures.adapters) for key, own in one.tensors.items()}
        told["IP-Adapter"] = {"weights": fingerprint(held)}
    return told | _low_rank(pipe) | {f"learnt word {word!r}": entry for word, entry in _learnt(pipe, arguments)}


def _tensors(model: Any) -> dict[str, Tensor]:
    parts: Sequence[Any] = model if isinstance(model, (list, tuple)) else parts_of(model)
    nets = [part for part in parts if isinstance(part, nn.Module)]
    # What is compiled, or offloaded by layer, has its names in other words.
    return {
        f"{place}.{name.replace('_orig_mod.', '')}": own
        for place, net in enumerate(nets)
        for name, own in net.state_dict().items()
    }


def _low_rank(pipe: Any) -> dict[str, Any]:
    """The low-rank adapters that count, or are fused."""
    models = {name: getattr(pipe, name, None) for name in ("unet", *ENCODERS)}
    owned = {
        name: own for name, model in models.items() if isinstance(model, nn.Module) and (own := adapters_of(model)) is not None
    }
    counting = {name: own.weights if own.enabled else {} for name, own in owned.items()}
    names = {adapter: None for place, own in owned.items() for adapter in (*counting[place], *own.fused)}
    told = dict[str, Any]()
    for adapter in names:
        scale = {
            place: "fused" if adapter in own.fused else counting[place].get(adapter)
            for place, own in owned.items()
            if adapter in own.names
        }
        held = {
            f"{place}.{layer}.{part}": tensor
            for place in scale
            for layer, factors in owned[place].factors(adapter).items()
            for part, tensor in (("down", factors.down), ("up", factors.up))
        }
        told[f"LoRA {adapter!r}"] = {"weights": fingerprint(held), "scale": scale}
    return told


def _learnt(pipe: Any, arguments: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The learnt words that prompts of a call use."""
    vectors = dict[str, dict[str, Tensor]]()
    for place in ENCODERS:
        known = getattr(getattr(pipe, place, None), "__dict__", {}).get("_learnt_words")
        for token, vector in (known.vectors if known is not None else {}).items():
            vectors.setdefault(SEVERAL.sub("", token), {})[f"{place}.{token}"] = vector
    told = _texts(arguments)
    for word, tokens in vectors.items():
        if word in told:
            yield word, {"weights": fingerprint(tokens), "word": word}


def _texts(arguments: Mapping[str, Any]) -> str:
    guidance = arguments.get("guidance")
    prompts = [value for name, value in arguments.items() if "prompt" in name or name == "safety_concept"]
    prompts += [*guidance.texts.values()] if guidance is not None else []
    return "\n".join(text for each in prompts for text in (each if isinstance(each, list) else [each]) if isinstance(text, str))


# ---------------------------------------------------------------- of a run that goes on


def tell_differences(known: Mapping[str, Any], pipe: Any, arguments: Mapping[str, Any]) -> None:
    """Warn, once, of what a run was told by when it was begun and is no longer, or otherwise, or only now."""
    now, texts, told = beside(pipe, arguments), _texts(arguments), list[str]()
    for label, entry in known.items():
        if label not in now:
            told += [f"no {label}"] if entry.get("word", "") in texts else []
        elif not _same(entry["weights"], now[label]["weights"]):
            told.append(f"another {label}")
        elif entry.get("scale") != now[label].get("scale"):
            told.append(f"another scale of {label}")
    told += [f"a {label} on top" for label, entry in now.items() if label not in known and "word" not in entry]
    if told:
        warnings.warn(f"the run is resumed with {', '.join(told)}: it was begun otherwise", stacklevel=4)
