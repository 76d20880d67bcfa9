"""Every named bad checkpoint gets its error, or the right picture with a word about it; nothing runs, nothing is left behind."""

from __future__ import annotations

import gc
import re
import shutil
import warnings
from pathlib import Path

import pytest
from bad_files import MARK, ROWS
from tasks import call, difference, folder, pair

import suffuse
from suffuse.errors import SuffuseError

BAD, ODD = [[name for name, row in ROWS.items() if (row.error is not None) is bad] for bad in (True, False)]
CLEAR_PEAK, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@pytest.fixture
def damaged(name, tmp_path):
    copied = shutil.copytree(folder("text"), tmp_path / "model")
    ROWS[name].damage(copied)
    yield copied
    assert not MARK.exists()


@pytest.mark.filterwarnings("ignore:.*is a pickle", "ignore:.*leaves out", "ignore:.*does not know")
@pytest.mark.parametrize("name", BAD)
def test_a_bad_folder_is_refused(name, damaged):
    row = ROWS[name]
    with pytest.raises(row.error, match=row.says) as raised:
        suffuse.DiffusionPipeline.from_pretrained(damaged, **row.options)
    assert isinstance(raised.value, SuffuseError)


@pytest.mark.parametrize("name", ODD)
def test_an_odd_folder_draws_and_is_told(name, damaged):
    row = ROWS[name]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipe = suffuse.DiffusionPipeline.from_pretrained(damaged, **row.options)
    told = [str(warning.message) for warning in caught if not issubclass(warning.category, DeprecationWarning)]
    assert len(told) == bool(row.says), told
    assert re.search(row.says, "".join(told))
    pipe.set_progress_bar_config(disable=True)
    same = difference(call(pipe, "text"), call(pair("text")[1], "text")) == 0
    assert same is ("beta_schedule" not in row.says)


@pytest.mark.skipif(not CLEAR_PEAK.exists(), reason="the peak of memory is read from Linux's /proc")
def test_a_refusal_takes_little_memory(tmp_path):
    def megabytes(field: str) -> float:
        return int(re.search(rf"{field}:\s+(\d+)", STATUS.read_text())[1]) / 1024

    for name in [*BAD][::4]:  # of every kind some: what is read, and by what, is the same for many
        copied = shutil.copytree(folder("text"), tmp_path / name.replace("/", "-"))
        ROWS[name].damage(copied)
        gc.collect()
        before = megabytes("VmRSS")
        CLEAR_PEAK.write_text("5")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(SuffuseError):
                suffuse.DiffusionPipeline.from_pretrained(copied, **ROWS[name].options)
        assert megabytes("VmHWM") - before < 64, name
