"""Tensors of a single file under the names, and in the shapes, of one model: read straight to where they belong."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from suffuse.checkpoints.reading import Source, Stored
from suffuse.conversion.architecture import EMA, LEFT_OUT, UNET, Part
from suffuse.conversion.latent_diffusion import QKV, renamed
from suffuse.errors import InputError


@dataclass(frozen=True)
class Piece:
    """Where a tensor of the model stands in the file.

    Args:
        name: The tensor in the file.
        third: 0, 1 or 2 for a third of its rows; None for all of it.
        transposed: Rows and columns change places.
    """

    name: str
    third: int | None = None
    transposed: bool = False


class RenamedSource:
    """The tensors of one component of a single file.

    Args:
        source: The file.
        part: The component.
        averaged: Take the running averages of the weights, which some files hold beside them.

    Raises:
        InputError: There are none.
    """

    def __init__(self, source: Source, part: Part, averaged: bool = False) -> None:
        self._source, self.where = source, source.where
        self._pieces = dict(_pieces(source.tensors, part))
        if averaged:
            self._pieces = {name: Piece(_average(piece.name, source.tensors)) for name, piece in self._pieces.items()}
        self.tensors: dict[str, Stored] = {
            name: _shown(source.tensors[piece.name], piece, part.kind) for name, piece in self._pieces.items()
        }

    def fill(self, targets: Mapping[str, Tensor]) -> None:
        """Write the tensors over the given ones; see `Source.fill`."""
        stored, whole = self._source.tensors, dict[str, Tensor]()
        parts: dict[str, list[tuple[Piece, Tensor]]] = {}
        for name, target in targets.items():
            piece = self._pieces[name]
            if piece.third is None and not piece.transposed:
                whole[piece.name] = target.view(stored[piece.name].shape)
            else:
                parts.setdefault(piece.name, []).append((piece, target))
        self._source.fill(whole)
        for name, wanted in parts.items():
            scratch = torch.empty(stored[name].shape, dtype=stored[name].dtype)
            self._source.fill({name: scratch})
            for piece, target in wanted:
                target.copy_(scratch.t() if piece.transposed else scratch.chunk(3)[piece.third or 0])

    def mapped(self, types: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
        """None; see `Source.mapped`."""
        return {}


def _pieces(tensors: Mapping[str, Stored], part: Part) -> Iterator[tuple[str, Piece]]:
    """Name in the model → where it stands, for each tensor of the part."""
    for name in tensors:
        inner = name.removeprefix(part.prefix)
        if not name.startswith(part.prefix) or LEFT_OUT.match(name) or LEFT_OUT.match(inner) or _beyond(inner, part):
            continue
        if (
            not part.prefix
            and part.kind == "AutoencoderKL"
            and not inner.startswith(("encoder.", "decoder.", "quant", "post_quant"))
        ):
            continue
        match = re.fullmatch(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)", inner)
        if match:
            for third, projection in enumerate(QKV):
                yield f"encoder.layers.{match[1]}.self_attn.{projection}.{match[2]}", Piece(name, third)
        elif inner == "text_projection" and part.modules:
            yield renamed(inner, part.modules), Piece(name, transposed=True)
        else:
            yield renamed(inner, part.modules), Piece(name)


def _beyond(inner: str, part: Part) -> bool:
    """Whether a tensor belongs to what the component leaves out: layers after the last one, a projection nobody uses."""
    if inner == "text_projection":
        return not part.kind.endswith("Projection")
    layer = re.match(r"transformer\.resblocks\.(\d+)\.", inner)
    return layer is not None and int(layer[1]) >= part.config.get("num_hidden_layers", 0)


def _average(name: str, tensors: Mapping[str, Stored]) -> str:
    averaged = EMA + name.removeprefix("model.").replace(".", "")
    if not name.startswith(UNET) or averaged not in tensors:
        raise InputError("extract_ema: the file holds no running averages", found=name, remedy="leave extract_ema out")
    return averaged


def _shown(stored: Stored, piece: Piece, kind: str) -> Stored:
    """What the file says of a tensor, as the model is to see it."""
    shape = stored.shape
    if piece.third is not None:
        shape = (shape[0] // 3, *shape[1:])
    elif piece.transposed:
        shape = tuple(reversed(shape))
    elif kind == "AutoencoderKL" and ".mid.attn_1." in piece.name and len(shape) == 4 and shape[2:] == (1, 1):
        shape = shape[:2]  # attention by convolutions of one pixel, which are matrices
    return Stored(shape, stored.dtype, stored.path)
