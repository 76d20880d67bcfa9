"""Stable unCLIP: Stable Diffusion 2.1 that is shown CLIP's vector of a picture, noised (Ramesh et al., 2022)."""
