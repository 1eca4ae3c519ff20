"""Tables on disk: parquet, JSON lines, TSV and CSV, as columns of Python values.

Class labels that a file stores as numbers together with their names come back as names, since the order of
classes differs between files. GLUE's TSV knows neither quotes nor missing values: `"` and `NA` are text.
"""

import csv
import io
import json
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Features

Columns = dict[str, list[Any]]


def read_table(
    path: Path, keep: Collection[str], *, headerless: tuple[str, ...] = (), skip_broken: bool = False
) -> tuple[Columns, list[str]]:
    """The columns of one file that are in `keep`, and the names of all its columns.

    headerless   the columns of a TSV that starts with a row of this width instead of a header
    skip_broken  leave out TSV rows of the wrong width, with one warning that counts them

    Raises ValueError, naming the file, if it is empty, cut off, not UTF-8 or not of its format.
    """
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    try:
        if path.suffix == ".parquet":
            return _read_parquet(path, keep)
        with open(path, encoding="utf-8-sig", newline="" if path.suffix == ".csv" else "\n") as file:
            if path.suffix in (".json", ".jsonl"):
                return _read_jsonl(file, keep)
            if path.suffix == ".csv":
                rows: Iterator[list[str]] = csv.reader(file, strict=True)
            else:  # only \n ends a row and only a tab ends a field; csv would also end rows at a stray \r
                rows = (line.rstrip("\r\n").split("\t") for line in file)
            return _read_rows(rows, keep, headerless, skip_broken, path)
    except (pa.ArrowException, OSError, UnicodeDecodeError, csv.Error, _Malformed) as error:
        raise ValueError(f"cannot read {path}: {error}; is the file complete and of the kind its name says?") from error


def columns_of(table: pa.Table, features: Features, keep: Collection[str]) -> Columns:
    """The columns of an Arrow table that are in `keep`; numbers of a `ClassLabel` become its names."""
    columns: Columns = {}
    for name in table.column_names:
        if name in keep:
            columns[name] = table[name].to_pylist()
            feature = features[name]
            if isinstance(feature, ClassLabel) and feature.names:
                names = dict(enumerate(feature.names))
                columns[name] = [names.get(value, value) for value in columns[name]]
    return columns


class _Malformed(Exception):
    """What is wrong with the content of a text file."""


def _read_parquet(path: Path, keep: Collection[str]) -> tuple[Columns, list[str]]:
    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        table = file.read(columns=[name for name in schema.names if name in keep])
    return columns_of(table, Features.from_arrow_schema(schema), keep), schema.names


def _read_jsonl(lines: Iterable[str], keep: Collection[str]) -> tuple[Columns, list[str]]:
    rows = []
    found: dict[str, None] = {}  # an ordered set
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise _Malformed(f"line {number} is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise _Malformed(f"line {number} is a {type(row).__name__}; JSON lines have one object a line")
        found |= dict.fromkeys(row)
        rows.append({name: value for name, value in row.items() if name in keep})
    return {name: [row.get(name) for row in rows] for name in found if name in keep}, list(found)


def _read_rows(
    rows: Iterator[list[str]], keep: Collection[str], headerless: tuple[str, ...], skip_broken: bool, path: Path
) -> tuple[Columns, list[str]]:
    header: list[str] = next(rows, [])
    first: list[list[str]] = []
    if len(header) == len(headerless) and not set(keep) & set(header):
        header, first = list(headerless), [header]
    kept = [(i, name) for i, name in enumerate(header) if name in keep]
    columns: Columns = {name: [] for _, name in kept}
    broken = 0
    for number, row in enumerate((row for part in (first, rows) for row in part), 1):
        if row in ([], [""]):  # a blank line
            continue
        if len(row) != len(header):
            if not skip_broken:
                raise _Malformed(f"row {number} has {len(row)} fields, the header has {len(header)}")
            broken += 1
            continue
        for i, name in kept:
            columns[name].append(row[i])
    if broken:
        warnings.warn(f"{path}: {broken} rows of the wrong width are left out", UserWarning, stacklevel=4)
    return columns, header


def _to_parquet(dataset: Dataset) -> bytes:
    sink = io.BytesIO()
    # The schema of the features carries the class names.
    pq.write_table(dataset.with_format("arrow")[:].cast(dataset.features.arrow_schema), sink)
    return sink.getvalue()


def _to_jsonl(dataset: Dataset) -> bytes:
    rows = (json.dumps(row, ensure_ascii=False) for row in _rows(dataset))
    return "".join(f"{row}\n" for row in rows).encode()


def _to_tsv(dataset: Dataset) -> bytes:
    lines = ["\t".join(dataset.column_names)]
    for number, row in enumerate(_rows(dataset), 1):
        for name, value in row.items():
            if isinstance(value, str) and any(mark in value for mark in "\t\n\r"):
                raise ValueError(
                    f"{name!r} of row {number} holds a tab or a line break, which TSV cannot; write parquet or jsonl"
                )
        lines.append("\t".join(map(str, row.values())))
    return "".join(f"{line}\n" for line in lines).encode()


def _rows(dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Rows with class names for labels, so that a text file says what it means."""
    columns = columns_of(dataset.with_format("arrow")[:], dataset.features, dataset.column_names)
    return (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))


# The formats that can be written; file names end in the key.
FORMATS: dict[str, Callable[[Dataset], bytes]] = {"parquet": _to_parquet, "tsv": _to_tsv, "jsonl": _to_jsonl}
