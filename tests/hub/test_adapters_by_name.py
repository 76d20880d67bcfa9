from __future__ import annotations

import sys
from pathlib import Path

import diffusers
import pytest
import safetensors.torch

import suffuse
from suffuse.errors import MissingFileError

sys.path.append(str(Path(__file__).parent.parent / "adapters"))

from image_weights import FEATURES, image_encoder, ip_adapter

NAME = "org/pictures"


@pytest.fixture
def pipe(tiny_folder):
    return suffuse.StableDiffusionPipeline.from_pretrained(tiny_folder)


@pytest.fixture
def pictures(hub, tiny_folder, tmp_path):
    """A repository laid out as that of the IP-Adapters, with several adapters and other things."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(tiny_folder, subfolder="unet")
    folder = tmp_path / "repository"
    (folder / "models").mkdir(parents=True)
    for number, name in enumerate(("plain", "plus")):
        safetensors.torch.save_file(ip_adapter(unet, name, number), folder / "models" / f"ip-adapter_{name}.safetensors")
    image_encoder().save_pretrained(folder / "models" / "image_encoder")
    (folder / "sdxl_models").mkdir()
    (folder / "sdxl_models" / "ip-adapter_sdxl.bin").write_bytes(b"x")
    hub.add_folder(NAME, folder)
    return hub


def test_an_ip_adapter_is_loaded_by_name_with_only_the_files_it_needs(pictures, pipe):
    pipe.load_ip_adapter(NAME, subfolder="models", weight_name="ip-adapter_plain.safetensors")
    assert pipe.image_encoder.config.projection_dim == FEATURES
    assert pictures.fetched() == {
        "models/ip-adapter_plain.safetensors",
        "models/image_encoder/config.json",
        "models/image_encoder/model.safetensors",
    }


def test_several_of_one_repository_share_the_image_encoder(pictures, pipe):
    names = ["ip-adapter_plain.safetensors", "ip-adapter_plus.safetensors"]
    pipe.load_ip_adapter(NAME, "models", names, image_encoder_folder="models/image_encoder")
    assert pictures.fetched() >= {f"models/{name}" for name in names}
    assert pipe.image_encoder is not None


def test_a_file_that_is_not_there_is_told(pictures, pipe):
    with pytest.raises(MissingFileError, match=r"ip-adapter_full(.|\n)*ip-adapter_plus"):
        pipe.load_ip_adapter(NAME, "models", "ip-adapter_full.safetensors")
    with pytest.raises(MissingFileError, match="no folder 'models/vision'"):
        pipe.load_ip_adapter(NAME, "models", "ip-adapter_plus.safetensors", image_encoder_folder="vision")
    assert pipe.image_encoder is None
