"""AltDiffusion: Stable Diffusion that reads eighteen languages (Chen et al., 2022; Ye et al., 2023)."""
