"""`resformer data` and `resformer tokenizer`: what is trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from resformer.cli.app import app
from resformer.cli.speaking import quiet, show


@app.command()
def data(
    task: Annotated[str | None, typer.Argument(help="Write this task; without it, list all.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write to; new or empty.")] = None,
    format: Annotated[str, typer.Option(help="parquet, tsv or jsonl.")] = "parquet",
    source: Annotated[str | None, typer.Option("--data", help="Folder that holds the task's data.")] = None,
    seed: Annotated[int, typer.Option(help="Of the built-in tasks.")] = 0,
) -> None:
    """List the tasks, or write one of them to files."""
    if task is None:
        from resformer.listing import tasks_table

        show(tasks_table())
        return
    if output is None:
        raise ValueError(f"data {task} needs --output, the folder to write to")
    from resformer.data.glue import write_task

    write_task(task, output, format=format, data=source, seed=seed)
    typer.echo(f"{task} written to {output}")


@app.command()
def tokenizer(
    corpus: Annotated[list[str], typer.Option(help="Files, folders, patterns or hub:OWNER/NAME:CONFIG:SPLIT.")],
    output: Annotated[Path, typer.Option(help="Folder to write to; new or empty.")],
    kind: Annotated[str, typer.Option(help="wordpiece or bpe.")] = "wordpiece",
    vocab_size: Annotated[int, typer.Option(help="Entries at most, special tokens included.")] = 8192,
    lowercase: Annotated[
        bool | None, typer.Option("--lowercase/--no-lowercase", help="Fold case. [default: only wordpiece does]")
    ] = None,
    causal: Annotated[bool, typer.Option("--causal", help="For decoders: bpe with an end of text only.")] = False,
    column: Annotated[str, typer.Option(help="That holds the text, in all but .txt.")] = "text",
) -> None:
    """Train a tokenizer on a corpus."""
    from rich.console import Console

    from resformer.data.corpus import read_corpus
    from resformer.data.tokenizer import SAMPLE, measure, write_tokenizer

    quiet()
    texts = read_corpus(corpus, column=column)
    with Console(stderr=True).status("reading the corpus") as line:
        trained = write_tokenizer(
            texts,
            output,
            kind,
            vocab_size=vocab_size,
            lowercase=lowercase,
            causal=causal,
            progress=lambda documents: line.update(f"reading the corpus: {documents:,} documents"),
        )
    fewer = f", since the corpus has no more for the {vocab_size} asked for" if len(trained) < vocab_size else ""
    figures = measure(trained, texts)
    typer.echo(f"{kind} tokenizer of {len(trained)} entries{fewer}, written to {output}")
    typer.echo(
        f"{figures['tokens_per_word']:.2f} tokens a word, {figures['unknown']:.2%} of tokens unknown "
        f"(on the first {SAMPLE} documents)"
    )
