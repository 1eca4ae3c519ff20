"""Which runs a report is about."""

import json
import shutil
from dataclasses import replace

import pytest
from study_folders import FULL, SHORT, diverged, ended, full, planned, put, study, write_study

from resformer.study.document import study_document
from resformer.study.plan import TUNING_SEED, Facts
from resformer.study.pretraining import Pretraining
from resformer.study.reading import read_runs

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
    assert "1 finished run at learning rates that are not the ones chosen now is not shown." in document["caveats"]
    assert all(row["score"] == 0.8 for setting in document["settings"] for row in setting["runs"])


def test_a_rate_that_is_not_chosen_yet_leaves_its_runs_planned(tmp_path):
    def half(run):
        return None if run.learning_rate == 1e-3 and run.condition.scheme == "rezero" else best_at(1e-2)(run)

    path = write_study(tmp_path / "runs", TWO_RATES, outcome=half)
    document = study_document(path)
    assert document["coverage"] | {"tuning": None, "encoders": None} == {
        "planned": 4, "finished": 2, "diverged": 0, "failed": 0, "missing": 2, "under_way": 0, "not_counted": [],
        "moved": [], "tuning": None, "encoders": None, "other_rates": 0, "unplanned": 0,
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


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({"settings": replace(SHORT, steps=200)}, [{"steps": 100}, {"steps": 200}]),
        ({"settings": replace(SHORT, width=64)}, [{"width": 32}, {"width": 64}]),
        ({"settings": replace(SHORT, family="roberta")}, [{"family": "bert"}, {"family": "roberta"}]),
        ({"settings": replace(SHORT, clip=0.0)}, [{"clip": 0.0}, {"clip": 1.0}]),
        (
            {"settings": replace(SHORT, model="hub/mini"), "facts": Facts(model="0123456789")},
            [{"model": "01234567"}, {"model": None}],
        ),
        (
            {"pretraining": Pretraining(corpus=("text.txt",), vocabulary=4096)},
            [
                {"pretraining": "2000 steps of 32 x 128 tokens of corpus None, learning rate 0.001, vocabulary 4096"},
                {"pretraining": None},
            ],
        ),
        ({"facts": Facts(data={"sentiment": "9876543210"})}, [{"rows": "98765432"}, {"rows": None}]),
    ],
)
def test_studies_under_different_conditions_stand_side_by_side(tmp_path, changes, differs):
    """Neither takes the place of the other, seed by seed, nor its learning rates."""
    rates = (1e-3, 1e-2)
    one = study(("pre_ln", "rezero"), (2,), 3, learning_rates=rates)
    other = study(("rezero", "pre_ln"), (2,), 2, learning_rates=rates, **changes)

    def outcome(run):
        return best_at(1e-2 if replace(run, learning_rate=None).id in later else 1e-3)(run)

    later = {replace(run, learning_rate=None).id for c in other.conditions() for run in other.tuning(c)}
    document = study_document(write_study(tmp_path / "runs", one, other, outcome=outcome))
    found = document["settings"]
    assert [setting["differs"] for setting in found] == differs
    assert document["coverage"]["finished"] == 10
    assert document["coverage"]["unplanned"] == document["coverage"]["other_rates"] == 0
    assert sorted([cell["finished"] for cell in setting["cells"]] for setting in found) == [[2, 2], [3, 3]]
    chosen = [{grid["chosen"] for grid in setting["learning_rates"]} for setting in found]
    assert sorted(chosen, key=str) == [{1e-3}, {1e-2}]


def test_what_goes_with_a_checkpoint_is_named_by_its_name(tmp_path):
    mini = replace(SHORT, model="hub/mini")
    patched = study(("pre_ln",), (2,), settings=mini, facts=Facts(model="0123456789"))
    fresh = study(("pre_ln",), (2,))
    wide = study(("pre_ln",), (2,), settings=replace(SHORT, width=64))
    path = write_study(tmp_path / "runs", fresh, wide, patched, outcome=lambda run: ended(run, 0.6))
    titles = [setting["title"] for setting in study_document(path)["settings"]]
    assert titles == [
        "sentiment, fresh weights, width 32", "sentiment, fresh weights, width 64", "sentiment, model mini (01234567)",
    ]  # fmt: skip


