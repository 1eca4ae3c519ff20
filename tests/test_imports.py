"""The order of imports: each module knows only what stands before it, and names are cheap until they are used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import resformer

ROOT = Path(resformer.__file__).parent
ORDER = [
    {"drawing", "errors", "files", "palette", "provenance", "swap"},
    {"schemes"},
    {"stack", "hosts", "calibration", "schedule"},
    {"attention"},
    {"layer"},
    {"host"},
    {"grouped", "edits", "sizes", "probing", "shapes", "ends"},
    {"verify"},
    {"saving"},
    {"adapters", "trainer"},
    {"plan"},
    {"patching"},
    {"folding", "growing"},
    {"checkpoint", "encoders", "sites"},
    {"options", "spelling", "configfile"},
    {"optim", "data", "testing"},
    {"train", "diagnostics", "support"},
    {"theory"},
    {"description"},
    {"study", "listing", "diagnosing"},
    {"advice"},
    {"cli"},
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")
LIGHT = {
    "study/plan.py",
    "study/settings.py",
    "study/problems.py",
    "study/identity.py",
    "study/condition.py",
    "study/pretraining.py",
    "study/selection.py",
    "study/kept.py",
    "study/results.py",
    "study/execute.py",
    "study/ray_pool.py",
    "study/status.py",
    "study/merge.py",
    "study/report.py",
    "study/findings.py",
    "study/summary.py",
    "study/apart.py",
    "study/chance.py",
    "study/reading.py",
    "study/document.py",
    "study/comparisons.py",
    "study/across.py",
    "study/speed.py",
    "study/rates.py",
    "study/caveats.py",
    "study/tables.py",
    "study/markdown.py",
    "study/words.py",
    "study/figures.py",
    "study/svg.py",
    "study/drawings.py",
    "study/records.py",
    "study/sureness.py",
    "study/stats.py",
    "study/multiplicity.py",
    "study/aggregate.py",
    "study/coverage.py",
    "study/interaction.py",
    "study/failures.py",
    "study/sensitivity.py",
    "study/convergence.py",
}


def part(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_imports_go_one_way(path):
    here = part(path)
    for name in imported(path):
        top, *rest = name.split(".")
        if top == "resformer" and rest:
            there = rest[0]
            assert there in RANK, f"{there} has no place in the order of imports"
            assert RANK[there] <= RANK[here], f"{here} imports {there}, which stands after it"
            assert there == here or RANK[there] < RANK[here], f"{here} and {there} stand side by side"
        assert not (here == "schemes" and top == "transformers"), "schemes know nothing of transformers"
        assert not (str(path.relative_to(ROOT)) in LIGHT and top == "torch"), "the report reads files without torch"


def test_every_module_has_its_place():
    assert {part(path) for path in FILES} == set(RANK)


def test_importing_is_cheap():
    code = "import sys, resformer; print([m for m in ('torch', 'transformers', 'rich', 'typer') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("resformer.schemes, resformer.hosts, resformer.stack", "transformers"),
        ("resformer.study.plan, resformer.study.results, resformer.study.report", "torch"),
        ("resformer.study.execute, resformer.study.status, resformer.study.merge", "torch"),
    ],
)
def test_what_a_module_brings_with_it(modules, heavy):
    code = f"import sys, {modules}; print({heavy!r} in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout == "False\n", ran.stderr


@pytest.mark.parametrize("name", resformer.__all__)
def test_public_names(name):
    assert callable(getattr(resformer, name))
    assert callable(getattr(resformer, name)), "also the second time, when modules of the same name are loaded"


def test_unknown_public_name():
    with pytest.raises(AttributeError, match="public names: ResidualStack"):
        resformer.patsch  # noqa: B018
