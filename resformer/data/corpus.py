"""Corpora for pre-training: the documents of local files and of data sets on the hub, in a fixed order.

A document is a block of lines between blank lines in .txt, a row in .jsonl (or .json, also one object a line),
.parquet and on the hub. Documents of nothing but white space are left out.
"""

import glob
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import load_dataset
from huggingface_hub import HfApi

from resformer.data.glue import OFFLINE

HUB = re.compile(r"hub:(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[^:]*)(:(?P<split>[^:]+))?)?")
FORM = "hub:OWNER/NAME, hub:OWNER/NAME:CONFIG, hub:OWNER/NAME:CONFIG:SPLIT or hub:OWNER/NAME::SPLIT"
BLOCK = 2**20  # bytes after which a block of a .txt is cut at the end of its line: some files have no blank line
ROWS = 1000  # rows of parquet at a time


@dataclass(frozen=True)
class HubData:
    """One split of a data set on the hub."""

    name: str
    config: str | None
    split: str

    def __str__(self) -> str:
        return f"hub:{self.name}:{self.config or ''}:{self.split}"


@dataclass(frozen=True)
class Corpus:
    """The documents of `parts`; they can be read any number of times, and memory holds only a few at a time."""

    parts: tuple[Path | HubData, ...]
    column: str

    def __iter__(self) -> Iterator[str]:
        for part in self.parts:
            yield from _documents(part, self.column)

    @cached_property
    def fingerprint(self) -> str:
        """A sha256 over the content and kind of the files in their order (not their names), the column, and the
        commits of hub data sets; two corpora with the same one hold the same documents."""
        whole = hashlib.sha256(self.column.encode())
        for part in self.parts:
            if isinstance(part, Path):
                with open(part, "rb") as file:
                    state = f"{part.suffix} {hashlib.file_digest(file, 'sha256').hexdigest()}"
            else:
                state = f"{part} {_commit(part)}"
            whole.update(f"\n{state}".encode())
        return whole.hexdigest()


def read_corpus(sources: Sequence[str] | str, *, column: str = "text") -> Corpus:
    """The documents of all `sources`, in their order, as something to iterate over, also repeatedly.

    sources   each a file (.txt, .jsonl, .json, .parquet), a folder (all such files in and below it), a pattern of
              such, with `*`, `?`, `[]` and `**`, or a data set on the hub: `hub:OWNER/NAME:CONFIG:SPLIT`, where
              CONFIG may be empty, both may be left out, and SPLIT is train by default. Paths of one source are sorted
    column    which holds the text, in all but .txt

    Raises ValueError at once for a source that matches nothing or is given twice, for hub data sets when the
    environment forbids the hub, for an unreadable first document of any file (so for a missing column), and where no
    file has a document; while reading, for text that is not UTF-8 and for malformed rows, with file and line.
    """
    if isinstance(sources, str):
        sources = [sources]
    if not sources:
        raise ValueError(f"no corpus given; give files, folders or patterns, or {FORM}")
    parts = tuple(part for source in map(str, sources) for part in _parts(source))
    names = [str(part) for part in parts]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"the corpus holds {', '.join(twice[:5])} more than once; give each source once")
    # Opening every part now tells of a missing column before hours of work on the parts before it.
    if not any([next(_documents(part, column), None) for part in parts]):
        raise ValueError(f"the corpus is empty: no document in {', '.join(names[:5])}{', ...' * (len(names) > 5)}")
    return Corpus(parts, column)


