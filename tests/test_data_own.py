"""A user's own files: which task they make, and one message with file and line for each fault."""

import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from resformer.data.own import own_split, own_task


def put(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def csv(folder, name="a.csv", *, labels, header="text,label"):
    return put(folder, name, f"{header}\n" + "".join(f"text {i},{label}\n" for i, label in enumerate(labels)))


def pair(folder, labels, **options):
    """The task of two files with the same labels."""
    return own_task(csv(folder, labels=labels), csv(folder, "b.csv", labels=labels), **options)


def refused(folder, content, message, name="a.csv", **options):
    good = put(folder, "good.csv", "text,label\na,x\nb,y\n")
    bad = put(folder, name, content)
    with pytest.raises(ValueError, match=message):
        own_task(bad, good, **options)


ROWS = [("NA", 'says "so"', "no"), ("a, b", "two\nlines", "yes"), ("null", " c", "no")]


def written(folder, name):
    header = ("sentence1", "sentence2", "label")
    if name.endswith("csv"):
        quoted = [[f'"{field}"' for field in (part.replace('"', '""') for part in row)] for row in ROWS]
        return put(folder, name, "".join(",".join(row) + "\r\n" for row in (header, *quoted)))
    if name.endswith("tsv"):
        return put(folder, name, "".join("\t".join(row).replace("\n", " ") + "\n" for row in (header, *ROWS)))
    if name.endswith("parquet"):
        pq.write_table(pa.table(dict(zip(header, map(list, zip(*ROWS, strict=True)), strict=True))), folder / name)
        return folder / name
    return put(folder, name, "".join(json.dumps(dict(zip(header, row, strict=True))) + "\n" for row in ROWS))


@pytest.mark.parametrize("last", ["", "\r", "\r\n"])
def test_rows_may_end_in_a_carriage_return_alone(tmp_path, last):
    for suffix, mark in (("csv", ","), ("tsv", "\t")):
        text = f"text{mark}label\ra b{mark}x\rc{mark}y{last}"
        task, data = own_task(*(put(tmp_path, f"{name}.{suffix}", text) for name in "ab"))
        assert task.labels == ("x", "y")
        assert data["train"].to_dict() == {"text": ["a b", "c"], "label": [0, 1]}
    refused(tmp_path, "text\tlabel\ra\tx\rb\r", r"a.tsv: line 3 has 1 fields, the header has 2", name="a.tsv")


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_every_format_gives_the_same_task(tmp_path, suffix):
    said = []
    task, data = own_task(written(tmp_path, f"a.{suffix}"), written(tmp_path, f"b.{suffix}"), say=said.append)
    assert (task.name, task.texts, task.labels) == ("own", ("sentence1", "sentence2"), ("no", "yes"))
    assert task.metrics == ("accuracy", "f1")
    assert list(data) == ["train", "validation"]
    second = [row[1].replace("\n", " ") if suffix == "tsv" else row[1] for row in ROWS]
    for part in data.values():
        assert part.features == task.features()
        assert part.to_dict() == {"sentence1": [row[0] for row in ROWS], "sentence2": second, "label": [0, 1, 0]}
    kind = "label label: 2 classes (no, yes)"
    assert said == [f"own: text sentence1 and sentence2; {kind}; train 3 rows, validation 3 rows"]


@pytest.mark.parametrize(
    ("labels", "classes", "metrics"),
    [
        (["10", "9", "-1"], ("-1", "9", "10"), ("accuracy", "macro_f1")),
        (["b", "10", "9"], ("10", "9", "b"), ("accuracy", "macro_f1")),
        (["1.5", "2", "2.5"], None, ("pearson", "spearman")),
        (["1e-3", "0.5"], None, ("pearson", "spearman")),
        (["1.5", "x"], ("1.5", "x"), ("accuracy", "f1")),
    ],
)
def test_what_labels_make(tmp_path, labels, classes, metrics):
    task, data = pair(tmp_path, labels)
    assert (task.labels, task.metrics) == (classes, metrics)
    if classes is None:
        assert data["train"]["label"][:] == pytest.approx([float(label) for label in labels])
    else:
        assert [classes[i] for i in data["train"]["label"]] == labels


def test_a_decision_that_nobody_made_is_said(tmp_path):
    said = []
    pair(tmp_path, ["1.5", "2"], say=said.append)
    assert "regression from 1.5 to 2 (the labels are decimals; --no-regression makes them classes)" in said[0]
    assert pair(tmp_path, ["1.5", "2"], regression=False)[0].labels == ("1.5", "2")
    assert pair(tmp_path, ["1", "2"], regression=True)[0].labels is None
    assert pair(tmp_path, ["1", "2"])[0].labels == ("1", "2")
    with pytest.raises(ValueError, match=r"whole numbers written as decimals \(0.0, 1.0\).*--regression or --no-"):
        pair(tmp_path, ["1.0", "0.0"])
    assert pair(tmp_path, ["1.0", "0.0"], regression=False)[0].labels == ("0.0", "1.0")


def test_truth_values_are_classes(tmp_path):
    rows = '{"text": "a", "label": true}\n{"text": "b", "label": false}\n'
    task, data = own_task(put(tmp_path, "a.jsonl", rows), put(tmp_path, "b.jsonl", rows))
    assert task.labels == ("false", "true")
    assert data["train"]["label"][:] == [1, 0]


def test_columns_by_name(tmp_path):
    header = "label,body,score,sentence\n"
    rows = "".join(f"l{i},body {i},{i}.5,s\n" for i in range(4))
    a, b = put(tmp_path, "a.csv", header + rows), put(tmp_path, "b.csv", header + rows)
    task, data = own_task(a, b, texts=["body"], label="score")
    assert task.texts == ("body",)
    assert data["train"]["label"][:] == [0.5, 1.5, 2.5, 3.5]
    assert own_task(a, b)[0].texts == ("sentence",)  # the only one that is known
    task, data = own_task(a, b, texts=["label", "body"], label="score")  # a column called label that is a text
    assert data["train"][0] == {task.texts[0]: "l0", "body": "body 0", "label": 0.5}


def test_a_pair_goes_before_its_parts(tmp_path):
    text = "question,sentence,label\na,b,0\nc,d,1\n"
    a, b = put(tmp_path, "a.csv", text), put(tmp_path, "b.csv", text)
    assert own_task(a, b)[0].texts == ("question", "sentence")


def test_columns_that_cannot_be_told(tmp_path):
    refused(tmp_path, "body,label\na,x\n", r"a.csv hold the text: none .*--text COLUMN.*it has body, label")
    refused(tmp_path, "text,premise,hypothesis,label\na,b,c,d\n", r"the text: text or premise\+hypothesis\?")
    refused(tmp_path, "text,y\na,x\n", r"a.csv lacks the column label; it has text, y; name the columns")
    refused(tmp_path, "text,y\na,x\n", r"lacks the column txt; it has text, y", texts=["txt"])
    refused(tmp_path, "text,label\na,x\n", "give one text column or two, and another label", texts=["text", "text"])
    refused(tmp_path, "text,label\na,x\n", "give one text column or two", texts=["label"])
    refused(tmp_path, "text,label,label\na,x,y\n", "the header names a column twice: text, label, label")


def test_files_that_are_none(tmp_path):
    good = csv(tmp_path, labels="xy")
    for path, message in (
        (tmp_path / "gone.csv", "the train file '.*gone.csv' does not exist"),
        (tmp_path, "does not exist or is no file"),
        (put(tmp_path, "a.xlsx", "x"), r"a.xlsx' must end in .parquet, .jsonl"),
        (put(tmp_path, "empty.csv", ""), "empty.csv is empty"),
        (put(tmp_path, "head.csv", "text,label\n"), "head.csv has no rows"),
        (put(tmp_path, "blank.csv", "\n\n"), "hold the text"),
        (put(tmp_path, "cut.parquet", b"PAR1xx"), "cannot read .*cut.parquet"),
        (good, "is given for training and for validation"),
    ):
        with pytest.raises(ValueError, match=message):
            own_task(path, good)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label\na,x\n,y\n", r"a.csv, line 3: 'text' is empty; leave the row out or fill it"),
        ('text,label\n"a\nb",x\n  ,y\n', r"a.csv, line 4: 'text' is empty"),
        ("text,label\na,x\nb\n", "a.csv: line 3 has 1 fields, the header has 2"),
        ("text,label\na,x\nb,y,z\n", "a.csv: line 3 has 3 fields"),
        ('text,label\na,x\n"b,y\nc,z\n', r"a.csv: the row that begins on line 3 is not CSV"),
        ("text,label\na,x\nb, \n", "a.csv, line 3: the label is missing"),
        ("text,label\na,x\nb,x\n", "all labels of .*a.csv are 'x'; a classification needs two classes"),
        ("text,label\na,x\ncaf\u00e9,y\n".encode("latin-1"), r"a.csv: line 3 is not UTF-8 .*; save the file as UTF-8"),
        ("text,label\na,x\n".encode("utf-16"), "line 1 is not UTF-8"),
    ],
)
def test_rows_that_are_wrong(tmp_path, content, message):
    refused(tmp_path, content, message)


