"""Colours that words name: of backgrounds, and of objects that are drawn in another colour than their own."""

from __future__ import annotations

BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (16, 16, 16),
    "gray": (136, 136, 136),
    "red": (214, 48, 49),
    "orange": (243, 140, 40),
    "yellow": (250, 214, 70),
    "green": (64, 160, 80),
    "blue": (52, 110, 219),
    "purple": (130, 72, 190),
    "pink": (246, 160, 196),
}
"""Names and sRGB values; what no word tells is white."""

PAINTS = {name: BACKGROUNDS[name] for name in ("red", "orange", "yellow", "green", "blue", "purple", "pink", "gray")}
"""Colours that objects are recoloured in."""
