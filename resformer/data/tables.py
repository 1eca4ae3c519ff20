"""Tables on disk: parquet, JSON lines, TSV and CSV, as columns of Python values.

Class labels that a file stores as numbers together with their names come back as names, since the order of
classes differs between files. GLUE's TSV knows neither quotes nor missing values: `"` and `NA` are text.
"""

import csv
import io
import itertools
import json
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Features

Columns = dict[str, list[Any]]


@dataclass(frozen=True)
class Table:
    """Columns with where they come from, for messages."""

    columns: Columns  # those that were asked for
    found: list[str]  # the names of all there are
    where: str
    lines: list[int] | None = None  # on which each row begins, from 1; None: the source has no lines

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def at(self, row: int) -> str:
        """Where row `row`, from 0, stands."""
        return f"{self.where}, row {row + 1}" if self.lines is None else f"{self.where}, line {self.lines[row]}"

    def select(self, rows: list[int]) -> "Table":
        """These rows alone, in this order."""
        columns = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        return Table(columns, self.found, self.where, [self.lines[row] for row in rows] if self.lines else None)


def read_table(
    path: Path, keep: Collection[str] | None = None, *, headerless: tuple[str, ...] = (), skip_broken: bool = False
) -> Table:
    """The columns of one file that are in `keep` (None: all).

    headerless   the columns of a TSV that starts with a row of this width instead of a header
    skip_broken  leave out TSV rows of the wrong width, with one warning that counts them

    Raises ValueError, naming the file and the line, if it is empty, cut off, not UTF-8 or not of its format.
    """
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    try:
        if path.suffix == ".parquet":
            return _read_parquet(path, keep)
        text = _decoded(path.read_bytes())
        if path.suffix in (".json", ".jsonl"):
            return _read_jsonl(io.StringIO(text, newline="\n"), keep, path)
        if path.suffix == ".csv":
            rows = _csv_rows(text)
        else:  # only \n ends a row and only a tab ends a field; csv would also end rows at a stray \r
            end = "\n" if "\n" in text.rstrip() else "\r"  # alone, as spreadsheets save for the Macintosh
            lines = enumerate(io.StringIO(text, newline=end), 1)
            rows = ((number, line.rstrip("\r\n").split("\t")) for number, line in lines)
        return _read_rows(rows, keep, headerless, skip_broken, path)
    except (pa.ArrowException, OSError, _Malformed) as error:
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


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _Malformed(f"line {line} is not UTF-8 ({error.reason}); save the file as UTF-8") from error


def _read_parquet(path: Path, keep: Collection[str] | None) -> Table:
    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        kept = [name for name in schema.names if keep is None or name in keep]
        table = file.read(columns=kept)
    return Table(columns_of(table, Features.from_arrow_schema(schema), kept), schema.names, str(path))


def _read_jsonl(lines: Iterable[str], keep: Collection[str] | None, path: Path) -> Table:
    rows, numbers = [], []
    found: dict[str, None] = {}  # an ordered set
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise _Malformed(f"line {number} is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise _Malformed(f"line {number} is a {type(row).__name__}; JSON lines have one object a line")
        found |= dict.fromkeys(row)
        rows.append({name: value for name, value in row.items() if keep is None or name in keep})
        numbers.append(number)
    columns = {name: [row.get(name) for row in rows] for name in found if keep is None or name in keep}
    return Table(columns, list(found), str(path), numbers)


def _csv_rows(text: str) -> Iterator[tuple[int, list[str]]]:
    """Each record with the line on which it begins: a quoted field may go over several."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    begins = 1
    try:
        for row in reader:
            yield begins, row
            begins = reader.line_num + 1
    except csv.Error as error:
        raise _Malformed(f"the row that begins on line {begins} is not CSV ({error})") from error


def _read_rows(
    rows: Iterator[tuple[int, list[str]]],
    keep: Collection[str] | None,
    headerless: tuple[str, ...],
    skip_broken: bool,
    path: Path,
) -> Table:
    first: list[tuple[int, list[str]]] = []
    number, header = next(rows, (1, []))
    if len(header) == len(headerless) and not set(keep or ()) & set(header):
        header, first = list(headerless), [(number, header)]
    kept = [(i, name) for i, name in enumerate(header) if keep is None or name in keep]
    columns: Columns = {name: [] for _, name in kept}
    if len(columns) < len(kept):
        raise _Malformed(f"the header names a column twice: {', '.join(header)}")
    numbers: list[int] = []
    broken = 0
    for number, row in itertools.chain(first, rows):
        if row in ([], [""]):  # a blank line
            continue
        if len(row) != len(header):
            if not skip_broken:
                raise _Malformed(f"line {number} has {len(row)} fields, the header has {len(header)}")
            broken += 1
            continue
        numbers.append(number)
        for i, name in kept:
            columns[name].append(row[i])
    if broken:
        warnings.warn(f"{path}: {broken} rows of the wrong width are left out", UserWarning, stacklevel=4)
    return Table(columns, header, str(path), numbers)


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
