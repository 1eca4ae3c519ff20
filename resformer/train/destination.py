"""Where a run goes, and what is done with what lies there. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resformer.options import option


@dataclass(frozen=True)
class Destination:
    """The folder of a run, whether to go on there or begin again, and what is kept."""

    output: Path = option(..., "Folder for result.json, train.jsonl and the model.")  # noqa: RUF009
    resume: str = option("auto", "auto, never, or the folder of a checkpoint.")
    overwrite: bool = option(False, "Delete an earlier run in the output folder.")
    dry_run: bool = option(False, "Check all, try two steps, write nothing.")
    save_model: bool = option(True, "Keep the model.")
    push_to_hub: str | None = option(None, "OWNER/NAME on the hub. [default: no]")

    def check(self) -> None:
        """Raises `ValueError` for a folder, a checkpoint or a name that cannot be used: before any work."""
        from resformer.train import checks

        checks.check_hub_name(self.push_to_hub)
        checks.check_folder(self.output, overwrite=self.overwrite)
        checks.check_resume(self.resume, overwrite=self.overwrite)

    def given(self) -> dict[str, Any]:
        """What `finetune` and `pretrain` of `resformer.train` take besides the folder."""
        kept = {"save_model": self.save_model, "push_to": self.push_to_hub}
        return {"resume": self.resume, "overwrite": self.overwrite, **kept}
