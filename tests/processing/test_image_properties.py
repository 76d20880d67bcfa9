"""For any picture, and for any array at all."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from pictures import MASK
from PIL import Image

from suffuse.errors import InputError
from suffuse.processing.image import VaeImageProcessor

FAST = settings(max_examples=50, deadline=None)
PROCESSOR = VaeImageProcessor()
MASKS = VaeImageProcessor(**MASK)
SHAPES = [(8, 9, 3), (2, 9, 8, 4), (8, 16), (9, 8, 1), (3, 9, 8)]
EDGES = st.integers(1, 6).map(lambda count: 8 * count)


@st.composite
def bytes_of_pictures(draw):
    shape = (draw(EDGES), draw(EDGES), 3)
    return draw(st_numpy.arrays(np.uint8, shape, elements=st.integers(0, 255), fill=st.integers(0, 255)))


@FAST
@given(bytes_of_pictures())
def test_pictures_come_back(array):
    for picture in (Image.fromarray(array), array, torch.from_numpy(array).permute(2, 0, 1)):
        (back,) = PROCESSOR.postprocess(PROCESSOR.preprocess(picture))
        assert np.abs(np.asarray(back).astype(int) - array).max() <= 1


@FAST
@given(st.data())
def test_any_array_is_in_range_or_refused(data):
    dtype = data.draw(st.one_of(st_numpy.scalar_dtypes(), st.sampled_from([np.dtype(np.longdouble), np.dtype(object)])))
    shape = data.draw(st.one_of(st.sampled_from(SHAPES), st_numpy.array_shapes(max_dims=5)))
    elements = st.none() if dtype.kind == "O" else None
    # Mostly one value, so that some are in range.
    fill = st.sampled_from([np.zeros(1, dtype)[0], np.ones(1).astype(dtype)[0]])
    array = data.draw(st_numpy.arrays(dtype, shape, elements=elements, fill=fill))
    for processor, channels in ((PROCESSOR, 3), (MASKS, 1)):
        try:
            made = processor.preprocess(array)
        except InputError:
            continue
        assert made.shape[1] == channels
        assert made.is_floating_point()
        assert torch.isfinite(made).all()
        assert made.abs().max() <= 1.02