def test_rows_of_json_that_are_wrong(tmp_path):
    for content, message in (
        ('{"text": "a", "label": 1}\n\n{"text": 5, "label": 0}\n', r"a.jsonl, line 3: 'text' is 5, not a text"),
        ('{"text": "a", "label": 1}\n{"label": 0}\n', r"a.jsonl, line 2: 'text' is None"),
        ('{"text": "a", "label": null}\n', r"a.jsonl, line 1: the label is missing"),
        ('{"text": "a", "label": [1]}\n', r"a.jsonl, line 1: the label \[1\] is neither a text nor a number"),
        ('{"text": "a", "label": 1}\n{"text"', "a.jsonl: line 2 is not JSON"),
    ):
        refused(tmp_path, content, message, name="a.jsonl")


def test_labels_that_do_not_fit(tmp_path):
    a, b = csv(tmp_path, labels="xyx"), csv(tmp_path, "b.csv", labels="xyz")
    with pytest.raises(ValueError, match=r"b.csv, line 4: the label 'z' is not among those for training: x, y"):
        own_task(a, b)
    with pytest.raises(ValueError, match=r"a.csv, line 2: the label 'x' is not a finite number"):
        own_task(a, b, regression=True)
    with pytest.raises(ValueError, match=r"a.csv, line 3: the label 'nan' is not a finite number"):
        pair(tmp_path, ["1.5", "nan"], regression=True)
    with pytest.raises(ValueError, match=r"all labels of .*a.csv are 1.5; a regression needs several"):
        pair(tmp_path, ["1.5", "1.5"])
    with pytest.raises(ValueError, match=r"has 101 different labels in 'label'.*for numbers .* say --regression"):
        pair(tmp_path, list(range(101)))
    with pytest.raises(ValueError, match=r"at most 100 are taken as classes; is it the column of the labels"):
        pair(tmp_path, [f"x{i}" for i in range(101)])
    assert len(pair(tmp_path, range(100))[0].labels) == 100


def test_a_file_to_be_answered(tmp_path):
    path = put(tmp_path, "new.csv", "id,text\n1,NA\n2,b\n")
    task, data = own_split(path, ("no", "yes"))
    assert (task.texts, task.labels, task.metrics) == (("text",), ("no", "yes"), ("accuracy", "f1"))
    assert data["test"].to_dict() == {"text": ["NA", "b"], "label": [-1, -1]}
    task, data = own_split(path, None, texts=["id", "text"])
    assert data["test"]["id"][:] == ["1", "2"]
    assert all(map(math.isnan, data["test"]["label"]))
    with pytest.raises(ValueError, match=r"new.csv lacks the column body; it has id, text"):
        own_split(path, None, texts=["body"])
    with pytest.raises(ValueError, match=r"new.csv, line 2: 'text' is empty"):
        own_split(put(tmp_path, "new.csv", "id,text\n1, \n"), None)
    with pytest.raises(ValueError, match=r"the test file 'gone.csv' does not exist"):
        own_split("gone.csv", None)
