from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys

import pytest

import suffuse
from suffuse.errors import ConfigError, InputError, MissingPackageError, UntrustedCodeError

PIPELINE = """
from suffuse import DiffusionPipeline
from .blocks import VALUE

class MyPipeline(DiffusionPipeline):
    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    def __call__(self):
        return VALUE, self.unet.config.in_channels
"""
BLOCKS = "VALUE = 41 + 1\n"
COMPONENT = """
from suffuse import UNet2DConditionModel

class MyUNet(UNet2DConditionModel):
    word = "mine"
"""
TRAP = "raise SystemError('this ran')\n"


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A checkpoint of two components, with a pipeline of its own beside."""
    folder = tmp_path / "custom"
    for name in ("unet", "scheduler"):
        shutil.copytree(tiny_folder / name, folder / name)
    index = json.loads((tiny_folder / "model_index.json").read_text())
    entries = {"_class_name": "MyPipeline", "unet": index["unet"], "scheduler": index["scheduler"]}
    (folder / "model_index.json").write_text(json.dumps(entries))
    (folder / "pipeline.py").write_text(PIPELINE)
    (folder / "blocks.py").write_text(BLOCKS)
    return folder


def rewrite(folder, **entries):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **entries}))


def lines_of(*files: tuple[str, str]) -> str:
    lines = "".join(f"{hashlib.sha256(text.encode()).hexdigest()}  {name}\n" for name, text in sorted(files))
    return "sha256:" + hashlib.sha256(lines.encode()).hexdigest()


PIN = lines_of(("pipeline.py", PIPELINE), ("blocks.py", BLOCKS))


def load(name, **options):
    return suffuse.DiffusionPipeline.from_pretrained(name, **options)


def test_a_pipeline_beside_the_checkpoint_runs_when_trusted_or_pinned(folder):
    for options in ({"trust_remote_code": True}, {"trust_code": PIN}, {"trust_code": [PIN, "sha256:" + "0" * 64]}):
        assert load(folder, **options)() == (42, 4)


def test_without_trust_nothing_runs_and_the_message_has_path_hash_and_flag(folder):
    (folder / "pipeline.py").write_text(TRAP)
    digest = "sha256:" + hashlib.sha256(TRAP.encode()).hexdigest()
    with pytest.raises(UntrustedCodeError) as caught:
        load(folder)
    for text in (str(folder / "pipeline.py"), f'trust_code="{digest}"', "trust_remote_code=True"):
        assert text in str(caught.value)
    with pytest.raises(ConfigError, match="this ran"):
        load(folder, trust_remote_code=True)


def test_a_pin_holds_for_every_file_that_would_run_and_goes_before_general_trust(folder):
    (folder / "blocks.py").write_text("VALUE = 666\n")
    for options in ({"trust_code": PIN}, {"trust_code": PIN, "trust_remote_code": True}):
        with pytest.raises(UntrustedCodeError, match=r"blocks\.py"):
            load(folder, **options)


@pytest.mark.parametrize("pin", ["sha256:12", "x", 3, [None]])
def test_a_pin_that_is_none_is_told(folder, pin):
    with pytest.raises(InputError, match="trust_code has the wrong value"):
        load(folder, trust_code=pin)


def test_custom_pipeline_is_a_file_a_folder_or_a_file_of_the_checkpoint(folder):
    (folder / "other.py").write_text(PIPELINE)
    for custom in (str(folder / "pipeline.py"), folder, str(folder)):
        with pytest.raises(UntrustedCodeError):
            load(folder, custom_pipeline=custom)
        assert load(folder, custom_pipeline=custom, trust_remote_code=True)() == (42, 4)
    assert type(load(folder, custom_pipeline="other", trust_remote_code=True)).__name__ == "MyPipeline"


def test_custom_pipeline_is_a_repository_of_the_hub_at_a_revision(hub, folder):
    hub.add_folder("org/code", folder)
    first = hub.repos["models", "org/code"].branches["main"]
    hub.commit("org/code", {"blocks.py": b"VALUE = 7\n"})
    rewrite(folder, _class_name="StableDiffusionPipeline")
    hub.forget()
    with pytest.raises(UntrustedCodeError, match="sha256:"):
        load(folder, custom_pipeline="org/code")
    assert load(folder, custom_pipeline="org/code", trust_remote_code=True)() == (7, 4)
    assert load(folder, custom_pipeline="org/code", custom_revision=first, trust_remote_code=True)() == (42, 4)
    assert hub.fetched() == {"pipeline.py", "blocks.py"}


def test_a_bare_name_is_one_of_the_communitys_pipelines_of_a_release(hub, folder):
    code = PIPELINE.replace("from .blocks import VALUE", "VALUE = 3").encode()
    files = {"v0.26.3/my_way.py": code, "main/my_way.py": code.replace(b"VALUE = 3", b"VALUE = 4")}
    hub.commit("diffusers/community-pipelines-mirror", files, kind="datasets")
    with pytest.raises(UntrustedCodeError, match=r"my_way\.py"):
        load(folder, custom_pipeline="my_way")
    assert load(folder, custom_pipeline="my_way", trust_remote_code=True)()[0] == 3
    assert load(folder, custom_pipeline="my_way", custom_revision="main", trust_remote_code=True)()[0] == 4


def test_code_of_a_repository_is_gated_before_its_weights_are_fetched(hub, folder):
    hub.add_folder("org/custom", folder)
    with pytest.raises(UntrustedCodeError):
        load("org/custom")
    assert not any(name.endswith(".safetensors") for name in hub.fetched())
    assert load("org/custom", trust_code=PIN)() == (42, 4)


def test_the_class_name_of_an_index_may_name_the_file(folder):
    (folder / "pipeline.py").rename(folder / "mine.py")
    rewrite(folder, _class_name=["mine", "MyPipeline"])
    with pytest.raises(UntrustedCodeError, match=r"mine\.py"):
        load(folder)
    assert load(folder, trust_remote_code=True)() == (42, 4)


def test_a_component_with_code_beside_its_weights_runs_when_trusted(folder, hub):
    (folder / "unet" / "my_unet.py").write_text(COMPONENT)
    (folder / "unet" / "config.json").write_text(
        (folder / "unet" / "config.json").read_text().replace("UNet2DConditionModel", "MyUNet")
    )
    rewrite(folder, unet=["my_unet", "MyUNet"])
    hub.add_folder("org/custom", folder)
    pin = "sha256:" + hashlib.sha256(COMPONENT.encode()).hexdigest()
    for name in (folder, "org/custom"):
        with pytest.raises(UntrustedCodeError, match=pin):
            load(name, trust_code=PIN)
        assert load(name, trust_code=[PIN, pin]).unet.word == "mine"


def test_what_was_loaded_with_code_is_saved_with_it(folder, tmp_path):
    (folder / "unet" / "my_unet.py").write_text(COMPONENT)
    (folder / "unet" / "config.json").write_text(
        (folder / "unet" / "config.json").read_text().replace("UNet2DConditionModel", "MyUNet")
    )
    rewrite(folder, unet=["my_unet", "MyUNet"])
    pipe = load(folder, trust_remote_code=True)
    pipe.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved", trust_remote_code=True)
    assert again() == (42, 4)
    assert again.unet.word == "mine"


def test_a_known_class_never_runs_what_lies_beside_it(tiny_folder, tmp_path):
    folder = tmp_path / "stray"
    shutil.copytree(tiny_folder, folder)
    for name in ("pipeline.py", "None.py", "unet/diffusers.py", "unet/unet.py", "text_encoder/transformers.py"):
        (folder / name).write_text(TRAP)
    assert type(load(folder, trust_remote_code=True)) is suffuse.StableDiffusionPipeline


def test_a_module_on_the_path_needs_the_callers_word_too(tiny_folder, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (tmp_path / "evil_module.py").write_text(TRAP)
    monkeypatch.syspath_prepend(str(tmp_path))
    rewrite(folder, unet=["evil_module", "Evil"])
    with pytest.raises(UntrustedCodeError, match=r"evil_module\.py holds Python(.|\n)*trust_code=.sha256:"):
        load(folder)
    assert "evil_module" not in sys.modules
    with pytest.raises(ConfigError, match="this ran"):
        load(folder, trust_remote_code=True)


@pytest.mark.parametrize("entry", [["os", "system"], ["../unet/x", "Y"], ["builtins", "exec"], ["x.y", "Z"]])
def test_entries_that_name_modules_stay_unknown_classes(folder, entry):
    rewrite(folder, unet=entry)
    with pytest.raises(ConfigError):
        load(folder, trust_remote_code=True)


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        ("import no_such_package_at_all\n", MissingPackageError, "pip install no_such_package_at_all"),
        ("x = = 1", ConfigError, "is not Python"),
        ("X = 1", ConfigError, "does not define"),
        ("from suffuse import DiffusionPipeline", ConfigError, "does not define"),
        ("import sys\nMyPipeline = type(sys)", ConfigError, "does not define"),
    ],
)
def test_code_that_cannot_be_used_is_told(folder, code, error, message):
    (folder / "pipeline.py").write_text(code)
    with pytest.raises(error, match=message):
        load(folder, trust_remote_code=True)


def test_loading_leaves_the_search_path_alone(folder):
    script = f"""
import sys, warnings
warnings.simplefilter("ignore")
import suffuse
before = list(sys.path)
suffuse.DiffusionPipeline.from_pretrained({str(folder)!r}, trust_remote_code=True)
assert sys.path == before
assert "blocks" not in sys.modules and "pipeline" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
