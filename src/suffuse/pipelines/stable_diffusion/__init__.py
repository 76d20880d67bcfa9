"""Stable Diffusion 1 and 2: text, image, mask and depth to image."""
