import inspect

import diffusers
import pytest
import torch
from diffusers.models.autoencoders import vae as peer_vae
from model_pairs import assert_same_outputs, pair
from unet_options import noise

from suffuse import AsymmetricAutoencoderKL, AutoencoderKL, AutoencoderTiny
from suffuse.errors import ConfigError, InputError
from suffuse.models import vae


def kl(**changes):
    return {
        "block_out_channels": (32, 64),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 8,
        "sample_size": 16,
        **changes,
    }


def asymmetric(**changes):
    return {
        "down_block_out_channels": (32, 64),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "layers_per_down_block": 1,
        "up_block_out_channels": (32, 64),
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_up_block": 1,
        "norm_num_groups": 8,
        **changes,
    }


def tiny(**changes):
    return {
        "encoder_block_out_channels": (16, 16, 16, 16),
        "decoder_block_out_channels": (16, 16, 16, 16),
        "num_encoder_blocks": (1, 1, 2, 1),
        "num_decoder_blocks": (2, 1, 1, 1),
        **changes,
    }


OPTIONS = {
    "kl": ("AutoencoderKL", kl()),
    "kl with attention": (
        "AutoencoderKL",
        kl(
            down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
            up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
            layers_per_block=2,
        ),
    ),
    "kl without attention": ("AutoencoderKL", kl(mid_block_add_attention=False)),
    "kl of flux": (
        "AutoencoderKL",
        kl(
            use_quant_conv=False,
            use_post_quant_conv=False,
            latent_channels=16,
            shift_factor=0.1,
            scaling_factor=0.36,
            force_upcast=False,
            latents_mean=(0.0,) * 16,
            latents_std=(1.0,) * 16,
        ),
    ),
    "kl of another shape": ("AutoencoderKL", kl(in_channels=5, out_channels=2, act_fn="gelu", sample_size=8)),
    "asymmetric": ("AsymmetricAutoencoderKL", asymmetric(scaling_factor=0.2, sample_size=16, latent_channels=4)),
    "asymmetric, deeper": (
        "AsymmetricAutoencoderKL",
        asymmetric(layers_per_down_block=2, layers_per_up_block=2, act_fn="mish", in_channels=3, out_channels=3),
    ),
    "tiny": ("AutoencoderTiny", tiny()),
    "tiny of another kind": (
        "AutoencoderTiny",
        tiny(
            in_channels=2,
            out_channels=3,
            act_fn="gelu",
            upsample_fn="bilinear",
            latent_channels=6,
            upsampling_scaling_factor=3,
            latent_magnitude=2,
            latent_shift=0.4,
            scaling_factor=2.0,
            shift_factor=0.1,
            force_upcast=False,
        ),
    ),
}


def image(name, size=16):
    return noise(2, OPTIONS[name][1].get("in_channels", 3), size, size).clamp(-1, 1)


@pytest.mark.parametrize("name", OPTIONS)
def test_outputs_equal_the_peers(name):
    ours, peer = pair(OPTIONS[name][0], **OPTIONS[name][1])
    assert_same_outputs(ours, peer, image(name))


@pytest.mark.parametrize("name", ["kl", "tiny"])
def test_outputs_equal_the_peers_in_bfloat16(name):
    ours, peer = pair(OPTIONS[name][0], torch.bfloat16, **OPTIONS[name][1])
    sample = image(name).bfloat16()
    with torch.no_grad():
        encoded = [model.encode(sample, return_dict=False)[0] for model in (ours, peer)]
        latents = [x if torch.is_tensor(x) else x.mode() for x in encoded]
        assert torch.equal(*latents)
        assert torch.equal(*(model.decode(latents[0]).sample for model in (ours, peer)))


def test_the_table_of_options_covers_every_option():
    for cls in (AutoencoderKL, AsymmetricAutoencoderKL, AutoencoderTiny):
        options = set(inspect.signature(cls.__init__).parameters) - {"self"}
        assert options == {key for kind, config in OPTIONS.values() if kind == cls.__name__ for key in config}


