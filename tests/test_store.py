import itertools
import multiprocessing
import os
import resource
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from basinlab.store import digest, kept

SETTINGS = {"scale": 7.5, "seeds": [0, 1]}
TABLE = pd.DataFrame({"prompt": ["an owl", "a null"], "copied": [True, False], "distance": [0.1, np.nan]})


def no_call(*_):
    raise AssertionError("it was made already")


def test_a_table_and_tensors_are_made_once_for_their_settings(tmp_path):
    assert kept(None, "grid", SETTINGS, lambda: TABLE) is TABLE
    pd.testing.assert_frame_equal(kept(tmp_path / "new", "grid", SETTINGS, lambda: TABLE), TABLE)
    pd.testing.assert_frame_equal(kept(tmp_path / "new", "grid", SETTINGS, no_call), TABLE)
    other = kept(tmp_path / "new", "grid", {**SETTINGS, "scale": 5.0}, lambda: TABLE[:1])
    assert len(other) == 1 and len(list((tmp_path / "new").iterdir())) == 2
    assert len(kept(tmp_path / "new", "grid", SETTINGS, no_call)) == 2
    tensors = {"latents": torch.randn(2, 3, 4).mT, "calls": torch.tensor([3, 4])}
    for make in (lambda: tensors, no_call):  # and as they were
        found = kept(tmp_path, "block", SETTINGS, make, ".safetensors")
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_a_digest_depends_on_content_alone():
    same = {"seeds": np.arange(2), "scale": np.float64(7.5)}
    assert digest(SETTINGS) == digest(same) == digest({"scale": 7.5, "seeds": (0, torch.tensor(1))})
    assert digest(SETTINGS) != digest({"scale": 7.5, "seeds": [1, 0]})
    with pytest.raises(TypeError, match="the path /x/y: give what the file holds"):
        digest({"weights": Path("/x/y")})


@pytest.mark.parametrize("suffix, result", [(".parquet", TABLE), (".safetensors", {"x": torch.ones(10_000)})])
def test_a_damaged_file_a_full_disk_and_a_folder_that_is_none_are_one_sentence(tmp_path, suffix, result):
    limits, again = resource.getrlimit(resource.RLIMIT_FSIZE), (tmp_path, "grid", SETTINGS, lambda: result, suffix)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # writing fails after so many bytes
    try:
        with pytest.raises(OSError, match=rf"{tmp_path}/grid-\w+{suffix} could not be written .*make room"):
            kept(*again)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
    kept(*again)
    (path,) = tmp_path.iterdir()
    for size in (path.stat().st_size // 2, 0):
        os.truncate(path, size)
        with pytest.raises(OSError, match=f"{path} is damaged .*: delete it, and the next run makes it again"):
            kept(*again)
    with pytest.raises(OSError, match="could not be written"):
        kept(path, *again[1:])


def test_ten_kills_leave_no_half_file_under_a_name_and_lose_one_block_at_most(tmp_path):
    def block(i, make=lambda i: {"x": torch.full((30_000,), i)}):
        return kept(tmp_path, "block", {"i": i}, lambda: make(i), ".safetensors")["x"]

    def whole():
        return len([*tmp_path.glob("*.safetensors")])

    for kill in range(10):
        before = whole()
        child = multiprocessing.get_context("fork").Process(target=lambda: [block(i) for i in itertools.count()])
        child.start()
        while whole() < before + 5 and child.is_alive():
            time.sleep(0.0007 * kill)
        child.kill()
        child.join()
        assert child.exitcode == -9 and whole() > before
    assert all(block(i, no_call).eq(i).all() for i in range(whole()))
    block(whole())
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors"}  # what was half written is gone
