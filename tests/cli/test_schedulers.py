"""`suffuse schedulers`, and the table that it prints."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import suffuse
from suffuse.cli.main import app
from suffuse.public_names import MODULES
from suffuse.schedulers.catalogue import CATALOGUE, KINDS, MODELS

NAMES = {n for module, names in MODULES.items() if module.startswith("suffuse.schedulers.") for n in names} - {"SchedulerMixin"}


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["schedulers", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_every_scheduler_has_its_row() -> None:
    assert set(CATALOGUE) == NAMES
    for facts in CATALOGUE.values():
        assert facts.kind in KINDS
        assert facts.models in MODELS
        assert facts.page.startswith("https://")
        assert (facts.order is None) == (facts.kind not in ("ODE", "inverse"))


@pytest.mark.parametrize("name", sorted(NAMES))
def test_noise_is_drawn_where_the_row_says(name: str) -> None:
    cls, facts = getattr(suffuse, name), CATALOGUE[name]
    methods = [getattr(cls, method) for method in ("step", "step_pred") if hasattr(cls, method)]
    known = {parameter for method in methods for parameter in inspect.signature(method).parameters}
    if name == "KarrasVeScheduler":
        known |= set(inspect.signature(cls.add_noise_to_input).parameters)
    if name == "DPMSolverMultistepInverseScheduler":  # it inherits the keyword, and refuses the equations with noise
        known -= {"generator"}
    assert ("generator" in known) == (facts.noise != "never")


def test_the_list_holds_all_and_a_kind_some() -> None:
    code, text, _ = run()
    assert code == 0
    assert all(name in text for name in NAMES)
    code, text, _ = run("--kind", "discrete")
    assert code == 0
    assert "VQDiffusionScheduler" in text
    assert "DDIM" not in text


def test_json_holds_the_same() -> None:
    told = json.loads(run("--json")[1])
    assert [row["name"] for row in told] == list(CATALOGUE)
    assert told[0] == {"name": "DDIMScheduler", **CATALOGUE["DDIMScheduler"]._asdict()}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_one_is_told_with_its_options_and_compatibles(name: str) -> None:
    code, text, _ = run(name)
    told = json.loads(run(name.removesuffix("Scheduler"), "--json")[1])
    cls = getattr(suffuse, name)
    assert code == 0
    assert list(told["options"]) == list(cls.parameters_of_init())
    assert all(option in text for option in told["options"])
    assert told["compatibles"] == [other.__name__ for other in cls.compatible_classes() if other is not cls]
    assert told["page"] in text


def test_help_teaches() -> None:
    text = run("--help")[1]
    assert "2^order times smaller" in text
    assert "from_config(pipe.scheduler.config)" in text
    assert all(kind in text for kind in KINDS)


def test_errors_name_what_is_near() -> None:
    code, _, message = run("DPMSolverMultistp")
    assert code == 1
    assert "did you mean 'DPMSolverMultistepScheduler'" in message
    code, _, message = run("--kind", "sde")
    assert code == 1
    assert "ODE, SDE, inverse, distilled, discrete" in message


def test_the_list_needs_no_torch() -> None:
    program = """
import sys
from suffuse.cli.main import app
try:
    app(["schedulers"])
finally:
    print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip().endswith("False")
