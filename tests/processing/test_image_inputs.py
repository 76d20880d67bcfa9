"""Pictures of every mode, type and file come out right; what is no picture is refused, early and by name; nothing is changed."""

from __future__ import annotations

import io
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import MASK, assert_same, floats, photo, tensor
from PIL import Image, ImageCms, PngImagePlugin

from suffuse.errors import ConfigError, InputError, LimitError, NonFiniteError
from suffuse.processing.image import VaeImageProcessor

PROCESSOR = VaeImageProcessor()
MASKS = VaeImageProcessor(**MASK)
NOISE = np.random.default_rng(0).integers(0, 256, (16, 24, 4), dtype=np.uint8)
RGB, RGBA = Image.fromarray(NOISE[..., :3]), Image.fromarray(NOISE)
SHAPE = np.zeros((16, 24), dtype=np.uint8)
SHAPE[4:12, 6:20] = 255


def shown(image, processor=PROCESSOR, **options):
    """What a picture became, as bytes (height, width, channels)."""
    return np.asarray(processor.postprocess(processor.preprocess(image, **options))[0]).astype(int)


def over_white(picture):
    """The formula, in float64."""
    values = np.asarray(picture)
    alpha = values[..., 3:] / 255.0
    return Image.fromarray((values[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8))


def lab(picture):
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.profileToProfile(picture, *profiles, outputMode="LAB")


def read(path):
    """A picture that is not decoded yet, and keeps no file open."""
    return Image.open(io.BytesIO(path.read_bytes()))


def assert_close(image, expected, within=1, **options):
    assert np.abs(shown(image, **options) - np.asarray(expected.convert("RGB")).astype(int)).max() <= within


# ---------------------------------------------------------------- PIL: modes and files


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "LAB", "RGBX"])
def test_every_mode_becomes_rgb(mode):
    picture = lab(RGB) if mode == "LAB" else RGB.convert(mode)
    assert_close(picture, picture, within=0)
    assert PROCESSOR.preprocess(picture).shape == (1, 3, 16, 24)
    assert MASKS.preprocess(picture).shape == (1, 1, 16, 24)


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA"])
def test_alpha_is_laid_over_white(mode):
    gray = Image.merge("LA", (RGB.convert("L"), RGBA.getchannel("A")))
    picture = (gray if mode in ("LA", "La") else RGBA).convert(mode)
    straight = gray if mode == "La" else picture
    assert len(np.unique(np.asarray(straight)[..., -1])) > 100
    assert_close(picture, over_white(straight.convert("RGBA")), within=2)
    assert_close(Image.new("RGBA", (16, 16)).convert("LA" if mode == "La" else mode), Image.new("RGB", (16, 16), "white"))


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "1"])
def test_a_transparent_color_is_white(mode, tmp_path):
    picture = Image.new(mode, (16, 16))
    if mode == "P":
        picture.putpalette([9, 9, 9, 200, 0, 0])
    picture.paste(1 if mode == "P" else (1, 1, 1) if mode == "RGB" else 255, (0, 0, 8, 16))
    picture.save(tmp_path / "a.png", transparency=(0, 0, 0) if mode == "RGB" else 0)
    made = shown(read(tmp_path / "a.png"))
    assert made[:, 8:].min() == 255
    assert made[:, :8].min() == {"P": 0, "L": 255, "RGB": 1, "1": 255}[mode]


def test_a_palette_with_alpha_for_each_entry_is_laid_over_white_without_a_warning(tmp_path):
    picture = RGB.quantize(4)
    picture.save(tmp_path / "a.png", transparency=bytes([0, 0, 0, 0]))
    assert shown(read(tmp_path / "a.png")).min() == 255


