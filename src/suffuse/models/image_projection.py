"""The image projections of IP-Adapters: from what an image encoder says of a picture to tokens for attention.

    plain     one embedding, as a few tokens                                    Ye et al., 2023, "IP-Adapter", section 3.2
    full      each hidden state of the image encoder, as one token
    plus      a resampler: queries that were learnt attend to the hidden states Alayrac et al., 2022, "Flamingo", section 2.1
    face ID   the embedding of a face, which is none of an image encoder, as a few tokens

Which kind a file is of, and of what sizes, is told from its keys and shapes. Attributes are called as in the files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD = 64
"""Size of a head in all resamplers there are; the files do not tell."""

Shapes = Mapping[str, tuple[int, ...]]


class PlainProjection(nn.Module):
    """(rows, features) → (rows, tokens, width)."""

    hidden_states = False

    def __init__(self, features: int, tokens: int, width: int) -> None:
        super().__init__()
        self.features, self.width = features, width
        self.proj, self.norm = nn.Linear(features, tokens * width), nn.LayerNorm(width)

    def forward(self, embeds: Tensor) -> Tensor:
        """Make tokens."""
        return self.norm(self.proj(embeds).unflatten(-1, (-1, self.width)))


class FaceProjection(PlainProjection):
    """(rows, features) → (rows, tokens, width), with a layer between."""

    def __init__(self, features: int, inner: int, tokens: int, width: int) -> None:
        super().__init__(features, tokens, width)
        self.proj = nn.Sequential(nn.Linear(features, inner), nn.GELU(), nn.Linear(inner, tokens * width))


class FullProjection(nn.Module):
    """(rows, states, features) → (rows, states, width)."""

    hidden_states = True

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.features, self.width = features, width
        self.proj = nn.Sequential(nn.Linear(features, features), nn.GELU(), nn.Linear(features, width), nn.LayerNorm(width))

    def forward(self, embeds: Tensor) -> Tensor:
        """Make tokens."""
        return self.proj(embeds)


class PerceiverAttention(nn.Module):
    """Queries attend to the states and to themselves."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, inner = heads, heads * HEAD
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q, self.to_kv = nn.Linear(width, inner, bias=False), nn.Linear(width, inner * 2, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, states: Tensor, queries: Tensor) -> Tensor:
        """What is added to the queries."""
        queries = self.norm2(queries)
        seen = torch.cat([self.norm1(states), queries], dim=-2)
        made = [self.to_q(queries), *(F.linear(seen, weight) for weight in self.to_kv.weight.chunk(2))]
        query, key, value = (tensor.unflatten(-1, (self.heads, HEAD)).transpose(1, 2) for tensor in made)
        return self.to_out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Resampler(nn.Module):
    """(rows, states, features) → (rows, tokens, width)."""

    hidden_states = True

    def __init__(self, features: int, tokens: int, inner: int, heads: int, depth: int, wide: int, width: int) -> None:
        super().__init__()
        self.features, self.width = features, width
        self.latents = nn.Parameter(torch.empty(1, tokens, inner))
        self.proj_in, self.proj_out, self.norm_out = nn.Linear(features, inner), nn.Linear(inner, width), nn.LayerNorm(width)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PerceiverAttention(inner, heads),
                    nn.Sequential(
                        nn.LayerNorm(inner), nn.Linear(inner, wide, bias=False), nn.GELU(), nn.Linear(wide, inner, bias=False)
                    ),
                ]
            )
            for _ in range(depth)
        )

    def forward(self, embeds: Tensor) -> Tensor:
        """Make tokens."""
        states, queries = self.proj_in(embeds), self.latents.repeat(len(embeds), 1, 1)
        layers: Any = self.layers
        for attention, widen in layers:
            queries = attention(states, queries) + queries
            queries = widen(queries) + queries
        return self.norm_out(self.proj_out(queries))


class Kind(NamedTuple):
    """A kind of image projection.

    Attributes:
        name: What people call adapters that have it.
        needs: Keys that only files of this kind have all of.
        make: From the shapes in the file.
    """

    name: str
    needs: tuple[str, ...]
    make: Callable[[Shapes], nn.Module]


KINDS = (
    Kind(
        "plain",
        ("proj.weight", "norm.weight"),
        lambda s: PlainProjection(s["proj.weight"][1], _times(s, "proj.weight"), s["norm.weight"][0]),
    ),
    Kind(
        "full",
        ("proj.0.weight", "proj.2.weight", "proj.3.weight"),
        lambda s: FullProjection(s["proj.0.weight"][1], s["proj.3.weight"][0]),
    ),
    Kind(
        "face ID",
        ("proj.0.weight", "proj.2.weight", "norm.weight"),
        lambda s: FaceProjection(
            features=s["proj.0.weight"][1],
            inner=s["proj.0.weight"][0],
            tokens=_times(s, "proj.2.weight"),
            width=s["norm.weight"][0],
        ),
    ),
    Kind(
        "plus",
        ("latents", "proj_in.weight", "layers.0.0.to_q.weight", "layers.0.1.1.weight", "proj_out.weight"),
        lambda s: Resampler(
            features=s["proj_in.weight"][1],
            tokens=s["latents"][1],
            inner=s["latents"][2],
            heads=s["layers.0.0.to_q.weight"][0] // HEAD,
            depth=len({key.split(".")[1] for key in s if key.startswith("layers.")}),
            wide=s["layers.0.1.1.weight"][0],
            width=s["proj_out.weight"][0],
        ),
    ),
)
"""The kinds there are; a file is of the first of which it has all that is needed."""


def projection_of(shapes: Shapes) -> tuple[str, nn.Module | None]:
    """The kind of a file with these keys and shapes, and its projection without weights; None where they make none."""
    kind = next((kind for kind in KINDS if all(key in shapes for key in kind.needs)), None)
    if kind is None:
        return "unknown", None
    try:
        with torch.device("meta"):
            made = kind.make(shapes)
    except (IndexError, ZeroDivisionError, RuntimeError, TypeError):
        return kind.name, None
    return kind.name, made if {key: tuple(t.shape) for key, t in made.state_dict().items()} == dict(shapes) else None


def _times(shapes: Shapes, last: str) -> int:
    """How many tokens a last layer makes."""
    return shapes[last][0] // shapes["norm.weight"][0]
