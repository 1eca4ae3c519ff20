import json
import math
import os
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets.packaged_modules.parquet.parquet import Parquet

from resformer.data import glue, layouts
from resformer.data.builtin import generate
from resformer.data.glue import load_split, load_task, write_task
from resformer.data.tables import FORMATS
from resformer.data.tasks import TASKS

REAL = Path(os.environ.get("RESFORMER_DATA", Path(__file__).parents[2] / "shared" / "data"))
PAIRS = {"sentence1": ["a b", 'NA "quoted', "null"], "sentence2": ["b", "", " c "], "label": [0, 1, 1]}
HEADER = "sentence1\tsentence2\tlabel\n"


@pytest.fixture(autouse=True)
def nowhere_else(monkeypatch, tmp_path):
    """No data from the environment, and the hub is out of bounds."""
    monkeypatch.delenv("RESFORMER_DATA", raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "no cache")
    for name in glue.OFFLINE:
        monkeypatch.setenv(name, "1")


def put(folder, **files):
    """Text files; `train_tsv` is train.tsv."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        stem, _, suffix = name.rpartition("_")
        (folder / f"{stem}.{suffix}").write_bytes(text.encode())
    return folder


def same(left, right):
    assert list(left) == list(right)
    for split in left:
        assert left[split].features == right[split].features
        assert left[split].to_dict() == right[split].to_dict()


# --- what is written is read back ---------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["sentiment", "entailment"])
def test_builtin_round_trip(tmp_path, name, format):
    files = write_task(name, tmp_path / "out", format=format, seed=3)
    assert [path.name for path in files] == [f"train.{format}", f"validation.{format}"]
    same(load_task(name, tmp_path / "out"), generate(name, seed=3))
    same(load_task(name, seed=3), generate(name, seed=3))


@pytest.mark.parametrize("format", FORMATS)
def test_hard_texts_round_trip(tmp_path, format):
    hard = ['"', "NA", "null", "", " padded ", "naïve \u2028 line", "[MASK]", "\\t", "it's, so"]
    for name, labels in {"stsb": [0.1 * i for i in range(9)], "mnli": [0, 1, 2] * 3}.items():
        task = TASKS[name]
        columns = {task.texts[0]: hard, task.texts[1]: hard[::-1], "label": labels}
        source = tmp_path / f"{name}-source"
        source.mkdir()
        for split in ("train", *task.splits):
            pq.write_table(pa.table(columns), source / f"{split}.parquet")
        write_task(name, tmp_path / name, format=format, data=source)
        same(load_task(name, tmp_path / name), load_task(name, source))
        assert load_task(name, tmp_path / name)["train"][task.texts[0]][:] == hard


def test_written_parquet_is_an_ordinary_data_set(tmp_path):
    write_task("sentiment", tmp_path / "out")
    part = Dataset(pq.read_table(tmp_path / "out" / "validation.parquet"))
    assert part.features == TASKS["sentiment"].features()


def test_text_files_say_the_class_names(tmp_path):
    write_task("sentiment", tmp_path / "t", format="tsv")
    write_task("sentiment", tmp_path / "j", format="jsonl")
    header, row = (tmp_path / "t" / "train.tsv").read_text().splitlines()[:2]
    assert header == "sentence\tlabel\tdifficulty"
    assert row.split("\t")[1] in ("negative", "positive")
    assert json.loads((tmp_path / "j" / "train.jsonl").read_text().splitlines()[0])["label"] == row.split("\t")[1]


def test_writing_overwrites_nothing(tmp_path):
    put(tmp_path / "out", notes_txt="mine")
    with pytest.raises(ValueError, match="out is not empty; give a new or empty one"):
        write_task("sentiment", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]
    with pytest.raises(ValueError, match=r"notes.txt is a file; give a new or empty directory"):
        write_task("sentiment", tmp_path / "out" / "notes.txt")
    with pytest.raises(ValueError, match=r"unknown format 'tvs'. Did you mean 'tsv'"):
        write_task("sentiment", tmp_path / "new", format="tvs")
    assert not (tmp_path / "new").exists()


def test_what_tsv_cannot_hold_is_refused_before_writing(tmp_path):
    source = put(
        tmp_path / "in",
        train_jsonl='{"sentence": "fine", "label": 1}\n{"sentence": "a\\tb", "label": 0}\n',
        dev_jsonl='{"sentence": "x", "label": 1}\n',
    )
    with pytest.raises(ValueError, match=r"'sentence' of row 2 holds a tab or a line break.*parquet or jsonl"):
        write_task("cola", tmp_path / "out", format="tsv", data=source)
    assert not (tmp_path / "out").exists()


# --- layouts ------------------------------------------------------------------------------------------


def texts_of(format):
    rows = list(zip(*PAIRS.values(), strict=True))
    if format == "csv":
        quoted = [(f'"{a.replace(chr(34), chr(34) * 2)}"', f'"{b}"', str(label)) for a, b, label in rows]
        return "sentence1,sentence2,label\n" + "".join(",".join(row) + "\n" for row in quoted)
    if format == "tsv":
        return HEADER + "".join(f"{a}\t{b}\t{label}\n" for a, b, label in rows)
    return "".join(json.dumps(dict(zip(PAIRS, row, strict=True))) + "\n" for row in rows)


@pytest.mark.parametrize("validation", ["validation", "dev"])
@pytest.mark.parametrize("format", ["tsv", "csv", "jsonl", "json"])
@pytest.mark.parametrize("below", ["", "rte", "RTE"])
def test_local_layouts(tmp_path, format, validation, below):
    text = texts_of(format)
    put(tmp_path / below, **{f"train_{format}": text, f"{validation}_{format}": text, f"test_{format}": "unlabelled"})
    data = load_task("rte", tmp_path)
    assert list(data) == ["train", "validation"]
    for part in data.values():
        assert part.to_dict() == PAIRS
        assert part.features == TASKS["rte"].features()


def test_parquet_in_parts(tmp_path):
    for number in range(2):
        rows = {name: values[number : number + 1] for name, values in PAIRS.items()}
        pq.write_table(pa.table(rows | {"idx": [number]}), tmp_path / f"train-0000{number}-of-00002.parquet")
    pq.write_table(pa.table(PAIRS), tmp_path / "validation-00000-of-00001.parquet")
    assert load_task("rte", tmp_path)["train"].to_dict() == {name: values[:2] for name, values in PAIRS.items()}
    (tmp_path / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match="holds 1 of the 00002 parts of the split 'train'"):
        load_task("rte", tmp_path)


def test_class_names_in_the_file_beat_its_order(tmp_path):
    features = Features(
        {
            "premise": Value("string"),
            "hypothesis": Value("string"),
            "label": ClassLabel(names=["contradiction", "entailment", "neutral"]),
        }
    )
    part = Dataset.from_dict({"premise": ["a"] * 3, "hypothesis": ["b"] * 3, "label": [0, 1, 2]}, features=features)
    for split in ("train", "validation_matched"):
        (tmp_path / f"{split}.parquet").write_bytes(FORMATS["parquet"](part))
    data = load_task("mnli", tmp_path)
    assert list(data) == ["train", "validation_matched"]  # the mismatched split may be absent
    assert data["train"]["label"][:] == [2, 0, 1]


OFFICIAL = {
    "cola": ("CoLA", "", 'gj04\t1\t\tShe left.\ngj04\t0\t*\tLeft she "has.\n', ["She left.", 'Left she "has.'], [1, 0]),
    "sst2": ("SST-2", "sentence\tlabel\n", "so good \t1\nNA\t0\n", ["so good ", "NA"], [1, 0]),
    "mrpc": (
        "MRPC",
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n",
        '1\t7\t8\tHe "said\tHe said "\r\n0\t9\t9\tYes\tNo\r\n',
        ['He "said', "Yes"],
        [1, 0],
    ),
    "stsb": (
        "STS-B",
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n",
        "0\tg\tf\t2012\t1\tn\tn\tA plane\tAn air plane\t5.000\n1\tg\tf\t2012\t1\tn\tn\tA dog\tA car\t0.25\n",
        ["A plane", "A dog"],
        [5.0, 0.25],
    ),
    "qqp": (
        "QQP",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n",
        "1\t2\t3\tWhy?\tWhy so?\t1\n4\t5\t6\tWho?\tWhat?\t0\n",
        ["Why?", "Who?"],
        [1, 0],
    ),
    "mnli": (
        "MNLI",
        "index\tpairID\tgenre\tsentence1\tsentence2\tlabel1\tgold_label\n",
        "0\tp\tg\tOne\tTwo\tneutral\tcontradiction\n1\tp\tg\tn/a\tFour\tneutral\tentailment\n",
        ["One", "n/a"],
        [2, 0],
    ),
    "qnli": (
        "QNLI",
        "index\tquestion\tsentence\tlabel\n",
        "0\tWho?\tHe.\tnot_entailment\n1\tWhat?\tIt.\tentailment\n",
        ["Who?", "What?"],
        [1, 0],
    ),
    "rte": (
        "RTE",
        "index\tsentence1\tsentence2\tlabel\n",
        "0\tnull\tB\tentailment\n1\tC\tD\tnot_entailment\n",
        ["null", "C"],
        [0, 1],
    ),
    "wnli": ("WNLI", "index\tsentence1\tsentence2\tlabel\n", "0\tA\tB\t1\n1\tC\tD\t0\n", ["A", "C"], [1, 0]),
}


def snli(label, premise):
    row = {"annotator_labels": ["neutral"], "captionID": "1.jpg#0", "gold_label": label, "pairID": "1.jpg#0r1n"}
    return json.dumps(row | {"sentence1": premise, "sentence1_binary_parse": "( a )", "sentence2": "b"}) + "\n"


@pytest.mark.parametrize("folder", ["", "snli", "snli_1.0"])
def test_snli_as_published(tmp_path, folder):
    rows = snli("neutral", "NA") + snli("-", "undecided") + snli("contradiction", 'a "b')
    for split in ("train", "dev", "test"):
        put(tmp_path / folder, **{f"snli_1.0_{split}_jsonl": rows, f"snli_1.0_{split}_txt": "gold_label\t..."})
    said = []
    data = load_task("snli", tmp_path, say=said.append)
    assert list(data) == ["train", "validation"]
    assert data["train"].to_dict() == {"premise": ["NA", 'a "b'], "hypothesis": ["b", "b"], "label": [1, 2]}
    part = "2 rows (1 without a label are left out)"
    assert f": train {part} (the official data have 549,367), validation {part} (the official data" in said[0]
    assert load_split("snli", "test", tmp_path)["test"]["label"][:] == [1, -1, 2]  # predicted as well


def test_snli_from_the_hub_drops_what_has_no_label(monkeypatch):
    def hub(path, config, split):
        assert (path, config, split) == ("stanfordnlp/snli", "plain_text", ["train", "validation"])
        rows = {"premise": ["a", "b"], "hypothesis": ["c", "d"], "label": [-1, 2]}
        return [Dataset.from_dict(rows, features=TASKS["snli"].features()) for _ in split]

    monkeypatch.setattr(glue, "load_dataset", hub)
    for name in glue.OFFLINE:
        monkeypatch.delenv(name)
    assert load_task("snli")["train"].to_dict() == {"premise": ["b"], "hypothesis": ["d"], "label": [2]}


@pytest.mark.parametrize("whole", [True, False])
def test_saved_to_disk(tmp_path, whole):
    parts = {split: Dataset.from_dict(PAIRS, features=TASKS["rte"].features()) for split in ("train", "validation")}
    if whole:
        DatasetDict(parts | {"test": parts["train"]}).save_to_disk(tmp_path / "rte")
    else:
        parts["train"].select([2, 0]).save_to_disk(tmp_path / "rte" / "train")
        parts["validation"].save_to_disk(tmp_path / "rte" / "dev")
    data = load_task("rte", tmp_path)
    assert data["validation"].to_dict() == PAIRS
    assert data["train"]["label"][:] == ([0, 1, 1] if whole else [1, 0])
    put(tmp_path / "rte", train_tsv=texts_of("tsv"))
    with pytest.raises(ValueError, match=r"the split 'train' more than once: train.tsv, train; keep one"):
        load_task("rte", tmp_path)
    (tmp_path / "rte" / "train.tsv").unlink()
    next((tmp_path / "rte" / "train").glob("*.arrow")).write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"cannot read the saved data set .*rte/train: .*; save it again"):
        load_task("rte", tmp_path)


def test_mrpc_as_its_authors_publish_it(tmp_path):
    header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    text = header + "1\t7\t8\ta\tb\r\n0\t9\t10\tc\td\r\n1\t8\t7\te\tf\r\n"
    put(tmp_path / "MRPC", msr_paraphrase_train_txt=text, msr_paraphrase_test_txt=text)
    with pytest.raises(ValueError, match=r"msr_paraphrase_train.txt, but not GLUE's dev_ids.tsv.*or give train.tsv"):
        load_task("mrpc", tmp_path)
    put(tmp_path / "MRPC", dev_ids_tsv="8\t7\n")
    data = load_task("mrpc", tmp_path)
    assert data["train"].to_dict() == {"sentence1": ["a", "c"], "sentence2": ["b", "d"], "label": [1, 0]}
    assert data["validation"].to_dict() == {"sentence1": ["e"], "sentence2": ["f"], "label": [1]}
    assert load_split("mrpc", "test", tmp_path)["test"]["label"][:] == [1, 0, 1]


# --- splits without labels ----------------------------------------------------------------------------


def test_test_splits_without_labels(tmp_path):
    put(tmp_path / "CoLA", test_tsv='index\tsentence\n0\tNA\n1\tShe "left.\n')
    assert load_split("cola", "test", tmp_path)["test"].to_dict() == {
        "sentence": ["NA", 'She "left.'], "label": [-1, -1],
    }  # fmt: skip
    put(tmp_path / "rte", test_tsv=HEADER + "a\tb\t-1\nc\td\tentailment\ne\tf\t\n")
    assert load_split("rte", "test", tmp_path)["test"]["label"][:] == [-1, 0, -1]
    put(tmp_path / "stsb", test_jsonl='{"sentence1": "a", "sentence2": "b", "label": -1.0}\n')
    assert math.isnan(load_split("stsb", "test", tmp_path)["test"]["label"][0])
    put(tmp_path / "rte", test_tsv=HEADER + "a\tb\tmaybe\n")
    with pytest.raises(ValueError, match=r"test.tsv, line 2: label 'maybe' is none of 'rte'"):
        load_split("rte", "test", tmp_path)


def test_both_test_splits_of_mnli(tmp_path):
    text = "index\tsentence1\tsentence2\n0\ta\tb\n"
    put(tmp_path, test_matched_tsv=text, test_mismatched_tsv=text, dev_matched_tsv=text + "1\tc\td\n")
    assert list(load_split("mnli", "test", tmp_path)) == ["test_matched", "test_mismatched"]
    assert list(load_split("mnli", "test_mismatched", tmp_path)) == ["test_mismatched"]
    assert list(load_split("mnli", "validation", tmp_path)) == ["validation_matched"]
    with pytest.raises(ValueError, match=r"unknown split 'tset' of task 'mnli'"):
        load_split("mnli", "tset", tmp_path)
    with pytest.raises(ValueError, match=r"does not hold 'mnli': .*with the files train, .*Found: dev_matched.tsv"):
        load_split("mnli", "train", tmp_path)


def test_torn_rows_of_a_test_split_are_refused(tmp_path):
    put(tmp_path, test_tsv="id\tquestion1\tquestion2\n0\ta\tb\n1\tc\n")
    with pytest.raises(ValueError, match=r"test.tsv: line 3 has 2 fields, the header has 3"):
        load_split("qqp", "test", tmp_path)


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_archive(tmp_path, name):
    folder, header, rows, first, labels = OFFICIAL[name]
    dev = "dev_matched_tsv" if name == "mnli" else "dev_tsv"
    put(tmp_path / folder, train_tsv=header + rows, **{dev: header + rows})
    data = load_task(name, tmp_path)
    for split in ("train", TASKS[name].splits[0]):
        assert data[split][TASKS[name].texts[0]][:] == first
        assert data[split]["label"][:] == labels
        assert data[split].column_names == list(TASKS[name].columns)


def test_the_torn_rows_of_qqp_are_left_out_with_a_warning(tmp_path):
    _, header, rows, first, _ = OFFICIAL["qqp"]
    torn = '7\t8\t9\tWas he a real figure? "\n"\tWhat is the evidence?\t0\n'
    put(tmp_path, train_tsv=header + torn + rows, dev_tsv=header + rows)
    with pytest.warns(UserWarning, match=r"train.tsv: 2 rows of the wrong width are left out"):
        data = load_task("qqp", tmp_path)
    assert data["train"]["question1"][:] == first


# --- where data come from -----------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["rte", "glue/rte", "glue/RTE"])
def test_the_environment_names_a_directory(tmp_path, monkeypatch, place):
    put(tmp_path / place, train_tsv=texts_of("tsv"), dev_tsv=texts_of("tsv"))
    monkeypatch.setenv("RESFORMER_DATA", str(tmp_path))
    assert load_task("rte")["train"].to_dict() == PAIRS
    with pytest.raises(ValueError, match=r"no data for 'cola', .* and HF_HUB_OFFLINE forbids the hub: give a data dir"):
        load_task("cola")
    same(load_task("sentiment"), generate("sentiment"))  # built-in tasks are generated nevertheless
    monkeypatch.setenv("RESFORMER_DATA", str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=r"RESFORMER_DATA='.*gone' is not a directory"):
        load_task("rte")


def test_a_given_directory_comes_first(tmp_path, monkeypatch):
    put(tmp_path / "env" / "rte", train_tsv=HEADER + "x\ty\t0\n", dev_tsv=HEADER + "x\ty\t0\n")
    put(tmp_path / "given", train_tsv=texts_of("tsv"), dev_tsv=texts_of("tsv"))
    monkeypatch.setenv("RESFORMER_DATA", str(tmp_path / "env"))
    assert load_task("rte", tmp_path / "given")["train"].to_dict() == PAIRS
    assert load_task("rte")["train"]["sentence1"][:] == ["x"]
    put(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"empty does not hold 'rte'.*Found: nothing"):
        load_task("rte", tmp_path / "empty")


def test_the_hub_is_the_last_resort(monkeypatch):
    asked = []

    def hub(path, config, split):
        asked.append((path, config, split))
        return [Dataset.from_dict(PAIRS | {"idx": [0, 1, 2]}) for _ in split]

    monkeypatch.setattr(glue, "load_dataset", hub)
    with pytest.raises(ValueError, match=r"HF_HUB_OFFLINE forbids the hub.*train and validation/dev"):
        load_task("rte")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(ValueError, match="HF_DATASETS_OFFLINE forbids the hub"):
        load_task("rte")
    monkeypatch.delenv("HF_DATASETS_OFFLINE")
    assert load_task("rte")["validation"].to_dict() == PAIRS
    assert asked == [("nyu-mll/glue", "rte", ["train", "validation"])]

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'nyu-mll/glue' on the Hub")

    monkeypatch.setattr(glue, "load_dataset", unreachable)
    with pytest.raises(ValueError, match=r"no data for 'rte': Couldn't reach.*Without the hub, give"):
        load_task("rte")


def test_the_cache_of_datasets_comes_before_the_hub(tmp_path, monkeypatch):
    """Written by `datasets` itself, in the place where a download from the hub goes."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    for split in ("train", "validation"):
        pq.write_table(pa.table(PAIRS), tmp_path / f"{split}.parquet")
    files = {split: [str(tmp_path / f"{split}.parquet")] for split in ("train", "validation")}
    arguments = {"dataset_name": "glue", "config_name": "rte", "data_files": files, "hash": "abc"}
    Parquet(cache_dir=str(tmp_path / "made"), **arguments).download_and_prepare()
    (made,) = (tmp_path / "made").rglob("dataset_info.json")
    (cache / "nyu-mll___glue/rte/0.0.0").mkdir(parents=True)
    made.parent.rename(cache / "nyu-mll___glue/rte/0.0.0/abc")

    said = []
    assert load_task("rte", say=said.append)["train"].to_dict() == PAIRS
    assert said[0].startswith("rte from nyu-mll/glue in the cache of datasets: train 3 rows")
    with pytest.raises(ValueError, match="the cache of datasets does not hold nyu-mll/glue either"):
        load_task("cola")
    with pytest.raises(ValueError, match="the cache of datasets does not hold nyu-mll/glue either"):
        load_split("rte", "test")  # not among the splits that were kept
    (cache / "nyu-mll___glue/rte/0.0.0/abc/glue-train.arrow").unlink()
    with pytest.raises(ValueError, match="forbids the hub"):
        load_task("rte")


