"""The bar on a terminal."""

import io

from rich.console import Console

from resformer.train import progress


def shown(monkeypatch, moves):
    text = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda **options: Console(file=text, force_terminal=True, width=80))
    with progress.progress_bar(100, shown=True, what="tokenising") as update:
        for moved in moves:
            update(completed=moved, note=f"{moved} seen")
    return text.getvalue()


def test_it_is_shown_by_whoever_moves_it(monkeypatch):
    """Another process that waits for the work of this one shows nothing."""
    assert shown(monkeypatch, []) == ""
    text = shown(monkeypatch, [3, 7])
    assert "tokenising" in text
    assert "7/100" in text
    assert "7 seen" in text
    assert text.endswith("\x1b[2K"), "and is gone at the end"
