"""What a conditional UNet takes in beside the sample: class labels, additions to the time embedding, context tokens.

Each has a configuration key whose values are rows of a table here: what the value needs configured, what it makes, and
what a call must bring.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from suffuse.errors import ConfigError, InputError, nearest
from suffuse.layers.embeddings import (
    ImageHintTimeEmbedding,
    ImageProjection,
    ImageTimeEmbedding,
    TextImageProjection,
    TextImageTimeEmbedding,
    TextTimeEmbedding,
    TimestepEmbedding,
)


class Sizes(NamedTuple):
    """The configuration entries that the modules below are made from, under their names there; `None` if not given."""

    time_embed_dim: int
    timestep_input_dim: int
    cross_attention_dim: int
    act_fn: str
    encoder_hid_dim: int | None
    projection_class_embeddings_input_dim: int | None
    addition_time_embed_dim: int | None
    addition_embed_type_num_heads: int


class Choice(NamedTuple):
    """A row: how to make the module, the entries of `Sizes` it needs, and the conditions a call must bring."""

    make: Callable[[Sizes], nn.Module]
    needs: Sequence[str] = ()
    conditions: Sequence[str] = ()


CLASS_EMBEDDINGS: dict[str, Choice] = {
    "timestep": Choice(lambda s: TimestepEmbedding(s.timestep_input_dim, s.time_embed_dim, s.act_fn)),
    "identity": Choice(lambda s: nn.Identity()),
    "projection": Choice(
        lambda s: TimestepEmbedding(s.projection_class_embeddings_input_dim or 0, s.time_embed_dim),
        needs=["projection_class_embeddings_input_dim"],
    ),
    "simple_projection": Choice(
        lambda s: nn.Linear(s.projection_class_embeddings_input_dim or 0, s.time_embed_dim),
        needs=["projection_class_embeddings_input_dim"],
    ),
}

ADDED_EMBEDDINGS: dict[str, Choice] = {
    "text": Choice(
        lambda s: TextTimeEmbedding(s.encoder_hid_dim or s.cross_attention_dim, s.time_embed_dim, s.addition_embed_type_num_heads)
    ),
    "text_image": Choice(
        lambda s: TextImageTimeEmbedding(s.cross_attention_dim, s.cross_attention_dim, s.time_embed_dim),
        conditions=["image_embeds"],
    ),
    "text_time": Choice(
        lambda s: TimestepEmbedding(s.projection_class_embeddings_input_dim or 0, s.time_embed_dim),
        needs=["addition_time_embed_dim", "projection_class_embeddings_input_dim"],
        conditions=["text_embeds", "time_ids"],
    ),
    "image": Choice(
        lambda s: ImageTimeEmbedding(s.encoder_hid_dim or 0, s.time_embed_dim),
        needs=["encoder_hid_dim"],
        conditions=["image_embeds"],
    ),
    "image_hint": Choice(
        lambda s: ImageHintTimeEmbedding(s.encoder_hid_dim or 0, s.time_embed_dim),
        needs=["encoder_hid_dim"],
        conditions=["image_embeds", "hint"],
    ),
}

CONTEXT_PROJECTIONS: dict[str, Choice] = {
    "text_proj": Choice(lambda s: nn.Linear(s.encoder_hid_dim or 0, s.cross_attention_dim), needs=["encoder_hid_dim"]),
    "text_image_proj": Choice(
        lambda s: TextImageProjection(s.encoder_hid_dim or 0, s.cross_attention_dim, s.cross_attention_dim),
        needs=["encoder_hid_dim"],
        conditions=["image_embeds"],
    ),
    "image_proj": Choice(
        lambda s: ImageProjection(s.encoder_hid_dim or 0, s.cross_attention_dim),
        needs=["encoder_hid_dim"],
        conditions=["image_embeds"],
    ),
}


def make(option: str, table: Mapping[str, Choice], value: str | None, sizes: Sizes) -> nn.Module | None:
    """The module for the value of a configuration key; none for `None`.

    Raises:
        ConfigError: There is no such value, or what it needs is not configured.
    """
    if value is None:
        return None
    if value not in table:
        close = nearest(value, table)
        raise ConfigError(
            f"{option}={value!r} is not known",
            expected=f"None or one of {', '.join(table)}",
            remedy=f"did you mean {close}?" if close else "",
        )
    missing = [name for name in table[value].needs if getattr(sizes, name) is None]
    if missing:
        raise ConfigError(f"{option}={value!r} needs {' and '.join(missing)}", remedy="give them in the configuration")
    return table[value].make(sizes)


def conditions_of(option: str, value: str, names: Sequence[str], given: Mapping[str, Any] | None) -> list[Tensor]:
    """The tensors a call must bring for the value of a configuration key.

    Raises:
        InputError: One of them is missing.
    """
    missing = [name for name in names if (given or {}).get(name) is None]
    if missing:
        raise InputError(
            f"this network has {option}={value!r}, which needs {' and '.join(missing)} in added_cond_kwargs",
            found=sorted(given or {}),
            expected=sorted(names),
        )
    return [given[name] for name in names] if given else []


def embed_added(
    kind: str, embedding: nn.Module, time_proj: nn.Module | None, emb: Tensor, text: Tensor, given: Mapping[str, Any] | None
) -> tuple[Tensor, Tensor | None]:
    """What is added to the time embedding, and the hint to join to the sample if there is one.

    Args:
        kind: A key of `ADDED_EMBEDDINGS`.
        embedding: What that row made.
        time_proj: Sines and cosines of numbers, for "text_time".
        emb: The time embedding (batch, time_embed_dim).
        text: Context tokens, before projection.
        given: The call's `added_cond_kwargs`.

    Raises:
        InputError: A condition is missing or has another size.
    """
    tensors = conditions_of("addition_embed_type", kind, ADDED_EMBEDDINGS[kind].conditions, given)
    match kind:
        case "text":
            return embedding(text), None
        case "text_image":
            return embedding((given or {}).get("text_embeds", text), *tensors), None
        case "text_time":
            return embedding(_text_and_numbers(tensors[0], tensors[1], time_proj, embedding).to(emb.dtype)), None
        case "image_hint" if isinstance(embedding, ImageHintTimeEmbedding):
            return embedding(tensors[0]), embedding.input_hint_block(tensors[1])
        case _:
            return embedding(*tensors), None


def project_context(
    kind: str | None,
    projection: nn.Module | None,
    tokens: Tensor,
    given: Mapping[str, Any] | None,
    text_projection: nn.Module | None,
) -> Any:
    """The tokens that attention sees.

    Args:
        kind: A key of `CONTEXT_PROJECTIONS`, or "ip_image_proj" where an adapter has put its own projection.
        projection: What that row made, or the adapter's.
        tokens: The call's `encoder_hidden_states`.
        given: The call's `added_cond_kwargs`.
        text_projection: What was in the adapter's place before it.

    Returns:
        (batch, tokens, cross_attention_dim); with an adapter, a pair of that and the adapter's own tokens.

    Raises:
        InputError: A condition is missing.
    """
    if projection is None or kind is None:
        return tokens
    if kind == "ip_image_proj":
        (images,) = conditions_of("encoder_hid_dim_type", kind, ["image_embeds"], given)
        return (tokens if text_projection is None else text_projection(tokens)), projection(images)
    tensors = conditions_of("encoder_hid_dim_type", kind, CONTEXT_PROJECTIONS[kind].conditions, given)
    return projection(*tensors) if kind == "image_proj" else projection(tokens, *tensors)


def _text_and_numbers(text: Tensor, numbers: Tensor, time_proj: nn.Module | None, embedding: nn.Module) -> Tensor:
    embedded = time_proj(numbers.flatten()) if time_proj is not None else numbers
    joined = torch.concat([text, embedded.reshape(len(text), -1)], dim=-1)
    wanted = embedding.get_submodule("linear_1").get_parameter("weight").shape[1]
    if joined.shape[1] != wanted:
        raise InputError(
            "text_embeds and time_ids in added_cond_kwargs do not make up this network's added embedding",
            found=f"{text.shape[1]} of text and {joined.shape[1] - text.shape[1]} of time_ids {tuple(numbers.shape)}",
            expected=f"{wanted} in all",
        )
    return joined