def test_where_the_data_are_from_and_how_many_is_said(tmp_path):
    said = []
    put(tmp_path / "rte", train_tsv=texts_of("tsv"), dev_tsv=HEADER + "a\tb\t0\n" * 277)
    load_task("rte", tmp_path, say=said.append)
    load_task("sentiment", say=said.append)
    assert said == [
        f"rte from {tmp_path / 'rte'}: train 3 rows (the official data have 2,490), validation 277 rows",
        "sentiment from its grammar with seed 0: train 8,000 rows, validation 1,000 rows",
    ]


def test_every_task_has_its_official_counts():
    """Those of nyu-mll/glue, and of SNLI without the examples on which nobody agreed; train, validation, test."""
    assert set(layouts.OFFICIAL) == {name for name, task in TASKS.items() if not task.builtin}
    for name, known in layouts.OFFICIAL.items():
        assert list(known.rows) == ["train", *TASKS[name].splits, *TASKS[name].tests]
    assert {name: tuple(known.rows.values()) for name, known in layouts.OFFICIAL.items()} == {
        "cola": (8_551, 1_043, 1_063),
        "sst2": (67_349, 872, 1_821),
        "mrpc": (3_668, 408, 1_725),
        "stsb": (5_749, 1_500, 1_379),
        "qqp": (363_846, 40_430, 390_965),
        "mnli": (392_702, 9_815, 9_832, 9_796, 9_847),
        "qnli": (104_743, 5_463, 5_463),
        "rte": (2_490, 277, 3_000),
        "wnli": (635, 71, 146),
        "snli": (549_367, 9_842, 9_824),
    }


