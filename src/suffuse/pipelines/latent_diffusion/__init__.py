"""Latent diffusion before Stable Diffusion: from noise alone, from text, and from a small picture (Rombach et al., 2022)."""
