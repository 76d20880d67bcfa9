#!/usr/bin/env python
"""Write docs/features.md: which pipeline takes which feature, from what pipelines and features say of themselves."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from suffuse.pipelines.features import EXCLUSIVE, FEATURES, Feature
from suffuse.pipelines.pipeline import DiffusionPipeline
from suffuse.public_names import PUBLIC, resolve

PAGE = Path(__file__).parent.parent / "docs" / "features.md"
HEAD = """# Features and pipelines

A feature is a value: pass it to a call and it is there, leave it out and it is not. Features work together unless both write a
place that only one can write: {exclusive}. A row of `suffuse.pipelines.features.FEATURES` says what each writes; this page is
made of those rows by `scripts/features.py`, and every pair of features is run by the tests.

| feature | asked for by | with | reads | writes |
|---|---|---|---|---|
{features}

## Which pipeline takes which

**●** has it built in, under its own keywords; **○** takes it as a value of any call, or loads it.

| pipeline | {names} |
|---|{lines}
{pipelines}
"""


def pipelines() -> dict[str, Any]:
    """Every public pipeline."""
    found = {name: resolve(name) for name, module in PUBLIC.items() if module.startswith("suffuse.pipelines.")}
    kinds = {name: kind for name, kind in found.items() if isinstance(kind, type) and issubclass(kind, DiffusionPipeline)}
    return {name: kind for name, kind in kinds.items() if kind is not DiffusionPipeline}


def mark(feature: Feature, pipeline: Any) -> str:
    """Whether a pipeline has a feature built in, takes it, or does not."""
    keywords, called = inspect.signature(pipeline.__call__).parameters, pipeline.called
    if feature.asked_by in pipeline.__call__.values:
        return "○"
    if feature.asked_by in called or (feature.asked_by in keywords and feature.asked_by not in called.values()):
        return "●"
    return "○" if inspect.isfunction(getattr(pipeline, feature.asked_by, None)) else ""


def page() -> str:
    """The text of the page."""
    rows = [
        f"| {each.name} | `{each.asked_by}` | {', '.join(f'`{name}`' for name in (*each.needs, *each.settings))} "
        f"| {', '.join(sorted(each.reads))} | {', '.join(sorted(each.writes))} |"
        for each in FEATURES
    ]
    kinds = [f"| `{name}` | {' | '.join(mark(each, kind) for each in FEATURES)} |" for name, kind in pipelines().items()]
    return HEAD.format(
        exclusive="; ".join(f"{place} ({why})" for place, why in EXCLUSIVE.items()),
        features="\n".join(rows),
        names=" | ".join(each.name for each in FEATURES),
        lines="---|" * len(FEATURES),
        pipelines="\n".join(kinds),
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
