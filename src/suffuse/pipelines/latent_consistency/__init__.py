"""Latent consistency models: few steps of a model that was distilled, from text or a picture."""
