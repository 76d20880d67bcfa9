"""Stable Diffusion and its XL with the samplers of k-diffusion, chosen by name."""