def test_local_files_leave_no_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    put(tmp_path / "rte", train_tsv=texts_of("tsv"), dev_tsv=texts_of("tsv"))
    assert load_task("rte", tmp_path)["train"].cache_files == []
    assert not (tmp_path / "cache").exists()


# --- bad input ----------------------------------------------------------------------------------------


def refused(folder, message, name="rte", **files):
    put(folder, dev_tsv=HEADER + "a\tb\t0\n", **files)
    with pytest.raises(ValueError, match=message):
        load_task(name, folder)


def test_unknown_tasks_and_places():
    with pytest.raises(ValueError, match=r"unknown task 'mprc'. Did you mean 'mrpc'"):
        load_task("mprc")
    with pytest.raises(
        ValueError, match=r"data directory 'no/such' is not a directory; give .* train and validation/dev"
    ):
        load_task("mrpc", "no/such")


def test_missing_and_double_splits(tmp_path):
    put(tmp_path / "a", train_tsv=texts_of("tsv"), test_tsv="x")
    with pytest.raises(ValueError, match=r"does not hold 'rte'.*Found: test.tsv, train.tsv"):
        load_task("rte", tmp_path / "a")
    put(tmp_path / "a", dev_tsv=texts_of("tsv"), validation_csv=texts_of("csv"))
    with pytest.raises(ValueError, match=r"the split 'validation' more than once: dev.tsv, validation.csv; keep one"):
        load_task("rte", tmp_path / "a")


