"""Options of `suffuse generate` that say how predictions are combined: other guidance, edits, in a part of the way."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from suffuse.errors import InputError, nearest
from suffuse.public_names import resolve

if TYPE_CHECKING:
    from suffuse.diffusion.guidance import Guidance

WAYS = {
    "plain": "ClassifierFreeGuidance",
    "projected": "AdaptiveProjectedGuidance",
    "tangential": "TangentialGuidance",
    "zero-star": "ZeroStarGuidance",
    "self-attention": "SelfAttentionGuidance",
    "unattended": "WorseGuidance",
    "skipped": "WorseGuidance",
    "safe": "SafeGuidance",
}
"""Name of a way to guide → its class."""
WORSENED = {"unattended": "Unattended", "skipped": "Skipped"}
"""Of those, what makes the model worse."""

Guide = Annotated[
    str | None,
    typer.Option(
        "--guide",
        metavar="WAY[:NAME=VALUE,…]",
        help=f"How to favour the prompt: {', '.join(WAYS)}; with settings of its class, as in projected:parallel=0.5.",
    ),
]
Edits = Annotated[
    list[str] | None,
    typer.Option(
        "--edit", metavar="CONCEPT[:SCALE]", help='Edit the picture towards it, or away from "-CONCEPT" (SEGA); once for each.'
    ),
]
Part = Annotated[
    str | None, typer.Option("--guide-part", metavar="FROM-TO", help="Guide in this part of the way only: 0.2-0.8, for example.")
]


def is_asked(given: Mapping[str, Any]) -> bool:
    """Whether the options ask for another guidance."""
    return any(given[name] for name in ("guide", "edit", "guide_part"))


def check_options(given: Mapping[str, Any]) -> None:
    """Raise `InputError` if an option is not understood, or two do not go together."""
    if given["guide"] and given["edit"]:
        raise InputError(
            "--guide and --edit are both given", remedy="one guidance combines the predictions: leave out one of them"
        )
    if given["guide"]:
        _class_and_settings(given["guide"])
    if given["guide_part"]:
        _part(given["guide_part"])
    _edits(given["edit"] or ())


def guided(given: Mapping[str, Any], call: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword of a pipeline for the options, in a call of so many steps and such a scale; none if they ask for nothing.

    Raises:
        InputError: A way has no such setting, or it is not what it may be.
    """
    if not is_asked(given):
        return {}
    scale, steps = call["guidance_scale"], call["num_inference_steps"]
    if given["edit"]:
        # Concepts wait for ten steps of fifty, and as long a part of another number.
        options = {"warmup": steps // 5}
        concepts = [resolve("Concept")(words, strength, away, **options) for words, strength, away in _edits(given["edit"])]
        made: Guidance = resolve("SemanticGuidance")(scale, concepts)
    else:
        name, settings = _class_and_settings(given["guide"] or "plain")
        made = _made(name, scale, settings)
    if given["guide_part"]:
        made = resolve("GuidanceInterval")(made, *_part(given["guide_part"]))
    return {"guidance": made}


def told(given: Mapping[str, Any]) -> dict[str, Any]:
    """What the PNG says of the options."""
    return {name: given[name] for name in ("guide", "edit", "guide_part") if given[name]}


def _made(name: str, scale: float, settings: Mapping[str, str]) -> Guidance:
    kind = resolve(WAYS[name])
    known = {field.name: field for field in dataclasses.fields(kind) if field.name != "scale" and field.repr}
    values: dict[str, Any] = {"worsening": resolve(WORSENED[name])()} if name in WORSENED else {}
    for setting, text in settings.items():
        default = known[setting].default if setting in known else None
        if not isinstance(default, (int, float, str)):
            numbers = [own for own, field in known.items() if isinstance(field.default, (int, float, str))]
            close = nearest(setting, numbers)
            raise InputError(
                f"--guide {name} has no setting {setting!r}",
                expected=", ".join(numbers),
                remedy=f"did you mean {close}?" if close else "",
            )
        try:
            values[setting] = type(default)(text)
        except ValueError as error:
            raise InputError(f"--guide {name}: {setting}={text!r} is no number", expected=f"{default}, for example") from error
    return kind(scale, **values)


def _class_and_settings(text: str) -> tuple[str, dict[str, str]]:
    name, _, rest = text.partition(":")
    pairs = [pair.partition("=") for pair in rest.split(",")] if rest else []
    if name not in WAYS:
        close = nearest(name, WAYS)
        raise InputError(
            f"--guide {name!r} is unknown", expected=", ".join(WAYS), remedy=f"did you mean {close}?" if close else ""
        )
    if not all(setting and equals for setting, equals, _ in pairs):
        raise InputError(f"--guide {text!r} is not understood", expected="WAY:NAME=VALUE,NAME=VALUE")
    names = [setting.strip() for setting, _, _ in pairs]
    for setting in names:
        if names.count(setting) > 1:
            raise InputError(f"--guide {text!r}: {setting} is given twice", remedy="leave out one of them")
    return name, {setting.strip(): value for setting, _, value in pairs}


def _edits(texts: Sequence[str]) -> list[tuple[str, float, bool]]:
    """For each concept its words, how far, and whether away from it."""
    edits: list[tuple[str, float, bool]] = []
    for text in texts:
        # After the last colon, what begins as a number is to be one: who says "at 3:30" adds a scale, "at 3:30:5".
        match = re.fullmatch(r"([+-]?)\s*(.*?)\s*(?::\s*([-+.\d][^:]*|nan|inf|))?", text.strip(), re.DOTALL | re.IGNORECASE)
        scale = "5" if match is None or match[3] is None else match[3]
        if match is None or not match[2] or not re.fullmatch(r"\d+\.?\d*|\.\d+", scale.strip()):
            remedy = "to go away from it, write -CONCEPT" if match and scale.startswith("-") else ""
            expected = 'CONCEPT, -CONCEPT or CONCEPT:SCALE, as in "-snow:3"'
            raise InputError(f"--edit {text!r} is not understood", expected=expected, remedy=remedy)
        edits.append((match[2], float(scale), match[1] == "-"))
    return edits


def _part(text: str) -> tuple[float, float]:
    match = re.fullmatch(r"([0-9.]+)-([0-9.]+)", text.strip())
    try:
        start, stop = map(float, match.groups()) if match else (1.0, 0.0)
    except ValueError:
        start, stop = 1.0, 0.0
    if not 0 <= start <= stop <= 1:
        raise InputError(f"--guide-part {text!r} is not understood", expected="FROM-TO, parts of the way, as in 0.2-0.8")
    return start, stop
