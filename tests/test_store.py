import multiprocessing
import os
import resource
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from basinlab import store
from basinlab.store import digest, kept

SETTINGS = {"scale": 7.5, "seeds": [0, 1]}
TABLE = pd.DataFrame({"prompt": ["an owl", "a null"], "copied": [True, False], "distance": [0.1, np.nan]})


def no_call():
    raise AssertionError("it was made already")


def test_a_table_is_made_once_for_its_settings(tmp_path):
    assert kept(None, "grid", SETTINGS, lambda: TABLE) is TABLE
    pd.testing.assert_frame_equal(kept(tmp_path / "new", "grid", SETTINGS, lambda: TABLE), TABLE)
    pd.testing.assert_frame_equal(kept(tmp_path / "new", "grid", SETTINGS, no_call), TABLE)
    other = kept(tmp_path / "new", "grid", {**SETTINGS, "scale": 5.0}, lambda: TABLE[:1])
    assert len(other) == 1 and len(list((tmp_path / "new").iterdir())) == 2
    assert len(kept(tmp_path / "new", "grid", SETTINGS, no_call)) == 2


def test_tensors_come_back_as_they_were(tmp_path):
    tensors = {"latents": torch.randn(2, 3, 4).mT, "calls": torch.tensor([3, 4])}
    for make in (lambda: tensors, no_call):
        found = kept(tmp_path, "block", SETTINGS, make, ".safetensors")
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_a_digest_depends_on_content_alone():
    same = {"seeds": np.arange(2), "scale": np.float64(7.5)}
    assert digest(SETTINGS) == digest(same) == digest({"scale": 7.5, "seeds": (0, torch.tensor(1))})
    assert digest(SETTINGS) != digest({"scale": 7.5, "seeds": [1, 0]})
    with pytest.raises(TypeError, match="the path /x/y: give what the file holds"):
        digest({"weights": Path("/x/y")})


@pytest.mark.parametrize("suffix, result", [(".parquet", TABLE), (".safetensors", {"x": torch.ones(1000)})])
@pytest.mark.parametrize("share", [0, 0.5])
def test_a_damaged_file_is_named_with_the_cure(tmp_path, suffix, result, share):
    kept(tmp_path, "grid", SETTINGS, lambda: result, suffix)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(OSError, match=f"{path} is damaged .*: delete it, and the next run makes it again"):
        kept(tmp_path, "grid", SETTINGS, no_call, suffix)


@pytest.mark.parametrize("suffix, result", [(".parquet", TABLE), (".safetensors", {"x": torch.ones(10_000)})])
def test_a_full_disk_and_a_folder_that_is_none_are_one_sentence_and_leave_nothing(tmp_path, suffix, result):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # writing fails after so many bytes
    try:
        with pytest.raises(OSError, match=rf"{tmp_path}/grid-\w+{suffix} could not be written .*make room"):
            kept(tmp_path, "grid", SETTINGS, lambda: result, suffix)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="could not be written"):
        kept(tmp_path / "file", "grid", SETTINGS, lambda: result, suffix)


def test_a_killed_process_leaves_no_half_file_under_the_name(tmp_path, monkeypatch):
    given = (tmp_path, "block", {}, lambda: {"x": torch.ones(1)}, ".safetensors")
    with monkeypatch.context() as patched:
        patched.setattr(store, "save_file", lambda tensors, path: path.write_bytes(b"half") and os.kill(os.getpid(), 9))
        child = multiprocessing.get_context("fork").Process(target=kept, args=given)
        child.start()
        child.join()
    assert child.exitcode == -9 and not list(tmp_path.glob("*.safetensors")) and list(tmp_path.iterdir())
    assert kept(*given)["x"] == 1
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]  # and the half file is gone
