"""The text encoder of the first latent diffusion model: a transformer that was trained along with it, on BERT's tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutput


class LDMBertConfig(PretrainedConfig):
    """The sizes of the text encoder, by the names that checkpoints use."""

    model_type = "ldmbert"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {"num_attention_heads": "encoder_attention_heads", "hidden_size": "d_model"}

    def __init__(
        self,
        vocab_size: int = 30522,
        max_position_embeddings: int = 77,
        encoder_layers: int = 32,
        encoder_ffn_dim: int = 5120,
        encoder_attention_heads: int = 8,
        head_dim: int = 64,
        encoder_layerdrop: float = 0.0,
        activation_function: str = "gelu",
        d_model: int = 1280,
        dropout: float = 0.1,
        attention_dropout: float = 0.0,
        activation_dropout: float = 0.0,
        init_std: float = 0.02,
        classifier_dropout: float = 0.0,
        scale_embedding: bool = False,
        use_cache: bool = True,
        pad_token_id: int = 0,
        **further: Any,
    ) -> None:
        entries = {name: value for name, value in locals().items() if name not in ("self", "further", "__class__")}
        for name, value in entries.items():
            if name != "pad_token_id":
                setattr(self, name, value)
        self.num_hidden_layers = encoder_layers
        super().__init__(pad_token_id=pad_token_id, **further)  # pyright: ignore[reportCallIssue]  a dataclass, to the checker


class LDMBertAttention(nn.Module):
    """Self-attention whose heads need not add up to the width of a token."""

    def __init__(self, config: LDMBertConfig) -> None:
        super().__init__()
        width, inner = config.d_model, config.encoder_attention_heads * config.head_dim
        self.heads, self.scaling = config.encoder_attention_heads, config.head_dim**-0.5
        self.k_proj, self.v_proj, self.q_proj = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.out_proj = nn.Linear(inner, width)

    def forward(self, hidden_states: Tensor, bias: Tensor | None) -> Tensor:
        """Map (batch, tokens, width) to the same; `bias` (batch, 1, tokens, tokens) is added to the scores."""
        batch, tokens, _ = hidden_states.shape

        def by_head(states: Tensor) -> Tensor:
            return states.view(batch, tokens, self.heads, -1).transpose(1, 2).reshape(batch * self.heads, tokens, -1)

        query = by_head(self.q_proj(hidden_states) * self.scaling)
        key, value = by_head(self.k_proj(hidden_states)), by_head(self.v_proj(hidden_states))
        scores = torch.bmm(query, key.transpose(1, 2))
        if bias is not None:
            scores = (scores.view(batch, self.heads, tokens, tokens) + bias).view(-1, tokens, tokens)
        attended = torch.bmm(scores.softmax(dim=-1), value).view(batch, self.heads, tokens, -1)
        return self.out_proj(attended.transpose(1, 2).reshape(batch, tokens, -1))


class LDMBertEncoderLayer(nn.Module):
    """Self-attention and two linear layers, each after a normalisation and added to its input."""

    def __init__(self, config: LDMBertConfig) -> None:
        super().__init__()
        self.self_attn = LDMBertAttention(config)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.activation_fn = ACT2FN[config.activation_function]
        self.fc1 = nn.Linear(config.d_model, config.encoder_ffn_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_dim, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model)

    def forward(self, hidden_states: Tensor, bias: Tensor | None) -> Tensor:
        """Map (batch, tokens, width) to the same."""
        hidden_states = hidden_states + self.self_attn(self.self_attn_layer_norm(hidden_states), bias)
        return hidden_states + self.fc2(self.activation_fn(self.fc1(self.final_layer_norm(hidden_states))))


class LDMBertEncoder(nn.Module):
    """Token and position embeddings, layers, a normalisation."""

    def __init__(self, config: LDMBertConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.d_model)
        self.layers = nn.ModuleList([LDMBertEncoderLayer(config) for _ in range(config.encoder_layers)])
        self.layer_norm = nn.LayerNorm(config.d_model)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, ...]:
        """Token numbers (batch, tokens) to what each layer begins with, and the last states: (batch, tokens, width) each."""
        tokens = input_ids.shape[-1]
        embedded = self.embed_tokens(input_ids.view(-1, tokens))
        states = [embedded + self.embed_positions(torch.arange(tokens, device=input_ids.device)[None])]
        bias = None
        if attention_mask is not None:
            seen = attention_mask[:, None, None, :].expand(-1, 1, tokens, tokens).to(embedded.dtype)
            bias = (1.0 - seen).masked_fill(seen == 0, torch.finfo(embedded.dtype).min)
        for layer in self.layers:
            states.append(layer(states[-1], bias))
        return (*states[:-1], self.layer_norm(states[-1]))


class LDMBertModel(PreTrainedModel):
    """Token numbers to the states that the UNet attends to."""

    config_class = LDMBertConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _keys_to_ignore_on_load_unexpected = [r"encoder\.version", r"decoder\.version"]

    def __init__(self, config: LDMBertConfig) -> None:
        super().__init__(config)
        self.model = LDMBertEncoder(config)
        self.to_logits = nn.Linear(config.d_model, config.vocab_size)  # in the files, and not used to draw
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> Any:
        """Encode.

        Args:
            input_ids: (batch, tokens).
            attention_mask: (batch, tokens): 0 where nothing is to be seen.
            output_hidden_states: Return what each layer begins with, too.
            return_dict: Return an output object instead of a tuple.

        Returns:
            `last_hidden_state` (batch, tokens, width), and `hidden_states` if they are asked for.
        """
        states = self.model(input_ids, attention_mask)
        shown = (*states[:-1], states[-1]) if output_hidden_states else None
        output = BaseModelOutput(last_hidden_state=states[-1], hidden_states=shown)  # pyright: ignore[reportArgumentType]
        return output if return_dict else output.to_tuple()
