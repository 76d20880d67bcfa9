"""The one table of public names: where each class and function lives.

`import suffuse` reads only this; a module is imported when one of its names is first asked for (PEP 562). The loader looks
classes up here as well, so a checkpoint can only ever name what stands in this table.
"""

from __future__ import annotations

import importlib
from typing import Any

MODULES: dict[str, tuple[str, ...]] = {
    "suffuse.configuration": ("ConfigMixin", "FrozenConfig", "register_to_config"),
    "suffuse.hub.publishing": ("PushToHubMixin",),
    "suffuse.checkpoints.bundle": ("bundled",),
    "suffuse.noise": ("CounterNoise",),
    "suffuse.diffusion.weighted_prompts": ("Weighted",),
    "suffuse.pipelines.saved_run": ("SavedRun",),
    "suffuse.models.model": ("ModelMixin",),
    "suffuse.models.unet_2d_condition": ("UNet2DConditionModel",),
    "suffuse.models.unet_2d": ("UNet2DModel",),
    "suffuse.models.controlnet": ("ControlNetModel", "MultiControlNetModel"),
    "suffuse.models.t2i_adapter": ("T2IAdapter", "MultiAdapter"),
    "suffuse.models.autoencoder_kl": ("AutoencoderKL",),
    "suffuse.models.autoencoder_asymmetric_kl": ("AsymmetricAutoencoderKL",),
    "suffuse.models.autoencoder_tiny": ("AutoencoderTiny",),
    "suffuse.schedulers.scheduler": ("SchedulerMixin",),
    "suffuse.schedulers.ddim": ("DDIMScheduler",),
    "suffuse.schedulers.ddpm": ("DDPMScheduler",),
    "suffuse.schedulers.pndm": ("PNDMScheduler",),
    "suffuse.schedulers.lms_discrete": ("LMSDiscreteScheduler",),
    "suffuse.schedulers.euler_discrete": ("EulerDiscreteScheduler",),
    "suffuse.schedulers.euler_ancestral_discrete": ("EulerAncestralDiscreteScheduler",),
    "suffuse.schedulers.heun_discrete": ("HeunDiscreteScheduler",),
    "suffuse.schedulers.dpmsolver_multistep": ("DPMSolverMultistepScheduler",),
    "suffuse.schedulers.dpmsolver_singlestep": ("DPMSolverSinglestepScheduler",),
    "suffuse.schedulers.unipc_multistep": ("UniPCMultistepScheduler",),
    "suffuse.schedulers.lcm": ("LCMScheduler",),
    "suffuse.schedulers.deis_multistep": ("DEISMultistepScheduler",),
    "suffuse.schedulers.k_dpm_2_discrete": ("KDPM2DiscreteScheduler",),
    "suffuse.schedulers.k_dpm_2_ancestral_discrete": ("KDPM2AncestralDiscreteScheduler",),
    "suffuse.schedulers.dpmsolver_sde": ("DPMSolverSDEScheduler",),
    "suffuse.schedulers.ipndm": ("IPNDMScheduler",),
    "suffuse.schedulers.ddim_inverse": ("DDIMInverseScheduler",),
    "suffuse.schedulers.unclip": ("UnCLIPScheduler",),
    "suffuse.schedulers.ddim_parallel": ("DDIMParallelScheduler",),
    "suffuse.schedulers.ddpm_parallel": ("DDPMParallelScheduler",),
    "suffuse.schedulers.dpmsolver_multistep_inverse": ("DPMSolverMultistepInverseScheduler",),
    "suffuse.schedulers.tcd": ("TCDScheduler",),
    "suffuse.schedulers.sasolver": ("SASolverScheduler",),
    "suffuse.schedulers.edm_euler": ("EDMEulerScheduler",),
    "suffuse.schedulers.edm_dpmsolver_multistep": ("EDMDPMSolverMultistepScheduler",),
    "suffuse.schedulers.cosine_dpmsolver_multistep": ("CosineDPMSolverMultistepScheduler",),
    "suffuse.schedulers.flow_match_euler_discrete": ("FlowMatchEulerDiscreteScheduler",),
    "suffuse.schedulers.flow_match_heun_discrete": ("FlowMatchHeunDiscreteScheduler",),
    "suffuse.schedulers.repaint": ("RePaintScheduler",),
    "suffuse.schedulers.sde_ve": ("ScoreSdeVeScheduler",),
    "suffuse.schedulers.sde_vp": ("ScoreSdeVpScheduler",),
    "suffuse.schedulers.karras_ve": ("KarrasVeScheduler",),
    "suffuse.schedulers.ddpm_wuerstchen": ("DDPMWuerstchenScheduler",),
    "suffuse.schedulers.consistency_models": ("CMStochasticIterativeScheduler",),
    "suffuse.schedulers.amused": ("AmusedScheduler",),
    "suffuse.schedulers.vq_diffusion": ("VQDiffusionScheduler",),
    "suffuse.adapters.lora": ("LoraLoaderMixin", "StableDiffusionXLLoraLoaderMixin"),
    "suffuse.adapters.textual_inversion": ("TextualInversionLoaderMixin",),
    "suffuse.pipelines.pipeline": ("DiffusionPipeline", "ImagePipelineOutput"),
    "suffuse.pipelines.unconditional.ddpm": ("DDPMPipeline",),
    "suffuse.pipelines.unconditional.ddim": ("DDIMPipeline",),
    "suffuse.pipelines.unconditional.pndm": ("PNDMPipeline",),
    "suffuse.pipelines.unconditional.score_sde_ve": ("ScoreSdeVePipeline",),
    "suffuse.pipelines.unconditional.karras_ve": ("KarrasVePipeline",),
    "suffuse.pipelines.unconditional.consistency_models": ("ConsistencyModelPipeline",),
    "suffuse.pipelines.unconditional.repaint": ("RePaintPipeline",),
    "suffuse.models.vq_model": ("VQModel",),
    "suffuse.models.transformer_2d": ("Transformer2DModel", "DiTTransformer2DModel"),
    "suffuse.pipelines.latent_diffusion.unconditional": ("LDMPipeline",),
    "suffuse.pipelines.latent_diffusion.super_resolution": ("LDMSuperResolutionPipeline",),
    "suffuse.pipelines.latent_diffusion.text_to_image": ("LDMTextToImagePipeline",),
    "suffuse.pipelines.dit": ("DiTPipeline",),
    "suffuse.pipelines.auto": ("AutoPipelineForText2Image", "AutoPipelineForImage2Image", "AutoPipelineForInpainting"),
    "suffuse.pipelines.stable_diffusion.text_to_image": ("StableDiffusionPipeline",),
    "suffuse.pipelines.stable_diffusion.image_to_image": ("StableDiffusionImg2ImgPipeline",),
    "suffuse.pipelines.stable_diffusion.inpaint": ("StableDiffusionInpaintPipeline",),
    "suffuse.pipelines.stable_diffusion.depth_to_image": ("StableDiffusionDepth2ImgPipeline",),
    "suffuse.pipelines.stable_diffusion_xl.text_to_image": ("StableDiffusionXLPipeline",),
    "suffuse.pipelines.stable_diffusion_xl.image_to_image": ("StableDiffusionXLImg2ImgPipeline",),
    "suffuse.pipelines.stable_diffusion_xl.inpaint": ("StableDiffusionXLInpaintPipeline",),
    "suffuse.pipelines.controlnet.text_to_image": ("StableDiffusionControlNetPipeline",),
    "suffuse.pipelines.controlnet.image_to_image": ("StableDiffusionControlNetImg2ImgPipeline",),
    "suffuse.pipelines.controlnet.inpaint": ("StableDiffusionControlNetInpaintPipeline",),
    "suffuse.pipelines.controlnet.text_to_image_xl": ("StableDiffusionXLControlNetPipeline",),
    "suffuse.pipelines.controlnet.image_to_image_xl": ("StableDiffusionXLControlNetImg2ImgPipeline",),
    "suffuse.pipelines.controlnet.inpaint_xl": ("StableDiffusionXLControlNetInpaintPipeline",),
    "suffuse.pipelines.t2i_adapter.text_to_image": ("StableDiffusionAdapterPipeline",),
    "suffuse.pipelines.t2i_adapter.text_to_image_xl": ("StableDiffusionXLAdapterPipeline",),
    "suffuse.pipelines.instruct_pix2pix.stable_diffusion": ("StableDiffusionInstructPix2PixPipeline",),
    "suffuse.pipelines.instruct_pix2pix.stable_diffusion_xl": ("StableDiffusionXLInstructPix2PixPipeline",),
    "suffuse.pipelines.image_variation.stable_diffusion": ("StableDiffusionImageVariationPipeline",),
    "suffuse.pipelines.paint_by_example.stable_diffusion": ("PaintByExamplePipeline",),
}

PUBLIC: dict[str, str] = {name: module for module, names in MODULES.items() for name in names}
"""Public name → module that defines it."""


def resolve(name: str) -> Any:
    """What a public name stands for; its module is imported if it was not."""
    return getattr(importlib.import_module(PUBLIC[name]), name)
