"""Grounding in boxes (Li et al., 2023, "GLIGEN"): tokens of phrases or images with the place they should take."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from suffuse.errors import InputError

FREQUENCIES = 8


class GatedSelfAttentionDense(nn.Module):
    """Self-attention over positions and grounding tokens, behind a gate that starts shut (GLIGEN, eq. 8).

    Args:
        attention: Self-attention over tokens of `query_dim`.
        feed_forward: A feed-forward layer of the same size.
        query_dim: Size of a position's token.
        context_dim: Size of a grounding token.
    """

    def __init__(self, attention: nn.Module, feed_forward: nn.Module, query_dim: int, context_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(context_dim, query_dim)
        self.attn, self.ff = attention, feed_forward
        self.norm1, self.norm2 = nn.LayerNorm(query_dim), nn.LayerNorm(query_dim)
        self.alpha_attn = nn.Parameter(torch.tensor(0.0))
        self.alpha_dense = nn.Parameter(torch.tensor(0.0))

    def forward(self, x: Tensor, objects: Tensor) -> Tensor:
        """Map `x` (batch, tokens, query_dim) under `objects` (batch, objects, context_dim) to the same shape."""
        everything = torch.cat([x, self.linear(objects)], dim=1)
        x = x + self.alpha_attn.tanh() * self.attn(self.norm1(everything))[:, : x.shape[1], :]
        return x + self.alpha_dense.tanh() * self.ff(self.norm2(x))


class GLIGENTextBoundingboxProjection(nn.Module):
    """Features of objects and their boxes to grounding tokens; absent objects get learned features (GLIGEN, eq. 5).

    Args:
        positive_len: Size of an object's feature.
        out_dim: Size of a grounding token.
        feature_type: Whether phrases alone describe objects, or phrases and images.
    """

    def __init__(self, positive_len: int, out_dim: int, feature_type: Literal["text-only", "text-image"] = "text-only") -> None:
        super().__init__()
        position_dim = FREQUENCIES * 2 * 4
        kinds = [""] if feature_type == "text-only" else ["_text", "_image"]
        for kind in kinds:
            self.add_module(f"linears{kind}", _three_layers(positive_len + position_dim, out_dim))
            name = f"null{kind or '_positive'}_feature"
            self.register_parameter(name, nn.Parameter(torch.zeros(positive_len)))
        self.null_position_feature = nn.Parameter(torch.zeros(position_dim))

    def forward(
        self,
        boxes: Tensor,
        masks: Tensor,
        positive_embeddings: Tensor | None = None,
        phrases_masks: Tensor | None = None,
        image_masks: Tensor | None = None,
        phrases_embeddings: Tensor | None = None,
        image_embeddings: Tensor | None = None,
    ) -> Tensor:
        """Make grounding tokens.

        Args:
            boxes: (batch, objects, 4), as left, top, right, bottom from 0 to 1.
            masks: (batch, objects), 1 for a box, 0 for none.
            positive_embeddings: Features (batch, objects, positive_len), of a "text-only" model.
            phrases_masks: 1 where `phrases_embeddings` holds a phrase.
            image_masks: 1 where `image_embeddings` holds an image.
            phrases_embeddings: Features of phrases, of a "text-image" model.
            image_embeddings: Features of images, of a "text-image" model.

        Returns:
            (batch, objects, out_dim); twice as many objects, phrases then images, of a "text-image" model.

        Raises:
            InputError: The features are not those of this kind of model.
        """
        place = _where(masks, box_frequencies(boxes), self.null_position_feature)
        given = {
            "": (positive_embeddings, masks, "positive"),
            "_text": (phrases_embeddings, phrases_masks, "text"),
            "_image": (image_embeddings, image_masks, "image"),
        }
        tokens: list[Tensor] = []
        for kind, (features, present, null) in given.items():
            if not hasattr(self, f"linears{kind}"):
                continue
            if features is None or present is None:
                wanted = "positive_embeddings" if not kind else "phrases_ and image_embeddings and their masks"
                raise InputError("the features of grounded objects are missing", expected=wanted)
            features = _where(present, features, getattr(self, f"null_{null}_feature"))
            tokens.append(getattr(self, f"linears{kind}")(torch.cat([features, place], dim=-1)))
        return torch.cat(tokens, dim=1) if len(tokens) > 1 else tokens[0]


def box_frequencies(boxes: Tensor) -> Tensor:
    """Sines and cosines of box corners: (batch, objects, 4) → (batch, objects, 64)."""
    frequencies = 100 ** (torch.arange(FREQUENCIES) / FREQUENCIES)
    angles = frequencies[None, None, None].to(device=boxes.device, dtype=boxes.dtype) * boxes.unsqueeze(-1)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).permute(0, 1, 3, 4, 2).flatten(2)


def _where(present: Tensor, features: Tensor, null: Tensor) -> Tensor:
    present = present.unsqueeze(-1)
    return features * present + (1 - present) * null.view(1, 1, -1)


def _three_layers(dim_in: int, dim_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim_in, 512), nn.SiLU(), nn.Linear(512, 512), nn.SiLU(), nn.Linear(512, dim_out))
