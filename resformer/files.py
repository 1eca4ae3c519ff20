"""Writing a file whole or not at all: a run is finished exactly when its result was put in place."""

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any


def write_json_atomically(path: Path, obj: object) -> None:
    """Write `obj` as indented JSON so that `path` never holds half of it, even when the machine stops.

    Floats are written exactly; NaN and infinities raise `ValueError` (they are not JSON), and then
    whatever `path` held before is untouched. The folder must exist.
    """
    write_text_atomically(path, json.dumps(obj, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def write_text_atomically(path: Path, text: str) -> None:
    """Write `text` as UTF-8, lines ending as they do in it; `path` never holds half of it. The folder must exist."""
    # Beside the target, since a rename is atomic only within one file system.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with open(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def fsync_folder(folder: Path) -> None:
    """Have the names in a folder on disk, as after a rename; without effect where a system does not offer it."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def finite(obj: Any) -> Any:
    """A copy of nested dicts, lists and tuples with every NaN and infinity as None, since JSON has neither."""
    if isinstance(obj, dict):
        return {key: finite(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [finite(value) for value in obj]
    return None if isinstance(obj, float) and not math.isfinite(obj) else obj
