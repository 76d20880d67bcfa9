"""Checkpoints of other houses, told apart and renamed: single files of latent diffusion models."""
