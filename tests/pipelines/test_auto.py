"""A task picks the class: from a folder and from another pipeline, in every direction."""

from __future__ import annotations

import itertools
import shutil
import warnings

import diffusers
import pytest
import torch
from diffusers.pipelines import auto_pipeline
from tasks import call, difference, folder, pair

import suffuse
from suffuse.errors import ConfigError, InputError, MissingFileError, UnknownArgumentError
from suffuse.pipelines import auto
from suffuse.public_names import PUBLIC

AUTO = {kind.task: kind for kind in auto.AutoPipeline.__subclasses__()}
PEER = {
    "text_to_image": auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
    "image_to_image": auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
    "inpainting": auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING,
}
CALL = {"text_to_image": "text", "image_to_image": "image", "inpainting": "inpaint"}


def test_every_public_class_that_the_peer_picks_is_in_the_table():
    known = {getattr(family, task) for family in auto.FAMILIES for task in AUTO}
    theirs = {kind.__name__ for mapping in PEER.values() for kind in mapping.values()}
    assert theirs & PUBLIC.keys() <= known


@pytest.mark.parametrize("family", auto.FAMILIES, ids=lambda family: f"{family.name}{' controlnet' * family.controlnet}")
def test_the_table_pairs_what_the_peers_pairs(family):
    for task, mapping in PEER.items():
        keys = {name: kind.__name__ for name, kind in mapping.items()}
        ours = getattr(family, task)
        others = {getattr(family, other) for other in AUTO if other != task}
        for key, name in keys.items():
            partners = {mapping[key].__name__ for other, mapping in PEER.items() if other != task and key in mapping}
            if name == ours:
                assert partners <= others


@pytest.mark.parametrize("task", AUTO)
def test_a_folder_becomes_the_pipeline_of_the_task(task):
    ours = AUTO[task].from_pretrained(folder("text"))
    theirs = getattr(diffusers, AUTO[task].__name__).from_pretrained(folder("text"))
    assert type(ours).__name__ == type(theirs).__name__
    for pipe in (ours, theirs):
        pipe.set_progress_bar_config(disable=True)
    assert difference(call(ours, CALL[task]), call(theirs, CALL[task])) < 1e-5


@pytest.mark.parametrize(("source", "target"), list(itertools.product(AUTO, AUTO)))
def test_from_pipe_goes_in_every_direction_and_shares(source, target):
    first = AUTO[source].from_pretrained(folder("text"))
    second = AUTO[target].from_pipe(first)
    assert type(second).__name__ == getattr(auto.FAMILIES[0], target)
    assert all(second.components[name] is component for name, component in first.components.items() if name != "scheduler")
    assert second.config.requires_safety_checker is False


@pytest.mark.parametrize("name", ["LatentConsistencyModel", "AltDiffusion"])
def test_families_of_two_tasks(name):
    first = getattr(suffuse, f"{name}Pipeline").from_pipe(pair("text")[1])
    second = suffuse.AutoPipelineForImage2Image.from_pipe(first)
    assert type(second).__name__ == f"{name}Img2ImgPipeline"
    assert all(second.components[part] is first.components[part] for part in ("unet", "vae", "text_encoder"))
    assert type(suffuse.AutoPipelineForText2Image.from_pipe(second)) is type(first)
    with pytest.raises(ConfigError, match=r"has no pipeline for inpainting(.|\n)*\['text_to_image', 'image_to_image'\]"):
        suffuse.AutoPipelineForInpainting.from_pipe(first)
    with pytest.raises(ConfigError, match="takes no controlnet"):
        suffuse.AutoPipelineForText2Image.from_pipe(first, controlnet=object())


def test_a_component_given_replaces_the_shared_one():
    _, ours = pair("text")
    other = suffuse.AutoencoderKL.from_config(ours.vae.config)
    assert suffuse.AutoPipelineForImage2Image.from_pipe(ours, vae=other).vae is other


def test_a_pipeline_of_no_family_is_told():
    _, depth = pair("depth")
    with pytest.raises(ConfigError, match=r"the pipeline is a 'StableDiffusionDepth2ImgPipeline', of which no family"):
        suffuse.AutoPipelineForText2Image.from_pipe(depth)


@pytest.mark.parametrize("way", ["from_pretrained", "from_pipe"])
def test_a_controlnet_picks_the_class_that_takes_one(way, monkeypatch):
    controlled = auto.Family("Stable Diffusion", "StableDiffusionImg2ImgPipeline", None, None, controlnet=True)
    plain = [family for family in auto.FAMILIES if not family.controlnet]
    monkeypatch.setattr(auto, "FAMILIES", (*plain, controlled))
    source = folder("text") if way == "from_pretrained" else pair("text")[1]
    with pytest.raises(UnknownArgumentError, match=r"StableDiffusionImg2ImgPipeline.from_p.*controlnet"):
        getattr(suffuse.AutoPipelineForText2Image, way)(source, controlnet=object())
    with pytest.raises(ConfigError, match=r"Stable Diffusion with a ControlNet has no pipeline for inpainting"):
        getattr(suffuse.AutoPipelineForInpainting, way)(source, controlnet=object())
    assert (
        type(suffuse.AutoPipelineForText2Image.from_pipe(pair("text")[1], controlnet=None)).__name__ == "StableDiffusionPipeline"
    )


def test_what_cannot_be_picked_is_told(tmp_path):
    with pytest.raises(InputError, match=r"picks a class and is none itself(.|\n)*AutoPipelineForInpainting.from_pretrained"):
        suffuse.AutoPipelineForInpainting()
    with pytest.raises(MissingFileError):
        suffuse.AutoPipelineForInpainting.from_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipelin"}')
    with pytest.raises(ConfigError, match=r"did you mean 'StableDiffusionPipeline'"):
        suffuse.AutoPipelineForInpainting.from_pretrained(tmp_path)
    with pytest.raises(UnknownArgumentError, match=r"did you mean 'safety_checker'"):
        suffuse.AutoPipelineForImage2Image.from_pipe(pair("text")[1], safty_checker=None)


@pytest.fixture(autouse=True)
def quiet_peer():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="diffusers.*")
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


class Combined(suffuse.DiffusionPipeline):
    """Needs a UNet of its own and one of another checkpoint."""

    _load_connected_pipes = True

    def __init__(self, unet, scheduler, prior_unet, prior_scheduler):
        self.register_modules(unet=unet, scheduler=scheduler, prior_unet=prior_unet, prior_scheduler=prior_scheduler)


@pytest.mark.filterwarnings("ignore:.*no use for")
def test_a_combined_pipeline_loads_what_the_model_card_names(tmp_path):
    decoder = shutil.copytree(folder("text"), tmp_path / "decoder")
    (decoder / "README.md").write_text(f"---\nprior:\n- {folder('text')}\n---\n# A decoder\n")
    pipe = Combined.from_pretrained(decoder)
    assert torch.equal(pipe.prior_unet.conv_in.weight, pipe.unet.conv_in.weight)
    assert pipe.prior_unet is not pipe.unet
    ours = pipe.unet
    assert Combined.from_pretrained(decoder, prior_unet=ours, torch_dtype=torch.bfloat16).prior_unet is ours
    (decoder / "README.md").write_text("---\nprior: 3\n---\n")
    with pytest.raises(ConfigError, match="prior names no checkpoint"):
        Combined.from_pretrained(decoder)
    (decoder / "README.md").unlink()
    assert Combined.from_pretrained(decoder).prior_unet is None
