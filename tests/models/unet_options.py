"""Configurations of `UNet2DConditionModel` that together use every block and every value of every option."""

import torch

CROSS, TOKENS = 16, 5


def cross(**changes):
    return {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": CROSS,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
        **changes,
    }


def simple(**changes):
    return cross(
        **{
            "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            "attention_head_dim": 8,
            **changes,
        }
    )


def latent_upscaler(**changes):
    return cross(
        **{
            "block_out_channels": (32, 64, 64),
            "down_block_types": ("KDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D"),
            "mid_block_type": None,
            "up_block_types": ("KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KUpBlock2D"),
            "attention_head_dim": 8,
            "norm_num_groups": None,
            "layers_per_block": 3,
            "act_fn": "gelu",
            "time_embedding_type": "fourier",
            "time_embedding_dim": 64,
            "conv_in_kernel": 1,
            "conv_out_kernel": 1,
            "resnet_time_scale_shift": "scale_shift",
            "time_cond_proj_dim": 12,
            **changes,
        }
    )


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


# name → configuration, arguments of the call beside sample, timestep and context
OPTIONS = {
    "stable diffusion 1": (cross(), {}),
    "stable diffusion 2": (cross(use_linear_projection=True, upcast_attention=True, attention_head_dim=(2, 4)), {}),
    "three levels": (
        cross(
            block_out_channels=(32, 32, 64),
            layers_per_block=(1, 2, 1),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=(2, 4, 8),
        ),
        {},
    ),
    "stable diffusion xl": (
        cross(
            transformer_layers_per_block=(1, 2),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=80,
        ),
        {"added_cond_kwargs": {"text_embeds": noise(2, 32), "time_ids": noise(2, 6)}},
    ),
    "depths per layer": (
        cross(
            transformer_layers_per_block=[[2], [1]],
            reverse_transformer_layers_per_block=[[1, 1], [1, 2]],
            down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2,
        ),
        {},
    ),
    "old block names": (cross(down_block_types=("UNetResCrossAttnDownBlock2D", "UNetResDownBlock2D")), {}),
    "context sizes per block": (
        cross(
            cross_attention_dim=[16, 16],
            down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2,
        ),
        {},
    ),
    "plain middle": (cross(mid_block_type="UNetMidBlock2D"), {}),
    "no middle": (cross(mid_block_type=None), {}),
    "middle scale": (cross(mid_block_scale_factor=1.4142), {}),
    "attention without context": (
        cross(down_block_types=("AttnDownBlock2D",) * 2, up_block_types=("AttnUpBlock2D",) * 2, attention_head_dim=(4, 8)),
        {},
    ),
    "only cross-attention": (cross(only_cross_attention=True), {}),
    "only cross-attention in one block": (cross(only_cross_attention=(True, False)), {}),
    "dual cross-attention": (cross(dual_cross_attention=True), {"encoder_hidden_states": noise(2, 334, CROSS)}),
    "simple cross-attention": (simple(), {}),
    "simple, only cross": (simple(only_cross_attention=True), {}),
    "simple, middle only cross": (simple(only_cross_attention=(False, False), mid_block_only_cross_attention=True), {}),
    "simple, layer norm": (simple(cross_attention_norm="layer_norm", cross_attention_dim=64), {"size": 64}),
    "simple, group norm": (simple(cross_attention_norm="group_norm", cross_attention_dim=64), {"size": 64}),
    "simple, masked": (simple(), {"encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])}),
    "deepfloyd": (
        simple(
            resnet_time_scale_shift="scale_shift",
            resnet_skip_time_act=True,
            resnet_out_scale_factor=1.4142,
            addition_embed_type="text",
            addition_embed_type_num_heads=4,
            encoder_hid_dim=24,
            cross_attention_dim=64,
            act_fn="gelu",
        ),
        {"size": 24},
    ),
    "latent upscaler": (latent_upscaler(), {"timestep_cond": noise(2, 12)}),
    "latent upscaler, plain blocks": (
        latent_upscaler(
            block_out_channels=(32, 64),
            down_block_types=("KDownBlock2D",) * 2,
            up_block_types=("KUpBlock2D",) * 2,
            time_embedding_dim=None,
        ),
        {},
    ),
    "embedding table": (cross(num_class_embeds=10), {"class_labels": torch.tensor([3, 7])}),
    "class timestep": (cross(class_embed_type="timestep"), {"class_labels": torch.tensor([3, 7])}),
    "class identity": (cross(class_embed_type="identity"), {"class_labels": noise(2, 128)}),
    "class projection": (
        cross(class_embed_type="projection", projection_class_embeddings_input_dim=12),
        {"class_labels": noise(2, 12)},
    ),
    "class simple projection": (
        cross(class_embed_type="simple_projection", projection_class_embeddings_input_dim=12),
        {"class_labels": noise(2, 12)},
    ),
    "class concatenated": (
        cross(class_embed_type="projection", projection_class_embeddings_input_dim=12, class_embeddings_concat=True),
        {"class_labels": noise(2, 12)},
    ),
    "added text": (cross(addition_embed_type="text", addition_embed_type_num_heads=4), {}),
    "kandinsky 2.1": (
        cross(addition_embed_type="text_image", encoder_hid_dim_type="text_image_proj", encoder_hid_dim=16),
        {"added_cond_kwargs": {"text_embeds": noise(2, 16), "image_embeds": noise(2, 16)}},
    ),
    "kandinsky 2.2": (
        cross(addition_embed_type="image", encoder_hid_dim_type="image_proj", encoder_hid_dim=24),
        {"added_cond_kwargs": {"image_embeds": noise(2, 24)}},
    ),
    "kandinsky 2.2 controlnet": (
        cross(addition_embed_type="image_hint", encoder_hid_dim_type="image_proj", encoder_hid_dim=24, in_channels=8),
        {"added_cond_kwargs": {"image_embeds": noise(2, 24), "hint": noise(2, 3, 64, 64)}},
    ),
    "projected text": (cross(encoder_hid_dim_type="text_proj", encoder_hid_dim=24), {"size": 24}),
    "projected text, unnamed": (cross(encoder_hid_dim=24), {"size": 24}),
    "fourier": (cross(time_embedding_type="fourier"), {"timestep": 0.5}),
    "time activations": (cross(time_embedding_act_fn="gelu", timestep_post_act="mish", time_embedding_dim=48), {}),
    "time condition": (cross(time_cond_proj_dim=12), {"timestep_cond": noise(2, 12)}),
    "sines first": (cross(flip_sin_to_cos=False, freq_shift=1), {}),
    "odd time embedding": (cross(block_out_channels=(33, 66), norm_num_groups=3, attention_head_dim=3), {}),
    "swish and relu": (cross(act_fn="relu", timestep_post_act="swish"), {}),
    "scale and shift": (cross(resnet_time_scale_shift="scale_shift"), {}),
    "kernels": (cross(conv_in_kernel=5, conv_out_kernel=1, norm_eps=1e-3), {}),
    "centred": (cross(center_input_sample=True, dropout=0.1, downsample_padding=1, in_channels=5, out_channels=3), {}),
    "grounded": (
        cross(attention_type="gated"),
        {
            "cross_attention_kwargs": {
                "gligen": {
                    "boxes": noise(2, 3, 4).abs(),
                    "masks": torch.tensor([[1.0, 1, 0]] * 2),
                    "positive_embeddings": noise(2, 3, CROSS),
                }
            }
        },
    ),
    "grounded, not called": (cross(attention_type="gated"), {}),
    "grounded in images": (
        cross(attention_type="gated-text-image"),
        {
            "cross_attention_kwargs": {
                "gligen": {
                    "boxes": noise(2, 3, 4).abs(),
                    "masks": torch.tensor([[1.0, 1, 0]] * 2),
                    "phrases_masks": torch.tensor([[1.0, 0, 0]] * 2),
                    "image_masks": torch.tensor([[0.0, 1, 0]] * 2),
                    "phrases_embeddings": noise(2, 3, CROSS),
                    "image_embeddings": noise(2, 3, CROSS),
                }
            }
        },
    ),
    "masked context": (cross(), {"encoder_attention_mask": torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])}),
    "masked positions": (
        cross(mid_block_type=None),
        {"attention_mask": torch.cat([torch.ones(2, 40), torch.zeros(2, 24)], dim=1)},
    ),
    "timestep each": (cross(), {"timestep": torch.tensor([10, 900])}),
    "timestep of no dimension": (cross(), {"timestep": torch.tensor(501)}),
    "timestep of half": (cross(), {"timestep": 1.5}),
    "controlnet": (
        cross(),
        {
            "down_block_additional_residuals": [noise(2, 32, 8, 8), noise(2, 32, 8, 8), noise(2, 32, 4, 4), noise(2, 64, 4, 4)],
            "mid_block_additional_residual": noise(2, 64, 4, 4),
        },
    ),
    "t2i adapter": (cross(), {"down_intrablock_additional_residuals": lambda: [noise(2, 32, 8, 8), noise(2, 64, 4, 4)]}),
    "t2i adapter, xl": (
        cross(),
        {"down_intrablock_additional_residuals": lambda: [noise(2, 32, 8, 8), noise(2, 64, 4, 4), noise(2, 64, 4, 4)]},
    ),
    "t2i adapter, old keyword": (cross(), {"down_block_additional_residuals": lambda: [noise(2, 32, 8, 8), noise(2, 64, 4, 4)]}),
    "not divisible": (
        cross(
            block_out_channels=(32, 32, 64),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        ),
        {"sample": noise(2, 4, 9, 13)},
    ),
}


def call(name):
    """Fresh arguments for the configuration of that name."""
    config, extra = OPTIONS[name]
    extra = {key: value() if callable(value) else value for key, value in extra.items()}
    channels = config.get("in_channels", 4) - (4 if config.get("addition_embed_type") == "image_hint" else 0)
    size = extra.pop("size", CROSS)
    return {"sample": noise(2, channels, 8, 8), "timestep": 7, "encoder_hidden_states": noise(2, TOKENS, size), **extra}
