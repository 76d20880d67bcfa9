"""The text encoder of AltDiffusion: XLM-R, of many languages, projected to where CLIP's one language lies (Chen et al., 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import XLMRobertaConfig, XLMRobertaModel, XLMRobertaPreTrainedModel
from transformers.utils.generic import ModelOutput


@dataclass
class TransformationModelOutput(ModelOutput):
    """What a text is to the UNet, and what XLM-R made of it on the way.

    Attributes:
        projection_state: (batch, tokens, project_dim).
        last_hidden_state: (batch, tokens, hidden_size).
        hidden_states: What each layer begins with, and the last states; if asked for.
        attentions: Of each layer, if asked for.
    """

    projection_state: Tensor | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class RobertaSeriesConfig(XLMRobertaConfig):
    """The sizes of the text encoder, by the names that checkpoints use.

    Args:
        pad_token_id: Number of the token that fills.
        bos_token_id: Of the one a text begins with.
        eos_token_id: Of the one it ends with.
        project_dim: How wide tokens are to the UNet.
        pooler_fn: Kept for its name.
        learn_encoder: Kept for its name.
        use_attention_mask: Tokens that fill are not attended to.
        **further: As of `XLMRobertaConfig`; `has_pre_transformation=True` projects what the last layer begins with.
    """

    def __init__(
        self,
        pad_token_id: int = 1,
        bos_token_id: int = 0,
        eos_token_id: int = 2,
        project_dim: int = 512,
        pooler_fn: str = "cls",
        learn_encoder: bool = False,
        use_attention_mask: bool = True,
        **further: Any,
    ) -> None:
        self.project_dim = project_dim
        self.pooler_fn = pooler_fn
        self.learn_encoder = learn_encoder
        self.use_attention_mask = use_attention_mask
        tokens = {"pad_token_id": pad_token_id, "bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
        super().__init__(**tokens, **further)


class RobertaSeriesModelWithTransformation(XLMRobertaPreTrainedModel):
    """Token numbers to the states that the UNet attends to."""

    config_class = RobertaSeriesConfig
    base_model_prefix = "roberta"
    _keys_to_ignore_on_load_unexpected = [r"pooler", r"logit_scale", r"position_ids"]
    _keys_to_ignore_on_load_missing = [r"pooler"]  # which nothing is computed with

    def __init__(self, config: RobertaSeriesConfig) -> None:
        super().__init__(config)
        width: Any = config.hidden_size
        self.roberta = XLMRobertaModel(config)
        self.transformation = nn.Linear(width, config.project_dim)
        self.has_pre_transformation = getattr(config, "has_pre_transformation", False)
        if self.has_pre_transformation:
            self.transformation_pre = nn.Linear(width, config.project_dim)
            self.pre_LN = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        **further: Any,
    ) -> Any:
        """Encode.

        Args:
            input_ids: (batch, tokens).
            attention_mask: (batch, tokens): 0 where nothing is to be seen.
            output_hidden_states: Return what each layer begins with, too.
            return_dict: Return an output object instead of a tuple.
            **further: Handed to XLM-R.

        Returns:
            `projection_state` (batch, tokens, project_dim), `last_hidden_state` (batch, tokens, hidden_size), and what
            is asked for.
        """
        further["output_hidden_states"] = output_hidden_states or self.has_pre_transformation
        made = self.roberta(input_ids, attention_mask=attention_mask, return_dict=True, **further)
        if self.has_pre_transformation:
            projected = self.transformation_pre(self.pre_LN(made.hidden_states[-2]))
        else:
            projected = self.transformation(made.last_hidden_state)
        output = TransformationModelOutput(projected, made.last_hidden_state, made.hidden_states, made.attentions)
        return output if return_dict else output.to_tuple()
