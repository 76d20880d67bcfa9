"""A picture and the name of its subject as a few tokens (Li et al., 2023, "BLIP-2", section 3.1, and "BLIP-Diffusion", 3.2).

Learned queries attend to one another, to the words of the subject and to the patches of the picture. The layers are those of
transformers; what they are put together with here is not there.
"""

from __future__ import annotations

import threading
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertTokenizer, Blip2Config, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.models.blip_2.modeling_blip_2 import Blip2Encoder, Blip2QFormerEncoder

from suffuse.errors import InputError, MissingFileError

TOKENIZER = "bert-base-uncased"
"""Reads the names of subjects, where the configuration names none."""
READING = threading.Lock()
"""Tokenizers keep padding in themselves: threads take turns."""


class Blip2TextEmbeddings(nn.Module):
    """The queries, then the words of the subject with their places."""

    position_ids: Tensor

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.register_buffer("position_ids", torch.arange(config.max_position_embeddings)[None])

    def forward(self, input_ids: Tensor, queries: Tensor) -> Tensor:
        """Map (batch, words) and (1, queries, width) to (batch, queries and words, width)."""
        words = self.word_embeddings(input_ids) + self.position_embeddings(self.position_ids[:, : input_ids.shape[1]])
        return self.LayerNorm(torch.cat([queries.expand(len(words), -1, -1), words], dim=1).to(queries.dtype))


class Blip2VisionEmbeddings(nn.Module):
    """A class token and the patches of a picture, with their places."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.randn(1, 1, width))
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.position_embedding = nn.Parameter(torch.randn(1, (config.image_size // patch) ** 2 + 1, width))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Map (batch, 3, rows, columns) to (batch, 1 + patches, width)."""
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_embedding.expand(len(patches), -1, -1), patches], dim=1)
        return tokens + self.position_embedding[:, : tokens.shape[1]]


class Blip2VisionModel(nn.Module):
    """A vision transformer with a normalisation before its layers, as OpenCLIP has it."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embeddings = Blip2VisionEmbeddings(config)
        self.pre_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = Blip2Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Map (batch, 3, rows, columns) to (batch, 1 + patches, width)."""
        return self.post_layernorm(self.encoder(self.pre_layernorm(self.embeddings(pixel_values)))[0])


class ProjLayer(nn.Module):
    """Two linear layers, four times as wide between them, added to their input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense1 = nn.Linear(width, 4 * width)
        self.dense2 = nn.Linear(4 * width, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (batch, tokens, width) to the same."""
        hidden = self.dense1(self.LayerNorm(tokens))
        return self.dense2(hidden * torch.sigmoid(1.702 * hidden)) + tokens


class Blip2QFormerModel(PreTrainedModel):
    """Pictures and names of subjects to tokens that a text encoder reads among its words."""

    config_class = Blip2Config
    main_input_name = "image_input"
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: Blip2Config) -> None:
        super().__init__(config)
        inner: Any = config.qformer_config
        inner.use_qformer_text_input = True  # these checkpoints are older than the entry
        self.embeddings = Blip2TextEmbeddings(inner)
        self.visual_encoder = Blip2VisionModel(config.vision_config)
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, inner.hidden_size))
        self.proj_layer = ProjLayer(inner.hidden_size)
        self.encoder = Blip2QFormerEncoder(inner)
        self.post_init()

    @cached_property
    def tokenizer(self) -> Any:
        """Reads the names of subjects; fetched when the first is read.

        Raises:
            MissingFileError: It is not on this machine, and could not be fetched.
        """
        name = getattr(self.config, "tokenizer", None) or TOKENIZER
        problem = "no words"
        try:
            tokenizer: Any = BertTokenizer.from_pretrained(name, truncation_side="right")
        except (OSError, ValueError) as error:
            tokenizer, problem = None, str(error).splitlines()[0]
        # Of a file that it cannot find, transformers makes a tokenizer that knows no word.
        if tokenizer is None or len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise MissingFileError(
                f"the names of subjects are read with the tokenizer {name}, which is not here",
                found=problem,
                remedy="pipe.qformer.tokenizer = transformers.BertTokenizer.from_pretrained(…)",
            )
        tokenizer.add_special_tokens({"bos_token": "[DEC]"})
        return tokenizer

    def forward(self, text_input: list[str], image_input: Tensor, return_dict: bool = True) -> Any:
        """Tokens of pictures.

        Args:
            text_input: What the subject of each is.
            image_input: (batch, 3, rows, columns), as the image processor makes them; one, or one for each text.
            return_dict: Return all states, not projected, as an output object.

        Returns:
            (batch, queries, width), projected; or an object with the states of queries and words.

        Raises:
            InputError: There are neither one picture nor as many as texts.
        """
        with READING:
            read = self.tokenizer(text_input, return_tensors="pt", padding=True).to(self.device)
        if len(image_input) not in (1, len(text_input)):
            raise InputError(f"{len(image_input)} pictures for {len(text_input)} subjects", expected="one, or one for each")
        count = self.query_tokens.shape[1]
        embedded = self.embeddings(read.input_ids, self.query_tokens)
        mask = F.pad(read.attention_mask, (count, 0), value=1)[:, None, None].to(embedded.dtype)
        patches = self.visual_encoder(image_input).expand(len(text_input), -1, -1)
        told = {"attention_mask": (1.0 - mask) * -10000.0, "encoder_hidden_states": patches, "query_length": count}
        states = self.encoder(embedded, **told)[0]
        if not return_dict:
            return self.proj_layer(states[:, :count])
        return BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=states, pooler_output=states[:, 0])
