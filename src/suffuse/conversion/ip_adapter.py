"""How files name the weights of IP-Adapters.

    image_proj.latents                      what makes tokens of a picture (`suffuse.models.image_projection`)
    ip_adapter.1.to_k_ip.weight             keys and values of these tokens, for one layer each
    ip_adapter.0.to_q_lora.down.weight      a low-rank adapter that goes with it, in those for faces

Pickles hold the two parts as dictionaries in a dictionary. Layers of attention are numbered in the order down, up, middle; only
those with odd numbers attend to words, and so to pictures.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

PROJECTION, ATTENTION = "image_proj.", "ip_adapter."

_OTHER_NAMES = {
    ".attn.": ".0.",
    ".ln0.": ".0.norm1.",
    ".ln1.": ".0.norm2.",
    ".ff.0.": ".1.0.",
    ".ff.1.net.0.proj.": ".1.1.",
    ".ff.1.net.2.": ".1.3.",
}
"""What some files call the parts of a resampler → what the others do."""

_LAYER = re.compile(r"ip_adapter\.(?P<number>\d+)\.to_(?P<part>[kv])_ip\.weight")
_LOW_RANK = re.compile(r"ip_adapter\.(?P<number>\d+)\.(?P<part>to_(?:q|k|v|out)_lora\.(?:down|up)\.weight)")


@dataclass
class Keys:
    """The keys of a file by what they are.

    Attributes:
        projection: Name in the image projection → key.
        layers: Number of a layer → "k" or "v" → key.
        low_rank: (number of a layer, its part) → key.
        unread: Those that are none of these.
    """

    projection: dict[str, str] = field(default_factory=dict[str, str])
    layers: dict[int, dict[str, str]] = field(default_factory=dict[int, dict[str, str]])
    low_rank: dict[tuple[int, str], str] = field(default_factory=dict[tuple[int, str], str])
    unread: list[str] = field(default_factory=list[str])


def read_keys(names: Iterable[str]) -> Keys:
    """Tell keys apart."""
    keys = Keys()
    for name in names:
        layer, low_rank = _LAYER.fullmatch(name), _LOW_RANK.fullmatch(name)
        if name.startswith(PROJECTION):
            keys.projection[_spelt(name.removeprefix(PROJECTION))] = name
        elif layer:
            keys.layers.setdefault(int(layer["number"]), {})[layer["part"]] = name
        elif low_rank:
            keys.low_rank[int(low_rank["number"]), low_rank["part"]] = name
        else:
            keys.unread.append(name)
    return keys


def flat(contents: Any) -> Any:
    """Dictionaries in a dictionary as one, with the names joined by dots; anything else as it is."""
    if not isinstance(contents, Mapping) or not any(isinstance(value, Mapping) for value in contents.values()):
        return contents
    made: dict[Any, Any] = {}
    for name, value in contents.items():
        made |= {f"{name}.{inner}": item for inner, item in value.items()} if isinstance(value, Mapping) else {name: value}
    return made


def in_order(layers: Iterable[str]) -> list[str]:
    """Names of layers of attention in the order in which files number them."""
    places = ("down_blocks", "up_blocks", "mid_block")
    return sorted(layers, key=lambda name: places.index(name.partition(".")[0]))


def _spelt(name: str) -> str:
    for other, usual in _OTHER_NAMES.items():
        name = name.replace(other, usual, 1)
    return name