@pytest.mark.parametrize("name", ["a.png", "a.tiff"])
def test_16_bits_are_scaled(name, tmp_path):
    values = np.linspace(0, 65535, 16 * 24).reshape(16, 24).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / name)
    expected = Image.fromarray((values / 257).round().astype(np.uint8))
    for picture in (read(tmp_path / name), Image.fromarray(values), Image.fromarray(values.astype(np.int32))):
        assert picture.mode.startswith("I")
        assert_close(picture, expected, within=0)
    assert np.array_equal(shown(read(tmp_path / name), MASKS) > 0, values >= 32768)


def test_wide_modes_that_hold_bytes_or_fractions():
    gray = RGB.convert("L")
    assert_close(gray.convert("I"), gray, within=0)
    assert_close(gray.convert("F"), gray, within=0)
    assert_close(Image.fromarray(np.asarray(gray, dtype=np.float32) / 255), gray, within=0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_picture(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turns = [None, None, 0, 3, 1, 5, 4, 6, 2]  # of Image.Transpose, by the values of EXIF
    seen = photo(16, 24)
    turn = turns[orientation]
    photo(16, 24).save(tmp_path / "a.png", exif=exif)
    expected = seen if turn is None else seen.transpose(Image.Transpose(turn))
    assert_close(read(tmp_path / "a.png"), expected, within=0)
    assert shown(read(tmp_path / "a.png"), MASKS).shape == (expected.height, expected.width)


def test_the_region_of_a_mask_is_that_of_the_turned_mask(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(SHAPE).save(tmp_path / "a.png", exif=exif)
    region = PROCESSOR.get_crop_region(read(tmp_path / "a.png"), 8, 14)
    assert region == (4, 6, 12, 20)


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"])
def test_damaged_exif_does_not_spoil_the_picture(exif):
    picture = RGB.copy()
    picture.info["exif"] = exif
    assert_close(picture, RGB, within=0)


@pytest.mark.parametrize("extension", ["png", "gif", "webp", "tiff", "bmp"])
def test_files_that_lose_nothing(extension, tmp_path):
    picture = RGB.quantize(16).convert("RGB")
    picture.save(tmp_path / f"a.{extension}", **({"lossless": True} if extension == "webp" else {}))
    assert_close(read(tmp_path / f"a.{extension}"), picture, within=0)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg(mode, tmp_path):
    picture = photo(16, 24, mode=mode)
    picture.save(tmp_path / "a.jpg", quality=100, subsampling=0)
    assert_close(read(tmp_path / "a.jpg"), picture, within=8)


@pytest.mark.parametrize("extension", ["gif", "webp", "png", "tiff"])
def test_of_several_frames_the_first_is_taken(extension, tmp_path):
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "lime", "blue")]
    frames[0].save(tmp_path / f"a.{extension}", save_all=True, append_images=frames[1:])
    picture = read(tmp_path / f"a.{extension}")
    assert picture.n_frames == 3
    assert_close(picture, frames[0], within=3)


# ---------------------------------------------------------------- arrays and tensors


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_bytes_in_arrays_and_tensors_are_the_picture(mode):
    picture = {"RGB": RGB, "L": RGB.convert("L"), "RGBA": RGBA}[mode]
    array = np.asarray(picture)
    planes = torch.from_numpy(np.atleast_3d(array).transpose(2, 0, 1).copy())
    expected = PROCESSOR.preprocess(picture)
    for given in (array, array[None] if array.ndim == 3 else [array], planes, planes[None], [planes], planes.to(torch.int64)):
        made = PROCESSOR.preprocess(given)
        assert made.shape == expected.shape
        assert (made - expected).abs().max() <= (0 if mode != "RGBA" else 2 / 255)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "int64", "uint32", "uint64", "uint16", ">i4", "<u2", ">u2"])
def test_integers_are_scaled(dtype):
    white = 65535 if np.dtype(dtype).name == "uint16" else 255
    array = (floats(16, 24, 3) * white).astype(dtype)
    expected = torch.from_numpy(array.astype(np.float32) / white * 2 - 1).permute(2, 0, 1)[None]
    made = PROCESSOR.preprocess(array)
    assert made.dtype == torch.float32
    assert (made - expected).abs().max() < 1e-6
    own = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
    assert torch.equal(PROCESSOR.preprocess(own.permute(2, 0, 1)), made)


