"""Ordinary pictures: every method equals the peer's bit for bit, in the same layout in memory."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor as Peer
from pictures import MASK, assert_same, floats, photo, processors, tensor
from PIL import Image

from suffuse.processing.image import RESAMPLING, VaeImageProcessor

RESIZE_MODES = ("default", "fill", "crop")
MASKS = {mode: photo(mode=mode) for mode in ("RGB", "L", "1")}
OPAQUE = photo(mode="RGBA")
PICTURES = {
    "PIL": photo(),
    "PIL of the right size": photo(64, 96),
    "PIL list": [photo(), photo(seed=1)],
    "PIL batch of sizes with the first's": [photo(64, 64), photo(64, 64, seed=2)],
    "array": floats(70, 93, 3),
    "array of a good size": floats(64, 96, 3),
    "array batch": floats(2, 70, 93, 3),
    "array list": [floats(70, 93, 3), floats(70, 93, 3, seed=1)],
    "array list of batches": [floats(1, 70, 93, 3), floats(2, 70, 93, 3, seed=1)],
    "array in Fortran order": np.asfortranarray(floats(70, 93, 3)),
    "array turned around": floats(70, 93, 3)[::-1, ::-1],
    "array float64": floats(70, 93, 3, dtype=np.float64),
    "array float16": floats(70, 93, 3, dtype=np.float16),
    "array in [-1, 1]": floats(70, 93, 3) * 2 - 1,
    "tensor": tensor(3, 70, 93),
    "tensor batch": tensor(2, 3, 70, 93),
    "tensor batch, channels last": tensor(2, 3, 70, 93).contiguous(memory_format=torch.channels_last),
    "tensor list": [tensor(3, 70, 93), tensor(3, 70, 93, seed=1)],
    "tensor list, channels last": [tensor(70, 93, 3).permute(2, 0, 1), tensor(70, 93, 3, seed=1).permute(2, 0, 1)],
    "tensor list of batches": [tensor(1, 3, 70, 93), tensor(2, 3, 70, 93, seed=1)],
    "tensor bfloat16": tensor(3, 70, 93, dtype=torch.bfloat16),
    "tensor float64": tensor(3, 70, 93, dtype=torch.float64),
    "tensor in [-1, 1]": tensor(3, 70, 93) * 2 - 1,
    "latents": tensor(2, 4, 8, 8) * 7 - 3,
    "latents, one": tensor(4, 8, 8),
    "latents, list": [tensor(1, 4, 8, 8), tensor(1, 4, 8, 8)],
}
PAINTED = {
    **{f"PIL {mode}": mask for mode, mask in MASKS.items()},
    "PIL RGBA, opaque": OPAQUE,
    "PIL list": [photo(mode="L"), photo(mode="L", seed=1)],
    "array": floats(70, 93),
    "array with a channel": floats(70, 93, 1),
    "array batch": floats(2, 70, 93),
    "array batch with a channel": floats(2, 70, 93, 1),
    "array list": [floats(70, 93), floats(70, 93, seed=1)],
    "tensor with a channel": tensor(1, 70, 93),
    "tensor batch": tensor(2, 70, 93),
    "tensor batch with a channel": tensor(2, 1, 70, 93),
    "tensor list": [tensor(70, 93), tensor(70, 93, seed=1)],
    "tensor list with a channel": [tensor(1, 70, 93), tensor(1, 70, 93, seed=1)],
}


def both(method, *arguments, options=None, **keywords):
    peer, ours = processors(**options or {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the peer means to stop taking [-1, 1] and lists of batches
        expected = getattr(peer, method)(*arguments, **keywords)
    return expected, getattr(ours, method)(*arguments, **keywords)


@pytest.mark.parametrize(
    "options",
    [{}, {"do_resize": False}, {"do_normalize": False}, {"do_resize": False, "do_normalize": False}, {"do_binarize": True}],
)
@pytest.mark.parametrize("name", PICTURES)
def test_pictures_become_tensors(name, options):
    assert_same(*both("preprocess", PICTURES[name], options=options))


@pytest.mark.parametrize("options", [{}, {"do_resize": False}, {"do_binarize": False}, {"vae_scale_factor": 16}])
@pytest.mark.parametrize("name", PAINTED)
def test_masks_become_tensors(name, options):
    if name == "PIL 1" and options == {}:
        assert set(both("preprocess", PAINTED[name], options=MASK)[1].unique().tolist()) == {0, 1}
    assert_same(*both("preprocess", PAINTED[name], options=MASK | options))


@pytest.mark.parametrize("size", [(64, 64), (40, 136), (136, 40), (100, 50)], ids=str)
@pytest.mark.parametrize("name", ["PIL", "PIL list", "array batch", "tensor", "tensor batch, channels last"])
def test_a_size_is_met(name, size):
    assert_same(*both("preprocess", PICTURES[name], *size))
    assert_same(*both("preprocess", PICTURES[name], size[0]))
    assert_same(*both("preprocess", PICTURES[name], width=size[1]))


@pytest.mark.parametrize("resample", RESAMPLING)
def test_pictures_are_resampled(resample):
    assert_same(*both("preprocess", photo(), 48, 120, options={"resample": resample}))


@pytest.mark.parametrize("mode", RESIZE_MODES)
@pytest.mark.parametrize("size", [(64, 64), (40, 136), (136, 40), (70, 93)], ids=str)
@pytest.mark.parametrize("box", [None, (3, 5, 60, 61)], ids=str)
def test_pictures_and_masks_are_framed(mode, size, box):
    assert_same(*both("preprocess", photo(), *size, resize_mode=mode, crops_coords=box))
    for mask in MASKS.values():
        assert_same(*both("preprocess", mask, *size, resize_mode=mode, crops_coords=box, options=MASK))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "YCbCr", "HSV"])
def test_modes_become_rgb_as_the_peer_makes_them_when_asked_to(mode):
    picture = photo(64, 96, mode=mode)
    asked = Peer(do_convert_rgb=True).preprocess(picture)
    assert_same(asked, VaeImageProcessor(do_convert_rgb=True).preprocess(picture))
    assert_same(asked, VaeImageProcessor().preprocess(picture))


def test_large_pictures_are_shrunk_in_two_passes():
    assert_same(*both("preprocess", photo(400, 600), 64, 64, options={"reducing_gap": 2}))


@pytest.mark.parametrize("mode", RESIZE_MODES)
@pytest.mark.parametrize("size", [(70, 93), (200, 40), (31, 33)], ids=str)
def test_resize_of_pil(mode, size):
    assert_same(*both("resize", photo(), *size, resize_mode=mode))


def test_resize_of_arrays_and_tensors():
    assert_same(*both("resize", floats(2, 70, 93, 3), 64, 48))
    assert_same(*both("resize", tensor(2, 3, 70, 93), 64, 48))


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
@pytest.mark.parametrize("flags", [None, [True, False], [False, False]], ids=str)
@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_tensors_become_pictures(output_type, flags, channels, layout, dtype):
    made = (tensor(2, channels, 16, 24) * 2.4 - 1.2).contiguous(memory_format=layout)
    if flags:  # what is not brought from [-1, 1] to [0, 1] is there already
        made = torch.stack([one if flag else one.clamp(0, 1) for one, flag in zip(made, flags, strict=True)])
    assert_same(*both("postprocess", made.to(dtype), output_type, flags))


def test_tensors_in_the_range_of_pictures_become_pictures():
    for output_type in ("pil", "np", "pt"):
        assert_same(*both("postprocess", tensor(2, 3, 16, 24), output_type, options={"do_normalize": False}))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("pad", [0, 5, 40])
def test_the_region_of_a_mask(seed, pad):
    rng = np.random.default_rng(seed)
    painted = np.zeros((70, 93), dtype=np.uint8)
    top, left = rng.integers(0, 60), rng.integers(0, 80)
    painted[top : top + rng.integers(1, 40), left : left + rng.integers(1, 60)] = rng.integers(1, 256)
    for size in ((64, 64), (128, 40), (40, 128), (93, 70)):
        region, ours = both("get_crop_region", Image.fromarray(painted), *size, pad=pad)
        assert ours == region
        assert all(type(edge) is int for edge in ours)


@pytest.mark.parametrize("mode", ["RGB", "L", "1"])
def test_overlays(mode):
    picture, mask = photo(), photo(mode=mode, seed=3)
    assert_same(*both("apply_overlay", mask, picture, photo(seed=4)))
    assert_same(*both("apply_overlay", mask, picture, photo(64, 64, seed=4), (10, 5, 50, 60)))


@pytest.mark.parametrize(
    ("method", "argument"),
    [
        ("numpy_to_pil", floats(2, 16, 24, 3)),
        ("numpy_to_pil", floats(16, 24, 3)),
        ("numpy_to_pil", floats(2, 16, 24, 1)),
        ("pil_to_numpy", photo()),
        ("pil_to_numpy", [photo(mode="L"), photo(mode="L")]),
        ("numpy_to_pt", floats(2, 16, 24, 3)),
        ("numpy_to_pt", floats(2, 16, 24)),
        ("pt_to_numpy", tensor(2, 3, 16, 24)),
        ("pt_to_numpy", tensor(2, 3, 16, 24, dtype=torch.bfloat16)),
        ("normalize", tensor(2, 3, 16, 24)),
        ("normalize", floats(2, 16, 24, 3)),
        ("denormalize", tensor(2, 3, 16, 24) * 4 - 2),
        ("convert_to_rgb", photo(mode="L")),
        ("convert_to_rgb", photo(mode="1")),
        ("convert_to_grayscale", photo()),
        ("convert_to_grayscale", photo(mode="1")),
        ("blur", photo()),
        ("get_default_height_width", photo()),
        ("get_default_height_width", floats(2, 70, 93, 3)),
        ("get_default_height_width", tensor(2, 3, 70, 93)),
    ],
)
def test_the_small_methods(method, argument):
    expected, made = both(method, argument)
    assert made == expected if isinstance(made, tuple) else assert_same(expected, made) is None


def test_binarize_equals_the_peer_and_leaves_what_it_was_given():
    values = tensor(2, 1, 16, 24)
    kept = values.clone()
    made = VaeImageProcessor().binarize(values)
    assert torch.equal(values, kept)
    assert_same(Peer().binarize(kept), made)


def test_configurations_travel(tmp_path):
    ours = VaeImageProcessor(resample="bicubic", vae_scale_factor=4, **MASK)
    ours.save_config(tmp_path)
    there = Peer.from_config(Peer.load_config(tmp_path))
    there.save_config(tmp_path / "back")
    back = VaeImageProcessor.from_config(VaeImageProcessor.load_config(tmp_path / "back"))
    names = VaeImageProcessor.parameters_of_init()
    assert {name: back.config[name] for name in names} == {name: ours.config[name] for name in names}