MATCHED = study(
    ("pre_ln", "rezero"),
    (6, 12),
    settings=replace(SHORT, match_parameters="12x64"),
    facts=Facts(widths={"6": 64, "12": 64}),
)


def test_matched_widths_are_no_settings_and_are_said_with_how_near_they_come(tmp_path):
    """A study beside it, whose width varies too, must not make them so."""
    fixed = study(("pre_ln", "rezero"), (6, 12), settings=replace(SHORT, width=64))
    narrow = study(("pre_ln", "rezero"), (6, 12))
    path = write_study(tmp_path / "runs", MATCHED, fixed, narrow, outcome=lambda run: ended(run, 0.6))
    document = study_document(path)
    assert [setting["title"] for setting in document["settings"]] == [
        "sentiment, match parameters 12x64", "sentiment, width 32", "sentiment, width 64",
    ]  # fmt: skip
    assert [setting["depths"] for setting in document["settings"]] == [[6, 12]] * 3
    assert document["coverage"]["planned"] == 8, "runs that two studies share are counted once"
    assert (
        "Widths follow from match_parameters 12x64: 64 at depth 6 (−50.0%) and 64 at depth 12 (+0.0%); in parentheses "
        "how far the parameters of the layers are from that. A change with depth can come from either."
    ) in document["caveats"]


def test_a_cell_that_is_run_in_another_way_is_taken_over_whole(tmp_path):
    """The control has other units now: its seeds of before are no more of it, also those that are not run again."""
    of = [study(("pre_ln",), (2,), seeds, controls=True, facts=Facts(wider={"2": units}))
          for seeds, units in ((3, 4), (2, 8))]  # fmt: skip
    path = write_study(tmp_path / "runs", *of, outcome=lambda run: ended(run, 0.6))
    assert sorted(run.config["extra_ffn"] for run in read_runs(path).runs) == [0, 0, 0, 8, 8]
    (text,) = [text for text in study_document(path)["caveats"] if "not shown" in text]
    assert text.startswith("3 finished runs are not shown: no study of this folder plans them as things stand.")


def test_a_rate_that_a_later_study_gives_takes_the_place_of_the_choice(tmp_path):
    given = study(("pre_ln", "rezero"), (2,), 1, learning_rates=(1e-3,))
    document = study_document(write_study(tmp_path / "runs", TWO_RATES, given, outcome=best_at(1e-2)))
    (setting,) = document["settings"]
    assert {row["learning_rate"] for row in setting["runs"]} == {1e-3}
    assert setting["learning_rates"] == []
    assert document["coverage"]["other_rates"] == 4


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
    assert document["coverage"]["unplanned"] == 0


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
    assert document["coverage"]["finished"] == 1
    (left_out,) = document["coverage"]["not_counted"]
    assert left_out["run"] == broken.parent.name
    assert says in left_out["problem"]
    (failure,) = document["settings"][0]["failures"]
    assert failure["what"] == "not counted"
    assert says in failure["detail"]
    assert "1 result file cannot be read or belongs elsewhere, and is not counted." in document["caveats"]


def test_a_folder_without_a_study_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no study"):
        read_runs(tmp_path)
    (tmp_path / "study.json").write_text('{"version": 1, "studies": []}')
    with pytest.raises(ValueError, match="lists no studies; remove it"):
        read_runs(tmp_path)


def test_a_study_of_another_version_is_refused(tmp_path):
    path = write_study(tmp_path / "runs", TWO_RATES, outcome=lambda run: None)
    content = json.loads((path / "study.json").read_text())
    del content["studies"][0]["study"]["facts"]
    (path / "study.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="of another version of resformer"):
        read_runs(path)
