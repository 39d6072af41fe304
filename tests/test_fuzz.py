"""Damaged inputs end in an error that names the file, or in what was written: in nothing else."""

import json
import socket
from unittest import mock

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_scenarios import LEAST

from basinlab import experiment
from basinlab.bundled import evaluation
from basinlab.bundled.comparison import kept_path
from basinlab.published import downloads, prompt_lists, scenarios


def steady(examples):
    """The same examples in every run; ``tmp_path`` is shared by all of them, each writes its files anew."""
    shared = [HealthCheck.function_scoped_fixture]
    return settings(derandomize=True, deadline=None, max_examples=examples, suppress_health_check=shared)


flips = st.lists(st.tuples(st.integers(0, 2**20), st.integers(1, 255)), max_size=4)


def damaged(content: bytes, flipped, kept: float) -> bytes:
    """``content`` with some bytes changed, and of it the first share ``kept``."""
    changed = bytearray(content)
    for place, mask in flipped:
        changed[place % len(changed)] ^= mask
    return bytes(changed[: round(len(changed) * kept)])


shares = st.one_of(st.just(1.0), st.just(1.0), st.floats(0, 1))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@steady(150)
@given(key=st.sampled_from([*scenarios.SCHEMA["properties"], "else"]), value=values, within=st.text(max_size=5))
def test_a_scenario_with_any_value_anywhere_is_read_or_named(tmp_path, key, value, within):
    path = tmp_path / "own.yaml"
    given = {**LEAST, key: {**LEAST[key], within: value} if isinstance(LEAST.get(key), dict) else value}
    path.write_text(yaml.safe_dump(given, allow_unicode=True, sort_keys=False), encoding="utf-8", errors="replace")
    read_or_named(path)


@steady(200)
@given(content=st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "replace")))
def test_a_scenario_of_any_bytes_is_named(tmp_path, content):
    path = tmp_path / "own.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"own\.yaml"):
        scenarios.read(path)


@steady(200)
@given(flipped=flips, kept=shares)
def test_a_damaged_scenario_is_read_or_named(tmp_path, flipped, kept):
    path = tmp_path / "own.yaml"
    path.write_bytes(damaged(yaml.safe_dump(LEAST).encode(), flipped, kept))
    read_or_named(path)


def read_or_named(path):
    try:
        found = scenarios.read(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert type(found.steps) is int and 1 <= found.steps <= 1000
        assert 1 <= found.static_transition_point <= 999 and 0 <= found.opposite_scale <= 100
        assert found.guidance_scale is None or 0.1 <= found.guidance_scale <= 100


@steady(200)
@given(rest=st.text(max_size=30), start=st.sampled_from(["", "http://", "https://", "file://", "http://["]))
def test_any_url_is_refused_where_nothing_is_allowed(rest, start):
    answer = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 80))]
    with mock.patch("socket.getaddrinfo", return_value=answer):  # no name is looked up
        row = downloads._fetched(start + rest, None, downloads.is_public, 1, 1, 1, 1)
    assert row["status"] == "refused"


ROWS = [{"prompt": f'an "owl"; {n} \u2028', "url": f"https://example.org/{n}.jpg", "index": str(n)} for n in range(4)]
LISTS = {
    "wen": "".join(
        json.dumps({"caption": r["prompt"], "url": r["url"], "index": int(r["index"])}) + "\n" for r in ROWS
    ),
    "han": "Caption;URL;type;Index\n"
    + "".join('"{}";{};VM;{}\n'.format(r["prompt"].replace('"', '""'), r["url"], r["index"]) for r in ROWS),
    "memattn": "".join(r["prompt"].strip() + "\n" for r in ROWS),
    "dcr": json.dumps({f"/x/{r['index']}.png": [r["prompt"]] for r in ROWS}),
    "basinlab": "prompt,object,attractor\n" + "".join(f"an owl {r['index']},owl,a/{r['index']}.png\n" for r in ROWS),
}


