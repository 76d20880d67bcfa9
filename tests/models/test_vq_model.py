"""The autoencoder with a codebook: equal to the peer's, bit for bit."""

from __future__ import annotations

import diffusers
import pytest
import torch
from model_pairs import pair
from unet_options import noise

import suffuse
from suffuse.errors import ConfigError, InputError

SMALL = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "num_vq_embeddings": 32,
}
KINDS = {
    "plain": SMALL,
    "another width": SMALL | {"vq_embed_dim": 5},
    "no attention": SMALL | {"mid_block_add_attention": False},
    "spatial": SMALL | {"norm_type": "spatial", "latent_channels": 4},
    "indices": SMALL | {"lookup_from_codebook": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(32, 32), (40, 24)], ids=str)
def test_pictures_and_latents_equal_the_peers(kind, size):
    ours, peer = pair("VQModel", **KINDS[kind])
    pictures = noise(2, 3, *size)
    with torch.no_grad():
        assert torch.equal(ours.encode(pictures).latents, peer.encode(pictures).latents)
        got, want = ours(pictures), peer(pictures)
        assert torch.equal(got.sample, want.sample)
        assert torch.equal(got.commit_loss, want.commit_loss)
        latents = peer.encode(pictures).latents
        if kind == "indices":
            indices = torch.arange(2 * 4 * 4) % 32
            shape = (2, 4, 4, 3)
            assert torch.equal(ours.decode(indices, True, shape=shape).sample, peer.decode(indices, True, shape=shape).sample)
        else:
            assert torch.equal(ours.decode(latents, True).sample, peer.decode(latents, True).sample)


def test_gradients_pass_the_codebook():
    ours, peer = pair("VQModel", **SMALL)
    for model in (ours, peer):
        output = model(noise(1, 3, 16, 16))
        (output.sample.sum() + output.commit_loss).backward()
    wanted = dict(peer.named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.allclose(parameter.grad, wanted[name].grad, rtol=1e-4, atol=1e-4), name


def test_folders_go_both_ways(tmp_path):
    ours, peer = pair("VQModel", **SMALL)
    ours.save_pretrained(tmp_path / "ours")
    peer.save_pretrained(tmp_path / "peers")
    picture = noise(1, 3, 16, 16)
    with torch.no_grad():
        wanted = peer(picture).sample
        assert torch.equal(suffuse.VQModel.from_pretrained(tmp_path / "peers").eval()(picture).sample, wanted)
        assert (diffusers.VQModel.from_pretrained(tmp_path / "ours").eval()(picture).sample - wanted).abs().max() < 1e-5


def test_what_cannot_be():
    with pytest.raises(ConfigError, match="num_vq_embeddings must be at least 1"):
        suffuse.VQModel(num_vq_embeddings=0)
    with pytest.raises(ConfigError, match="norm_type has the wrong type"):
        suffuse.VQModel(norm_type="layer")
    with pytest.raises(InputError, match=r"latents have the wrong shape(.|\n)*\(batch, 3, height, width\)"):
        suffuse.VQModel(**SMALL).decode(noise(1, 4, 8, 8))
