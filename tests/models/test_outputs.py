import copy
import dataclasses
import pickle

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput as PeerOutput

from suffuse.models.unet_2d_condition import UNet2DConditionOutput
from suffuse.models.vae import DecoderOutput
from suffuse.outputs import BaseOutput


@dataclasses.dataclass
class Pair(BaseOutput):
    first: object
    second: object = None


@pytest.mark.parametrize("output", [UNet2DConditionOutput, PeerOutput])
def test_a_result_is_read_by_attribute_key_and_position(output):
    sample = torch.ones(2)
    result = output(sample=sample)
    assert result.sample is result["sample"] is result[0] is result.to_tuple()[0]
    assert result[:1] == (sample,)
    assert list(result) == ["sample"]
    assert len(result) == 1


def test_fields_that_are_none_have_no_key_and_no_position():
    assert DecoderOutput(torch.ones(1)).to_tuple() == (torch.ones(1),)
    assert Pair(1).to_tuple() == (1,)
    assert Pair(1, 2).to_tuple() == (1, 2)
    assert Pair(1).second is None


def test_assignment_changes_attribute_and_key():
    result = Pair(1, 2)
    result.first = 3
    result["second"] = 4
    assert result.to_tuple() == (3, 4)
    assert (result["first"], result.second) == (3, 4)


@pytest.mark.parametrize("copies", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_results_can_be_copied(copies):
    again = copies(Pair(1, [2]))
    assert again == Pair(1, [2])
    assert again.second == [2]


def test_torch_walks_results():
    doubled = torch.utils._pytree.tree_map(lambda x: 2 * x, Pair(1, 2))
    assert doubled == Pair(2, 4)
    assert isinstance(doubled, Pair)


@pytest.mark.parametrize(
    "change", [lambda r: r.pop("first"), lambda r: r.update(first=2), lambda r: r.setdefault("third", 1), lambda r: r.popitem()]
)
def test_fields_stay(change):
    with pytest.raises(TypeError, match="keeps its fields"):
        change(Pair(1))
    with pytest.raises(TypeError, match="keeps its fields"):
        del Pair(1)["first"]