ONES = [(dtype, 1) for dtype in (bool, np.uint8, np.int8, np.int64, np.float32, np.float64)]


@pytest.mark.parametrize(("dtype", "white"), [*ONES, (np.uint8, 255), (np.int64, 255)])
def test_masks_of_ones_or_of_bytes(dtype, white):
    mask = (SHAPE // 255 * white).astype(dtype)
    expected = torch.from_numpy(SHAPE / 255)[None, None]
    for given in (mask, mask[None], mask[..., None], [mask], torch.from_numpy(mask), torch.from_numpy(mask)[None, None]):
        assert torch.equal(MASKS.preprocess(given).double(), expected)


@pytest.mark.parametrize("where", ["alpha", "colors"])
def test_a_mask_is_what_varies(where):
    expected = MASKS.preprocess(Image.fromarray(SHAPE))
    if where == "alpha":
        drawings = [np.dstack([np.full_like(SHAPE, flat)] * 3 + [SHAPE]) for flat in (0, 255, 90)]
    else:
        drawings = [np.dstack([SHAPE] * 3 + [np.full_like(SHAPE, flat)]) for flat in (255, 7)]
    for drawing in drawings:
        picture = Image.fromarray(drawing)
        assert_same(MASKS.preprocess(picture), expected)
        for given in (
            drawing,
            drawing / 255,
            drawing[None],
            picture.convert("LA"),
            torch.from_numpy(drawing).permute(2, 0, 1)[None],
        ):
            assert torch.equal(MASKS.preprocess(given).to(expected), expected)


def test_an_opaque_black_mask_is_black():
    black = Image.new("RGBA", (16, 16), (0, 0, 0, 255))
    assert MASKS.preprocess(black).max() == 0
    assert MASKS.preprocess(np.asarray(black)).max() == 0


def test_four_channels_are_latents_in_tensors_of_floats_only():
    latents = tensor(1, 4, 16, 24) * 20
    assert torch.equal(PROCESSOR.preprocess(latents), latents)
    assert_close(NOISE, over_white(RGBA))
    assert_close(NOISE / np.float32(255), over_white(RGBA))
    assert_close(torch.from_numpy(NOISE).permute(2, 0, 1), over_white(RGBA))
    assert VaeImageProcessor(vae_latent_channels=16).preprocess(tensor(1, 4, 16, 24)).shape[1] == 3


def test_what_sharp_resizing_overshoots_is_still_in_the_range_of_pictures():
    made = PROCESSOR.preprocess(floats(16, 24, 3) * 1.006 - 0.003)
    assert -1.01 < made.min() < -0.9


def test_gradients_pass():
    given = tensor(1, 3, 16, 24).requires_grad_()
    made = PROCESSOR.preprocess(given)
    made.sum().backward()
    assert given.grad.unique().tolist() == [2]
    assert len(PROCESSOR.postprocess(made)) == 1


# ---------------------------------------------------------------- nothing changes


@pytest.mark.parametrize(
    "processor", [PROCESSOR, MASKS, VaeImageProcessor(False, do_normalize=False)], ids=["image", "mask", "bare"]
)
@pytest.mark.parametrize(
    "given",
    [
        RGB,
        RGBA,
        RGB.convert("L"),
        RGB.convert("P"),
        NOISE,
        floats(16, 24, 3),
        floats(16, 24),
        tensor(3, 16, 24),
        tensor(1, 4, 8, 8),
    ],
    ids=lambda given: f"{type(given).__name__} {given.mode if isinstance(given, Image.Image) else tuple(given.shape)}",
)
def test_what_is_given_stays_as_it_is(processor, given):
    before = given.copy() if hasattr(given, "copy") else given.clone()
    made = processor.preprocess(given)
    made.fill_(7)
    assert_same(before, given)


def test_what_cannot_be_written_can_be_read():
    array = floats(16, 24, 3)
    array.flags.writeable = False
    assert PROCESSOR.preprocess(array).shape == (1, 3, 16, 24)
    assert PROCESSOR.preprocess([array, array]).shape == (2, 3, 16, 24)


def test_overlays_change_neither_picture_nor_mask_and_fit_masks_of_other_sizes():
    mask, picture, made = Image.fromarray(SHAPE), RGB.copy(), photo(16, 24)
    kept = [one.copy() for one in (mask, picture, made)]
    overlay = PROCESSOR.apply_overlay(mask, picture, made)
    assert_same([mask, picture, made], kept)
    painted = SHAPE[..., None] > 0
    assert np.array_equal(np.asarray(overlay), np.where(painted, np.asarray(made), np.asarray(picture)))
    large = VaeImageProcessor(resample="nearest").apply_overlay(mask.resize((48, 32), Image.Resampling.NEAREST), picture, made)
    assert_same(large, overlay)
    assert PROCESSOR.apply_overlay(mask, picture, photo(32, 48)).size == (48, 32)


# ---------------------------------------------------------------- refused


class Huge(Image.Image):
    """A picture whose header promises more than may be decoded."""

    def __init__(self):
        super().__init__()
        self._mode, self._size = "RGB", (9000, 8000)

    def load(self):
        raise AssertionError("it was decoded")


READABLE = "a PIL picture, an array"
NAN, INFINITE = floats(16, 24, 3), floats(16, 24, 3)
NAN[3, 4, 1], INFINITE[3, 4, 1] = np.nan, -np.inf
REFUSED = {
    "None": (None, rf"face is no picture\n  found: NoneType\n  expected: {READABLE}"),
    "an empty list": ([], rf"no picture\n  found: \[\]\n  expected: {READABLE}"),
    "an empty tuple": ((), "no picture"),
    "a list of None": ([None], r"found: \[NoneType\]"),
    "text": ("a.png", r"found: str(.|\n)*PIL.Image.open"),
    "a path": (Path("a.png"), "Path(.|\n)*PIL.Image.open"),
    "bytes": (b"\x89PNG", "found: bytes"),
    "a file": (io.BytesIO(), "found: BytesIO"),
    "a generator": ((RGB for _ in range(2)), "found: generator"),
    "a number": (7, "found: int"),
    "nested lists": ([[[0.5, 0.5], [0.5, 0.5]]], r"found: \[list\]"),
    "a million numbers": ([0.5] * 10**6, r"found: \[float"),
    "mixed kinds": ([RGB, floats(16, 24, 3)], r"found: \[Image, ndarray\(16, 24, 3\)\]"),
    "arrays and tensors": ([floats(16, 24, 3), tensor(3, 16, 24)], "no picture"),
    "a list in a list": ([[RGB]], "no picture"),
    "one dimension": (floats(24), r"found: ndarray\(24,\)"),
    "no dimension": (np.array(0.5), "no picture"),
    "five dimensions": (tensor(1, 1, 3, 16, 24), r"Tensor\(1, 1, 3, 16, 24\)"),
    "PIL of several sizes": ([RGB, photo()], r"several sizes(.|\n)*\(24, 16\), \(93, 70\)"),
    "arrays of several shapes": ([floats(16, 24, 3), floats(24, 16, 3)], r"several shapes(.|\n)*\(16, 24, 3\).*\(24, 16, 3\)"),
    "tensors of several shapes": ([tensor(3, 16, 24), tensor(1, 3, 16, 24)], "several shapes"),
    "arrays of several types": ([floats(16, 24, 3), NOISE[..., :3]], "float32(.|\n)*uint8"),
    "1 x 1": (Image.new("RGB", (1, 1)), "too small(.|\n)*1 x 1 pixels"),
    "a line": (floats(1, 24, 3), "too small(.|\n)*24 x 1 pixels"),
    "smaller than a latent": (photo(6, 24), "too small(.|\n)*24 x 6 pixels(.|\n)*at least 8 x 8"),
    "an array smaller than a latent": (floats(6, 24, 3), "too small(.|\n)*24 x 6 pixels"),
    "no pixels": (Image.new("RGB", (0, 8)), "too small"),
    "an array without pixels": (np.zeros((0, 8, 3)), "too small"),
    "an empty batch": (tensor(0, 3, 16, 24), "empty batch"),
    "objects": (np.full((16, 24, 3), None), "holds no plain numbers(.|\n)*object"),
    "strings": (np.full((16, 24, 3), "a"), "no plain numbers"),
    "complex": (tensor(3, 16, 24).to(torch.complex64), "no plain numbers(.|\n)*complex64"),
    "dates": (np.zeros((16, 24, 3), "datetime64[s]"), "no plain numbers"),
    "records": (np.zeros((16, 24, 3), [("r", "u1")]), "no plain numbers"),
    "8-bit floats": (tensor(3, 16, 24).to(torch.float8_e4m3fn), "no plain numbers(.|\n)*float8"),
    "sparse": (tensor(16, 24).to_sparse(), "no plain numbers"),
    "on no device": (torch.empty(3, 16, 24, device="meta"), "no plain numbers"),
    "NaN": (NAN, "face holds NaN or infinity"),
    "infinity": (INFINITE, "holds NaN or infinity"),
    "latents with NaN": (tensor(1, 4, 8, 8) * torch.nan, "holds NaN or infinity"),
    "floats of bytes": (floats(16, 24, 3) * 255, r"out of range(.|\n)*found: \[[\d.]+, 25[\d.]+\] in float32"),
    "a tensor of bytes as floats": (tensor(3, 16, 24) * 255, "out of range(.|\n)*divide by"),
    "floats below -1": (floats(16, 24, 3) - 2, "out of range"),
    "negative integers": (-NOISE[..., :3].astype(int), "out of range"),
    "integers above 255": (NOISE[..., :3].astype(int) * 257, r"out of range(.|\n)*in int64"),
    "2 channels": (floats(16, 24, 2), r"face has 2 channels(.|\n)*\(1, 2, 16, 24\)"),
    "5 channels": (tensor(5, 16, 24), "face has 5 channels"),
    "channels first in an array": (floats(3, 16, 24), "24 channels(.|\n)*channels come last in arrays"),
    "channels last in a tensor": (tensor(16, 24, 3).repeat(1, 1, 3), "16 channels(.|\n)*before height and width in tensors"),
    "alpha and negative colors": (floats(16, 24, 4) * 2 - 1, "alpha channel and negative values"),
    "72 million pixels": (Huge(), "too large(.|\n)*9000 x 8000 pixels(.|\n)*at most 64000000"),
    "an array of 72 million pixels": (np.broadcast_to(np.float32(0), (9000, 8000, 3)), "too large"),
    "a tensor of 72 million pixels": (torch.zeros(1, 1, 1).expand(3, 9000, 8000), "too large"),
    "F with NaN": (Image.fromarray(NAN[..., 1]), "out of range(.|\n)*mode F"),
    "F below 0": (Image.fromarray(floats(16, 24) - 0.5), "out of range(.|\n)*mode F"),
    "I above 16 bits": (Image.fromarray(np.full((16, 24), 70000, np.int32)), "out of range(.|\n)*mode I"),
}


STACKS = ("channels first in an array", "channels last in a tensor", "5 channels")
"""As masks these are batches."""
CASES = [("picture", name) for name in REFUSED] + [("mask", name) for name in REFUSED if name not in STACKS]


@pytest.mark.parametrize(("what", "name"), CASES)
def test_what_is_no_picture_is_refused_at_once(what, name):
    given, message = REFUSED[name]
    processor = {"picture": PROCESSOR, "mask": MASKS}[what]
    begin = time.perf_counter()
    with pytest.raises(InputError, match=message):
        processor.preprocess(given, name="face")
    assert time.perf_counter() - begin < 0.05


@pytest.mark.parametrize("extension", ["png", "jpg", "gif", "webp", "tiff"])
@pytest.mark.parametrize("part", [0.5, 0.9])
def test_a_file_cut_short_is_refused(extension, part):
    file = io.BytesIO()
    photo(128, 128).save(file, {"jpg": "jpeg"}.get(extension, extension))
    cut = file.getvalue()[: int(len(file.getvalue()) * part)]
    try:
        picture = Image.open(io.BytesIO(cut))
    except OSError:
        return  # Pillow saw it, before we could
    with pytest.raises(InputError, match=r"face cannot be decoded: .*\n  to fix it: the file is damaged"):
        PROCESSOR.preprocess(picture, name="face")


def test_a_closed_file_is_refused(tmp_path):
    RGB.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        pass
    with pytest.raises(InputError, match="cannot be decoded"):
        PROCESSOR.preprocess(picture)


def test_a_bomb_is_refused_by_its_header():
    """9 kB that would be 270 MB."""
    file = io.BytesIO()
    Image.new("1", (9000, 8000)).save(file, "png")
    assert len(file.getvalue()) < 20_000
    with Image.open(file) as picture:
        begin = time.perf_counter()
        with pytest.raises(InputError, match="too large"):
            PROCESSOR.preprocess(picture)
        assert time.perf_counter() - begin < 0.05


def test_a_text_bomb_in_a_png_is_refused():
    info, file = PngImagePlugin.PngInfo(), io.BytesIO()
    info.add_text("a", "b" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    RGB.save(file, "png", pnginfo=info)
    with pytest.raises((InputError, OSError, ValueError)):
        PROCESSOR.preprocess(Image.open(file))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"height": 0}, InputError, "height=0 is no size"),
        ({"width": -64}, InputError, "width=-64 is no size"),
        ({"height": "64"}, InputError, "height='64' is no size"),
        ({"width": 64.0}, InputError, r"width=64.0 is no size(.|\n)*at least 8"),
        ({"height": 7}, InputError, "height=7 is no size"),
        ({"height": 10**6, "width": 10**6}, LimitError, "at most 64000000 pixels"),
        ({"resize_mode": "stretch"}, InputError, "resize_mode='stretch' is unknown(.|\n)*default, fill, crop"),
        ({"crops_coords": (0, 0, 0, 8)}, InputError, r"\(0, 0, 0, 8\) is no part of image(.|\n)*within 24 x 16"),
        ({"crops_coords": (0, 0, 25, 8)}, InputError, "is no part of image"),
        ({"crops_coords": (8, 8, 0, 0)}, InputError, "is no part of image"),
        ({"crops_coords": (0, 0, 8)}, InputError, "is no part of image"),
        ({"crops_coords": (0, 0, 8.5, 8)}, InputError, "is no part of image"),
        ({"crops_coords": "abcd"}, InputError, "is no part of image"),
    ],
    ids=str,
)
def test_what_is_asked_for_must_be_possible(options, error, message):
    with pytest.raises(error, match=message):
        PROCESSOR.preprocess(RGB, **options)


