"""IP-Adapters of pipelines: pictures to take after, beside the words (Ye et al., 2023, "IP-Adapter").

Adapters belong to the UNet: pipelines that share it share them. The image encoder and its picture processor are components of the
pipeline; those that came with an adapter go with it.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from suffuse.checkpoints.adapter_files import Choice
from suffuse.checkpoints.fetching import Wanted, fetch_components
from suffuse.checkpoints.layout import TRANSFORMERS
from suffuse.diffusion.conditioning import UNTOLD, Conditioner
from suffuse.diffusion.image_prompts import ShowPictures
from suffuse.errors import AdapterError, InputError
from suffuse.hub.options import HubOptions
from suffuse.hub.sources import opened_subfolder
from suffuse.layers.low_rank import adapters_of, delete_adapters, number
from suffuse.models.adapter_services import block_weights, hub_options
from suffuse.models.image_adapter import (
    Given,
    ImageAdapter,
    ImageAdapters,
    Scale,
    drop_image_adapters,
    image_adapters_of,
    read_adapter,
    use_adapters,
)
from suffuse.models.lora import LoraFile, load_lora
from suffuse.processing.pixels import opened, over_white

MASKS = "ip_adapter_masks"
"""The key of masks in `cross_attention_kwargs`."""
PROMPTED = ("ip_adapter_image", "ip_adapter_image_embeds", "ip_adapter_scale")
"""Keywords of calls."""
KINDS = "PIL pictures, or arrays (height, width, 3)"
USUAL_SIZE = 224
"""Rows and columns that image encoders see, where none says."""


class IPAdapterMixin:
    """Ways of a pipeline to load IP-Adapters, and to look at pictures."""

    if TYPE_CHECKING:
        unet: Any
        image_encoder: Any
        feature_extractor: Any

    # ---------------------------------------------------------------- load and unload

    def load_ip_adapter(
        self,
        pretrained_model_name_or_path_or_dict: Given | Sequence[Given],
        subfolder: str | Sequence[str | None] | None = None,
        weight_name: str | Sequence[str | None] | None = None,
        image_encoder_folder: str | None = "image_encoder",
        *,
        use_safetensors: bool | None = None,
        low_cpu_mem_usage: bool = True,
        **keywords: Any,
    ) -> None:
        """Load one adapter or several; those that were loaded before are gone then.

        Args:
            pretrained_model_name_or_path_or_dict: A folder, a repository, a file, or the contents of a file; or a list of such.
            subfolder: Of the folder or the repository; a list of one for each adapter.
            weight_name: The name of the file, likewise.
            image_encoder_folder: Where the image encoder is, if the pipeline has none: inside of `subfolder`, or with a slash in
                it inside of the repository. None loads none: pass `ip_adapter_image_embeds` then.
            use_safetensors: True refuses pickles, False takes nothing else, None prefers safetensors.
            low_cpu_mem_usage: Kept for its name: memory is taken once in any case.
            **keywords: The `suffuse.hub.options.HubOptions`.

        Raises:
            InputError: One is neither a name nor named tensors. The pipeline is unchanged.
            AdapterError: One does not fit the pipeline, with the numbers. The pipeline is unchanged.
            WeightsMismatchError: A tensor holds other than floating point numbers. The pipeline is unchanged.
            MissingFileError: There is no such file, or no image encoder. The pipeline is unchanged.
            NonFiniteError: A tensor holds NaN or infinity. The pipeline is unchanged.
            CorruptFileError: A file is damaged. The pipeline is unchanged.
        """
        options = hub_options(f"{type(self).__name__}.load_ip_adapter", keywords)
        sources, folders, names = _as_long_as_each_other(
            pretrained_model_name_or_path_or_dict=pretrained_model_name_or_path_or_dict,
            subfolder=subfolder,
            weight_name=weight_name,
        )
        check_sources(sources)
        adapters = [
            read_adapter(source, Choice(name or None, folder or None, use_safetensors), options, self.unet)
            for source, folder, name in zip(sources, folders, names, strict=True)
        ]
        low_rank = [LoraFile.open(adapter.take_low_rank(), unet=self.unet.config) for adapter in adapters]
        for file in low_rank:
            if file.components:
                file.fit({"unet": self.unet})
        parts = self._parts_for(sources[0], folders[0], image_encoder_folder, options)
        _remove(self.unet)
        use_adapters(self.unet, adapters).low_rank = _load_low_rank(self.unet, low_rank)
        cast(Any, self).register_modules(**parts)
        self.__dict__["_parts_for_pictures"] = (*self.__dict__.get("_parts_for_pictures", ()), *parts)

    def unload_ip_adapter(self) -> None:
        """Remove all adapters, and what was loaded for them: the pipeline is as if they had never been loaded."""
        _remove(self.unet)
        cast(Any, self).register_modules(**dict.fromkeys(self.__dict__.pop("_parts_for_pictures", ())))

    def set_ip_adapter_scale(self, scale: Any) -> None:
        """Say how much of the adapters, in all calls that do not say it themselves (`ip_adapter_scale`).

        Args:
            scale: A number; or numbers by block, `{"down": 0.5, "mid": 1.0, "up": {"block_0": [0.0, 1.0, 0.0]}}`, 0 where none is
                told; or a list of one of these for each adapter. With masks, a list of numbers for each picture of an adapter.

        Raises:
            AdapterError: No adapter is loaded, or a list has another length, or a block is not there; nothing is changed.
        """
        adapters = image_adapters_of(self.unet)
        if adapters is None:
            raise AdapterError("no IP-Adapter is loaded", remedy="load one first: load_ip_adapter(…)")
        adapters.scales, adapters.asked = scales_for(adapters, scale), copy.deepcopy(scale)

    # ---------------------------------------------------------------- pictures

    def encode_image(
        self, image: Any, device: torch.device | str, num_images_per_prompt: int, output_hidden_states: bool | None = None
    ) -> tuple[Tensor, Tensor]:
        """What the image encoder says of pictures, and of nothing.

        Args:
            image: A PIL picture or an array, a list of them, or a tensor (pictures, 3, height, width) as the encoder takes it.
            device: Where it is to be said.
            num_images_per_prompt: How often each.
            output_hidden_states: The last but one hidden states, (pictures, states, width), of a black picture for nothing; else
                embeddings, (pictures, features), zeros for nothing.

        Raises:
            InputError: The pipeline has no image encoder, or these are no pictures.
        """
        pixels, encoder = self._pixels(image).to(device), self.image_encoder
        pixels = pixels.to(next(encoder.parameters()).dtype)
        if output_hidden_states:
            shown = (pixels, torch.zeros_like(pixels))
            seen = [encoder(each, output_hidden_states=True).hidden_states[-2] for each in shown]
            said, nothing = (states.repeat_interleave(num_images_per_prompt, dim=0) for states in seen)
            return said, nothing
        said = encoder(pixels).image_embeds.repeat_interleave(num_images_per_prompt, dim=0)
        return said, torch.zeros_like(said)

    def prepare_ip_adapter_image_embeds(
        self,
        ip_adapter_image: Any,
        ip_adapter_image_embeds: Sequence[Tensor] | None,
        device: torch.device | str,
        num_images_per_prompt: int,
        do_classifier_free_guidance: bool,
    ) -> list[Tensor]:
        """What an image encoder says of the pictures of each adapter.

        Args:
            ip_adapter_image: A picture for each adapter; a list in the list for several pictures of one.
            ip_adapter_image_embeds: What this method returned, instead.
            device: Where it is to be said.
            num_images_per_prompt: How often each.
            do_classifier_free_guidance: What is said of nothing stands before it.

        Returns:
            For each adapter (1 or 2 · num_images_per_prompt, pictures, …).

        Raises:
            InputError: There are pictures for another number of adapters, or they do not fit these.
        """
        adapters = _loaded(self.unet).adapters
        said: list[Tensor] = []
        shown = one_for_each_adapter(adapters, ip_adapter_image, ip_adapter_image_embeds)
        for adapter, (where, own) in zip(adapters, shown.items(), strict=True):
            if ip_adapter_image_embeds is None:
                pictures, nothing = self.encode_image(own, device, 1, adapter.projection.hidden_states)
                own = torch.stack([nothing, pictures])
                adapter.check(where, own)
            parts = _halves(where, own, do_classifier_free_guidance)
            said.append(torch.cat([part for part in parts for _ in range(num_images_per_prompt)]).to(device))
        return said

    # ---------------------------------------------------------------- inside

    def _pixels(self, image: Any) -> Tensor:
        """Pictures as the image encoder takes them."""
        encoder, extractor = (getattr(self, name, None) for name in ("image_encoder", "feature_extractor"))
        if encoder is None or (extractor is None and not isinstance(image, Tensor)):
            raise InputError(
                "the pipeline has no image encoder, or no feature_extractor, to look at pictures",
                remedy="pass ip_adapter_image_embeds; or set pipe.image_encoder and pipe.feature_extractor; or load the adapter "
                "with image_encoder_folder=…",
            )
        if isinstance(image, Tensor):
            size = encoder.config.image_size
            if image.ndim != 4 or tuple(image.shape[1:]) != (3, size, size) or not len(image) or not image.is_floating_point():
                raise InputError(
                    "ip_adapter_image has the wrong shape",
                    found=f"{tuple(image.shape)} of {image.dtype}",
                    expected=f"floats (pictures, 3, {size}, {size}), as the feature_extractor makes them; or PIL pictures",
                )
            return image
        pictures: list[Any] = list(image) if isinstance(image, (list, tuple)) else [image]
        if not pictures or not all(isinstance(picture, (Image.Image, np.ndarray)) for picture in pictures):
            kinds = sorted({type(picture).__name__ for picture in pictures})
            raise InputError("ip_adapter_image holds no pictures", found=", ".join(kinds) or "nothing", expected=KINDS)
        plain = [_plain(picture) for picture in pictures]
        try:
            return cast(Any, extractor)(plain, return_tensors="pt").pixel_values
        except (ValueError, TypeError) as error:
            raise InputError("ip_adapter_image holds no pictures", found=str(error), expected=KINDS) from None

    def _parts_for(self, source: Given, subfolder: str | None, folder: str | None, options: HubOptions) -> dict[str, Any]:
        """The image encoder and the picture processor that the pipeline needs and does not have."""
        parts: dict[str, Any] = {}
        components: Mapping[str, Any] = cast(Any, self).components
        encoder = components.get("image_encoder")
        if "image_encoder" in components and encoder is None and folder is not None:
            parts["image_encoder"] = encoder = self._read_encoder(source, subfolder, folder, options)
        if "feature_extractor" in components and components["feature_extractor"] is None:
            from transformers import CLIPImageProcessorPil

            size = encoder.config.image_size if encoder is not None else USUAL_SIZE
            parts["feature_extractor"] = CLIPImageProcessorPil(
                size={"shortest_edge": size}, crop_size={"height": size, "width": size}
            )
        return parts

    def _read_encoder(self, source: Given, subfolder: str | None, folder: str, options: HubOptions) -> Any:
        if isinstance(source, Mapping):
            raise AdapterError(
                "the pipeline has no image encoder, and weights in memory tell none",
                remedy="set pipe.image_encoder first; or pass image_encoder_folder=None, and ip_adapter_image_embeds in calls",
            )
        from transformers import CLIPVisionModelWithProjection

        from suffuse.checkpoints.transformers_models import load_transformers_model

        root = Path(source).parent if os.path.isfile(source) else source
        inside = folder if "/" in folder or not subfolder else f"{subfolder.strip('/')}/{folder}"
        with opened_subfolder(root, inside, options) as (files, prefix):
            if files.commit is not None:
                fetch_components(files, {prefix: Wanted(TRANSFORMERS)})
        pipe: Any = self
        model = load_transformers_model(CLIPVisionModelWithProjection, files.folder / prefix, torch_dtype=self.unet.dtype)
        return model.to(pipe._execution_device)


# ---------------------------------------------------------------- in a call


def one_for_each_adapter(adapters: Sequence[ImageAdapter], image: Any, embeds: Any) -> dict[str, Any]:
    """What a call shows each adapter, by its place among the arguments: pictures, or what an image encoder said of them.

    Raises:
        InputError: It is for another number of adapters; or what was said does not fit one.
    """
    name, passed = (PROMPTED[0], image) if embeds is None else (PROMPTED[1], embeds)
    given: list[Any] = list(passed) if isinstance(passed, (list, tuple)) else [passed]
    if len(given) != len(adapters):
        raise InputError(
            f"{name}: {len(given)} given for {len(adapters)} IP-Adapter{'s' * (len(adapters) > 1)}",
            remedy="pass one for each adapter, and several pictures for one adapter as a list in the list: [[first, second]]",
        )
    shown = {f"{name}[{place}]": own for place, own in enumerate(given)}
    for adapter, (where, own) in zip(adapters, shown.items(), strict=True):
        if embeds is None:
            continue
        if not isinstance(own, Tensor) or not own.is_floating_point() or not torch.isfinite(own).all():
            raise InputError(f"{where} is no tensor of finite numbers", found=type(own).__name__)
        adapter.check(where, own)
    return shown


def check_image_prompts(pipe: Any, arguments: Mapping[str, Any]) -> None:
    """Raise `InputError` if a call has pictures and no adapter, or an adapter and no pictures; or they do not go together.

    Raises:
        AdapterError: Scales are not one for each adapter, or one is no number.
    """
    adapters, masks = image_adapters_of(pipe.unet), (arguments.get("cross_attention_kwargs") or {}).get(MASKS)
    given = [name for name in PROMPTED if arguments.get(name) is not None] + ([] if masks is None else [MASKS])
    if adapters is None:
        if given:
            raise InputError(
                f"{given[0]} is given and no IP-Adapter is loaded", remedy="pipe.load_ip_adapter(…) first, or leave it out"
            )
        return
    if not {*PROMPTED[:2]} & {*given}:
        if any(own != 0 for own in _scales(adapters, arguments)):
            takes = PROMPTED[0] in arguments or PROMPTED[1] in arguments
            raise InputError(
                "an IP-Adapter is loaded, and no picture is given",
                remedy="pass ip_adapter_image or ip_adapter_image_embeds; to draw without, pipe.set_ip_adapter_scale(0)"
                if takes
                else f"{type(pipe).__name__} takes none: pipe.unload_ip_adapter(), or pipe.set_ip_adapter_scale(0)",
            )
        return
    image, embeds = (arguments.get(name) for name in PROMPTED[:2])
    shown = one_for_each_adapter(adapters.adapters, image, embeds)
    counts = [_pictures_in(own) if embeds is None else own.shape[1] for own in shown.values()]
    _masks_for(masks, counts, _scales(adapters, arguments), torch.device("cpu"))
    adapters.check_processors()


def _scales(adapters: ImageAdapters, arguments: Mapping[str, Any]) -> list[Scale]:
    scale = arguments.get(PROMPTED[2])
    return adapters.scales if scale is None else scales_for(adapters, scale)


def scale_in_effect(pipe: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """`ip_adapter_scale` as it counts in a call that shows pictures, whoever said it."""
    adapters, shown = (
        image_adapters_of(getattr(pipe, "unet", None)),
        any(arguments.get(name) is not None for name in PROMPTED[:2]),
    )
    if adapters is None or not shown or PROMPTED[2] not in arguments:
        return {}
    told = arguments[PROMPTED[2]]
    return {PROMPTED[2]: adapters.asked if told is None else told}


def image_prompts(pipe: Any) -> list[Conditioner]:
    """What lets the UNet of a run attend to pictures: nothing, if there are none."""
    run, adapters = pipe._run, image_adapters_of(pipe.unet)
    image, embeds = (run.arguments.get(name) for name in PROMPTED[:2])
    if adapters is None or (image is None and embeds is None):
        return []
    scales, masks = _scales(adapters, run.arguments), (run.cross_attention_kwargs or {}).get(MASKS)
    guided = image is not None or any(branch in UNTOLD for branch in run.guidance.branches)
    device, dtype = pipe._execution_device, pipe.unet.dtype
    said = [own.to(dtype) for own in pipe.prepare_ip_adapter_image_embeds(image, embeds, device, 1, guided)]
    where = _masks_for(masks, [own.shape[1] for own in said], scales, device)
    return [ShowPictures(adapters, said, scales, where)]


def _plain(picture: Any) -> Any:
    """A picture as the processor of an image encoder takes it: upright, in 8-bit RGB; arrays of floats in bytes too."""
    if isinstance(picture, Image.Image):
        return over_white(opened(picture, PROMPTED[0]))
    if picture.dtype.kind == "f" and picture.size and np.isfinite(picture).all() and 0 <= picture.min() <= picture.max() <= 1:
        return (picture * 255).round().astype(np.uint8)
    return picture


def scales_for(adapters: ImageAdapters, wanted: Any) -> list[Scale]:
    """How much of each adapter: of one for all, or a list.

    Raises:
        AdapterError: The list has another length, or a block is not there.
    """
    count = len(adapters.adapters)
    each = list(wanted) if isinstance(wanted, (list, tuple)) else [wanted] * count
    if len(each) != count:
        raise AdapterError("there must be one scale for each IP-Adapter", found=f"{len(each)} for {count}")
    what = "the scale of an IP-Adapter"
    return [
        [number(what, item) for item in own] if isinstance(own, (list, tuple)) else block_weights(adapters.model, own, 0.0)
        for own in each
    ]


def _pictures_in(shown: Any) -> int:
    """How many pictures an adapter is shown."""
    return len(shown) if isinstance(shown, (list, tuple)) or getattr(shown, "ndim", 0) == 4 else 1


def _masks_for(masks: Any, counts: Sequence[int], scales: Sequence[Scale], device: torch.device) -> list[Tensor | None]:
    """Where each adapter counts, checked against how many pictures it is shown."""
    if masks is not None and (not isinstance(masks, (list, tuple, Tensor)) or (isinstance(masks, Tensor) and masks.ndim < 3)):
        raise InputError(f"{MASKS} has the wrong type", found=type(masks).__name__, expected="a tensor for each IP-Adapter")
    each: list[Any] = [None] * len(counts) if masks is None else list(masks.unsqueeze(1) if isinstance(masks, Tensor) else masks)
    if len(each) != len(counts):
        raise InputError(f"{MASKS}: {len(each)} given for {len(counts)} IP-Adapters", remedy="pass one for each, or None")
    for mask, pictures, scale in zip(each, counts, scales, strict=True):
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[:2] != (1, pictures)):
            raise InputError(
                f"one of {MASKS} does not fit the pictures of its adapter",
                found=tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__,
                expected=f"a tensor (1, {pictures}, height, width)",
            )
        if mask is not None and (mask.is_complex() or not mask.numel() or not bool(((mask >= 0) & (mask <= 1)).all())):
            raise InputError(f"one of {MASKS} says where with other numbers", found=str(mask.dtype), expected="0 to 1")
        if isinstance(scale, list) and (mask is None or len(scale) != pictures):
            raise InputError(
                "a scale for each picture of an adapter needs a mask for each",
                found=f"{len(scale)} scales",
                expected=f"{pictures}",
            )
    return [None if mask is None else mask.to(device, torch.float32 if not mask.is_floating_point() else None) for mask in each]


def _loaded(unet: Any) -> ImageAdapters:
    adapters = image_adapters_of(unet)
    if adapters is None:
        raise InputError("no IP-Adapter is loaded", remedy="load one first: load_ip_adapter(…)")
    return adapters


def _halves(name: str, embeds: Tensor, guided: bool) -> Sequence[Tensor]:
    """What is said of nothing, if it is needed, and of the pictures."""
    if len(embeds) == 2:
        return embeds.chunk(2)[0 if guided else 1 :]
    if len(embeds) != 1 or guided:
        raise InputError(
            f"{name} must have {'two rows: what is said of nothing, and' if guided else 'one row:'} what is said of the pictures",
            found=tuple(embeds.shape),
            remedy="make it with pipe.prepare_ip_adapter_image_embeds(…, do_classifier_free_guidance=True)",
        )
    return [embeds]


def check_sources(sources: Sequence[Any]) -> None:
    """Raise `InputError` unless these are names of files, folders or repositories, or contents of files."""
    for source in sources:
        if not isinstance(source, (str, os.PathLike, Mapping)):
            raise InputError(
                "load_ip_adapter: nothing to load an IP-Adapter from",
                found=type(source).__name__,
                expected="a file, a folder, a repository, or named tensors; or a list of one for each adapter",
            )


def _as_long_as_each_other(**given: Any) -> list[list[Any]]:
    """Lists of one entry for each adapter, of lists or of one for all."""
    lists = {name: list(value) if isinstance(value, (list, tuple)) else [value] for name, value in given.items()}
    count = max(map(len, lists.values()))
    if any(len(entries) not in (1, count) for entries in lists.values()):
        told = ", ".join(f"{len(entries)} of {name}" for name, entries in lists.items())
        raise AdapterError("load_ip_adapter: lists of different lengths", found=told, remedy="pass one for each adapter")
    return [entries * count if len(entries) == 1 else entries for entries in lists.values()]


def _load_low_rank(unet: Any, files: Sequence[LoraFile]) -> list[str]:
    """Load the low-rank adapters that go with these, beside those that are active; returns their names."""
    names: list[str] = []
    for file in files:
        if file.components:
            own = adapters_of(unet)
            taken, before = ([], {}) if own is None else (own.names, dict(own.weights))
            free = next(name for name in (f"faceid_{number}" for number in range(len(taken) + 1)) if name not in taken)
            names.append(load_lora(file, {"unet": unet}, free))
            cast(Any, adapters_of(unet)).activate({**before, free: 1.0})
    return names


def _remove(unet: Any) -> None:
    """Take adapters off a UNet, and the low-rank ones that came with them."""
    adapters = image_adapters_of(unet)
    if adapters is not None:
        delete_adapters(unet, adapters.low_rank)
        drop_image_adapters(unet)
