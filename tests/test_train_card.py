"""The model card: what a result says, and nothing where it says nothing."""

import math

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from training_fakes import tiny_bert, tiny_tokenizer

import resformer
from resformer.train.card import model_card

RESULT = {
    "version": 1,
    "config": {
        "task": "mnli", "seed": 3, "steps": 100, "learning_rate": 5e-5, "scheme": "exclusive_gate:bias=0",
        "init": "preserve", "placement": None, "model": "bert-base-uncased",
    },
    "status": "ok",
    "flags": ["at_chance"],
    "score": 0.55,
    "metrics": {"accuracy": 0.5, "accuracy_mm": 0.6, "majority": 1 / 3, "majority_mm": math.nan},
    "train_loss": 0.3,
    "loss_curve": [[25, 1.0]],
    "cost": {"parameters": 100, "seconds": 1.5},
    "provenance": {"torch": "2.9", "datasets": None, "git": "abc123", "dirty": True},
}  # fmt: skip


def front_matter(text):
    _, matter, body = text.split("---\n", 2)
    return yaml.safe_load(matter), body


def test_a_card_says_what_the_result_says():
    matter, body = front_matter(
        model_card(RESULT, host="BertForSequenceClassification, 12 layers", command="resformer finetune --task mnli")
    )
    assert matter["library_name"] == "transformers"
    assert matter["tags"] == ["resformer", "exclusive_gate"]
    assert matter["base_model"] == "bert-base-uncased"
    assert matter["datasets"] == ["nyu-mll/glue"]
    assert matter["metrics"] == ["accuracy"]
    (index,) = matter["model-index"]
    assert [
        (found["dataset"]["config"], found["dataset"]["split"], metric["type"], metric["value"])
        for found in index["results"]
        for metric in found["metrics"]
    ] == [("mnli", "validation_matched", "accuracy", 0.5), ("mnli", "validation_mismatched", "accuracy", 0.6)]
    for part in (
        "BertForSequenceClassification, 12 layers",
        "x ← g ⊙ F(x) + (1 - g) ⊙ x",
        "`exclusive_gate:bias=0`, init `preserve`\n\nA gate opens",
        "arXiv:1603.05027",
        "`mnli`: inference over many genres",
        "| `learning_rate` | `5e-05` |",
        "| `accuracy_mm` | `0.6000` |",
        "| `score` | `0.5500` |",
        "**at\\_chance**: correlation of answers",
        'model = resformer.from_pretrained("path/to/this/folder", AutoModelForSequenceClassification)',
        "```bash\nresformer finetune --task mnli\n```",
        "| `commit` | `abc123 with changes` |",
        "| `parameters` | `100` |",
    ):
        assert part in body
    for part in ("placement", "nan", "None", "loss_curve", "trained from scratch"):
        assert part not in body
    assert model_card(RESULT) == model_card(RESULT)


@pytest.mark.parametrize("key", [None, *RESULT])
def test_what_is_missing_is_left_out(key):
    result = {} if key is None else {name: value for name, value in RESULT.items() if name != key}
    matter, body = front_matter(model_card(result))
    assert matter["library_name"] == "transformers"
    assert "## How to load it" in body
    assert "None" not in body
    ModelCard(model_card(result))  # the hub's own reader takes it
    if key is None:
        assert "model-index" not in matter, "the hub takes no empty one"
        assert "trained from scratch" in body
    for inner in RESULT["config"]:
        front_matter(model_card({"config": {name: v for name, v in RESULT["config"].items() if name != inner}}))


def test_metrics_in_the_long_form_and_other_objectives():
    metrics = {"perplexity": {"value": 12.5, "higher_is_better": False, "n": 99}, "loss": None}
    matter, body = front_matter(
        model_card({"config": {"objective": "mlm", "family": "bert", "depth": 24}, "metrics": metrics})
    )
    assert matter["pipeline_tag"] == "fill-mask"
    assert matter["model-index"][0]["results"][0]["metrics"] == [
        {"type": "perplexity", "value": 12.5, "name": "perplexity"}
    ]
    assert "host: `family bert, depth 24`" in body
    assert 'AutoModelForMaskedLM.from_pretrained("path/to/this/folder")' in body
    assert "`12.5000`" in body


def test_what_users_wrote_is_escaped():
    bad = "x`|\n# <b>*y*</b>: [a](b)"
    result = {"config": {"task": bad, "model": bad, "note": bad, bad: 1, "init": bad, "scheme": bad}, "status": bad}
    matter, body = front_matter(
        model_card(result | {"flags": [bad]}, host=bad, command=f"a\n```\n{bad}", name=f"n: {bad}")
    )
    assert "base_model" not in matter
    headings = [line for line in body.splitlines() if line.startswith("#")]
    assert headings[0].startswith("# n: x\\`\\|")
    assert [line for line in headings if "<b>" in line] == ["# <b>*y*</b>: [a](b)"]  # within the command's block
    rows = [line for line in body.splitlines() if line.startswith("| ")]
    assert all(line.replace("\\|", "").count("|") == 3 for line in rows)
    assert "````bash\na\n```\n" in body


def test_local_folders_are_no_hub_ids(tmp_path, monkeypatch):
    (tmp_path / "out" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for base in ("out/model", str(tmp_path), "./x", "a/b/c"):
        matter, body = front_matter(model_card({}, base=base))
        assert "base_model" not in matter
        assert f"trained from: `{base}`" in body


def test_own_files_are_named_without_their_folders():
    _, body = front_matter(
        model_card({"config": {"task": "own", "train_file": "/home/me/a.csv", "validation_file": "b.csv"}})
    )
    assert "The user's own files `a.csv` and `b.csv`." in body
    assert "/home/me" not in body


@pytest.mark.parametrize("scheme", [None, "highway"])
def test_the_example_loads_the_model(tmp_path, scheme):
    model = tiny_bert().eval()
    if scheme:
        resformer.patch(model, scheme)
    model.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text(model_card({}, scheme=scheme, path=str(tmp_path)))
    code = (tmp_path / "README.md").read_text().split("```python\n")[1].split("```")[0]
    there = {}
    exec(code, there)
    batch = tiny_tokenizer()(["good film"], return_tensors="pt")
    torch.testing.assert_close(there["model"].eval()(**batch).logits, model(**batch).logits)