@pytest.mark.parametrize("options", [{"resize_mode": "fill"}, {"resize_mode": "crop"}, {"crops_coords": (0, 0, 8, 8)}], ids=str)
def test_framing_needs_pil(options):
    for given in (floats(16, 24, 3), tensor(3, 16, 24)):
        with pytest.raises(InputError, match="needs PIL pictures"):
            PROCESSOR.preprocess(given, **options)


def test_pictures_of_several_sizes_are_brought_to_the_one_asked_for():
    assert PROCESSOR.preprocess([RGB, photo()], 32, 40).shape == (2, 3, 32, 40)
    with pytest.raises(InputError, match="several sizes"):
        PROCESSOR.preprocess([RGB, photo()], 32)
    with pytest.raises(InputError, match="several sizes"):
        VaeImageProcessor(do_resize=False).preprocess([RGB, photo()], 32, 40)


def test_a_narrow_picture_is_framed_or_refused_but_never_expanded_without_limit():
    line = Image.new("RGB", (2, 20_000), "red")
    assert PROCESSOR.preprocess(line, 64, 64, "fill").shape == (1, 3, 64, 64)
    with pytest.raises(InputError, match="2 x 20000 is too narrow to fill 512 x 512"):
        PROCESSOR.preprocess(line, 512, 512, "crop")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"do_convert_rgb": True, "do_convert_grayscale": True}, InputError, "exclude each other"),
        ({"resample": "cubic"}, InputError, "resample='cubic' is unknown(.|\n)*bicubic"),
        ({"vae_scale_factor": 0}, InputError, "vae_scale_factor=0 is out of range"),
        ({"reducing_gap": 0}, InputError, "reducing_gap=0 is out of range"),
        ({"vae_scale_factor": "8"}, ConfigError, "vae_scale_factor has the wrong type"),
    ],
    ids=str,
)
def test_processors_that_cannot_be(options, error, message):
    with pytest.raises(error, match=message):
        VaeImageProcessor(**options)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((tensor(1, 3, 8, 8), "jpeg"), InputError, "output_type='jpeg' is unknown(.|\n)*pil, np, pt, latent"),
        ((tensor(1, 3, 8, 8), "pils"), InputError, "did you mean 'pil'"),
        ((floats(1, 8, 8, 3),), InputError, r"only tensors(.|\n)*ndarray\(1, 8, 8, 3\)"),
        ((tensor(3, 8, 8),), InputError, r"Tensor\(3, 8, 8\)"),
        ((tensor(2, 3, 8, 8), "pil", [True]), InputError, "1 entries for 2 pictures"),
        ((tensor(2, 3, 8, 8), "pil", []), InputError, "0 entries for 2 pictures"),
        ((tensor(1, 3, 8, 8) * torch.nan,), NonFiniteError, "NaN or infinity"),
        ((tensor(1, 5, 8, 8),), InputError, r"does not hold pictures(.|\n)*\(1, 8, 8, 5\)"),
    ],
    ids=range(8),
)
def test_what_cannot_be_given_out(arguments, error, message):
    with pytest.raises(error, match=message):
        PROCESSOR.postprocess(*arguments)