def test_missing_columns(tmp_path):
    refused(
        tmp_path,
        r"train.tsv lacks the columns sentence2, label; 'rte' needs sentence1, sentence2, label; found sentence1, y",
        train_tsv="sentence1\ty\na\t1\n",
    )
    refused(
        tmp_path / "cola", r"lacks the column sentence;.*found text, label", "cola", train_tsv="text\tlabel\na\t1\n"
    )


def test_labels_outside_the_task(tmp_path):
    refused(
        tmp_path,
        r"train.tsv, line 3: label '2' is none of 'rte'; it has 0 or 'entailment', 1 or 'not_entailment'",
        train_tsv=HEADER + "a\tb\t1\na\tb\t2\n",
    )
    refused(tmp_path, "line 2: label '-1' .-1 marks the unlabelled test split.", train_tsv=HEADER + "a\tb\t-1\n")
    refused(tmp_path, "train.tsv, line 2: label 'maybe'", train_tsv=HEADER + "a\tb\tmaybe\n")
    refused(tmp_path / "stsb", "label 'nan' .*scores from 0 to 5", "stsb", train_tsv=HEADER + "a\tb\tnan\n")
    refused(tmp_path / "high", "label '5.5' is none", "stsb", train_tsv=HEADER + "a\tb\t5.5\n")
    row = '{"sentence1": "a", "sentence2": "b", "label": [1]}\n'
    refused(tmp_path / "list", r"train.jsonl, line 1: label \[1\]", train_jsonl=row)


