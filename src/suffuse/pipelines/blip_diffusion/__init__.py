"""BLIP-Diffusion: the subject of a picture in another (Li et al., 2023, https://arxiv.org/abs/2305.14720)."""
