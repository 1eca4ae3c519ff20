"""A table of runs with paired seeds: python scripts/studies/collect.py RUNS OUT --baseline NAME

RUNS holds folders TASK-NAME-SEED as `resformer finetune` leaves them. OUT gets results.csv, a line a run, and
results.md: for each task and name the mean score, what its difference to the baseline over the seeds that both have
says, and the wall time of training.
"""

import argparse
import csv
import json
from pathlib import Path
from statistics import fmean

from resformer.study.stats import comparison, estimate, paired_difference

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("runs", type=Path)
parser.add_argument("out", type=Path)
parser.add_argument("--baseline", required=True)
given = parser.parse_args()

rows = []
for path in sorted(given.runs.glob("*/result.json")):
    task, name, seed = path.parent.name.rsplit("-", 2)
    result = json.loads(path.read_text())
    cost = result["cost"]
    row = {"task": task, "name": name, "seed": int(seed), "status": result["status"], "score": result["score"]}
    row |= {"train_loss": result["train_loss"], "steps": cost["steps"], "seconds": round(cost["seconds"], 1)}
    rows.append(row | {"flags": " ".join(result["flags"])})
if not rows:
    parser.error(f"no finished runs in {given.runs}")
given.out.mkdir(parents=True, exist_ok=True)
with (given.out / "results.csv").open("w", newline="") as file:
    table = csv.DictWriter(file, rows[0])
    table.writeheader()
    table.writerows(rows)

lines = [
    f"| task | | seeds | score | difference to {given.baseline}, paired by seed | training loss | s |",
    "|---|---|---|---|---|---|---|",
]
for task, name in dict.fromkeys((row["task"], row["name"]) for row in rows):
    mine = [row for row in rows if (row["task"], row["name"]) == (task, name)]
    scores = {row["seed"]: row["score"] for row in mine if row["score"] is not None}
    base = {
        r["seed"]: r["score"]
        for r in rows
        if (r["task"], r["name"]) == (task, given.baseline) and r["score"] is not None
    }
    difference = paired_difference(scores, base) if name != given.baseline else None
    shown = "" if difference is None else comparison(difference, decimals=4)
    mean = f"{estimate(list(scores.values())).mean:.4f}" if scores else "none"
    if diverged := len(mine) - len(scores):
        mean += f", {diverged} diverged"
    losses = [row["train_loss"] for row in mine if row["train_loss"] is not None]
    loss, seconds = fmean(losses) if losses else float("nan"), fmean(row["seconds"] for row in mine)
    lines.append(f"| {task} | {name} | {len(scores)} | {mean} | {shown} | {loss:.3f} | {seconds:.0f} |")
(given.out / "results.md").write_text("\n".join(lines) + "\n")
print("\n".join(lines))
