"""A CLIP text encoder that reads further embeddings among those of the words (Li et al., 2023, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPPreTrainedModel, CLIPTextConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPEncoder


class ContextCLIPTextEmbeddings(nn.Module):
    """Embeddings of words, with those of the context among them, and of their places."""

    position_ids: Tensor

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.register_buffer("position_ids", torch.arange(config.max_position_embeddings)[None])

    def forward(self, input_ids: Tensor, context: Tensor | None, begin: Sequence[int] | None) -> Tensor:
        """Map (batch, words), with a context (batch, tokens, width) from position `begin` of each, to (batch, all, width)."""
        words = self.token_embedding(input_ids)
        if context is not None:
            places = begin or [0] * len(words)
            rows = zip(words, context, places, strict=True)
            words = torch.stack([torch.cat([row[:place], among, row[place:]]) for row, among, place in rows])
        return words + self.position_embedding(self.position_ids[:, : words.shape[1]])


class ContextCLIPTextTransformer(nn.Module):
    """Embeddings, layers that see what stands before, a normalisation."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = ContextCLIPTextEmbeddings(config)
        self.encoder = CLIPEncoder(config)  # pyright: ignore[reportArgumentType]
        self.final_layer_norm = nn.LayerNorm(config.hidden_size)

    def forward(self, input_ids: Tensor, context: Tensor | None, begin: Sequence[int] | None) -> Tensor:
        """The last states (batch, all, width)."""
        embedded = self.embeddings(input_ids, context, begin)
        count = embedded.shape[1]
        lowest = torch.full((count, count), torch.finfo(embedded.dtype).min, dtype=embedded.dtype, device=embedded.device)
        seen = lowest.triu(1).expand(len(embedded), 1, count, count)
        return self.final_layer_norm(self.encoder(inputs_embeds=embedded, attention_mask=seen)[0])


class ContextCLIPTextModel(CLIPPreTrainedModel):
    """The text encoder, by the names that checkpoints use."""

    config_class = CLIPTextConfig
    _no_split_modules = ["CLIPEncoderLayer"]

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__(config)
        self.text_model = ContextCLIPTextTransformer(config)
        self.post_init()

    def forward(
        self,
        ctx_embeddings: Tensor | None = None,
        ctx_begin_pos: Sequence[int] | None = None,
        input_ids: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Encode.

        Args:
            ctx_embeddings: (batch, tokens, width), to stand among those of the words.
            ctx_begin_pos: For each text, the position from which they do.
            input_ids: (batch, words).
            return_dict: Return an output object instead of a tuple.

        Returns:
            `last_hidden_state` (batch, words and tokens, width) and `pooler_output` (batch, width), that of the end of each text.
        """
        if input_ids is None:
            raise ValueError("input_ids are missing")
        states = self.text_model(input_ids, ctx_embeddings, ctx_begin_pos)
        ends = input_ids.int().argmax(dim=-1)
        output = BaseModelOutputWithPooling(states, states[torch.arange(len(states), device=states.device), ends])
        return output if return_dict else output.to_tuple()
