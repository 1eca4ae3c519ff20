import math

import pytest

from resformer.data.layouts import OFFICIAL
from resformer.data.own import own_task
from resformer.data.submission import file_name, submission, table
from resformer.data.tasks import TASKS, Task


def test_the_names_that_the_server_wants():
    names = {file_name(task, split) for task in map(TASKS.get, set(OFFICIAL) - {"snli"}) for split in task.tests}
    assert names == {
        "CoLA.tsv", "SST-2.tsv", "MRPC.tsv", "STS-B.tsv", "QQP.tsv", "MNLI-m.tsv", "MNLI-mm.tsv", "QNLI.tsv",
        "RTE.tsv", "WNLI.tsv",
    }  # fmt: skip


def test_what_the_server_does_not_take_is_csv():
    assert file_name(TASKS["rte"], "validation") == "rte_validation.csv"
    assert file_name(TASKS["rte"], "test", "csv") == "rte_test.csv"
    assert file_name(TASKS["snli"], "test") == "snli_test.csv"
    with pytest.raises(ValueError, match=r"no predictions of rte validation; of rte it takes test; use --format csv"):
        file_name(TASKS["rte"], "validation", "glue")
    with pytest.raises(ValueError, match=r"'snli' is no task of GLUE; use --format csv"):
        file_name(TASKS["snli"], "test", "glue")
    with pytest.raises(ValueError, match=r"unknown format 'gleu'. Did you mean 'glue'"):
        file_name(TASKS["rte"], "test", "gleu")


@pytest.mark.parametrize(
    ("name", "predictions", "lines"),
    [
        ("cola", [1, 0], ["0\t1", "1\t0"]),
        ("wnli", [1, 0], ["0\t1", "1\t0"]),
        ("mrpc", [0, 1], ["0\t0", "1\t1"]),
        ("qqp", [0, 1], ["0\t0", "1\t1"]),
        ("sst2", [0, 1], ["0\t0", "1\t1"]),
        ("mnli", [2, 0, 1], ["0\tcontradiction", "1\tentailment", "2\tneutral"]),
        ("qnli", [1, 0], ["0\tnot_entailment", "1\tentailment"]),
        ("rte", [1, 0], ["0\tnot_entailment", "1\tentailment"]),
        ("stsb", [-0.2, 1.23456, 5.4, 3], ["0\t0.000", "1\t1.235", "2\t5.000", "3\t3.000"]),
    ],
)
def test_the_words_that_the_server_wants(name, predictions, lines):
    assert submission(TASKS[name], predictions) == "\n".join(["index\tprediction", *lines, ""])


def test_csv_says_class_names_and_whole_scores():
    task = Task("own", "", ("text",), ('a "b", c', "d"), ("accuracy",))
    assert table(task, [1, 0]) == 'index,prediction\n0,d\n1,"a ""b"", c"\n'
    assert table(TASKS["stsb"], [5.25, -1.0]) == "index,prediction\n0,5.25\n1,-1.0\n"


def test_what_is_no_answer_is_refused():
    with pytest.raises(ValueError, match="a prediction is nan, not a finite number"):
        submission(TASKS["stsb"], [math.nan])
    for write in (submission, table):
        with pytest.raises(ValueError, match="a prediction is 2, which is no class of 'rte'"):
            write(TASKS["rte"], [2])


def test_csv_is_read_back(tmp_path):
    """As labels of a user's own file."""
    task = Task("own", "", ("text",), ("no, never", 'so "yes"'), ("accuracy",))
    for name in ("a.csv", "b.csv"):
        rows = table(task, [0, 1, 1]).replace("index", "text", 1)
        (tmp_path / name).write_text(rows)
    again, data = own_task(tmp_path / "a.csv", tmp_path / "b.csv", label="prediction")
    assert again.labels == task.labels
    assert data["train"]["label"][:] == [0, 1, 1]
