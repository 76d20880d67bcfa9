"""Pictures drawn after pictures equal the peer's, bit for bit."""

from __future__ import annotations

import copy
import warnings

import pytest
import safetensors.torch
import torch
from factors import adapter
from image_weights import FACE, image_encoder, ip_adapter, nested
from tasks import CONTROLLED, align, call, difference, pair, picture, set_scheduler

import suffuse

TASKS = [
    "text", "image", "inpaint", "inpaint9", "xl text", "xl image", "xl inpaint",
    "control text", "control image", "control inpaint", "control xl text", "control xl image",
]  # fmt: skip
KINDS = ["plain", "full", "plus", "plus of other names"]
PICTURE = picture(40, 50, seed=9)


@pytest.fixture(autouse=True)
def quiet_peer():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="diffusers.*")
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


class Pipes:
    """The peer's pipeline and ours for one task, with the same adapters."""

    def __init__(self, task: str, *adapters: dict[str, torch.Tensor], fresh: bool = False) -> None:
        # Low-rank adapters leave traces in the peer's models.
        self.task, self.pair = task, pair.__wrapped__(task) if fresh else pair(task)
        set_scheduler(self.pair, "DDIMScheduler")
        peer, ours = self.pair
        for pipe in self.pair:
            pipe.register_modules(image_encoder=copy.deepcopy(image_encoder()))
        peer.load_ip_adapter([nested(own) for own in adapters], "", [""] * len(adapters))
        ours.load_ip_adapter(list(adapters), "", "")
        if len(adapters) > 1:  # of several, the peer takes no scale for all
            self.scale([1.0] * len(adapters))
        align(peer)

    def scale(self, scale) -> None:
        for pipe in self.pair:
            pipe.set_ip_adapter_scale(copy.deepcopy(scale))

    def difference(self, **options) -> float:
        made = [call(pipe, self.task, **options) for pipe in self.pair]
        return difference(*made)

    def unload(self) -> None:
        for pipe in self.pair:
            pipe.unload_ip_adapter()
            pipe.register_modules(image_encoder=None)


@pytest.fixture
def pipes():
    made = []

    def make(task: str, *adapters: dict[str, torch.Tensor], **options: bool) -> Pipes:
        made.append(Pipes(task, *adapters, **options))
        return made[-1]

    yield make
    for own in made:
        own.unload()


def unet(task: str):
    return pair(task)[0].unet


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", TASKS)
def test_every_kind_in_every_pipeline(pipes, task, kind):
    assert pipes(task, ip_adapter(unet(task), kind)).difference(ip_adapter_image=PICTURE) == 0


