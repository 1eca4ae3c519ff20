"""The study file that is kept in a study's folder asks for the same study."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from study_folders import study

from resformer.cli.studies import _command
from resformer.study.file import read_study
from resformer.study.kept import as_toml, file_name, keep
from resformer.study.plan import Facts
from resformer.study.pretraining import Pretraining
from resformer.study.settings import Settings

PLAIN = study(("plain", "exclusive_gate:bias=-1.5,placement=pre"), (1, 2), 2)


@pytest.mark.parametrize(
    "asked",
    [
        replace(PLAIN, settings=Settings(width=16, epochs=1e-05, data='C:\\new "data"/ü')),
        replace(PLAIN, pretraining=Pretraining(("a.txt", "b*.txt"), steps=7), learning_rates=(1e-5, 1e16)),
        replace(PLAIN, controls=True, endpoint="train_loss", baseline="plain", weight_inits=("bert", "xavier")),
    ],
)
def test_what_is_kept_asks_for_the_same(tmp_path, monkeypatch, asked):
    monkeypatch.setattr("resformer.study.file.resolve", lambda study, say: study)
    keep(tmp_path, as_toml(replace(asked, facts=Facts(data={"sentiment": "0" * 64}))))
    (path,) = tmp_path.glob("study-*.toml")
    assert read_study(path) == asked


def test_studies_of_a_folder_have_a_file_each_and_one_that_goes_on_the_same(tmp_path):
    for asked in (PLAIN, replace(PLAIN, seeds=3), PLAIN):
        keep(tmp_path, as_toml(asked))
    assert {path.name for path in tmp_path.iterdir()} == {
        file_name(as_toml(PLAIN)), file_name(as_toml(replace(PLAIN, seeds=3))),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("typed", "given", "recorded"),
    [
        (
            "compare ./a.toml --seeds 2 --output out",
            "a.toml",
            "resformer compare 'out/study 1.toml' --seeds 2 --output out",
        ),
        ("compare --tasks sentiment --output out", None, "resformer compare --tasks sentiment --output out"),
    ],
)
def test_the_command_that_is_recorded_reads_the_file_that_is_kept(tmp_path, monkeypatch, typed, given, recorded):
    monkeypatch.setattr(sys, "argv", ["resformer", *typed.split()])
    assert _command(given and Path(given), Path("out/study 1.toml")) == recorded
