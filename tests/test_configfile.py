"""Options from a TOML file: command line before file before default."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import pytest
import typer

from resformer import cli
from resformer.configfile import Config, read_options
from resformer.study.file import KINDS, TABLE


def command(
    task: Annotated[str, typer.Option()],
    output: Annotated[Path, typer.Option()],
    depths: Annotated[list[int], typer.Option()],
    rates: list[float] | None = None,
    steps: int | None = None,
    clip: float = 1.0,
    save_model: bool = True,
    source: Annotated[str, typer.Option("--data")] = "none",
    config: Config = None,
) -> None:
    seen.update(locals())


seen: dict = {}


@pytest.fixture
def main(capsys):
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(command)

    def run(*arguments) -> dict | str:
        seen.clear()
        try:
            app([str(argument) for argument in arguments], standalone_mode=True)
        except ValueError as error:
            return str(error)
        except SystemExit as stop:
            out, err = capsys.readouterr()
            return dict(seen) if stop.code == 0 else out + err
        raise AssertionError("typer ends the process")

    return run


def write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text)
    return path


FULL = """
# a run
task = "cola"
output = "out/a"
depths = [2, 8]
rates = [1, 3e-4]
steps = 7
clip = 2
save-model = false
data = "folder"
"""


def test_file_before_default(main, tmp_path):
    path = write(tmp_path, FULL)
    found = main("--config", path)
    assert found == {
        "task": "cola", "output": Path("out/a"), "depths": [2, 8], "rates": [1.0, 3e-4], "steps": 7, "clip": 2.0,
        "save_model": False, "source": "folder", "config": path,
    }  # fmt: skip
    assert isinstance(found["clip"], float)
    few = main("--config", write(tmp_path, 'task = "cola"\noutput = "a"\ndepths = [1]'))
    assert (few["rates"], few["steps"], few["clip"], few["save_model"], few["source"]) == (
        None,
        None,
        1.0,
        True,
        "none",
    )


def test_command_line_before_file(main, tmp_path):
    path = write(tmp_path, FULL)
    given = ("--task", "rte", "--depths", 4, "--steps", 9, "--save-model", "--data", "other", "--clip", "1.0")
    for arguments in ((*given, "--config", path), ("--config", path, *given)):
        found = main(*arguments)
        assert (found["task"], found["steps"], found["save_model"], found["source"]) == ("rte", 9, True, "other")
        assert found["depths"] == [4], "a list takes the place of the file's"
        assert found["clip"] == 1.0, "also where it is the default"
        assert found["rates"] == [1.0, 3e-4]


def test_underscores(main, tmp_path):
    assert main("--config", write(tmp_path, FULL.replace("save-model", "save_model")))["save_model"] is False


def test_what_is_missing_in_both_is_asked_for(main, tmp_path):
    assert "Missing option '--depths'" in main(
        "--config", write(tmp_path, FULL.replace("depths", "rates", 1).replace("\nrates = [1, 3e-4]", ""))
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stps = 3", "unknown option 'stps' of {path}, line 1. Did you mean 'steps'"),
        ('task = "a"\n\n  save_modl = true', "unknown option 'save-modl' of {path}, line 3. Did you mean 'save-model'"),
        ("source = 3", "unknown option 'source' of {path}, line 1"),
        ('config = "b.toml"', "unknown option 'config'"),
        ("help = true", "unknown option 'help'"),
        ("[finetune]\nsteps = 3", "unknown option 'finetune' of {path}, line 1"),
        ("save-model = true\nsave_model = true", "option 'save-model' is twice in {path}, line 2"),
        ('steps = "3"', "option 'steps' of {path}, line 1 must be a whole number, got '3'"),
        ("steps = 3.0", "must be a whole number, got 3.0"),
        ("steps = true", "must be a whole number, got True"),
        ('clip = "1"', "option 'clip' of {path}, line 1 must be a number, got '1'"),
        ("clip = false", "must be a number, got False"),
        ("save-model = 1", "must be true or false, got 1"),
        ("output = 3", "must be text, got 3"),
        ("task = 1979-05-27", "must be text, got datetime.date"),
        ("depths = 2", "option 'depths' of {path}, line 1 must be a list, each of it a whole number, got 2"),
        ("depths = [2, 2.5]", "must be a list, each of it a whole number, got [2, 2.5]"),
        ("depths = []", "must be a list"),
        ('rates = ["a"]', "must be a list, each of it a number"),
        ("steps = [1]", "must be a whole number, got [1]"),
        ("clip.a = 1", "option 'clip' of {path}, line 1 must be a number"),
        ("steps = ", "{path!r} is no TOML file: Invalid value"),
        ("steps = 1\nsteps = 2", "is no TOML file: Cannot overwrite a value"),
    ],
)  # fmt: skip
def test_bad_input(main, tmp_path, text, message):
    path = write(tmp_path, text)
    assert message.format(path=str(path)).replace("{path!r}", repr(str(path))) in main("--config", path)


def test_files_that_cannot_be_read(main, tmp_path):
    (tmp_path / "latin.toml").write_bytes("task = 'é'".encode("latin-1"))
    assert "is no UTF-8 text (byte 8)" in main("--config", tmp_path / "latin.toml")
    with pytest.raises(FileNotFoundError):
        main("--config", tmp_path / "absent.toml")


# --------------------------------------------------------------------------------------------- the real commands


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    return stop.value.code


def test_compare(monkeypatch, tmp_path):
    studies = []
    path = write(
        tmp_path,
        'schemes = ["rezero", "plain"]\ndepths = [1, 2]\ntasks = ["agreement"]\nlearning-rates = [1e-3]\nwidth = 16\n'
        "heads = 2\ncontrols = false",
    )
    tally = SimpleNamespace(finished=0, skipped=0, elsewhere=0, waiting=0, failed={})
    monkeypatch.setattr("resformer.study.execute.execute", lambda study, *_, **__: studies.append(study) or tally)
    monkeypatch.setattr("resformer.cli.studies.report", lambda output: None)
    given = ("--depths", 4, 3, "--seeds", 2, "--output", tmp_path / "out")
    assert run("compare", path, *given) == 0
    (study,) = studies
    assert (study.schemes, study.depths, study.learning_rates) == (("rezero", "plain"), (4, 3), (1e-3,))
    assert (study.settings.width, study.settings.heads, study.seeds) == (16, 2, 2)


def test_every_option_of_a_study_can_be_in_its_file():
    command = typer.main.get_command(cli.app).commands["compare"]
    machine = {"output", "study", "workers", "executor", "address", "shard", "dry_run", "help"}
    assert {parameter.name for parameter in command.params} - machine == KINDS.keys() - {TABLE}


def test_errors_are_one_message(capsys, tmp_path):
    assert run("finetune", "--config", write(tmp_path, "batch_siz = 3")) == 2
    assert "resformer: unknown option 'batch-siz'" in capsys.readouterr().err
    assert run("finetune", "--config", tmp_path / "absent.toml") == 2
    assert "No such file" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["finetune", "pretrain"])
def test_every_option_can_be_in_a_file(tmp_path, name):
    """Whatever is added to a command has a type that the file can hold."""
    found = typer.main.get_command(cli.app).commands[name]
    for parameter in found.params:
        if parameter.name in ("config", "help"):
            continue
        option = next(text for text in parameter.opts if text.startswith("--")).removeprefix("--")
        tried = []
        for value in (3, 0.5, True, "a", [1], [0.5], ["a"]):
            try:
                tried.append(read_options(write(tmp_path, f"{option} = {json.dumps(value)}"), found)[parameter.name])
            except ValueError:
                continue
        assert tried, option
