"""Larger pictures from small ones, with diffusion (Rombach et al., 2022)."""
