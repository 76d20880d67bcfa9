"""Pictures as the Q-Former and a ControlNet of BLIP-Diffusion see them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.image_processing_base import ImageProcessingMixin

from suffuse.processing.pixels import in_eight_bits

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class BlipImageProcessor(ImageProcessingMixin):
    """Resizes to a fixed size, scales to [0, 1] and normalises.

    Args:
        do_resize: Bring pictures to `size`.
        size: {"height": rows, "width": columns}; 224 each, if None.
        resample: A filter of PIL by its number.
        do_rescale: Multiply by `rescale_factor`.
        rescale_factor: What makes [0, 1] of bytes.
        do_normalize: Subtract `image_mean` and divide by `image_std`.
        image_mean: Of each channel; that of CLIP, if None.
        image_std: Likewise.
        do_convert_rgb: Kept for its name; pictures always become RGB.
        do_center_crop: Kept for its name; there is nothing to crop once they have their size.
        **further: What the file holds besides.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        do_resize: bool = True,
        size: dict[str, int] | None = None,
        resample: int = Image.Resampling.BICUBIC,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        do_convert_rgb: bool = True,
        do_center_crop: bool = True,
        **further: Any,
    ) -> None:
        super().__init__(**further)
        self.do_resize, self.size, self.resample = do_resize, size or {"height": 224, "width": 224}, int(resample)
        self.do_rescale, self.rescale_factor, self.do_normalize = do_rescale, rescale_factor, do_normalize
        self.image_mean, self.image_std = list(image_mean or CLIP_MEAN), list(image_std or CLIP_STD)
        self.do_convert_rgb, self.do_center_crop = do_convert_rgb, do_center_crop

    def pixels(
        self,
        images: Any,
        name: str,
        size: tuple[int, int] | None = None,
        normalize: bool | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> Tensor:
        """Pictures as (batch, 3, rows, columns).

        Args:
            images: One of any kind, or a list; floats are rounded to 8 bits, which is what these models were trained on.
            name: The argument's name, for errors.
            size: (rows, columns) to bring them to; its own, if None.
            normalize: Whether to; as the processor is set, if None.
            mean: Instead of its own.
            std: Instead of its own.

        Raises:
            InputError: They are no pictures.
        """
        rows, columns = size or (self.size["height"], self.size["width"])
        made = list[np.ndarray]()
        for picture in in_eight_bits(images, name):
            picture = picture.resize((columns, rows), self.resample) if self.do_resize else picture
            values = np.asarray(picture)
            if self.do_rescale:  # in two steps, as these models were trained: the product is rounded to float32
                values = (values.astype(np.float64) * self.rescale_factor).astype(np.float32)
            if self.do_normalize if normalize is None else normalize:
                center, spread = (np.array(v, values.dtype) for v in (mean or self.image_mean, std or self.image_std))
                values = (values - center) / spread
            made.append(np.ascontiguousarray(values.transpose(2, 0, 1), dtype=np.float32))
        return torch.from_numpy(np.stack(made))
