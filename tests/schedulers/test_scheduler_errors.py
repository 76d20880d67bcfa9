"""What schedulers refuse, and what they say."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from scheduler_oracle import EVERY, NAMES

import suffuse
from suffuse.errors import ConfigError, InputError, MissingFileError, MissingPackageError, UnknownArgumentError

each_scheduler = pytest.mark.parametrize("name", EVERY)
SAMPLE = torch.zeros(1, 4, 4, 4)


@each_scheduler
@pytest.mark.parametrize("steps", [0, -1, 1.5, "2", True, 1001, None])
def test_impossible_numbers_of_steps(name: str, steps: Any) -> None:
    scheduler = getattr(suffuse, name)()
    before = scheduler.timesteps
    with pytest.raises(InputError, match="num_inference_steps"):
        scheduler.set_timesteps(steps)
    assert scheduler.timesteps is before


@pytest.mark.parametrize(
    "name", [n for n in EVERY if n.startswith(("DDIM", "PNDM", "DPMSolverM", "DPMSolverSi", "UniPC", "LCM", "DEIS"))]
)  # the others have the schedule of training to begin with
def test_step_before_set_timesteps(name: str) -> None:
    with pytest.raises(InputError, match="call set_timesteps before step"):
        getattr(suffuse, name)().step(SAMPLE, 10, SAMPLE)


@each_scheduler
@pytest.mark.parametrize(
    ("entry", "value"),
    [("prediction_type", "epsilonn"), ("beta_schedule", "cosine"), ("timestep_spacing", "even"), ("num_train_timesteps", "4")],
)
def test_configuration_values_that_are_not_known(name: str, entry: str, value: Any) -> None:
    cls = getattr(suffuse, name)
    if entry in cls.parameters_of_init():
        with pytest.raises(ConfigError, match=rf"{name}: {entry} has the wrong type(.|\n)*{value}"):
            cls(**{entry: value})


@each_scheduler
def test_a_prediction_type_registered_later_is_checked_too(name: str) -> None:
    scheduler = getattr(suffuse, name)()
    if "prediction_type" not in scheduler.config:
        return
    scheduler.set_timesteps(5)
    scheduler.register_to_config(prediction_type="v_predicton")
    scheduler.scale_model_input(SAMPLE, scheduler.timesteps[0])
    with pytest.raises(ConfigError, match=r"prediction_type='v_predicton' is not known(.|\n)*did you mean 'v_prediction'"):
        scheduler.step(SAMPLE, scheduler.timesteps[0], SAMPLE)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("DPMSolverMultistepScheduler", {"algorithm_type": "dpm"}, "algorithm_type"),
        ("DPMSolverMultistepScheduler", {"solver_type": "euler"}, "solver_type"),
        ("DPMSolverMultistepScheduler", {"solver_order": 4}, "solver_order is not possible"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver"}, "cannot end at sigma 0"),
        ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver"}, "use final_sigmas_type='sigma_min'"),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "use_beta_sigmas": True}, "only one kind of sigmas"),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "use_exponential_sigmas": True}, "only one kind of sigmas"),
        ("EulerDiscreteScheduler", {"interpolation_type": "cubic"}, "interpolation_type"),
        ("UniPCMultistepScheduler", {"solver_type": "bh3"}, "solver_type"),
        ("UniPCMultistepScheduler", {"solver_order": 0}, "solver_order is not possible"),
        ("UniPCMultistepScheduler", {"shift_terminal": 0.1}, "shift_terminal is for use_flow_sigmas=True"),
        ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction"}, "needs flow sigmas"),
        ("DDPMScheduler", {"variance_type": "fixed"}, "variance_type"),
    ],
)
def test_configurations_that_cannot_work(name: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        getattr(suffuse, name)(**config)


def test_dpm_solver_has_no_third_order_for_the_noise_sde() -> None:
    with pytest.raises(ConfigError, match="sde-dpmsolver has no third order"):
        suffuse.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver", solver_order=3, final_sigmas_type="sigma_min")


CUSTOM = ["DDPMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler"]


@pytest.mark.parametrize("name", [*CUSTOM, "DPMSolverSinglestepScheduler"])
@pytest.mark.parametrize("timesteps", [[1, 2, 3], [500, 500], [1000, 3], [5, -1], []])
def test_timesteps_that_do_not_fall(name: str, timesteps: list[int]) -> None:
    with pytest.raises(InputError, match="timesteps must be in descending order"):
        getattr(suffuse, name)().set_timesteps(timesteps=timesteps)


@pytest.mark.parametrize("name", [*CUSTOM, "DPMSolverSinglestepScheduler"])
def test_a_number_and_timesteps_at_once(name: str) -> None:
    with pytest.raises(InputError, match="exactly one of num_inference_steps, timesteps"):
        getattr(suffuse, name)().set_timesteps(5, timesteps=[5, 3])


@pytest.mark.parametrize("name", CUSTOM[1:])
def test_timesteps_against_configured_sigmas(name: str) -> None:
    with pytest.raises(InputError, match="use_karras_sigmas=True"):
        getattr(suffuse, name)(use_karras_sigmas=True).set_timesteps(timesteps=[5, 3])


def test_sigmas_that_do_not_fall() -> None:
    with pytest.raises(InputError, match="sigmas must be in descending order"):
        suffuse.EulerDiscreteScheduler().set_timesteps(sigmas=[1.0, 2.0, 0.0])
    with pytest.raises(InputError, match="use_flow_sigmas=True only"):
        suffuse.UniPCMultistepScheduler().set_timesteps(sigmas=[1.0, 0.5])


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"])
@pytest.mark.parametrize("timestep", [3, torch.tensor(3)])
def test_indices_are_no_timesteps(name: str, timestep: Any) -> None:
    scheduler = getattr(suffuse, name)()
    scheduler.set_timesteps(5)
    with pytest.raises(InputError, match="not its index"):
        scheduler.step(SAMPLE, timestep, SAMPLE)


@pytest.mark.parametrize("name", [n for n in NAMES if n.endswith("DiscreteScheduler")])
def test_timesteps_of_another_schedule(name: str) -> None:
    scheduler = getattr(suffuse, name)()
    scheduler.set_timesteps(5)
    with pytest.raises(InputError, match=r"timestep 123.5 is not one of scheduler.timesteps"):
        scheduler.scale_model_input(SAMPLE, 123.5)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
def test_timesteps_that_no_model_was_trained_on(name: str) -> None:
    scheduler = getattr(suffuse, name)()
    scheduler.set_timesteps(5)
    for timestep in (1000, -1):
        with pytest.raises(InputError, match="outside of the training timesteps"):
            scheduler.step(SAMPLE, timestep, SAMPLE)
        with pytest.raises(InputError, match="outside of the training timesteps"):
            scheduler.add_noise(SAMPLE, SAMPLE, torch.tensor([timestep]))
    with pytest.raises(InputError, match="one timestep for the whole batch"):
        scheduler.step(SAMPLE, torch.tensor([1, 2]), SAMPLE)


def test_ddpm_wants_timesteps_of_its_schedule() -> None:
    scheduler = suffuse.DDPMScheduler()
    scheduler.set_timesteps(5)
    with pytest.raises(InputError, match=r"timestep 7 is not one of scheduler.timesteps"):
        scheduler.step(SAMPLE, 7, SAMPLE)


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith(("DDIM", "DDPM", "PNDM"))])
def test_more_steps_than_the_run_has(name: str) -> None:
    scheduler = getattr(suffuse, name)()
    scheduler.set_timesteps(2)
    for timestep in scheduler.timesteps:
        scheduler.scale_model_input(SAMPLE, timestep)
        scheduler.step(SAMPLE, timestep, SAMPLE)
    with pytest.raises(InputError, match="steps of the run are taken"):
        scheduler.step(SAMPLE, scheduler.timesteps[-1], SAMPLE)


def test_unscaled_input_is_warned_about() -> None:
    for name in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler"):
        scheduler = getattr(suffuse, name)()
        scheduler.set_timesteps(2)
        with pytest.warns(UserWarning, match="call scale_model_input before the model"):
            scheduler.step(SAMPLE, scheduler.timesteps[0], SAMPLE)


def test_pndm_out_of_order() -> None:
    with pytest.raises(InputError, match="PNDM needs 4 steps to warm up"):
        suffuse.PNDMScheduler().set_timesteps(3)
    scheduler = suffuse.PNDMScheduler()
    scheduler.set_timesteps(5)
    with pytest.raises(InputError, match="step_plms needs three noise estimates"):
        scheduler.step_plms(SAMPLE, scheduler.timesteps[0], SAMPLE)


def test_noise_from_two_sources() -> None:
    scheduler = suffuse.DDIMScheduler()
    scheduler.set_timesteps(2)
    with pytest.raises(InputError, match="generator and variance_noise cannot both be given"):
        scheduler.step(SAMPLE, 500, SAMPLE, eta=1.0, generator=torch.Generator(), variance_noise=SAMPLE)


def test_a_learned_variance_that_is_not_there() -> None:
    scheduler = suffuse.DDPMScheduler(variance_type="learned")
    scheduler.set_timesteps(2)
    with pytest.raises(InputError, match="twice the channels"):
        scheduler.step(SAMPLE, 500, SAMPLE)


@pytest.mark.parametrize("eta", [-0.1, 1.5, float("nan")])
def test_eta_out_of_range(eta: float) -> None:
    scheduler = suffuse.DDIMScheduler()
    scheduler.set_timesteps(2)
    with pytest.raises(InputError, match="eta is not possible"):
        scheduler.step(SAMPLE, 500, SAMPLE, eta=eta)


def test_lms_order() -> None:
    scheduler = suffuse.LMSDiscreteScheduler()
    scheduler.set_timesteps(2)
    with pytest.raises(InputError, match="order is not possible"):
        scheduler.step(SAMPLE, scheduler.timesteps[0], SAMPLE, order=0)


@pytest.mark.parametrize("name", ["LMSDiscreteScheduler", "EulerDiscreteScheduler"])
def test_without_scipy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(MissingPackageError, match=r'needs the package scipy(.|\n)*pip install "suffuse\[lms\]"'):
        scheduler = getattr(suffuse, name)(use_beta_sigmas=name.startswith("Euler"))
        scheduler.set_timesteps(2)
        scheduler.scale_model_input(SAMPLE, scheduler.timesteps[0])
        scheduler.step(SAMPLE, scheduler.timesteps[0], SAMPLE)


@pytest.mark.parametrize("name", ["DPMSolverSDEScheduler", "CosineDPMSolverMultistepScheduler"])
def test_without_torchsde(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchsde", None)
    scheduler = getattr(suffuse, name)()
    scheduler.set_timesteps(2)
    with pytest.raises(MissingPackageError, match=r'needs the package torchsde(.|\n)*pip install "suffuse\[sde\]"'):
        scheduler.step(SAMPLE, scheduler.timesteps[0], SAMPLE)


def test_seeds_for_another_batch() -> None:
    scheduler = suffuse.CosineDPMSolverMultistepScheduler()
    scheduler.set_timesteps(2)
    with pytest.raises(InputError, match="2 generators for a batch of 1"):
        scheduler.step(SAMPLE, scheduler.timesteps[0], SAMPLE, generator=[torch.Generator(), torch.Generator()])
    with pytest.raises(ConfigError, match="solver_order is not possible"):
        suffuse.CosineDPMSolverMultistepScheduler(solver_order=3)


def test_dynamic_shifting_needs_mu() -> None:
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    with pytest.raises(InputError, match="needs mu"):
        suffuse.UniPCMultistepScheduler(**flow, use_dynamic_shifting=True).set_timesteps(5)
    with pytest.raises(InputError, match="mu is for use_dynamic_shifting=True"):
        suffuse.DPMSolverMultistepScheduler(**flow).set_timesteps(5, mu=0.5)


def test_files(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no file"):
        suffuse.DDIMScheduler.from_pretrained(tmp_path)
    suffuse.DDIMScheduler(beta_start=0.001).save_pretrained(tmp_path / "scheduler")
    with pytest.raises(UnknownArgumentError, match="did you mean 'steps_offset'"):
        suffuse.DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler", step_offset=1)
    scheduler, unused = suffuse.DDIMScheduler.from_pretrained(
        tmp_path, subfolder="scheduler", return_unused_kwargs=True, steps_offset=1, other=2
    )
    assert (scheduler.config.beta_start, scheduler.config.steps_offset, unused["other"]) == (0.001, 1, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        euler = suffuse.EulerDiscreteScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert euler.config.set_alpha_to_one is True


def test_timesteps_that_no_consistency_model_was_distilled_on() -> None:
    scheduler = suffuse.LCMScheduler()
    with pytest.warns(UserWarning, match=r"not distilled on timesteps \[500\]"):
        scheduler.set_timesteps(timesteps=[999, 500, 19])
    with pytest.raises(InputError, match="more than the 25 timesteps to choose from"):
        scheduler.set_timesteps(30, strength=0.5)
    with pytest.raises(InputError, match="original_inference_steps is not possible"):
        scheduler.set_timesteps(4, original_inference_steps=2000)
    with pytest.raises(InputError, match="strength is not possible"):
        scheduler.set_timesteps(4, strength=0.0)


def test_unclip_goes_down() -> None:
    scheduler = suffuse.UnCLIPScheduler()
    with pytest.raises(InputError, match="num_inference_steps is not possible"):
        scheduler.set_timesteps(1)
    with pytest.raises(InputError, match="prev_timestep is not possible"):
        scheduler.step(SAMPLE, 5, SAMPLE, prev_timestep=5)
    with pytest.raises(InputError, match="twice the channels"):
        suffuse.UnCLIPScheduler(variance_type="learned_range").step(SAMPLE, 5, SAMPLE)


def test_deis_has_no_stochastic_kind() -> None:
    with pytest.raises(ConfigError, match="algorithm_type has the wrong type"):
        suffuse.DEISMultistepScheduler(algorithm_type="sde-dpmsolver++")
    with pytest.raises(ConfigError, match="solver_order is not possible"):
        suffuse.DEISMultistepScheduler(solver_order=4)
