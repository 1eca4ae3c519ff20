"""A corpus as token ids on disk: tokenised once, memory-mapped.

A folder of shards holds `tokens-00000.bin`, ... (ids, little-endian, nothing else) and `index.json`, written last.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from resformer.data.corpus import Corpus, read_corpus
from resformer.files import write_json_atomically

VERSION = 1
INDEX = "index.json"
LOCK = ".lock"
SHARD = 2**26  # tokens
BATCH = 2**19  # characters tokenised at a time
OURS = re.compile(rf"tokens-\d+\.bin|\.{re.escape(INDEX)}\..*\.tmp")

Progress = Callable[[int, int], None]  # documents and tokens so far


@dataclass(frozen=True)
class Shards:
    """The tokens of a corpus, in one row."""

    folder: Path
    index: dict[str, Any]  # of index.json: tokens, documents, dtype, the fingerprints of tokenizer and corpus, ...
    reused: bool = True  # found on disk, not made by this call

    @property
    def tokens(self) -> int:
        """How many, the separators included."""
        return self.index["tokens"]

    @property
    def documents(self) -> int:
        return self.index["documents"]

    @cached_property
    def _files(self) -> list[np.ndarray]:
        paths = (self.folder / _name(number) for number in range(len(self.index["shards"])))
        dtype = _stored(self.index["dtype"])
        # As plain arrays, which are cut faster than memmaps.
        return [np.asarray(np.memmap(path, dtype=dtype, mode="r")) for path in paths]

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum([0, *self.index["shards"]])

    def window(self, start: int, length: int) -> np.ndarray:
        """Tokens `start` to `start + length`, also across files: (length,), of the dtype on disk, not to write to.

        Raises ValueError for a window that is not within the tokens.
        """
        if not 0 <= start <= start + length <= self.tokens:
            raise ValueError(f"{length} tokens from {start} on are not within the {self.tokens} of {self.folder}")
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        parts = []
        for file, begin in zip(self._files[first:], self._starts[first:], strict=False):
            parts.append(file[max(0, start - begin) : start + length - begin])
            if start + length <= begin + len(file):
                break
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def tokenize_corpus(
    sources: Sequence[str] | str,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    column: str = "text",
    progress: Progress | None = None,
    shard_tokens: int = SHARD,
) -> Shards:
    """The shards of a corpus in `folder`: those that are there, if they are of the same corpus and tokenizer, else new.

    sources, column   as for `read_corpus`
    progress          called with the documents and tokens so far
    shard_tokens      tokens a file

    Every document is followed by the separator: the tokenizer's sep token, or eos where it has none. Special tokens
    are not looked for in the text: the letters `[MASK]` are tokenised as such. A folder that an earlier call
    did not finish is begun anew; of several processes, one does the work, and the others wait for it.

    Raises ValueError for what `read_corpus` refuses, a tokenizer that is not fast or has neither sep nor eos, and a
    folder that holds shards of something else, or other files.
    """
    corpus = read_corpus(sources, column=column)
    backend = _backend(tokenizer)
    separator = tokenizer.eos_token_id if tokenizer.sep_token_id is None else tokenizer.sep_token_id
    if separator is None:
        raise ValueError("the tokenizer has neither a sep nor an eos token to end a document with; set one of them")
    largest = max(tokenizer.get_vocab().values())
    wanted = {
        "version": VERSION,
        "corpus": corpus.fingerprint,
        "column": column,
        "tokenizer": fingerprint(tokenizer),
        "separator": separator,
        "dtype": "uint16" if largest < 2**16 else "uint32",
    }
    folder = Path(folder).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder for the shards")
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens must be at least 1, got {shard_tokens!r}")
    if not (folder / INDEX).exists():
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            if not (folder / INDEX).exists():  # else another process made it meanwhile
                _clear(folder)
                index = {**wanted, "sources": [str(part) for part in corpus.parts]}
                encoded = _encoded(corpus, backend, separator, progress)
                index |= _write(folder, encoded, _stored(wanted["dtype"]), shard_tokens)
                write_json_atomically(folder / INDEX, index)
                return Shards(folder, index, reused=False)
    shards = open_shards(folder)
    different = [name for name in wanted if shards.index.get(name) != wanted[name]]
    if different:
        sources = " and ".join(shards.index.get("sources", ["an unknown corpus"]))
        lines = [f"\n  {name}: there {shards.index.get(name)!r}, asked for {wanted[name]!r}" for name in different]
        raise ValueError(
            f"{folder} holds shards made of {sources}, with another {' and '.join(different)}; give another folder, "
            f"or remove this one:{''.join(lines)}"
        )
    return shards


def open_shards(folder: str | Path) -> Shards:
    """The shards in `folder`. Raises ValueError if there are none, or a file is missing or not of its size."""
    folder = Path(folder).expanduser()
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["version"] != VERSION:
            raise ValueError(f"version {index['version']!r}, this program writes {VERSION}")
        sizes, width = index["shards"], _stored(index["dtype"]).itemsize
        if sum(sizes) != index["tokens"]:
            raise ValueError(f"{sum(sizes)} tokens in files, {index['tokens']} in all")
    except FileNotFoundError:
        raise ValueError(f"{folder} has no {INDEX}: no shards, or unfinished ones; tokenise the corpus again") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no index of shards ({error!r}); remove the folder and tokenise again") from error
    for number, size in enumerate(sizes):
        path = folder / _name(number)
        held = path.stat().st_size if path.is_file() else None
        if held != size * width:
            state = "is missing" if held is None else f"has {held} bytes, and should have {size * width}"
            raise ValueError(f"{path} {state}; remove the folder and tokenise again")
    return Shards(folder, index)


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A sha256 of all that decides the ids of a text; settings of padding and truncation do not."""
    return hashlib.sha256(_backend(tokenizer).to_str().encode()).hexdigest()