def test_empty_files(tmp_path):
    refused(tmp_path, "train.tsv is empty", train_tsv="")
    refused(tmp_path, "train.tsv has no rows", train_tsv=HEADER)
    refused(tmp_path / "parquet", "train.parquet is empty", train_parquet="")
    pq.write_table(
        pa.table({name: values[:0] for name, values in PAIRS.items()}), tmp_path / "parquet" / "train.parquet"
    )
    with pytest.raises(ValueError, match=r"train.parquet has no rows"):
        load_task("rte", tmp_path / "parquet")


def test_files_cut_off(tmp_path):
    write_task("sentiment", tmp_path / "p")
    path = tmp_path / "p" / "train.parquet"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"cannot read .*train.parquet: .*; is the file complete"):
        load_task("sentiment", tmp_path / "p")
    row = '{"sentence1": "a", "sentence2": "b", "label": 1}\n'
    refused(tmp_path / "j", "cannot read .*train.jsonl: line 2 is not JSON", train_jsonl=row + row[:20])
    refused(tmp_path / "array", "line 1 is a list; JSON lines have one object a line", train_json=f"[{row.strip()}]")
    refused(tmp_path / "t", "train.tsv: line 3 has 2 fields, the header has 3", train_tsv=HEADER + "a\tb\t1\na\tb")


