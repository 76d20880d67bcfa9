"""Samplers of the package k-diffusion, of which a stand-in with its interface is here: they walk with our denoiser."""

from __future__ import annotations

import itertools
import sys
from types import ModuleType

import pytest
import torch
from tasks import difference
from test_composition import net
from test_k_diffusion import call, pair

import suffuse
from suffuse.diffusion.k_package import level_below
from suffuse.errors import InputError, MissingPackageError


def sample_levels(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Steps of Euler, each told of before it is made: the interface of most."""
    ones = x.new_ones([len(x)])
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * ones, **(extra_args or {}))
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    return x


def sample_dpm_fast(
    model, x, sigma_min, sigma_max, n, extra_args=None, callback=None, disable=None, eta=0.0, s_noise=1.0, noise_sampler=None
):
    """Fewer steps than asked for, from end to end, with noise that counts for nothing."""
    levels = torch.logspace(*torch.tensor([sigma_max, sigma_min]).log10(), n // 3 + 1)
    for i in range(len(levels) - 1):
        denoised = model(x, levels[i] * x.new_ones([len(x)]))
        callback({"x": x, "i": i, "t": -levels[i].log(), "sigma": levels[i], "denoised": denoised})
        x = x + (x - denoised) / levels[i] * (levels[i + 1] - levels[i])
        x = x + 0.0 * noise_sampler(levels[i], levels[i + 1])
    return x


def sample_dpm_adaptive(
    model, x, sigma_min, sigma_max, extra_args=None, callback=None, disable=None, rtol=0.05, eta=0.0, noise_sampler=None
):
    """Told of after each step, of which every second is not accepted."""
    levels = torch.logspace(*torch.tensor([sigma_max, sigma_min]).log10(), 4)
    for i in range(6):
        denoised = model(x, levels[i // 2] * x.new_ones([len(x)]))
        if i % 2:
            x = x + (x - denoised) / levels[i // 2] * (levels[i // 2 + 1] - levels[i // 2])
        callback({"x": x, "i": i, "sigma": levels[(i + 1) // 2], "denoised": denoised, "error": 0.0})
    return x


def sample_hot(model, x, sigmas, temperature):
    raise AssertionError("nobody calls this")


@pytest.fixture
def package(monkeypatch):
    """The stand-in; and the pipeline with samplers, as it was before."""
    sampling = ModuleType("k_diffusion.sampling")
    vars(sampling).update({own.__name__: own for own in (sample_levels, sample_dpm_fast, sample_dpm_adaptive, sample_hot)})
    monkeypatch.setitem(sys.modules, "k_diffusion", ModuleType("k_diffusion"))
    monkeypatch.setitem(sys.modules, "k_diffusion.sampling", sampling)
    pipe = pair(False)[1]
    monkeypatch.setattr(pipe, "sampler", pipe.sampler)
    return pipe


@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("xl", [False, True])
def test_its_steps_are_those_of_our_sampler(package, xl, karras, monkeypatch):
    pipe, made = pair(xl)[1], []
    monkeypatch.setattr(pipe, "sampler", pipe.sampler)
    for name in ("sample_euler", "sample_levels"):
        pipe.set_scheduler(name)
        made.append(call(pipe, use_karras_sigmas=karras, num_images_per_prompt=2))
    assert difference(*made) == 0


def listening(pipe, **options):
    """(what a call makes, what its callback was told)."""
    heard = []

    def listen(pipe, index, timestep, tensors):
        heard.append((index, float(timestep), tensors["latents"]))

    return call(pipe, output_type="latent", callback_on_step_end=listen, **options), heard


def test_each_step_is_told_of_as_our_own(package):
    told = []
    for name in ("sample_euler", "sample_levels"):
        package.set_scheduler(name)
        told.append(listening(package)[1])
    for ours, theirs in zip(*told, strict=True):
        assert ours[:2] == pytest.approx(theirs[:2], abs=1e-3)
        assert difference(ours[2], theirs[2]) == 0


@pytest.mark.parametrize("name", ["sample_dpm_fast", "sample_dpm_adaptive"])
def test_what_decides_itself_how_many_steps_there_are_is_heard_of_each(package, name):
    package.set_scheduler(name)
    made, heard = listening(package, num_inference_steps=9)
    assert [index for index, _, _ in heard] == [0, 1, 2]
    assert [timestep for _, timestep, _ in heard] == sorted((timestep for _, timestep, _ in heard), reverse=True)
    assert difference(heard[-1][2], made) == 0
    assert all(difference(one[2], other[2]) > 0 for one, other in itertools.pairwise(heard))
    assert difference(call(package, num_inference_steps=9, output_type="latent"), made) == 0


@pytest.mark.parametrize("name", ["sample_levels", "sample_dpm_fast", "sample_dpm_adaptive"])
def test_a_callback_may_end_the_way(package, name):
    package.set_scheduler(name)
    _, whole = listening(package, num_inference_steps=9)
    heard = []

    def listen(pipe, index, timestep, tensors):
        heard.append(tensors["latents"])
        pipe._interrupt = index == 1

    made = call(package, num_inference_steps=9, output_type="latent", callback_on_step_end=listen)
    assert len(heard) == 2
    assert difference(made, whole[1][2]) == 0


def test_the_bar_counts_steps(package, monkeypatch):
    counts = []

    class Bar:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self):
            counts.append(1)

    monkeypatch.setattr(package, "progress_bar", lambda **_: Bar())
    package.set_scheduler("sample_dpm_adaptive")
    call(package, num_inference_steps=2)
    assert len(counts) == 3


def test_guidance_may_change_on_the_way(package):
    package.set_scheduler("sample_levels")

    def change(pipe, index, timestep, tensors):
        pipe._guidance_scale = 2.0

    changed = call(package, callback_on_step_end=change)
    assert difference(changed, call(package)) > 1e-4
    package.set_scheduler("sample_euler")
    # By then it has the prediction of the next step already: a change counts one step later than with our own.
    assert difference(changed, call(package, callback_on_step_end=change)) > 0


def test_control_acts_in_its_part_of_the_way(package):
    made, given = [], {"controlnet": net(False), "control_image": torch.rand(1, 3, 64, 48), "control_guidance_end": 0.4}
    for name in ("sample_euler", "sample_levels"):
        package.set_scheduler(name)
        made.append(call(package, **given, control_guidance_start=0.2))
    assert difference(*made) == 0
    package.set_scheduler("sample_dpm_fast")
    assert difference(call(package, **given), call(package)) > 1e-4


def test_a_level_lies_in_the_step_that_begins_above_it():
    sigmas = torch.tensor([10.0, 5.0, 2.0, 0.0])
    assert [level_below(sigmas, torch.tensor(at)) for at in (11.0, 10.0001, 10.0, 7.0, 5.0, 4.9, 2.0, 0.5)] == [
        0,
        0,
        0,
        0,
        1,
        1,
        2,
        2,
    ]


def test_half_precision_keeps_exact_levels(package, tmp_path):
    package.save_pretrained(tmp_path / "saved")
    half = suffuse.DiffusionPipeline.from_pretrained(tmp_path / "saved", torch_dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    for pipe in (half, package):
        pipe.set_scheduler("sample_dpm_fast")
    made, heard = listening(half)
    assert heard[0][2].dtype == made.dtype == torch.bfloat16
    assert difference(call(half), call(package)) < 0.1


# ---------------------------------------------------------------- what cannot be


def test_it_cannot_be_saved_on_the_way(package, tmp_path):
    package.set_scheduler("sample_dpm_fast")
    generator = torch.Generator().manual_seed(7)
    before = generator.get_state()
    with pytest.raises(InputError, match=r"save_run is given, and what sample_dpm_fast remembers(.|\n)*sample_dpmpp_2m"):
        call(package, save_run=tmp_path / "run", generator=generator)
    assert torch.equal(generator.get_state(), before)
    assert not [*tmp_path.iterdir()]


def test_a_run_of_our_sampler_goes_on_with_it(package, tmp_path):
    package.set_scheduler("sample_dpmpp_2m")
    made = call(package, save_run=tmp_path / "{step}.run")
    package.set_scheduler("sample_dpm_fast")
    again = package(resume=tmp_path / "2.run", save_run=tmp_path / "again-{step}.run")[0]
    assert difference(again, made) == 0
    assert (tmp_path / "again-3.run").exists()


def test_latents_that_are_replaced_are_refused(package):
    package.set_scheduler("sample_levels")
    with pytest.raises(InputError, match=r"latents were replaced on the way, and sample_levels would not know"):
        call(package, callback_on_step_end=lambda *told: {"latents": told[3]["latents"] * 2})


def test_a_sampler_that_asks_for_more_is_refused(package):
    with pytest.raises(InputError, match="sample_hot asks for temperature, which no pipeline has"):
        package.set_scheduler("sample_hot")


def test_names_of_the_package_are_told(package):
    for name in ("sample_level", "level_below", "torch"):
        with pytest.raises(InputError, match=rf"there is no sampler '{name}'(.|\n)*sample_dpmpp_2m(.|\n)*sample_levels"):
            package.set_scheduler(name)


@pytest.mark.parametrize("name", ["sample_dpm_fast", "sample_dpm_adaptive"])
def test_without_the_package_it_is_asked_for(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "k_diffusion", None)
    pipe = pair(False)[1]
    with pytest.raises(MissingPackageError, match=rf'{name} is a sampler of the package k-diffusion(.|\n)*pip install "suffuse'):
        pipe.set_scheduler(name)


def test_a_package_that_is_gone_is_told_before_anything_is_computed(package, monkeypatch):
    package.set_scheduler("sample_dpm_fast")
    monkeypatch.setitem(sys.modules, "k_diffusion.sampling", None)
    monkeypatch.setattr(package.unet, "forward", None)
    with pytest.raises(MissingPackageError, match="sample_dpm_fast"):
        call(package)
