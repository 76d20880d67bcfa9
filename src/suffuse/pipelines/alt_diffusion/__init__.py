"""AltDiffusion: Stable Diffusion that reads eighteen languages (Chen et al., 2022, "AltCLIP"; Ye et al., 2023, "AltDiffusion")."""