def _backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy of the Rust tokenizer that neither cuts, pads, nor sees special tokens in a text."""
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer; give one with a tokenizer.json")
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def _encoded(
    corpus: Corpus, backend: Tokenizer, separator: int, progress: Progress | None
) -> Iterator[tuple[int, list[int]]]:
    """The number of documents in a batch and their ids, each document with its separator; none without a token."""
    documents = tokens = 0
    for texts in _batches(corpus):
        ids: list[int] = []
        before = documents
        for encoding in backend.encode_batch_fast(texts, add_special_tokens=False):
            if encoding.ids:
                ids += encoding.ids
                ids.append(separator)
                documents += 1
        tokens += len(ids)
        yield documents - before, ids
        if progress is not None:
            progress(documents, tokens)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """By characters, since it is these that fill the memory: an encoding takes a hundred bytes a token."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write(folder: Path, encoded: Iterable[tuple[int, list[int]]], dtype: np.dtype, limit: int) -> dict[str, Any]:
    """Write the files; the numbers of documents, tokens, and tokens in each file."""
    documents, sizes = 0, [0]
    for count, ids in encoded:
        documents += count
        rest = np.array(ids, dtype=dtype)
        while len(rest):
            if sizes[-1] == limit:
                sizes.append(0)
            part, rest = np.split(rest, [limit - sizes[-1]])
            path = folder / _name(len(sizes) - 1)
            try:
                with open(path, "ab") as file:
                    file.write(part.tobytes())
            except OSError as error:  # a full disk does not say of which file
                raise OSError(error.errno, error.strerror, str(path)) from error
            sizes[-1] += len(part)
    if not documents:
        raise ValueError("the tokenizer finds no token in the corpus; is it the right one?")
    for number in range(len(sizes)):  # on the disk before the index says so
        with open(folder / _name(number), "rb") as file:
            os.fsync(file.fileno())
    return {"documents": documents, "tokens": sum(sizes), "shards": sizes}


def _clear(folder: Path) -> None:
    """Remove what an unfinished call left. Raises ValueError if there is anything else."""
    left = [path for path in folder.iterdir() if path.name != LOCK]
    foreign = sorted(path.name for path in left if not OURS.fullmatch(path.name))
    if foreign:
        raise ValueError(f"{folder} holds {', '.join(foreign[:5])}, which is no shard; give a new or empty folder")
    for path in left:
        path.unlink()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Alone in the folder; the system frees it when the process ends, however it ends."""
    with open(folder / LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _name(number: int) -> str:
    return f"tokens-{number:05d}.bin"


def _stored(dtype: str) -> np.dtype:
    return np.dtype(dtype).newbyteorder("<")