def test_values_beyond_the_range_are_cut_and_never_wrap():
    assert PROCESSOR.numpy_to_pil(np.full((8, 8, 3), 1.2))[0].getextrema() == ((255, 255),) * 3
    assert PROCESSOR.numpy_to_pil(np.full((8, 8, 3), -0.2))[0].getextrema() == ((0, 0),) * 3
    with pytest.raises(InputError, match=r"uint8 \(8, 8, 3\)(.|\n)*floats in \[0, 1\]"):
        PROCESSOR.numpy_to_pil(np.zeros((8, 8, 3), np.uint8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Image.new("L", (16, 16)), 8, 8), "is black"),
        ((Image.fromarray(SHAPE), 0, 8), "no region of 0 x 8"),
        ((Image.fromarray(SHAPE), 8, 8, -1), "pad=-1"),
    ],
    ids=["black", "empty", "negative"],
)
def test_regions_that_cannot_be(arguments, message):
    with pytest.raises(InputError, match=message):
        PROCESSOR.get_crop_region(*arguments)


def test_no_warning_comes_from_below(tmp_path):
    """Under the settings a user has, too."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for given in (RGB.quantize(4), RGBA, RGB.convert("F"), NOISE, floats(16, 24, 3, dtype=np.float16), NOISE > 9):
            PROCESSOR.preprocess(given)
    assert not seen
