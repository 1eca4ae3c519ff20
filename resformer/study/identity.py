"""The name of a run's directory, which follows from what decides its outcome. Stdlib only."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

FORMAT = 2  # raised when an entry changes its meaning, so that old runs are not taken for new ones
PLACES = ("data", "model", "corpus")  # entries that say where something lies; what lies there has its own sha256


def identity(config: Mapping[str, Any]) -> str:
    """12 hexadecimal digits that depend on a run's config alone, `PLACES` left out."""
    decides = {key: value for key, value in config.items() if key not in PLACES}
    text = json.dumps({"format": FORMAT, **decides}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]
