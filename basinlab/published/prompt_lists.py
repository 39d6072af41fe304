"""Lists of prompts, in the formats in which the field shares them, as one kind of table."""

import csv
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from ..models import read_prompts

FILE_NAME = r"[^/\\.][^/\\]*"


def read_list(path: str | Path, format: str) -> pd.DataFrame:
    """A list of prompts, a row each: prompt, and where the format has them url, index, kind, attractor.

    Args:
        format: "basinlab" (`models.read_prompts`), "wen" (JSON lines: caption, url, index), "han" (CSV with
            semicolons: Caption, URL, type VM or TM, Index), "memattn" (one prompt a line), "pairs" (a folder
            of texts, each beside its picture) or "dcr" (JSON: path of a picture -> its captions, the first is used).

    Prompts stay as they are written, the doubled quotes of some lists included: so they were sampled by others.
    Raises ValueError that names the file and the line.
    """
    path = Path(path)
    if format == "basinlab":
        return _checked(path, enumerate(_bundled(path), start=2))
    if format not in _READERS:
        raise ValueError(f"no prompt format {format!r}: give one of {FORMATS}")
    return _checked(path, _READERS[format](path))


def _bundled(path: Path) -> list[dict]:
    try:
        return read_prompts(str(path.parent.resolve()), path.stem).to_dict("records")
    except (ValueError, TypeError, OSError) as error:  # pandas' parser errors are ValueErrors
        raise ValueError(f"{path}: {error}") from error


def read_text(path: Path) -> str:
    """A text in UTF-8; ValueError names the file and the byte that is none."""
    try:
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, byte {error.start}: no UTF-8; restore the file, or save it as UTF-8") from error


def _lines(path: Path) -> list[str]:
    """The lines of a text; only a newline ends one, since captions hold other separators."""
    lines = read_text(path).split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def _json(path: Path, line: int, text: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, line {line}: no JSON ({error}); fetch the file again") from error


def _wen(path: Path) -> Iterator[tuple[int, dict]]:
    for line, text in enumerate(_lines(path), start=1):
        found = _json(path, line, text)
        if not isinstance(found, dict) or "caption" not in found:
            raise ValueError(f"{path}, line {line}: no object with the key caption")
        yield line, {"prompt": found["caption"]} | {k: found[k] for k in ("url", "index") if k in found}


def _han(path: Path) -> Iterator[tuple[int, dict]]:
    columns = {"Caption": "prompt", "URL": "url", "type": "kind", "Index": "index"}
    kinds = {"VM": "verbatim", "TM": "template"}
    reader = csv.DictReader((f"{line}\n" for line in _lines(path)), delimiter=";", strict=True)
    try:
        if missing := [name for name in columns if name not in (reader.fieldnames or ())]:
            raise ValueError(f"{path}, line 1: no column {', '.join(missing)}; the columns are {reader.fieldnames}")
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"{path}, line {reader.line_num}: not {len(reader.fieldnames)} fields, as line 1 has")
            if row["type"] not in kinds:
                raise ValueError(f"{path}, line {reader.line_num}: type is {row['type']!r:.80}: not one of {[*kinds]}")
            yield reader.line_num, {new: row[old] for old, new in columns.items()} | {"kind": kinds[row["type"]]}
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: no CSV with semicolons ({error})") from error


def _memattn(path: Path) -> Iterator[tuple[int, dict]]:
    return enumerate(({"prompt": line.strip()} for line in _lines(path)), start=1)


def _pairs(path: Path) -> Iterator[tuple[int, dict]]:
    for number, text in enumerate(sorted(path.glob("*.txt")), start=1):
        yield number, {"prompt": read_text(text).strip(), "index": text.stem}


def _dcr(path: Path) -> Iterator[tuple[int, dict]]:
    found = _json(path, 1, read_text(path))
    if not isinstance(found, dict):
        raise ValueError(f"{path}: no object of pictures and captions")
    for number, (picture, captions) in enumerate(found.items(), start=1):
        if not isinstance(captions, list) or not captions:
            raise ValueError(f"{path}, entry {number}: no list of captions for {picture!r:.80}")
        yield number, {"prompt": captions[0], "index": Path(picture).stem}


_READERS = {"wen": _wen, "han": _han, "memattn": _memattn, "pairs": _pairs, "dcr": _dcr}
FORMATS = ("basinlab", *_READERS)


def _checked(path: Path, rows: Iterator[tuple[int, dict]]) -> pd.DataFrame:
    """The rows as a table; ValueError names file and line where a prompt, url or index is none."""
    kept = []
    for line, row in rows:
        if isinstance(row.get("index"), int):
            row["index"] = str(row["index"])
        for name in ("prompt", *({"url", "index"} & row.keys())):
            text = row.get(name)
            if not isinstance(text, str) or not text.strip() or "\0" in text or _surrogates(text):
                raise ValueError(f"{path}, line {line}: the {name} is {text!r:.80}: give a text that is not empty")
        if not re.fullmatch(FILE_NAME, row.get("index", "none")):
            raise ValueError(f"{path}, line {line}: the index {row['index']!r:.80} is no file name")
        kept.append(row)
    if not kept:
        raise ValueError(f"{path} holds no prompts")
    if partial := [name for name, n in Counter(name for row in kept for name in row).items() if n != len(kept)]:
        raise ValueError(f"{path}: only some of its prompts have {', '.join(partial)}")
    return pd.DataFrame(kept)


def _surrogates(text: str) -> bool:
    return any("\ud800" <= letter <= "\udfff" for letter in text)
