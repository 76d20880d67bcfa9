"""T2I-Adapters: features equal the peer's, bit for bit, and folders go both ways."""

from __future__ import annotations

import diffusers
import pytest
import torch
from model_pairs import pair
from unet_options import noise

import suffuse
from suffuse.errors import ConfigError, InputError

SMALL = {"channels": [8, 16, 16, 24], "num_res_blocks": 2, "downscale_factor": 4}
KINDS = {
    "full": {**SMALL},
    "full, one": {**SMALL, "channels": [8]},
    "gray": {**SMALL, "in_channels": 1},
    "xl": {**SMALL, "adapter_type": "full_adapter_xl", "downscale_factor": 8, "channels": [8, 16, 24, 24]},
    "light": {**SMALL, "adapter_type": "light_adapter", "channels": [8, 16, 24]},
}


def same(got, want):
    return len(got) == len(want) and all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(32, 32), (40, 56)], ids=str)
def test_features_equal_the_peers(kind, size):
    ours, peer = pair("T2IAdapter", **KINDS[kind])
    picture = noise(2, KINDS[kind].get("in_channels", 3), *size)
    with torch.no_grad():
        assert same(ours(picture), peer(picture))
    assert (ours.total_downscale_factor, ours.downscale_factor) == (peer.total_downscale_factor, peer.downscale_factor)


@pytest.mark.parametrize("weights", [None, [0.3, 0.9]], ids=str)
def test_several_add_up_as_the_peers(weights):
    ours, peers = zip(*(pair("T2IAdapter", **KINDS["full"]) for _ in range(2)), strict=True)
    pictures = [noise(1, 3, 32, 32), noise(1, 3, 32, 32).flip(3)]
    with torch.no_grad():
        got = suffuse.MultiAdapter(ours)(pictures, weights)
        want = diffusers.MultiAdapter(list(peers))(pictures, weights)
    assert same(got, want)


@pytest.mark.parametrize("kind", KINDS)
def test_folders_go_both_ways(kind, tmp_path):
    ours, peer = pair("T2IAdapter", **KINDS[kind])
    ours.save_pretrained(tmp_path / "ours")
    peer.save_pretrained(tmp_path / "peers")
    picture = noise(1, KINDS[kind].get("in_channels", 3), 32, 32)
    with torch.no_grad():
        assert same(diffusers.T2IAdapter.from_pretrained(tmp_path / "ours")(picture), peer(picture))
        assert same(suffuse.T2IAdapter.from_pretrained(tmp_path / "peers")(picture), ours(picture))


def test_what_cannot_be():
    with pytest.raises(ConfigError, match="adapter_type has the wrong type"):
        suffuse.T2IAdapter(adapter_type="heavy_adapter")
    with pytest.raises(ConfigError, match="the same from the third on"):
        suffuse.T2IAdapter(channels=[8, 8, 16, 24], adapter_type="full_adapter_xl")
    with pytest.raises(ConfigError, match="downscale_factor must be at least 1"):
        suffuse.T2IAdapter(downscale_factor=0)
    adapter = suffuse.T2IAdapter(**SMALL)
    with pytest.raises(InputError, match="cannot take this control picture"):
        adapter(noise(1, 3, 30, 32))
    with pytest.raises(ConfigError, match="two adapters or more"):
        suffuse.MultiAdapter([adapter])
    with pytest.raises(ConfigError, match="shrink pictures differently"):
        suffuse.MultiAdapter([adapter, suffuse.T2IAdapter(**KINDS["xl"])])
    with pytest.raises(InputError, match="adapter_weights: 1 given for 2 adapters"):
        suffuse.MultiAdapter([adapter, adapter])([noise(1, 3, 32, 32)] * 2, [1.0])
