"""The prior of unCLIP: a transformer that denoises CLIP's vector of a picture, given a text (Ramesh et al., 2022, section 2.2).

It reads a row of tokens: the text, its vector, the timestep, the noisy vector, and a learned one, in whose place the prediction
is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from suffuse.configuration import register_to_config
from suffuse.errors import ConfigError, InputError
from suffuse.layers.embeddings import TimestepEmbedding, Timesteps
from suffuse.layers.transformer import BasicTransformerBlock, Context
from suffuse.models.adapter_services import AdapterServices
from suffuse.models.attention_services import AttentionServices
from suffuse.models.model import ModelMixin
from suffuse.models.sizes import require_positive
from suffuse.outputs import BaseOutput

UNSEEN = -10000.0
"""Added to the scores of what is not to be attended to."""
KNOWN: dict[str, tuple[str | None, ...]] = {
    "norm_in_type": (None, "layer"),
    "embedding_proj_norm_type": (None, "layer"),
    "encoder_hid_proj_type": ("linear", None),
    "added_emb_type": ("prd", None),
}
"""Configuration entry → what it may be."""


@dataclass
class PriorTransformerOutput(BaseOutput):
    """`predicted_image_embedding`: the vector of a picture (batch, clip_embed_dim)."""

    predicted_image_embedding: Tensor


class PriorTransformer(AdapterServices, AttentionServices, ModelMixin):
    """From a noisy vector and a text to the vector of a picture.

    Args:
        num_attention_heads: Heads of each attention layer.
        attention_head_dim: Size of a head.
        num_layers: Number of blocks.
        embedding_dim: Size of a noisy vector, and of a token of the text.
        num_embeddings: Tokens of a text.
        additional_embeddings: Tokens that follow them.
        dropout: Probability of zeroing in the blocks.
        time_embed_act_fn: Activation in the embedding of the timestep.
        norm_in_type: "layer" to normalise before the blocks.
        embedding_proj_norm_type: "layer" to normalise the text's vector.
        encoder_hid_proj_type: "linear", or None for a prior that is told no tokens of a text.
        added_emb_type: "prd" for a learned token in whose place the prediction is; in that of the vector otherwise.
        time_embed_dim: Size of the timestep's embedding on the way; that of a token, if None.
        embedding_proj_dim: Size of the text's vector; `embedding_dim`, if None.
        clip_embed_dim: Size of the prediction; `embedding_dim`, if None.

    Raises:
        ConfigError: The values do not make such a network; the message says which.
    """

    causal_attention_mask: Tensor

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 32,
        attention_head_dim: int = 64,
        num_layers: int = 20,
        embedding_dim: int = 768,
        num_embeddings: int = 77,
        additional_embeddings: int = 4,
        dropout: float = 0.0,
        time_embed_act_fn: str = "silu",
        norm_in_type: str | None = None,
        embedding_proj_norm_type: str | None = None,
        encoder_hid_proj_type: str | None = "linear",
        added_emb_type: str | None = "prd",
        time_embed_dim: int | None = None,
        embedding_proj_dim: int | None = None,
        clip_embed_dim: int | None = None,
    ) -> None:
        super().__init__()
        for name, known in KNOWN.items():
            if self.config[name] not in known:
                raise ConfigError(f"PriorTransformer: no such {name}", found=self.config[name], expected=f"one of {known}")
        sizes = ("num_attention_heads", "attention_head_dim", "num_layers", "embedding_dim", "num_embeddings", "time_embed_dim")
        require_positive(
            "PriorTransformer", **{name: self.config[name] for name in (*sizes, "embedding_proj_dim", "clip_embed_dim")}
        )
        width, tokens = num_attention_heads * attention_head_dim, num_embeddings + additional_embeddings
        told, made = embedding_proj_dim or embedding_dim, clip_embed_dim or embedding_dim

        self.time_proj = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(width, time_embed_dim or width, out_dim=width, act_fn=time_embed_act_fn)
        self.proj_in = nn.Linear(embedding_dim, width)
        self.embedding_proj_norm = nn.LayerNorm(told) if embedding_proj_norm_type else None
        self.embedding_proj = nn.Linear(told, width)
        self.encoder_hidden_states_proj = nn.Linear(embedding_dim, width) if encoder_hid_proj_type else None
        self.positional_embedding = nn.Parameter(torch.zeros(1, tokens, width))
        self.prd_embedding = nn.Parameter(torch.zeros(1, 1, width)) if added_emb_type else None
        block: dict[str, Any] = {"attention_bias": True, "activation_fn": "gelu", "dropout": dropout}
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(width, num_attention_heads, attention_head_dim, **block) for _ in range(num_layers)
        )
        self.norm_in = nn.LayerNorm(width) if norm_in_type else None
        self.norm_out = nn.LayerNorm(width)
        self.proj_to_clip_embeddings = nn.Linear(width, made)
        self.register_buffer("causal_attention_mask", torch.full((1, tokens, tokens), UNSEEN).triu_(1), persistent=False)
        self.clip_mean, self.clip_std = (nn.Parameter(torch.zeros(1, made)) for _ in range(2))

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float | int,
        proj_embedding: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> PriorTransformerOutput | tuple[Tensor]:
        """Predict.

        Args:
            hidden_states: Noisy vectors (batch, embedding_dim), or (batch, tokens, embedding_dim).
            timestep: One for all, or (batch,).
            proj_embedding: Vectors of the texts (batch, embedding_proj_dim).
            encoder_hidden_states: Tokens of the texts (batch, num_embeddings, embedding_dim).
            attention_mask: (batch, num_embeddings), False where a token only fills; each token then sees those before it alone.
            return_dict: Return an output object instead of a tuple.

        Returns:
            Vectors of pictures (batch, clip_embed_dim); (batch, tokens, clip_embed_dim) without a learned token.

        Raises:
            InputError: The tokens of the texts are missing, or are not as many as the prior was trained on.
        """
        told = self._told(len(hidden_states), timestep, proj_embedding, encoder_hidden_states)
        noisy = _as_tokens(self.proj_in(hidden_states))
        learned = [] if self.prd_embedding is None else [self.prd_embedding.to(noisy.dtype).expand(len(noisy), -1, -1)]
        tokens = torch.cat([told, noisy, *learned], dim=1)
        tokens = tokens + self._places(tokens, told.shape[1], len(learned))
        if self.norm_in is not None:
            tokens = self.norm_in(tokens)
        context = Context(attention_mask=None if attention_mask is None else self._bias(attention_mask, tokens))
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        tokens = self.norm_out(tokens)
        predicted = self.proj_to_clip_embeddings(tokens[:, -1] if learned else tokens[:, told.shape[1] :])
        return PriorTransformerOutput(predicted) if return_dict else (predicted,)

    def post_process_latents(self, prior_latents: Tensor) -> Tensor:
        """Vectors as the prior makes them to vectors as CLIP makes them, (batch, clip_embed_dim)."""
        return prior_latents * self.clip_std.to(prior_latents.device) + self.clip_mean.to(prior_latents.device)

    def _told(self, batch: int, timestep: Any, vector: Tensor, text: Tensor | None) -> Tensor:
        """What stands before the noisy tokens: the text, its vector and the timestep, (batch, tokens, width)."""
        timesteps = torch.as_tensor(timestep, device=vector.device).reshape(-1).expand(batch)
        time = self.time_embedding(self.time_proj(timesteps).to(self.dtype))
        vector = _as_tokens(self.embedding_proj(vector if self.embedding_proj_norm is None else self.embedding_proj_norm(vector)))
        if self.encoder_hidden_states_proj is None:
            return torch.cat([vector, time[:, None]] if text is None else [text, vector, time[:, None]], dim=1)
        if text is None:
            raise InputError("this prior reads the tokens of a text", remedy="pass encoder_hidden_states")
        return torch.cat([self.encoder_hidden_states_proj(text), vector, time[:, None]], dim=1)

    def _places(self, tokens: Tensor, before: int, after: int) -> Tensor:
        """What is added to each token for its place; some checkpoints have places for the noisy ones alone."""
        places = self.positional_embedding.to(tokens.dtype)
        if places.shape[1] < tokens.shape[1]:
            places = F.pad(places, (0, 0, before, after))
        if places.shape[1] != tokens.shape[1]:
            found, known = f"{tokens.shape[1]} tokens", self.positional_embedding.shape[1]
            raise InputError("this prior has other places than tokens", found=found, expected=f"{known}, or {known} noisy ones")
        return places

    def _bias(self, mask: Tensor, tokens: Tensor) -> Tensor:
        """A bias on scores, (batch, tokens, tokens): nothing that fills is seen, and nothing that comes later."""
        filled = F.pad((1 - mask.to(tokens.dtype)) * UNSEEN, (0, self.config.additional_embeddings))
        return (filled[:, None] + self.causal_attention_mask).to(tokens.dtype)


def _as_tokens(vectors: Tensor) -> Tensor:
    """One vector each (batch, width) as one token each; tokens as they are."""
    return vectors[:, None] if vectors.ndim == 2 else vectors