def test_texts_that_are_none(tmp_path):
    pq.write_table(pa.table(PAIRS | {"sentence2": ["a", None, "c"]}), tmp_path / "train.parquet")
    pq.write_table(pa.table(PAIRS), tmp_path / "validation.parquet")
    with pytest.raises(ValueError, match=r"train.parquet, row 2: 'sentence2' is None, not a text"):
        load_task("rte", tmp_path)
    refused(
        tmp_path / "j",
        "line 1: 'sentence1' is 5, not a text",
        train_jsonl='{"sentence1": 5, "sentence2": "", "label": 1}',
    )


def test_text_in_another_encoding(tmp_path):
    put(tmp_path, train_tsv=HEADER, dev_tsv=HEADER)
    (tmp_path / "train.tsv").write_bytes(HEADER.encode() + "café\tb\t1\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"cannot read .*train.tsv: line 2 is not UTF-8"):
        load_task("rte", tmp_path)


# --- real data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rows"),
    {"cola": (8551, 1043), "mrpc": (3668, 408), "rte": (2490, 277), "stsb": (5749, 1500)}.items(),
)
def test_real_glue(tmp_path, name, rows):
    folder = next((place / name for place in (REAL, REAL / "glue") if (place / name).is_dir()), None)
    if folder is None:
        pytest.skip(f"no {name} in {REAL}; set RESFORMER_DATA")
    data = load_task(name, folder)
    assert tuple(map(len, data.values())) == rows
    write_task(name, tmp_path / "out", format="tsv", data=folder)
    same(load_task(name, tmp_path / "out"), data)
