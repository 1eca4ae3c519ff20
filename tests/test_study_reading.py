"""Which runs a report is about."""

import json
import shutil
from dataclasses import replace

import pytest
from study_folders import FULL, diverged, ended, full, planned, put, study, write_study

from resformer.study.document import study_document
from resformer.study.plan import TUNING_SEED, Facts
from resformer.study.pretraining import Pretraining
from resformer.study.reading import read_runs
from resformer.study.settings import Settings

TWO_RATES = study(("pre_ln", "rezero"), (2,), 2, learning_rates=(1e-3, 1e-2))


def best_at(rate, score=0.8):
    return lambda run: ended(run, score if run.learning_rate == rate else score - 0.1)


def test_runs_at_the_chosen_rate_are_reported_and_tuning_runs_never(tmp_path):
    path = write_study(tmp_path / "runs", TWO_RATES, outcome=best_at(1e-2))
    found = read_runs(path)
    assert {run.config["learning_rate"] for run in found.runs} == {1e-2}
    assert [run.config["seed"] for run in found.runs] == [0, 0, 1, 1]
    assert len(found.tuning) == 4
    assert {run.config["seed"] for run in found.tuning} == {TUNING_SEED}
    document = study_document(path)
    assert {row["tuning"] for setting in document["settings"] for row in setting["runs"]} == {False}
    assert document["coverage"]["tuning"] == {"planned": 4, "finished": 4}


def test_rates_that_are_no_longer_chosen_are_counted_and_not_shown(tmp_path):
    path = write_study(tmp_path / "runs", TWO_RATES, outcome=best_at(1e-2))
    run = planned(path, TWO_RATES)[0]
    put(path, replace(run, learning_rate=1e-3), ended(run, 0.99))
    document = study_document(path)
    assert document["coverage"]["other_rates"] == 1
    assert "1 finished run at learning rates that are not the ones chosen now are not shown." in document["caveats"]
    assert all(row["score"] == 0.8 for setting in document["settings"] for row in setting["runs"])


def test_a_rate_that_is_not_chosen_yet_leaves_its_runs_planned(tmp_path):
    def half(run):
        return None if run.learning_rate == 1e-3 and run.condition.scheme == "rezero" else best_at(1e-2)(run)

    path = write_study(tmp_path / "runs", TWO_RATES, outcome=half)
    document = study_document(path)
    assert document["coverage"] | {"tuning": None, "encoders": None} == {
        "planned": 4, "finished": 2, "diverged": 0, "failed": 0, "missing": 2, "not_counted": 0, "tuning": None,
        "encoders": None, "other_rates": 0, "replaced": 0,
    }  # fmt: skip
    assert "The learning rate is not chosen yet in 1 cell of 2." in document["caveats"]


def test_where_every_rate_diverged_the_smallest_was_run(tmp_path):
    path = write_study(tmp_path / "runs", TWO_RATES, outcome=lambda r: diverged(r) if r.tuning else ended(r, 0.6))
    document = study_document(path)
    text = (
        "Every learning rate diverged in tuning, and the smallest was run, in pre_ln at depth 2 and rezero at depth 2."
    )
    assert text in document["caveats"]
    assert document["coverage"]["finished"] == 4


def test_result_files_alone_report_the_same(tmp_path):
    path = write_study(tmp_path / "runs", FULL, outcome=full)
    for result in path.glob("runs/*/result.json"):
        kept = tmp_path / "committed" / "runs" / result.parent.name
        kept.mkdir(parents=True)
        shutil.copy(result, kept)
    shutil.copy(path / "study.json", tmp_path / "committed")
    assert study_document(tmp_path / "committed") == study_document(path)


def test_a_later_study_overrides_the_same_condition_and_seed(tmp_path):
    longer = study(("rezero",), (2,), 1, settings=Settings(width=32, steps=200, warmup=0.0))
    early = study(("pre_ln", "rezero"), (2,), 1)
    path = write_study(
        tmp_path / "runs", early, longer, outcome=lambda run: ended(run, 0.7 if run.settings.steps == 200 else 0.6)
    )
    found = read_runs(path)
    assert {(run.config["scheme"], run.config["steps"], run.score) for run in found.runs} == {
        ("pre_ln", 100, 0.6),
        ("rezero", 200, 0.7),
    }
    assert found.replaced == 1
    # runs of different length are never averaged, nor compared
    document = study_document(path)
    assert [setting["differs"] for setting in document["settings"]] == [{"steps": 100}, {"steps": 200}]
    assert any("studies of this folder plan no more" in text for text in document["caveats"])


