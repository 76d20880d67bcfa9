from __future__ import annotations

import os
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import diffusers
    import transformers

transformers.logging.set_verbosity_error()
diffusers.logging.set_verbosity_error()
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A text-to-image checkpoint folder written by the peer."""
    import tiny

    folder = tmp_path_factory.mktemp("tiny") / "stable-diffusion"
    components = tiny.stable_diffusion(tmp_path_factory.mktemp("tokenizer"))
    diffusers.StableDiffusionPipeline(**components, requires_safety_checker=False).save_pretrained(folder)
    return folder
