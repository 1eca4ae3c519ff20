import subprocess
import sys

import pytest
from datasets import ClassLabel, Value

from resformer.data.builtin import GRAMMARS
from resformer.data.metrics import METRICS
from resformer.data.tasks import TASKS


def test_importing_the_tasks_loads_nothing_heavy():
    code = "import sys, resformer.data.tasks; print(*{'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_a_task_is_complete(task):
    assert task.name in TASKS
    assert len(task.texts) in (1, 2)
    assert task.labels is None or len(task.labels) >= 2
    assert task.metrics
    assert set(task.metrics) <= set(METRICS)
    assert task.builtin == (task.name in GRAMMARS) == bool(task.hard)
    assert task.columns == (*task.texts, "label", *(["difficulty"] if task.builtin else []))


def test_features_name_the_classes_in_order():
    """As the hub has them: ids in files mean these."""
    assert {name: task.labels for name, task in TASKS.items() if not task.builtin} == {
        "cola": ("unacceptable", "acceptable"),
        "sst2": ("negative", "positive"),
        "mrpc": ("not_equivalent", "equivalent"),
        "stsb": None,
        "qqp": ("not_duplicate", "duplicate"),
        "mnli": ("entailment", "neutral", "contradiction"),
        "qnli": ("entailment", "not_entailment"),
        "rte": ("entailment", "not_entailment"),
        "wnli": ("not_entailment", "entailment"),
        "snli": ("entailment", "neutral", "contradiction"),
    }
    assert TASKS["mnli"].features()["label"] == ClassLabel(names=["entailment", "neutral", "contradiction"])
    assert TASKS["stsb"].features()["label"] == Value("float32")
    assert list(TASKS["entailment"].features()) == ["sentence1", "sentence2", "label", "difficulty"]
