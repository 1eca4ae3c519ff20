"""The table that measurements give: read, printed, drawn, saved."""

import csv
import io
import json
import math
from xml.etree import ElementTree

import pytest
from rich.console import Console

from resformer.diagnostics.lines import exponent, fit, fit_log, slope
from resformer.diagnostics.measured import Column, Measured


def measured(layers: int = 3) -> Measured:
    columns = (
        Column("size", "of the thing", "m", log=True),
        Column("share", "of all things", ""),
        Column("rest", "", shown=False),
    )
    rows = [
        {"stack": "encoder", "layer": layer, "site": site, "size": 10.0**layer, "share": None if layer else math.nan}
        for layer in range(layers)
        for site in ("attn", "ffn")
    ]
    matrices = {"alike": [[1.0, 0.5], [0.5, 1.0]]}
    return Measured("things", "Things", columns, rows, {"rate": 10.0}, matrices, draws=("size", "share"))


def shown(one: Measured) -> str:
    console = Console(width=80, file=io.StringIO(), color_system=None)
    console.print(one.shown())
    return console.file.getvalue()


def test_columns_by_name():
    assert measured().column("size") == [1, 1, 10, 10, 100, 100]
    assert measured().column("layer") == [0, 0, 1, 1, 2, 2]
    assert measured().unit("size") == "m"
    with pytest.raises(ValueError, match="things has no column 'sizes'; it has stack, layer, site, size, share, rest"):
        measured().column("sizes")


def test_json_and_csv_hold_everything():
    one = measured()
    content = json.loads(one.to_json())
    assert content["rows"][0] == {"stack": "encoder", "layer": 0, "site": "attn", "size": 1.0, "share": None}
    assert content["columns"][0] == {"name": "size", "meaning": "of the thing", "unit": "m", "shown": True, "log": True}
    assert content["facts"] == {"rate": 10.0}
    assert content["matrices"]["alike"] == [[1.0, 0.5], [0.5, 1.0]]
    rows = list(csv.DictReader(io.StringIO(one.to_csv())))
    assert [row["size"] for row in rows] == ["1.0", "1.0", "10.0", "10.0", "100.0", "100.0"]
    assert list(rows[0]) == ["stack", "layer", "site", "size", "share", "rest"]


def test_printed_within_80_columns():
    text = shown(measured())
    assert max(map(len, text.splitlines())) <= 80
    assert "rate: 10" in text
    assert "rest" not in text
    assert "encoder" not in text  # there is but one
    many = shown(measured(100))
    assert "26 of 200 rows; all of them are in the CSV" in many
    assert [line.split()[:2] for line in many.splitlines()[-5:-3]] == [["99", "attn"], ["99", "ffn"]]


def test_the_picture_is_the_same_each_time(tmp_path):
    one = measured()
    assert one.plot() == one.plot()
    texts = [element.text for element in ElementTree.fromstring(one.plot()).iter() if element.tag.endswith("text")]
    assert {"size (m)", "share", "alike", "layer", "attn", "ffn"} <= set(texts)
    paths = one.save(str(tmp_path / "new"))
    assert sorted(path.name for path in paths) == ["things.csv", "things.json", "things.svg"]
    assert (tmp_path / "new" / "things.svg").read_text() == one.plot()


def test_rounding_is_not_drawn_as_a_finding():
    rows = [{"layer": layer, "level": 1 + 1e-8 * (-1) ** layer, "steep": 2.0**layer} for layer in range(6)]
    columns = (Column("level", ""), Column("steep", "", log=True))
    one = Measured("things", "Things", columns, rows, keys=("layer",), draws=("level", "steep"))
    texts = [element.text for element in ElementTree.fromstring(one.plot()).iter() if element.tag.endswith("text")]
    assert {"0.96", "1.00", "1.04", "1", "5", "20"} <= set(texts)


def test_fit_of_a_line():
    line = fit([0, 1, 2, 3], [1.0, 3.1, 4.9, 7.0])
    assert line is not None
    assert line.slope == pytest.approx(1.98)
    # by the textbook: residual variance over n - 2, over the spread of x
    residuals = [y - (1.03 + 1.98 * x) for x, y in enumerate([1.0, 3.1, 4.9, 7.0])]
    assert line.error == pytest.approx(math.sqrt(sum(r * r for r in residuals) / 2 / 5))
    assert fit([1.0], [2.0]) is None
    assert fit([1.0, 1.0], [2.0, 3.0]) is None
    assert math.isnan(fit([1.0, 2.0], [2.0, 3.0]).error)


def test_rates_and_exponents_are_slopes():
    assert slope([0, 1, 2], [0, 3, 0]) == pytest.approx(0.0)
    assert exponent([1, 2, 4, 8], [3 * x**-0.5 for x in (1, 2, 4, 8)]) == pytest.approx(-0.5)
    assert math.exp(fit_log([0, 1, 2, 3], [8.0, 4.0, 0.0, 1.0]).slope) == pytest.approx(0.5)  # zeros have no logarithm
    assert fit_log([0, 1], [0.0, 0.0]) is None
    with pytest.raises(ValueError, match="a slope needs points at two different x, got 2 points at x = \\[1, 1\\]"):
        slope([1, 1], [2, 3])
