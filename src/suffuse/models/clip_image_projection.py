"""From CLIP's space of pictures to its space of phrases, for grounding in pictures (Li et al., 2023, "GLIGEN", appendix)."""

from __future__ import annotations

from torch import Tensor, nn

from suffuse.configuration import register_to_config
from suffuse.models.model import ModelMixin
from suffuse.models.sizes import require_positive


class CLIPImageProjection(ModelMixin):
    """One matrix.

    Args:
        hidden_size: Size of a vector, of pictures and of phrases.
    """

    @register_to_config
    def __init__(self, hidden_size: int = 768) -> None:
        super().__init__()
        require_positive("CLIPImageProjection", hidden_size=hidden_size)
        self.hidden_size = hidden_size
        self.project = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, hidden_size) to the same shape."""
        return self.project(x)
