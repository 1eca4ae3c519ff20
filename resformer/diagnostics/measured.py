"""What a measurement gives: rows under named columns with units, to print, draw and save."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resformer.files import finite, write_text_atomically

if TYPE_CHECKING:
    from rich.console import Group

Row = dict[str, Any]
Matrix = list[list[float]]


@dataclass(frozen=True)
class Column:
    """One quantity of a table."""

    name: str  # as in the rows
    meaning: str
    unit: str = ""  # "" for ratios and counts
    shown: bool = True  # in the printed table; all are saved
    log: bool = False  # drawn on a logarithmic axis


@dataclass(frozen=True)
class Measured:
    """The outcome of one measurement on one model and batch.

    rows      one for each residual connection (or what `keys` name), by column name; None where there is no value
    facts     what the rows come to, such as a fitted rate or a verdict, by name
    matrices  square tables, such as the similarity of each two layers, by name
    draws     the columns that `plot` draws, a panel each, against `along`, a line for each value of the other keys; or
              pairs of columns, points of the first against the second
    """

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: list[Row]
    facts: dict[str, Any] = field(default_factory=dict)
    matrices: dict[str, Matrix] = field(default_factory=dict)
    keys: tuple[str, ...] = ("stack", "layer", "site")
    along: str = "layer"
    draws: tuple[str | tuple[str, str], ...] = ()

    def column(self, name: str) -> list[Any]:
        """The values of one column, in the order of the rows."""
        if name not in self.keys and all(name != column.name for column in self.columns):
            known = ", ".join((*self.keys, *(column.name for column in self.columns)))
            raise ValueError(f"{self.name} has no column {name!r}; it has {known}")
        return [row.get(name) for row in self.rows]

    def unit(self, name: str) -> str:
        return next(column.unit for column in self.columns if column.name == name)

    def to_json(self) -> str:
        """All of it; NaN and infinities, which JSON has not, as null."""
        content: dict[str, Any] = {
            "name": self.name,
            "title": self.title,
            "columns": [asdict(column) for column in self.columns],
        }
        content |= {"keys": self.keys, "rows": self.rows, "facts": self.facts, "matrices": self.matrices}
        return json.dumps(finite(content), indent=1, allow_nan=False, ensure_ascii=False) + "\n"

    def to_csv(self) -> str:
        """The rows, under the names of the columns."""
        out = StringIO()
        writer = csv.DictWriter(out, [*self.keys, *(column.name for column in self.columns)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return out.getvalue()

    def save(self, folder: str | Path) -> list[Path]:
        """Write NAME.json, NAME.csv and NAME.svg into a folder, made where it is not there; their paths."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        texts = {"json": self.to_json(), "csv": self.to_csv(), "svg": self.plot()}
        paths = [folder / f"{self.name}.{ending}" for ending in texts]
        for path, content in zip(paths, texts.values(), strict=True):
            write_text_atomically(path, content)
        return paths

    def plot(self) -> str:
        """An SVG picture: a panel for each drawn column, then one for each matrix."""
        from resformer.diagnostics.drawing import draw

        return draw(self)

    def shown(self, rows: int = 26) -> Group:
        """For a terminal of 80 columns; of more rows than that, those of evenly spaced layers."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        if not self.rows:
            return Group(Text(self.title, style="bold"), Text("nothing: this model has none"))
        keys = [key for key in self.keys if key == self.along or len({row.get(key) for row in self.rows}) > 1]
        columns = [column for column in self.columns if column.shown]
        table = Table(box=None, pad_edge=False)
        for key in keys:
            table.add_column(key, justify="right" if key == self.along else "left", no_wrap=True)
        for column in columns:
            table.add_column(column.name.replace("_", " "), justify="right")
        every = [row for row in self.rows if row.get(self.along) is not None]
        printed = _spread(every, rows, self.along)
        for row in printed:
            table.add_row(*(text(row.get(name)) for name in (*keys, *(column.name for column in columns))))
        lines = [f"{name.replace('_', ' ')}: {text(value)}" for name, value in self.facts.items()]
        if len(printed) < len(every):
            lines.append(f"{len(printed)} of {len(every)} rows; all of them are in the CSV")
        meanings = "; ".join(f"{column.name.replace('_', ' ')}: {column.meaning}" for column in columns)
        return Group(
            Text(self.title, style="bold"), table, *(Text(line) for line in lines), Text(meanings, style="dim")
        )


def text(value: Any) -> str:
    """A value as people read it."""
    if value is None:
        return ""
    if isinstance(value, dict):
        return ", ".join(f"{name} {text(one)}" for name, one in value.items())
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}"


def _spread(rows: Sequence[Row], most: int, along: str) -> list[Row]:
    """All rows, or those of evenly spaced values of `along`: the sites of a layer stay together."""
    if len(rows) <= most:
        return list(rows)
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[along], []).append(row)
    values = list(groups)
    number = min(len(values), max(2, most // max(map(len, groups.values()))))
    kept = [values[round(i * (len(values) - 1) / (number - 1))] for i in range(number)] if number > 1 else values
    return [row for value in kept for row in groups[value]]