def _parts(source: str) -> list[Path | HubData]:
    """The files of a source, or the one hub data set."""
    if source.startswith("hub:"):
        if (match := HUB.fullmatch(source)) is None:
            raise ValueError(f"{source!r} is no data set of the hub; it is written {FORM}")
        offline = [name for name in OFFLINE if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")]
        if offline:
            raise ValueError(f"{source!r} is on the hub, and {offline[0]} forbids it; give local files")
        return [HubData(match["name"], match["config"] or None, match["split"] or "train")]
    root = Path(source).expanduser()
    # A path that exists is itself, even with signs of a pattern in its name.
    found = [root] if root.exists() else sorted(map(Path, glob.glob(str(root), recursive=True)))
    if not found:
        raise ValueError(f"corpus {source!r} matches nothing; {_listing(root)}")
    files: list[Path | HubData] = []
    for path in found:
        if path.is_dir():
            files += sorted(file for file in path.rglob("*") if file.suffix in READERS and not _hidden(file, path))
        elif path.suffix in READERS:
            files.append(path)
        else:
            raise ValueError(f"{path} is none of the kinds {', '.join(READERS)}; name the files more exactly")
    if not files:
        raise ValueError(f"corpus {source!r} has no file ending in {', '.join(READERS)}; {_listing(found[0] / '*')}")
    return list(dict.fromkeys(files))  # `**` finds a folder and the files in it


def _hidden(file: Path, root: Path) -> bool:
    return not file.is_file() or any(name.startswith(".") for name in file.relative_to(root).parts)


def _listing(path: Path) -> str:
    """What is in the nearest folder that exists above `path`, for messages."""
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    return f"{folder} holds {', '.join(names[:20]) or 'nothing'}{', ...' * (len(names) > 20)}"


def _documents(part: Path | HubData, column: str) -> Iterator[str]:
    if not isinstance(part, Path):
        return _from_hub(part, column)
    return READERS[part.suffix](part, column)


def _from_txt(path: Path, column: str) -> Iterator[str]:
    block: list[str] = []
    size = 0
    for _, line in _lines(path):
        if line.strip():
            block.append(line)
            size += len(line)
        if block and (not line.strip() or size > BLOCK):
            yield "\n".join(block)
            block, size = [], 0
    if block:
        yield "\n".join(block)


def _from_jsonl(path: Path, column: str) -> Iterator[str]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error}); it needs one object a line") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} is a {type(row).__name__}; JSON lines have one object a line")
        yield from _text(row, column, f"{path}, line {number}")


def _from_parquet(path: Path, column: str) -> Iterator[str]:
    try:
        # Without buffers, whole columns would be fetched ahead.
        with pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
            if column not in file.schema_arrow.names:
                raise _missing(column, file.schema_arrow.names, str(path))
            batches = file.iter_batches(ROWS, columns=[column], use_threads=False)
            texts = chain.from_iterable(batch.column(0).to_pylist() for batch in batches)
            for number, text in enumerate(texts, 1):
                yield from _text({column: text}, column, f"{path}, row {number}")
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"cannot read {path}: {error}; is the file complete and really parquet?") from error


def _from_hub(part: HubData, column: str) -> Iterator[str]:
    try:
        rows = load_dataset(part.name, part.config, split=part.split, streaming=True)
        for number, row in enumerate(rows, 1):
            yield from _text(row, column, f"{part}, row {number}")
    except OSError as error:
        raise ValueError(f"cannot read {part}: {error}; it is written {FORM}") from error


def _commit(part: HubData) -> str | None:
    try:
        return HfApi().dataset_info(part.name).sha
    except OSError as error:
        raise ValueError(f"the hub does not tell the commit of {part}: {error}") from error


READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".txt": _from_txt,
    ".jsonl": _from_jsonl,
    ".json": _from_jsonl,
    ".parquet": _from_parquet,
}


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines without their ends, of which only line feeds, with or without carriage return, count."""
    try:
        with open(path, "rb") as file:
            offset = 0
            for number, raw in enumerate(file, 1):
                try:
                    yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise ValueError(
                        f"{path} is not UTF-8: byte {offset + error.start} (line {number}) is "
                        f"0x{raw[error.start]:02x}; convert the file, for example with iconv"
                    ) from error
                offset += len(raw)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error


def _text(row: dict[str, object], column: str, where: str) -> Iterator[str]:
    """The text of a row; nothing if it is blank."""
    if column not in row:
        raise _missing(column, list(row), where)
    text = row[column]
    if not isinstance(text, str):
        raise ValueError(f"{where}: {column!r} is {str(text)[:50]!r} of type {type(text).__name__}, not a text")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can write half of a character of two parts
        raise ValueError(f"{where}: {column!r} is no text: {error}") from error
    if text.strip():
        yield text


def _missing(column: str, found: Sequence[str], where: str) -> ValueError:
    return ValueError(f"{where} has no column {column!r} for the text; it has {', '.join(found) or 'none'}; name one")
