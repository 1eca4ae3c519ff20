"""What a result was made with."""

import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import pytest

import resformer.provenance
from resformer.provenance import provenance

CODE = Path(resformer.provenance.__file__)
ASK = (
    "import pathlib, sys; sys.path[:0] = [{!r}]; from resformer.provenance import provenance; "
    "print(provenance(*map(pathlib.Path, {!r}))[{!r}])"
)


def test_versions_and_time():
    made = provenance()
    assert made["torch"] == metadata.version("torch")
    assert made["python"] == ".".join(map(str, sys.version_info[:3]))
    age = datetime.now(UTC) - datetime.fromisoformat(made["finished"])
    assert 0 <= age.total_seconds() < 60


def test_it_needs_no_torch():
    check = "import sys; import resformer.provenance, resformer.files; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_commit_and_changes_are_those_of_the_code(tmp_path):
    package = tmp_path / "resformer"
    package.mkdir()
    for name in ("__init__.py", "provenance.py"):
        shutil.copy(CODE.parent / name, package)

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def said(key, *folders):
        code = ASK.format(str(tmp_path), [str(tmp_path / name) for name in folders], key)
        command = [sys.executable, "-B", "-c", code]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert said("git") == "None"
    git("init", "-q")
    (tmp_path / "other.txt").write_text("a")
    git("add", "other.txt")
    git("commit", "-qm", "other")
    assert said("git") == "None"  # a repository of somebody else
    git("add", "resformer")
    git("commit", "-qm", "code")
    assert said("git") == git("rev-parse", "HEAD")
    (tmp_path / "other.txt").write_text("b")
    assert said("dirty") == "False"
    assert said("dirty", "other.txt") == "True"  # as of another folder whose code takes part
    (package / "new.py").write_text("")
    assert said("dirty") == "True"
