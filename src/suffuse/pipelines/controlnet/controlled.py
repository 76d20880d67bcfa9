"""What the pipelines with ControlNets share: the component, and from control pictures to conditioners (Zhang et al., 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from suffuse.checkpoints.layout import numbered
from suffuse.diffusion.control import Control
from suffuse.errors import ConfigError, InputError
from suffuse.models.controlnet import MultiControlNetModel
from suffuse.models.side_by_side import parts_of
from suffuse.pipelines.arguments import one_for_each, prompt_count
from suffuse.pipelines.stable_diffusion.base import StableDiffusionBase
from suffuse.processing.image import Box, ImageInput, VaeImageProcessor
from suffuse.processing.pixels import listed

if TYPE_CHECKING:
    from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

    from suffuse.models.autoencoder_kl import AutoencoderKL
    from suffuse.models.controlnet import ControlNetModel
    from suffuse.models.unet_2d_condition import UNet2DConditionModel
    from suffuse.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from suffuse.schedulers.scheduler import SchedulerMixin

AGREED = {
    "cross_attention_dim": "cross_attention_dim",
    "in_channels": "out_channels",
    "block_out_channels": "block_out_channels",
    "layers_per_block": "layers_per_block",
    "addition_embed_type": "addition_embed_type",
    "projection_class_embeddings_input_dim": "projection_class_embeddings_input_dim",
}
"""Entries in which a ControlNet must be as its UNet is: what both are given, and what the one adds to the other."""
PER_NET = ("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end")
"""Arguments that may be a list of one for each ControlNet."""


class Controlled(StableDiffusionBase):
    """The verbs of ControlNets, and the components of those for Stable Diffusion."""

    controlnet: Any

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        controlnet: ControlNetModel | Sequence[ControlNetModel] | MultiControlNetModel,
        scheduler: SchedulerMixin,
        safety_checker: StableDiffusionSafetyChecker | None,
        feature_extractor: CLIPImageProcessor | None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        requires_safety_checker: bool = True,
    ) -> None:
        checker = (safety_checker, feature_extractor, image_encoder, requires_safety_checker)
        super().__init__(vae, text_encoder, tokenizer, unet, scheduler, *checker)
        self.take(controlnet)

    def take(self, controlnet: Any) -> None:
        """Make a ControlNet, or a list of several, the component of the pipeline."""
        listed = isinstance(controlnet, (list, tuple))
        controlnet = MultiControlNetModel(controlnet) if listed else controlnet
        self.check_nets(parts_of(controlnet))
        self.register_modules(controlnet=controlnet)

    @property
    def several(self) -> bool:
        """Whether the component is several nets, which take lists of pictures; a list of one is several too."""
        return isinstance(self.controlnet, MultiControlNetModel)

    @property
    def nets(self) -> list[Any]:
        """The ControlNets, in the order of their pictures."""
        return parts_of(self.controlnet)

    @property
    def _modules_by_name(self) -> dict[str, nn.Module]:
        # Each net is a model of its own, to be moved and to wait elsewhere.
        modules = {name: module for name, module in super()._modules_by_name.items() if name != "controlnet"}
        return modules | {numbered("controlnet", index): net for index, net in enumerate(self.nets)}

    def needed_components(self, arguments: dict[str, Any]) -> list[str]:
        """Those of Stable Diffusion, and the ControlNet."""
        return [*super().needed_components(arguments), "controlnet"]

    def check_nets(self, nets: Sequence[Any]) -> None:
        """Raise `ConfigError` if a ControlNet was made for another UNet."""
        if self.unet is None:
            return
        for index, net in enumerate(nets):
            own, unet = net.config, self.unet.config
            told = {key: (own[key], unet[other]) for key, other in AGREED.items() if own[key] is not None}
            unlike = {key: pair for key, pair in told.items() if not _alike(*pair)}
            if unlike:
                raise ConfigError(
                    f"{numbered('controlnet', index)}/config.json and unet/config.json disagree",
                    found="; ".join(f"{key} {one!r} and {other!r}" for key, (one, other) in unlike.items()),
                    expected="a ControlNet that was trained for this UNet",
                )

    # ------------------------------------------------------------ control pictures

    @cached_property
    def control_image_processor(self) -> VaeImageProcessor:
        """Control pictures to tensors in [0, 1]."""
        return VaeImageProcessor(vae_scale_factor=self.vae_scale_factor, do_normalize=False)

    def check_image(
        self, image: ImageInput, prompt: str | list[str] | None, prompt_embeds: Tensor | None, name: str = "control_image"
    ) -> None:
        """Raise `InputError` unless control pictures are one for all prompts, or one for each."""
        given = sum(len(item) if getattr(item, "ndim", 3) == 4 else 1 for item in listed(image, name))
        prompts = prompt_count({"prompt": prompt, "prompt_embeds": prompt_embeds})
        if given not in (1, prompts):
            raise InputError(
                f"{name}: {given} pictures given for {prompts} prompt{'s' * (prompts != 1)}",
                expected="one for all, or one for each prompt",
            )

    def prepare_control_image(
        self,
        image: ImageInput,
        width: int | None,
        height: int | None,
        batch_size: int,
        num_images_per_prompt: int,
        device: torch.device,
        dtype: torch.dtype,
        crops_coords: Box | None = None,
        resize_mode: Literal["default", "fill", "crop"] = "default",
        do_classifier_free_guidance: bool = False,
        guess_mode: bool = False,
        name: str = "control_image",
    ) -> Tensor:
        """Control pictures as a ControlNet sees them: (batch, 3, height, width) in [0, 1].

        Args:
            image: One for all, or one for each prompt.
            width: Columns wanted; the picture's own, if None.
            height: Rows, likewise.
            batch_size: How often to repeat one picture.
            num_images_per_prompt: How often to repeat each of several.
            device: Where they are wanted.
            dtype: The type of the net.
            crops_coords: (left, top, right, bottom) to cut out of PIL pictures first.
            resize_mode: "fill" and "crop" keep the aspect of PIL pictures.
            do_classifier_free_guidance: Once more for the unconditional branch.
            guess_mode: Not for that branch.
            name: The argument's name, for errors.
        """
        pictures = self.control_image_processor.preprocess(image, height, width, resize_mode, crops_coords, name).float()
        times = batch_size if len(pictures) == 1 else num_images_per_prompt
        pictures = pictures.repeat_interleave(times, dim=0).to(device, dtype)
        return torch.cat([pictures] * 2) if do_classifier_free_guidance and not guess_mode else pictures

    def controls(
        self,
        name: str,
        height: int | None,
        width: int | None,
        size: tuple[int, int] | None = None,
        crops_coords: Box | None = None,
        resize_mode: Literal["default", "fill", "crop"] = "default",
    ) -> list[Control]:
        """A conditioner for each ControlNet of the call.

        Args:
            name: The argument that holds the control pictures.
            height: Rows to bring them to; their own, if None.
            width: Columns, likewise.
            size: What they have to have in the end; what the first has, if None.
            crops_coords: Of them, as of the picture.
            resize_mode: Likewise.

        Raises:
            ConfigError: A net was made for another UNet.
            InputError: Pictures, scales or parts of the way are not one for each net; or a picture does not fit.
        """
        self.check_nets(self.nets)
        arguments, scheduler, nets = self._run.arguments, self._run.scheduler, self.nets
        settings = [one_for_each(key, arguments[key], len(nets), "ControlNet") for key in PER_NET]
        check_parts(*settings[1:])
        each, device = arguments["num_images_per_prompt"], self._execution_device
        made = list[Control]()
        per_net = zip(nets, self.images_of_nets(name), *settings, strict=True)
        for index, (net, image, scale, start, end) in enumerate(per_net):
            place = f"{name}[{index}]" if self.several else name
            self.check_image(image, arguments["prompt"], arguments["prompt_embeds"], place)
            frame = (width, height, 1, each, device, net.dtype, crops_coords, resize_mode)
            pictures = self.prepare_control_image(image, *frame, name=place)
            size = size or (pictures.shape[-2], pictures.shape[-1])
            if net.dtype != self.unet.dtype:
                types = f"{net.dtype} and {self.unet.dtype}"
                raise InputError("ControlNet and UNet compute in two types", found=types, remedy="pipe.to(…) with one for all")
            check_size(place, pictures, (net.config.conditioning_channels, *size))
            guess = arguments["guess_mode"] or net.config.global_pool_conditions
            made.append(Control(net, pictures, scheduler, scale, start, end, guess))
        return made

    def images_of_nets(self, name: str) -> list[Any]:
        """The control pictures of the call, those of each net for themselves."""
        image, count = self._run.arguments[name], len(self.nets)
        if not self.several:
            return [image]
        by_prompt = isinstance(image, list) and any(isinstance(item, (list, tuple)) for item in image)
        for entry in image if by_prompt else [image]:
            if not isinstance(entry, (list, tuple)) or len(entry) != count:
                found = f"{len(entry)} pictures" if isinstance(entry, (list, tuple)) else type(entry).__name__
                raise InputError(f"{name} does not go with {count} ControlNets", found=found, expected=f"a list of {count}")
        return [list(pictures) for pictures in zip(*image, strict=True)] if by_prompt else image


def check_parts(starts: list[float], ends: list[float]) -> None:
    """Raise `InputError` if a ControlNet would begin to act no earlier than it ends."""
    for start, end in zip(starts, ends, strict=True):
        if start >= end:
            raise InputError(
                f"control_guidance_start={start} is not before control_guidance_end={end}", remedy="for none, use a scale of 0"
            )


def check_size(name: str, pictures: Tensor, expected: tuple[int, int, int]) -> None:
    """Raise `InputError` unless control pictures are of this many channels, rows and columns."""
    if tuple(pictures.shape[1:]) != expected:
        raise InputError(
            f"{name} does not fit",
            found="{} channels, {} x {} pixels".format(*_columns_first(pictures.shape[1:])),
            expected="{} channels, {} x {} pixels".format(*_columns_first(expected)),
            remedy="pass height=… and width=…, to which all are brought",
        )


def _columns_first(shape: Sequence[int]) -> tuple[int, int, int]:
    channels, height, width = shape
    return channels, width, height


def _alike(one: Any, other: Any) -> bool:
    """Whether two entries say the same, though one may say it for all blocks and the other for each."""
    lists = [list(value) if isinstance(value, (list, tuple)) else None for value in (one, other)]
    if lists[0] is None and lists[1] is None:
        return one == other
    length = len(lists[0] or lists[1] or [])
    return (lists[0] or [one] * length) == (lists[1] or [other] * length)
