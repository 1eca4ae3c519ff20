"""How many parameters of a net are not in its layers: embeddings above all, which hide what a scheme adds."""

from resformer.study.apart import tied
from resformer.study.comparisons import mean_of
from resformer.study.plan import BASELINES
from resformer.study.summary import Setting


def outside_layers(setting: Setting) -> int | None:
    """The parameters of embeddings, head and what else does not grow with depth, by arms whose layers are all alike.

    With P parameters at depth d and P' at d' it is P - d (P' - P) / (d' - d), of the shallowest and the deepest. None
    below two depths, where another condition changes with depth, and where no arm of `BASELINES` was run.
    """
    if any(key != "extra_ffn" for key in tied(setting.runs)):
        return None
    for name in (arm for arm in BASELINES if arm in setting.arms):
        known = {d: n for d in setting.depths if (n := mean_of([setting.cells[name, d]], "parameters")) is not None}
        low, high = min(known, default=0), max(known, default=0)
        if low < high and known[low] < known[high]:
            return round(known[low] - low * (known[high] - known[low]) / (high - low))
    return None
