"""Pipelines of Stable Diffusion XL (Podell et al., 2023)."""
