"""The README's blocks are run, in order, in one folder; those that need the hub or minutes are marked and are not."""

import csv
import re
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev

import pytest
from scipy.stats import t

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"(<!-- not run: [a-z ]+ -->\n)?```(python|bash)\n(.*?)```", re.DOTALL)


def blocks(language: str) -> list[str]:
    return [body for skipped, kind, body in BLOCK.findall(README.read_text()) if kind == language and not skipped]


def test_python_blocks_run_in_order(tmp_path):
    first, *rest = blocks("python")
    assert first == 'resformer.patch(model, "highway")\n', "the first block is the one line of the introduction"
    script = tmp_path / "readme.py"
    script.write_text("\n".join(rest))
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "x ← N(2 (T ⊙ F(x) + (1 - T) ⊙ x))" in done.stdout
    assert "bit-equal to the host" in done.stdout


COMMANDS = [
    line.partition(" #")[0].strip()
    for block in blocks("bash")
    for line in block.splitlines()
    if line[:10] == "resformer "
]


def test_command_blocks_run(tmp_path, monkeypatch):
    from resformer import cli

    monkeypatch.chdir(tmp_path)
    assert len(COMMANDS) >= 6
    for command in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            cli.main(shlex.split(command)[1:])
        assert not stop.value.code, command
    assert (tmp_path / "out/small/report.html").is_file()


def test_table_of_schemes_is_the_registry():
    from resformer.listing import schemes_markdown

    text = README.read_text()
    inside = text.partition("<!-- schemes -->\n")[2].partition("<!-- /schemes -->")[0]
    assert inside.strip() == schemes_markdown(), "run `resformer schemes --markdown` and put its output there"


@pytest.mark.parametrize("name", re.findall(r"^  ([a-z_]+\.py|[a-z]+/) ", README.read_text(), re.MULTILINE))
def test_annotated_tree_names_what_is_there(name):
    assert (README.parent / "resformer" / name).exists()


def test_numbers_of_the_recorded_study_are_its_own():
    study = README.parent / "scripts" / "studies" / "depth_x_scheme"
    with (study / "results.csv").open(newline="") as file:
        runs = [row for row in csv.DictReader(file) if row["depth"] == "24" and row["tuning"] == "False"]
    losses = {(row["arm"], row["task"], int(row["seed"])): float(row["train_loss"]) for row in runs}
    assert len(losses) == 60

    def shown(values, signed=""):
        half = t.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5
        return f"{fmean(values):{signed}.3f} ± {half:.3f}".replace("-", "−")

    for arm in {arm for arm, _, _ in losses}:
        cells = []
        for task in ("sst2", "mnli"):
            seeds = range(3)
            cells.append(shown([losses[arm, task, seed] for seed in seeds]))
            minus = [losses[arm, task, seed] - losses["pre_ln", task, seed] for seed in seeds]
            cells.append("" if arm == "pre_ln" else shown(minus, "+"))
        above = sum(row["learned"] == "True" for row in runs if row["arm"] == arm)
        control = " (control)" * (arm in ("static_mix", "pre_ln + wider ffn"))
        row = f"| {arm}{control} | {' | '.join(cells)} | {above} of 6 |"
        assert re.sub(" +", " ", row) in README.read_text()
