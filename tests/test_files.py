"""Files are written whole or not at all."""

import json
import math
import os

import pytest

from resformer.files import finite, write_json_atomically


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "result.json"
    for content in ({"a": [1, 0.1 + 0.2, None]}, {"b": "é"}):
        write_json_atomically(path, content)
        assert json.loads(path.read_text(encoding="utf-8")) == content
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize(("content", "error"), [({"a": math.nan}, ValueError), ({"a": object()}, TypeError)])
def test_what_is_no_json_leaves_the_old_file(tmp_path, content, error):
    path = tmp_path / "result.json"
    write_json_atomically(path, {"a": 1})
    with pytest.raises(error):
        write_json_atomically(path, content)
    assert json.loads(path.read_text()) == {"a": 1}


def test_a_failed_move_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_json_atomically(tmp_path / "result.json", {})
    assert list(tmp_path.iterdir()) == []


def test_finite_keeps_all_but_nan_and_infinities():
    assert finite({"a": [math.nan, 1.5, (math.inf, "x")], "b": 0}) == {"a": [None, 1.5, [None, "x"]], "b": 0}
