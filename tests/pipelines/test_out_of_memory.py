"""Whichever allocation fails, the error comes out, and the pipeline draws the same picture afterwards."""

from __future__ import annotations

import pytest
import torch
from tasks import call, difference, folder, pair

import suffuse
from suffuse.errors import SaveError


def failing_at(moment: int, function):
    calls = iter(range(10**6))

    def faulty(*args, **kwargs):
        if next(calls) == moment:
            raise MemoryError("no memory left")
        return function(*args, **kwargs)

    return faulty


@pytest.mark.parametrize("function", ["conv2d", "linear", "group_norm", "silu", "scaled_dot_product_attention"])
def test_in_a_call(function, monkeypatch):
    _, ours = pair("text")
    expected = call(ours, "text")
    for moment in (0, 3, 20, 57):
        with monkeypatch.context() as patched:
            patched.setattr(torch.nn.functional, function, failing_at(moment, getattr(torch.nn.functional, function)))
            with pytest.raises(MemoryError, match="no memory left"):
                call(ours, "text", num_inference_steps=20)
        assert difference(call(ours, "text"), expected) == 0


def test_in_a_load(monkeypatch):
    raised = []
    for moment in range(0, 2000, 37):
        with monkeypatch.context() as patched:
            patched.setattr(torch, "empty", failing_at(moment, torch.empty))
            try:
                suffuse.DiffusionPipeline.from_pretrained(folder("text"))
            except (MemoryError, ValueError) as error:
                raised.append(str(error))
            else:
                break
    else:
        pytest.fail("the loop must end with a load in which nothing failed")
    assert len(raised) > 5
    assert all("no memory left" in message for message in raised)


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(tmp_path, monkeypatch):
    class Usage:
        free = 10**5

    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage)
    with pytest.raises(SaveError, match=r"no space for \d+ bytes"):
        pair("text")[1].save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())