@pytest.mark.parametrize("format", LISTS)
@steady(150)
@given(flipped=flips, kept=shares, junk=st.binary(max_size=60))
def test_a_damaged_list_is_read_or_named(tmp_path, format, flipped, kept, junk):
    path = tmp_path / "list.csv"
    path.write_bytes(damaged(LISTS[format].encode(), flipped, kept) + junk)
    try:
        table = prompt_lists.read_list(path, format)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert len(table) and all(isinstance(prompt, str) and prompt.strip() for prompt in table["prompt"])


@pytest.mark.parametrize("format", ["wen", "han"])
def test_an_undamaged_list_comes_back(tmp_path, format):
    path = tmp_path / "list"
    path.write_text(LISTS[format], encoding="utf-8", newline="")
    assert prompt_lists.read_list(path, format)[["prompt", "url", "index"]].to_dict("records") == ROWS


TABLE = pd.DataFrame(
    {
        "prompt": [f"owl {n}" for n in range(40)],
        "seed": range(40),
        "distance": np.linspace(0, 1, 40),
        "inside": [n % 3 == 0 for n in range(40)],
        "seen": [None if n % 7 == 0 else "owl" for n in range(40)],
        "calls": [np.nan if n % 5 == 0 else n for n in range(40)],
        "magnitude": [[float(n), 0.5, np.nan] for n in range(40)],
    }
)
NOTES = {"weights": "ab", "scale": 7.5, "prompts": ["owl"], "seconds": 0.25}


@pytest.fixture(scope="module")
def part(tmp_path_factory):
    path = tmp_path_factory.mktemp("part") / "part.parquet"
    experiment.write_part(TABLE, path, NOTES)
    return path.read_bytes()


def same_or_named(path, expected):
    try:
        table, notes = experiment.read_part(path, {"weights": "ab"})
    except (OSError, ValueError) as error:
        assert str(path) in str(error) and "delete it" in str(error)
    else:
        pd.testing.assert_frame_equal(table, expected)
        assert notes == NOTES


@steady(400)
@given(flipped=flips, kept=shares)
def test_a_damaged_part_is_whole_or_named(tmp_path, part, flipped, kept):
    whole, path = tmp_path / "whole.parquet", tmp_path / "part.parquet"
    whole.write_bytes(part)
    path.write_bytes(damaged(part, flipped, kept))
    same_or_named(path, experiment.read_part(whole, NOTES)[0])


def test_every_byte_of_a_part_matters_or_changes_nothing(tmp_path, part):
    whole, path = tmp_path / "whole.parquet", tmp_path / "part.parquet"
    whole.write_bytes(part)
    expected = experiment.read_part(whole, NOTES)[0]
    for place in range(0, len(part), 7):
        path.write_bytes(damaged(part, [(place, 1 << place % 8)], 1.0))
        same_or_named(path, expected)


@steady(50)
@given(
    columns=st.dictionaries(st.text(min_size=1, max_size=5), st.lists(values, min_size=2, max_size=2), max_size=3),
    notes=st.binary(max_size=20) | st.sampled_from([b"[]", b"null", b"3", b'{"weights": "cd"}']),
)
def test_a_parquet_file_of_another_schema_is_named(tmp_path, columns, notes):
    path = tmp_path / "part.parquet"
    try:
        table = pa.Table.from_pandas(pd.DataFrame(columns))
        pq.write_table(table.replace_schema_metadata({b"basinlab": notes}), path)
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        return  # no file of that
    with pytest.raises((OSError, ValueError), match=r"part.parquet.*(?s:.*)delete it"):
        experiment.read_part(path, {"weights": "ab"})


@steady(40)
@given(
    st.lists(
        st.tuples(
            st.none() | st.integers(-(2**53), 2**53),
            st.floats(),
            st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
            st.none() | st.booleans(),
            st.lists(st.floats(width=32), max_size=3),
        ),
        max_size=5,
    )
)
def test_any_table_that_is_written_is_read(tmp_path, rows):
    table, path = pd.DataFrame(rows, columns=list("abcde")), tmp_path / "part.parquet"
    experiment.write_part(table, path, NOTES)
    experiment.read_part(path, NOTES)


def test_parts_without_a_checksum_are_read():
    assert len(experiment.read_part(kept_path(), {})[0]) > 1000
    assert len(experiment.read_part(evaluation.evaluation_path("emoji-duplicated"), {})[0]) > 1000
