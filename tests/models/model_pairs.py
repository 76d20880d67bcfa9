"""The same tiny model twice, ours and the peer's, with the same weights."""

import diffusers
import torch

import suffuse

torch.set_num_threads(1)


def pair(name, dtype=torch.float32, **config):
    """Ours and the peer's model of a class, from one configuration, with the peer's random weights."""
    torch.manual_seed(0)
    peer = getattr(diffusers, name)(**config)
    with torch.no_grad():
        for key, parameter in peer.named_parameters():
            # Gates start at zero and biases of norms too; a test must see what they multiply.
            if not parameter.any():
                parameter.normal_(std=0.5)
            assert parameter.isfinite().all(), key
    ours = getattr(suffuse, name)(**config)
    assert ours.state_dict().keys() == peer.state_dict().keys()
    ours.load_state_dict(peer.state_dict(), strict=True)
    return ours.to(dtype).eval(), peer.to(dtype).eval()


@torch.no_grad()
def assert_same_outputs(ours, peer, *args, **kwargs):
    """Both models give the same numbers, bit for bit; returns them."""
    got, want = ours(*args, **kwargs)[0], peer(*args, **kwargs)[0]
    assert want.isfinite().all()
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    assert (got - want).abs().max() == 0
    return got
