"""The report as Markdown: what the page says, with figures in files beside it."""

import re
from collections.abc import Sequence
from typing import Any

from resformer.study.document import Document
from resformer.study.records import COSTS
from resformer.study.tables import aggregate, cost, failed, indexed, main_rows, p_value, sentence, shown
from resformer.study.words import counted, number


def markdown(document: Document) -> str:
    """The page's text and tables."""
    some = bool(document["coverage"]["finished"])
    lines = [f"# {document['title']}", ""]
    if some:
        lines += ["![Score, training loss and token cosine against depth, by scheme](report.svg)", ""]
    lines += [_plain(text) + "\n" for text in [document["overview"], *document["claims"]] if text]
    for setting in document["settings"]:
        lines += _setting(setting, document)
    if document["across"]:
        lines += ["## Across tasks", ""]
        statistic = " or ".join(dict.fromkeys(e["statistic"] for e in document["across"]))
        head = ["tasks", "arm", "depth", f"{statistic} over tasks", "minus baseline", "seeds"]
        lines += _table(
            head,
            [
                [
                    e["title"],
                    e["arm"],
                    e["depth"],
                    aggregate(e["value"]),
                    aggregate(e["gap"], sign=True),
                    e["value"]["runs"],
                ]
                for e in document["across"]
            ],
        )
        lines += [document["across_note"], ""]
    lines += ["## Coverage", "", coverage(document), ""]
    lines += ["## Caveats", "", *(f"- {_plain(text)}" for text in document["caveats"]), ""]
    if some:
        known = {name for name in ("start", "curves", "learning_rates", "gradients") if _drawn(document, name)}
        lines += ["## More figures", ""]
        for name, what in (
            ("start", "training loss at the end against token cosine at initialisation"),
            ("curves", "training loss by step"),
            ("learning_rates", "learning rates tried"),
            ("gradients", "gradient norm by layer at initialisation"),
            ("cost", "against parameters, FLOPs, time and memory"),
        ):
            if name in known or name == "cost":
                lines += [f"![{what}]({name}.svg)", ""]
    return "\n".join([*lines, *_protocol(document)])


def coverage(document: Document) -> str:
    """The counts of runs in a line."""
    found, tuning = document["coverage"], document["coverage"]["tuning"]
    parts = [f"{found['finished']} of {found['planned']} runs finished, {found['diverged']} of them diverged"]
    parts += [f"{found['failed']} failed with an error"] * bool(found["failed"])
    parts += [f"{found['missing']} not finished"] * bool(found["missing"])
    parts += [f"{found['under_way']} under way"] * bool(found["under_way"])
    parts += [f"{counted(len(found['not_counted']), 'result file')} not counted"] * bool(found["not_counted"])
    parts += [f"{tuning['finished']} of {tuning['planned']} tuning runs finished"] * bool(tuning["planned"])
    encoders = found["encoders"]
    parts += [f"{encoders['finished']} of {encoders['planned']} encoders pre-trained"] * bool(encoders["planned"])
    return "; ".join(parts) + "."