@pytest.mark.parametrize("name", OPTIONS)
def test_can_be_built_on_meta_and_filled(name):
    kind, config = OPTIONS[name]
    cls = {c.__name__: c for c in (AutoencoderKL, AsymmetricAutoencoderKL, AutoencoderTiny)}[kind]
    with torch.device("meta"):
        empty = cls(**config)
    assert not [key for key, _ in empty.named_buffers()]
    full = cls(**config).eval()
    empty.load_state_dict(full.state_dict(), assign=True)
    with torch.no_grad():
        assert torch.equal(empty.eval()(image(name)).sample, full(image(name)).sample)


@pytest.mark.parametrize("name", ["kl", "asymmetric", "tiny"])
def test_gradient_checkpointing_gives_the_same_gradients(name):
    ours, _ = pair(OPTIONS[name][0], **OPTIONS[name][1])

    def gradients():
        ours.zero_grad()
        latents = ours.encode(image(name), return_dict=False)[0]
        ours.decode(latents if torch.is_tensor(latents) else latents.mode()).sample.square().sum().backward()
        return [p.grad for p in ours.parameters() if p.grad is not None]

    plain = gradients()
    ours.enable_gradient_checkpointing()
    assert ours.is_gradient_checkpointing
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))


@pytest.mark.parametrize("changes", [{}, {"use_quant_conv": False, "use_post_quant_conv": False}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("height", "width"), [(16, 40), (40, 16), (38, 54), (16, 16)])
def test_tiles_and_slices_equal_the_peers(changes, dtype, height, width):
    ours, peer = pair("AutoencoderKL", dtype, **kl(**changes))
    sample = noise(2, 3, height, width).to(dtype)
    for model in (ours, peer):
        model.enable_tiling()
        model.enable_slicing()
    with torch.no_grad():
        posteriors = [model.encode(sample).latent_dist for model in (ours, peer)]
        assert torch.equal(posteriors[0].parameters, posteriors[1].parameters)
        z = posteriors[0].mode()
        decoded = [model.decode(z).sample for model in (ours, peer)]
        assert torch.equal(*decoded)
        assert torch.equal(ours.tiled_decode(z, return_dict=False)[0], peer.tiled_decode(z, return_dict=False)[0])
        assert torch.equal(ours.tiled_encode(sample).latent_dist.mode(), peer.tiled_encode(sample).latent_dist.mode())
        ours.disable_tiling()
        ours.disable_slicing()
        assert torch.equal(ours.decode(z).sample, ours.decoder(z if changes else ours.post_quant_conv(z)))


@pytest.mark.parametrize(("height", "width"), [(128, 128), (136, 264), (32, 48)])
def test_tiles_and_slices_of_the_tiny_one_equal_the_peers(height, width):
    ours, peer = pair("AutoencoderTiny", **tiny())
    for model in (ours, peer):
        model.enable_tiling()
        model.enable_slicing()
        model.tile_sample_min_size, model.tile_latent_min_size = 128, 16
    sample = noise(2, 3, height, width).clamp(-1, 1)
    with torch.no_grad():
        latents = [model.encode(sample).latents for model in (ours, peer)]
        assert torch.equal(*latents)
        assert torch.equal(*(model.decode(latents[0]).sample for model in (ours, peer)))
        ours.enable_tiling(False)
        assert torch.equal(ours.decode(latents[0]).sample, torch.cat([ours.decoder(z[None]) for z in latents[0]]))


def test_tiles_of_the_tiny_one_keep_the_type_where_the_peer_gives_float32():
    ours = AutoencoderTiny(**tiny()).bfloat16()
    ours.enable_tiling()
    with torch.no_grad():
        assert ours.encode(noise(1, 3, 16, 16).bfloat16()).latents.dtype == torch.bfloat16


def test_latents_of_the_tiny_one_scale_as_the_peers():
    ours, peer = pair("AutoencoderTiny", **tiny())
    latents = noise(1, 4, 4, 4) * 4
    assert torch.equal(ours.scale_latents(latents), peer.scale_latents(latents))
    assert torch.equal(ours.unscale_latents(latents), peer.unscale_latents(latents))


@pytest.mark.parametrize("name", ["asymmetric", "asymmetric, deeper"])
def test_the_masked_decoder_equals_the_peers(name):
    ours, peer = pair(OPTIONS[name][0], **OPTIONS[name][1])
    mask = (noise(2, 1, 16, 16) > 0).float()
    assert_same_outputs(ours, peer, image(name), mask=mask)
    with torch.no_grad():
        z, picture = noise(2, 4, 8, 8), image(name)
        assert torch.equal(*(model.decode(z, None, picture, mask).sample for model in (ours, peer)))


def test_the_masked_decoder_wants_image_and_mask_together():
    ours = AsymmetricAutoencoderKL(**asymmetric())
    with pytest.raises(InputError, match="an image and a mask go together"):
        ours.decode(noise(1, 4, 8, 8), image=noise(1, 3, 16, 16))
    with pytest.raises(InputError, match="does not fit the latents"):
        ours.decode(noise(1, 4, 8, 8), image=noise(1, 3, 12, 12), mask=noise(1, 1, 12, 12))


def test_the_decoder_under_latents_equals_the_peers():
    config = {
        "in_channels": 4,
        "block_out_channels": (32, 64),
        "up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
        "norm_type": "spatial",
    }
    torch.manual_seed(0)
    peer = peer_vae.Decoder(**config).eval()
    ours = vae.Decoder(**config).eval()
    ours.load_state_dict(peer.state_dict())
    z = noise(2, 4, 4, 4)
    with torch.no_grad():
        assert torch.equal(ours(z, z), peer(z, z))


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_distribution_equals_the_peers(deterministic):
    parameters, other = noise(2, 8, 4, 4) * 3, noise(2, 8, 4, 4).flip(0)
    ours, peer = (
        kind(parameters, deterministic)
        for kind in (vae.DiagonalGaussianDistribution, diffusers.models.autoencoders.vae.DiagonalGaussianDistribution)
    )
    for key in ("mean", "logvar", "std", "var"):
        assert torch.equal(getattr(ours, key), getattr(peer, key))
    assert torch.equal(*(d.sample(torch.Generator().manual_seed(1)) for d in (ours, peer)))
    seeds = [[torch.Generator().manual_seed(i) for i in range(2)] for _ in range(2)]
    assert torch.equal(ours.sample(seeds[0]), peer.sample(seeds[1]))
    assert torch.equal(ours.mode(), peer.mode())
    assert torch.equal(ours.kl(), peer.kl())
    assert torch.equal(ours.kl(vae.DiagonalGaussianDistribution(other)), peer.kl(vae.DiagonalGaussianDistribution(other)))
    sample = noise(2, 4, 4, 4)
    assert torch.equal(ours.nll(sample), peer.nll(sample))


def test_drawn_latents_equal_the_peers():
    ours, peer = pair("AutoencoderKL", **kl())
    with torch.no_grad():
        got, want = (
            model(image("kl"), sample_posterior=True, generator=torch.Generator().manual_seed(3)).sample for model in (ours, peer)
        )
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("cls", "config", "message"),
    [
        (AutoencoderKL, kl(down_block_types=("DownBlock2D",) * 2), "did you mean"),
        (AutoencoderKL, kl(up_block_types=("UpDecoderBlock2D",)), "block_out_channels needs one entry for each of up_block"),
        (AutoencoderKL, kl(norm_num_groups=5), "do not divide into 5 groups"),
        (AutoencoderKL, kl(latent_channels=0), "latent_channels must be at least 1"),
        (AutoencoderKL, kl(sample_size=-1), "sample_size must be at least 1"),
        (AutoencoderKL, kl(layers_per_block=0), "layers_per_block must be at least 1"),
        (AsymmetricAutoencoderKL, asymmetric(latent_channels=-4), "latent_channels must be at least 1"),
        (AutoencoderTiny, tiny(num_encoder_blocks=(1, 1)), "encoder_block_out_channels and num_encoder_blocks must be"),
        (AutoencoderTiny, tiny(num_decoder_blocks=(1, 1)), "decoder_block_out_channels and num_decoder_blocks must be"),
        (AutoencoderTiny, tiny(act_fn="rely"), "did you mean 'relu'"),
    ],
)
def test_a_configuration_that_makes_no_network_is_refused(cls, config, message):
    with pytest.raises(ConfigError) as caught:
        cls(**config)
    assert message in str(caught.value)


def test_images_and_latents_of_another_shape_are_refused():
    ours = AutoencoderKL(**kl())
    with pytest.raises(InputError, match="images have the wrong shape"):
        ours.encode(noise(2, 4, 8, 8))
    with pytest.raises(InputError, match="latents have the wrong shape"):
        ours.decode(noise(2, 3, 8, 8))
