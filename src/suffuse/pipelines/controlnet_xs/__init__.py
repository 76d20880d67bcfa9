"""ControlNet-XS, with Stable Diffusion and its XL: text to image under control of a picture."""