def test_the_units_of_the_wider_control_may_change(tmp_path):
    wide = [study(("pre_ln",), (2,), controls=True, facts=Facts(wider={"2": units})) for units in (4, 8)]
    path = write_study(tmp_path / "runs", *wide, outcome=lambda run: ended(run, 0.6))
    assert sorted(run.config["extra_ffn"] for run in read_runs(path).runs) == [0, 8]


def test_a_study_that_grew_is_one(tmp_path):
    grown = [study(("pre_ln", "rezero"), (2, 8), 2), study(("pre_ln", "rezero"), (32,), 1)]
    path = write_study(tmp_path / "runs", *grown, outcome=lambda run: ended(run, 0.6))
    (setting,) = study_document(path)["settings"]
    assert setting["depths"] == [2, 8, 32]
    assert [cell["planned"] for cell in setting["cells"]] == [2, 2, 1] * 2


def test_weight_initialisations_are_settings_and_learning_rates_are_not(tmp_path):
    both = study(("pre_ln", "rezero"), (2, 8), weight_inits=("xavier", "bert"), learning_rates=(1e-3, 1e-2))

    def outcome(run):
        rate = 1e-3 if run.condition.scheme == "rezero" else 1e-2
        return best_at(rate)(run)

    document = study_document(write_study(tmp_path / "runs", both, outcome=outcome))
    assert [setting["differs"] for setting in document["settings"]] == [
        {"weight_init": "bert"},
        {"weight_init": "xavier"},
    ]
    first = document["settings"][0]
    assert first["where"].startswith("At the learning rate of each cell (1e-3 to 0.01)")
    assert [grid["chosen"] for grid in first["learning_rates"]] == [1e-2, 1e-2, 1e-3, 1e-3]
    assert document["across"] == []  # initialisations are not tasks


PRETRAINED = study(("pre_ln", "rezero"), (2,), 3, pretraining=Pretraining(corpus=("text.txt",), seeds=1))


def test_what_few_encoders_leave_open_is_said(tmp_path):
    path = write_study(tmp_path / "runs", PRETRAINED, outcome=lambda run: ended(run, 0.7))
    document = study_document(path)
    assert document["coverage"]["encoders"] == {"planned": 2, "finished": 0}
    (setting,) = document["settings"]  # though each cell has an encoder of its own
    assert "a net of width 32 (bert) pre-trained for each cell" in setting["where"]
    assert any("1 encoder for each arm and depth and 3 seeds of fine-tuning" in text for text in document["caveats"])


def test_encoders_are_counted(tmp_path):
    path = write_study(tmp_path / "runs", PRETRAINED, outcome=lambda run: ended(run, 0.7))
    for encoder in PRETRAINED.encoders():
        directory = path / "runs" / encoder.id
        directory.mkdir()
        content = {"version": 1, "config": encoder.config, "status": "ok", "score": 2.0, "train_loss": 2.0}
        (directory / "result.json").write_text(json.dumps(content))
    document = study_document(path)
    assert document["coverage"]["encoders"] == {"planned": 2, "finished": 2}
    assert document["coverage"]["replaced"] == 0


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda text: text[: len(text) // 2], "result.json cannot be read"),
        (lambda text: text.replace('"version": 1', '"version": 9'), "has version 9"),
        (lambda text: text.replace('"scheme": "pre_ln"', '"scheme": "plain"'), "is of another run"),
    ],
)
def test_what_is_damaged_or_foreign_is_named_and_not_counted(tmp_path, damage, says):
    one = study(("pre_ln",), (2,), 2)
    path = write_study(tmp_path / "runs", one, outcome=lambda run: ended(run, 0.7))
    broken = path / "runs" / planned(path, one)[0].id / "result.json"
    broken.write_text(damage(broken.read_text()))
    document = study_document(path)
    assert (document["coverage"]["finished"], document["coverage"]["not_counted"]) == (1, 1)
    (failure,) = document["settings"][0]["failures"]
    assert failure["what"] == "not counted"
    assert says in failure["detail"]
    assert "1 result file could not be read or belong elsewhere, and are not counted." in document["caveats"]


def test_a_folder_without_a_study_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no study"):
        read_runs(tmp_path)
    (tmp_path / "study.json").write_text('{"version": 1, "studies": []}')
    with pytest.raises(ValueError, match=r"lists no studies in study\.json"):
        read_runs(tmp_path)


def test_a_study_of_another_version_is_refused(tmp_path):
    path = write_study(tmp_path / "runs", TWO_RATES, outcome=lambda run: None)
    content = json.loads((path / "study.json").read_text())
    del content["studies"][0]["study"]["facts"]
    (path / "study.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="written by another version of resformer"):
        read_runs(path)
