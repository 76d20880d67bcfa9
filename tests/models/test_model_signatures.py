import inspect
import json
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch

import suffuse
from suffuse.public_names import MODULES

MODELS = [name for module, names in MODULES.items() if module.startswith("suffuse.models.") for name in names]
MODELS = [name for name in MODELS if name != "ModelMixin"]
CONTRACT = json.loads(Path(__file__).with_name("models_of_diffusers_0_26_3.json").read_text())
"""What diffusers 0.26.3 has, less what adapters and single files will bring."""
OLDER = [name for name in MODELS if name in CONTRACT]
"""Models whose names 0.26.3 gives out at its top."""


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("name", MODELS)
def test_init_has_the_peers_parameters_and_defaults(name):
    ours, peer = (inspect.signature(getattr(library, name).__init__).parameters for library in (suffuse, diffusers))
    assert set(ours) == set(peer)
    for key in list(ours)[1:]:
        assert ours[key].default == peer[key].default, key
        assert ours[key].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD


@pytest.mark.parametrize("name", MODELS)
def test_forward_has_the_peers_parameters_in_order(name):
    ours, peer = (inspect.signature(getattr(library, name).forward).parameters for library in (suffuse, diffusers))
    assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in peer.values()]


@pytest.mark.parametrize("name", OLDER)
def test_init_begins_with_the_contracts_parameters_in_order(name):
    ours = list(inspect.signature(getattr(suffuse, name).__init__).parameters.values())[1:]
    wanted = CONTRACT[name]["init"]
    assert [[p.name, _plain(p.default)] for p in ours[: len(wanted)]] == wanted


@pytest.mark.parametrize("name", OLDER)
def test_the_contracts_methods_and_properties_are_there(name):
    cls = getattr(suffuse, name)
    for method, wanted in CONTRACT[name]["methods"].items():
        parameters = inspect.signature(getattr(cls, method)).parameters.values()
        assert not any(p.kind is p.VAR_KEYWORD for p in parameters), method
        names = [p.name for p in parameters if p.name != "self"]
        assert names[: len(wanted)] == wanted, method
    assert not [key for key in CONTRACT[name]["properties"] if not hasattr(cls, key)]


def test_importing_the_models_imports_nothing_heavy():
    script = (
        "import sys, suffuse.models.unet_2d_condition, suffuse.models.unet_2d, suffuse.models.autoencoder_kl,"
        "suffuse.models.autoencoder_asymmetric_kl, suffuse.models.autoencoder_tiny;"
        "print([name for name in ('transformers', 'scipy', 'diffusers', 'PIL') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Nothing is built of the defaults of a Transformer2DModel, there or here.
@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith(("Multi", "Transformer2D"))])
def test_configurations_go_both_ways(name, tmp_path):
    ours, peer = (getattr(library, name) for library in (suffuse, diffusers))
    with torch.device("meta"):
        made, theirs = ours(), peer()
    made.save_config(tmp_path)
    written = json.loads(Path(tmp_path, "config.json").read_text())
    assert {k: v for k, v in written.items() if k != "_diffusers_version"} == {
        k: v for k, v in json.loads(theirs.to_json_string()).items() if k != "_diffusers_version"
    }
    with torch.device("meta"):
        again, theirs_again = ours.from_config(dict(theirs.config)), peer.from_config(written)
    assert again.state_dict().keys() == theirs_again.state_dict().keys()
