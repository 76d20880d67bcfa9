"""ControlNet, with Stable Diffusion and its XL: text, image and mask to image under control of further pictures."""