OPTIONS = {
    "no guidance": {"guidance_scale": 1.0},
    "two prompts": {"prompt": ["a cat", "a dog"]},
    "several": {"num_images_per_prompt": 2},
    "several pictures": {"ip_adapter_image": [[PICTURE, picture(seed=2)]]},
    "a tensor": {"ip_adapter_image": torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", ["plain", "plus"])
@pytest.mark.parametrize("task", ["text", "xl text"])
def test_every_option(pipes, task, kind, option):
    own = pipes(task, ip_adapter(unet(task), kind))
    assert own.difference(**{"ip_adapter_image": PICTURE, **OPTIONS[option]}) == 0


SCALES = {
    "a number": 0.4,
    "zero": 0.0,
    "by block": {"down": {"block_1": [0.3]}, "up": 0.8},
    "one block": {"up": {"block_0": [0.0, 1.5]}},
    "middle": {"mid": 2.0},
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("task", ["text", "xl text"])
def test_scales(pipes, task, scale):
    own = pipes(task, ip_adapter(unet(task)))
    own.scale(SCALES[scale])
    assert own.difference(ip_adapter_image=PICTURE) == 0


@pytest.mark.parametrize("scales", [[0.5, 1.2], [0.0, 1.0], [{"up": 1.0}, {"down": 0.7, "mid": 0.1}]])
@pytest.mark.parametrize("kinds", [("plain", "plus"), ("full", "full")])
def test_two_adapters(pipes, kinds, scales):
    own = pipes("text", *(ip_adapter(unet("text"), kind, seed) for seed, kind in enumerate(kinds)))
    pictures = [PICTURE, [picture(seed=2), picture(seed=3)]]
    assert own.difference(ip_adapter_image=pictures) == 0
    own.scale(scales)
    assert own.difference(ip_adapter_image=pictures) == 0


@pytest.mark.parametrize("scales", [0.7, [[0.7, 0.2]]])
def test_masks(pipes, scales):
    own = pipes("text", ip_adapter(unet("text"), "plus"))
    own.scale(scales)
    masks = torch.zeros(1, 2, 64, 48)
    masks[:, 0, :, :20], masks[:, 1, 30:] = 1, 1
    pictures = {"ip_adapter_image": [[PICTURE, picture(seed=2)]]}
    assert own.difference(**pictures, cross_attention_kwargs={"ip_adapter_masks": [masks]}) == 0


def test_masks_for_two_adapters(pipes):
    own = pipes("text", *(ip_adapter(unet("text"), seed=seed) for seed in range(2)))
    masks = torch.zeros(2, 1, 64, 48)
    masks[0, :, :20], masks[1, :, 30:] = 1, 1
    assert own.difference(ip_adapter_image=[PICTURE, PICTURE], cross_attention_kwargs={"ip_adapter_masks": masks}) == 0


def test_a_low_rank_adapter_at_the_same_time(pipes):
    own = pipes("text", ip_adapter(unet("text")), fresh=True)
    factors = adapter(own.pair[1], components=("unet",))
    for pipe in own.pair:
        pipe.load_lora_weights(factors)
    assert own.difference(ip_adapter_image=PICTURE) == 0
    assert own.difference(ip_adapter_image=PICTURE, cross_attention_kwargs={"scale": 0.5}) == 0


def test_free_u_at_the_same_time(pipes):
    own = pipes("text", ip_adapter(unet("text")))
    for pipe in own.pair:
        pipe.enable_freeu(0.9, 0.2, 1.2, 1.4)
    assert own.difference(ip_adapter_image=PICTURE) == 0
    for pipe in own.pair:
        pipe.disable_freeu()


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_image_encoder_says(pipes, kind):
    own = pipes("text", ip_adapter(unet("text"), kind))
    said = [pipe.prepare_ip_adapter_image_embeds([[PICTURE, PICTURE]], None, "cpu", 3, True) for pipe in own.pair]
    assert [len(each) for each in said] == [1, 1]
    assert difference(said[0][0], said[1][0]) == 0


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_files(pipes, tmp_path, suffix):
    own = pipes("text", ip_adapter(unet("text"), seed=1))
    tensors = ip_adapter(unet("text"), "plus", seed=2)
    (tmp_path / "models").mkdir()
    if suffix == "bin":
        torch.save(nested(tensors), tmp_path / "models" / "adapter.bin")
    else:
        safetensors.torch.save_file(tensors, tmp_path / "models" / "adapter.safetensors")
    image_encoder().save_pretrained(tmp_path / "models" / "image_encoder")
    own.unload()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is a pickle")
        for pipe in own.pair:
            pipe.load_ip_adapter(str(tmp_path), subfolder="models", weight_name=f"adapter.{suffix}")
    align(own.pair[0])
    assert own.difference(ip_adapter_image=PICTURE) == 0


@pytest.mark.parametrize("rank", [0, 4])
def test_faces(pipes, rank):
    own = pipes("text", ip_adapter(unet("text"), "face", rank=rank), fresh=True)
    said = torch.randn(2, 1, FACE, generator=torch.Generator().manual_seed(3))
    assert own.difference(ip_adapter_image_embeds=[said]) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_embeddings_instead_of_pictures(pipes, kind, guidance_scale):
    own = pipes("text", ip_adapter(unet("text"), kind))
    said = own.pair[1].prepare_ip_adapter_image_embeds([[PICTURE]], None, "cpu", 1, guidance_scale > 1)
    assert own.difference(ip_adapter_image_embeds=said, guidance_scale=guidance_scale) == 0
    with_pictures = call(own.pair[1], "text", ip_adapter_image=PICTURE, guidance_scale=guidance_scale)
    assert difference(call(own.pair[1], "text", ip_adapter_image_embeds=said, guidance_scale=guidance_scale), with_pictures) == 0


@pytest.mark.parametrize("task", ["control inpaint", "controls xl inpaint"])
def test_text_to_image_with_all_values_is_the_class_with_all_of_them(pipes, task):
    peer, ours = pipes(task, ip_adapter(unet(task), "plus")).pair
    shown = {"ip_adapter_image": picture(seed=5), "strength": 0.7, "controlnet_conditioning_scale": 0.6, "guidance_scale": 6.0}
    theirs = call(peer, task, **shown)
    plain = getattr(suffuse, "StableDiffusionXLPipeline" if "xl" in task else "StableDiffusionPipeline").from_pipe(ours)
    seeded = {"generator": torch.Generator().manual_seed(7), "num_inference_steps": 4, "output_type": "pt"}
    mine = plain("a cat", controlnet=ours.controlnet, **CONTROLLED[task].call, **shown, **seeded).images
    assert difference(theirs, mine) == 0