def _setting(setting: Document, document: Document) -> list[str]:
    endpoint, cells = document["endpoint"], indexed(setting["cells"])
    words, depths = document["endpoints"], [f"depth {depth}" for depth in setting["depths"]]
    controls = {arm["name"] for arm in document["arms"] if arm["control"]}
    other = next(name for name in words if name != endpoint)

    def named(arm: str) -> str:
        return f"{arm} (control)" if arm in controls else arm

    lines = [f"## {_plain(setting['title'])}", ""]
    lines += [_plain(f"{setting['where']}: {'; '.join(setting['claims'])}."), ""]
    lines += [*(_plain(text) for text in setting["certainty"]), ""]
    lines += _table(
        [f"{words[endpoint]}", *depths],
        [[named(arm), *(_cell(cells[arm, depth], endpoint) for depth in setting["depths"])] for arm in setting["arms"]],
    )
    if setting["definition"]:
        lines += [f"Mean (runs above chance / runs finished). {setting['definition']}", ""]
    if setting["comparisons"]:
        base = _plain(setting["baseline"])
        lines += [f"### Differences from {base}, paired by seed", ""]
        head = ["arm", "depth", words[endpoint], f"minus {setting['baseline']}", "in words", "adjusted p (Holm)",
                "failed (95% Wilson)", words[other], f"minus {setting['baseline']}", "adjusted p (BH)"]  # fmt: skip
        rows = [
            [
                named(row["arm"]), row["depth"], shown(row["cell"][endpoint]),
                shown(row["primary"]["gap"], sign=True) if row["primary"] else "",
                sentence(row["primary"]), p_value(row["primary"]),
                failed(row["cell"]["failures"]), shown(row["cell"][other]),
                shown(row["other"]["gap"], sign=True) if row["other"] else "", p_value(row["other"]),
            ]
            for row in main_rows(setting)
        ]  # fmt: skip
        lines += _table(head, rows)
    if setting["interactions"]:
        lines += [f"### Depth x scheme, by {words[endpoint]}", ""]
        rows = [[named(i["arm"]), shown(i["slope"], sign=True), i["found"]] for i in setting["interactions"]]
        lines += _table(["arm", "slope minus the baseline's, for a doubling of depth", "resolved"], rows)
    if setting["against_controls"]:
        lines += [f"### Differences from the controls, by {words[endpoint]}", ""]
        rows = [[c["arm"], named(c["control"]), c["depth"], c["sentence"]] for c in setting["against_controls"]]
        lines += _table(["scheme", "minus", "depth", "95% over all these pairs together"], rows)
    if setting["learning_rates"]:
        lines += ["### Learning rates", ""]
        rows = [
            [named(g["arm"]), g["depth"], "" if g["chosen"] is None else number(g["chosen"]),
             f"at the {g['edge']} edge" if g["edge"] else "", "" if g["drop"] is None else f"{g['drop']:.3f}"]
            for g in setting["learning_rates"]
        ]  # fmt: skip
        lines += _table(
            [
                "arm",
                "depth",
                "chosen",
                "of its grid",
                f"spread of {'score' if endpoint == 'score' else 'loss'} on the slice",
            ],
            rows,
        )
    speed = setting["speed"]
    if speed["cells"]:
        lines += ["### Convergence", ""]
        if speed["target"] is not None:
            lines += [f"Target: a training loss of {_plain(speed['words'])}.", ""]
        fractions = [f"loss at {fraction:.0%}" for fraction in speed["fractions"]]
        rows = [
            [named(c["arm"]), c["depth"], *map(shown, c["at"]), *_reached(c, speed["target"])] for c in speed["cells"]
        ]
        lines += _table(["arm", "depth", *fractions, "median steps to target", "reached"], rows)
    lines += [setting["collapse"], ""] if setting["collapse"] else []
    if setting["failures"]:
        lines += ["### Did not learn", ""]
        rows = [
            [named(f["arm"]), f["depth"], f"{f['what']}: {f['detail']}", " ".join(run["id"] for run in f["runs"])]
            for f in setting["failures"]
        ]
        lines += _table(["arm", "depth", "what", "runs"], rows)
    costs = [cell for cell in setting["cells"] if cell["cost"]]
    if costs:
        lines += ["### Cost", ""]
        rows = [[named(cell["arm"]), cell["depth"], *map(cost, cell["cost"].values())] for cell in costs]
        lines += _table(["arm", "depth", *COSTS.values()], rows)
    return lines


def _protocol(document: Document) -> list[str]:
    found = document["protocol"]
    lines = ["## Protocol", ""]
    equations = [[arm["name"], arm["equation"]] for arm in document["arms"] if arm["equation"]]
    lines += _table(["scheme", "update (N: a norm)"], equations)
    lines += _table(["setting", "value"], [[key, number(value)] for key, value in found["shared"].items()])
    varied = [[key, ", ".join(map(number, values))] for key, values in found["varied"].items()]
    lines += _table(["differs", "values"], varied)
    lines += _table(["made with", ""], [[key, ", ".join(map(str, v))] for key, v in found["made_with"].items()])
    for command in found["commands"]:
        lines += ["```", command, "```", ""]
    return lines


def _reached(cell: Document, target: float | None) -> list[str]:
    if target is None:
        return ["", ""]
    median = "not reached" if cell["median"] is None else str(cell["median"])
    return [median, f"{cell['reached']}/{cell['n']}"]


def _drawn(document: Document, name: str) -> bool:
    if name == "gradients":
        return any(cell["gradient_norms"] for setting in document["settings"] for cell in setting["cells"])
    if name == "start":
        seeds = [s for setting in document["settings"] for cell in setting["cells"] for s in cell["seeds"]]
        return any(s["token_cosine"] is not None and s["train_loss"] is not None for s in seeds)
    return any(setting[name] for setting in document["settings"])


def _cell(cell: Document, endpoint: str) -> str:
    return " ".join(filter(None, [shown(cell[endpoint]), f"({cell['verdict']})"]))


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    if not rows:
        return []
    lines = [head, ["---"] * len(head), *rows]
    return [*("| " + " | ".join(_plain(str(entry)) for entry in line) + " |" for line in lines), ""]


def _plain(text: Any) -> str:
    """Text that Markdown shows as it is, within a table too."""
    return re.sub(r"([\\`*<>|\[\]])", r"\\\1", str(text).replace("\n", " "))
