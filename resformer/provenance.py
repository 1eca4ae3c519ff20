"""What a result was made with: versions, machine, commit, command, time. Needs no torch."""

import functools
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "resformer",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "tokenizers",
    "numpy",
    "scikit-learn",
    "scipy",
)
HERE = Path(__file__).resolve().parent


def provenance(*folders: Path) -> dict[str, Any]:
    """Versions, Python, platform, commit of this package's code, the command line, and the time now (UTC, ISO 8601).

    A package that is not installed has version None. `git` and `dirty` are None unless this package
    is code tracked by git; `dirty` then says whether the package's own files, or those in `folders`, differ from the
    commit.
    """
    commit, dirty = _commit(*folders)
    return {
        **{name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),  # not where it is installed
        "git": commit,
        "dirty": dirty,
        "finished": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@functools.cache  # asked once a process: what matters is the code that was loaded, not what is edited later
def _commit(*folders: Path) -> tuple[str | None, bool | None]:
    # An installed copy can lie inside somebody else's repository, whose commit would be a lie.
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None, None
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--", *map(str, (HERE, *folders)))
    return (None, None) if commit is None or changes is None else (commit, changes != "")


def _git(*arguments: str) -> str | None:
    """The output of a git command run in this package's folder, or None where git or a repository is missing."""
    try:
        done = subprocess.run(
            ["git", "-C", str(HERE), *arguments],
            capture_output=True,
            text=True,
            timeout=30,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},  # read only: never in the way of the user's git
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
