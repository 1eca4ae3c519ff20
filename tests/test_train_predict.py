"""Predictions of a saved model, against its own forward pass."""

import pytest
import torch
from training_fakes import WORDS, tiny_bert, tiny_tokenizer
from transformers import BertModel

import resformer
from resformer import cli
from resformer.data.glue import load_split
from resformer.data.tasks import TASKS
from resformer.files import write_json_atomically
from resformer.train.predict import predict_task

ROWS = [(" ".join(WORDS[: 2 + i % 6]), " ".join(WORDS[i % 5 :])) for i in range(13)]


def save(folder, *, labels=("entailment", "not_entailment"), model=None):
    model = model or tiny_bert(num_labels=len(labels or ("score",)))
    centre(model.eval())
    if labels:
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {label: i for i, label in enumerate(labels)}
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def centre(model):
    """Answers of both kinds, or scores within 0 to 5: else constant ones would pass."""
    given = torch.stack(answers(model))
    with torch.no_grad():
        if given.shape[1] == 1:
            model.classifier.bias += 2.5 - given.mean()
        elif given.isfinite().all():
            low, high = (given[:, 0] - given[:, 1]).sort().values[6:8]
            model.classifier.bias[1] += (low + high) / 2


def put(folder, split="test", labels=None):
    folder.mkdir(parents=True, exist_ok=True)
    header = ["index", "sentence1", "sentence2", *(["label"] if labels else [])]
    rows = [[str(i), *pair, *([labels[i]] if labels else [])] for i, pair in enumerate(ROWS)]
    (folder / f"{split}.tsv").write_text("".join("\t".join(row) + "\n" for row in (header, *rows)))
    return folder


def run(model, task, output, *, data, split="test", **settings):
    return predict_task(model, task, load_split(task.name, split, data), output, **settings)


@torch.no_grad()
def answers(model):
    """One at a time, without padding."""
    return [model(**tiny_tokenizer()(*pair, return_tensors="pt")).logits[0] for pair in ROWS]


@pytest.mark.parametrize("patched", [False, True])
def test_a_submission(tmp_path, patched):
    model = tiny_bert()
    if patched:
        resformer.patch(model, "highway", init="paper")
    model = save(tmp_path / "model", model=model)
    written = run(tmp_path / "model", TASKS["rte"], tmp_path / "out", data=put(tmp_path / "data"), batch_size=4)
    assert written == {tmp_path / "out" / "RTE.tsv": {}}
    names = [("entailment", "not_entailment")[int(logits.argmax())] for logits in answers(model)]
    assert len(set(names)) == 2
    lines = [f"{i}\t{name}" for i, name in enumerate(names)]
    assert (tmp_path / "out" / "RTE.tsv").read_text() == "\n".join(["index\tprediction", *lines, ""])


def test_classes_go_by_name(tmp_path):
    model = save(tmp_path / "model", labels=("not_entailment", "entailment"))
    run(tmp_path / "model", TASKS["rte"], tmp_path / "out", data=put(tmp_path / "data"))
    first = [("not_entailment", "entailment")[int(logits.argmax())] for logits in answers(model)]
    assert [line.split("\t")[1] for line in (tmp_path / "out/RTE.tsv").read_text().split("\n")[1:-1]] == first
    save(tmp_path / "other", labels=("no", "yes"))
    with pytest.raises(ValueError, match=r"the model answers no, yes, 'rte' has entailment, not_entailment"):
        run(tmp_path / "other", TASKS["rte"], tmp_path / "new", data=put(tmp_path / "data"))
    assert not (tmp_path / "new").exists()


def test_known_labels_are_measured(tmp_path):
    model = save(tmp_path / "model")
    right = [int(logits.argmax()) for logits in answers(model)]
    labels = ["-1" if i == 0 else str(label if i != 1 else 1 - label) for i, label in enumerate(right)]
    put(tmp_path / "data", "validation", labels)
    (metrics,) = run(
        tmp_path / "model", TASKS["rte"], tmp_path / "out", data=tmp_path / "data", split="validation"
    ).values()
    assert metrics == {"accuracy": pytest.approx(11 / 12)}
    assert (tmp_path / "out" / "rte_validation.csv").read_text().startswith("index,prediction\n0,")


def test_a_regression(tmp_path):
    model = save(tmp_path / "model", labels=None)
    run(tmp_path / "model", TASKS["stsb"], tmp_path / "out", data=put(tmp_path / "data"))
    lines = (tmp_path / "out" / "STS-B.tsv").read_text().split("\n")[1:-1]
    expected = [min(max(float(logits), 0.0), 5.0) for logits in answers(model)]
    assert [float(line.split("\t")[1]) for line in lines] == pytest.approx(expected, abs=6e-4)


def test_inputs_are_cut_as_in_training(tmp_path):
    save(tmp_path / "run" / "model", labels=None)
    data = put(tmp_path / "data")
    write_json_atomically(tmp_path / "run" / "config.json", {"task": "stsb", "max_length": 5})
    outputs = {}
    for name, settings in {"run": {}, "5": {"max_length": 5}, "64": {"max_length": 64}}.items():
        run(tmp_path / "run" / "model", TASKS["stsb"], tmp_path / name, data=data, **settings)
        outputs[name] = (tmp_path / name / "STS-B.tsv").read_text()
    assert outputs["run"] == outputs["5"] != outputs["64"]


def test_nothing_is_overwritten_unless_asked(tmp_path):
    save(tmp_path / "model")
    data, out = put(tmp_path / "data"), tmp_path / "out"
    out.mkdir()
    (out / "RTE.tsv").write_text("mine")
    with pytest.raises(ValueError, match=r"out' holds RTE.tsv; say --overwrite"):
        run(tmp_path / "model", TASKS["rte"], out, data=data)
    assert (out / "RTE.tsv").read_text() == "mine"
    run(tmp_path / "model", TASKS["rte"], out, data=data, overwrite=True)
    assert (out / "RTE.tsv").read_text().count("\n") == 14
    assert [path.name for path in out.iterdir()] == ["RTE.tsv"]


def test_models_that_cannot_answer(tmp_path):
    data = put(tmp_path / "data")

    def refused(model, message, task="rte"):
        with pytest.raises(ValueError, match=message):
            run(tmp_path / model, TASKS[task], tmp_path / "out", data=data)
        assert not (tmp_path / "out").exists()

    save(tmp_path / "run" / "model")
    refused("run", r"is not the folder of a saved model; give '.*run/model'")
    refused("gone", r"gone' is not the folder of a saved model")
    BertModel(tiny_bert().config).save_pretrained(tmp_path / "bare")
    tiny_tokenizer().save_pretrained(tmp_path / "bare")
    refused("bare", r"bare' is not fine-tuned for classes: its weights lack classifier")
    save(tmp_path / "three", labels=("a", "b", "c"))
    refused("three", r"answers 3 classes \(a, b, c\), 'rte' has 2 \(entailment, not_entailment\)")
    refused("run/model", r"answers 2 classes .*, 'stsb' has 1 \(a score\)", "stsb")
    tiny_bert().save_pretrained(tmp_path / "mute")
    refused("mute", "holds no tokenizer")
    broken = tiny_bert()
    torch.nn.init.constant_(broken.classifier.bias, float("nan"))
    save(tmp_path / "broken", model=broken)
    refused("broken", "gives values that are not finite; nothing is written")
    weights = tmp_path / "three" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:400])
    save(tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes(weights.read_bytes())
    refused("cut", "cannot read the weights")


def test_the_command(tmp_path, capsys):
    save(tmp_path / "model")
    put(tmp_path / "data")
    arguments = [
        "predict",
        tmp_path / "model",
        "--task",
        "rte",
        "--data",
        tmp_path / "data",
        "--output",
        tmp_path / "o",
    ]
    for expected, message in ((0, f"predictions: {tmp_path / 'o' / 'RTE.tsv'}\n"), (2, "say --overwrite")):
        with pytest.raises(SystemExit) as stop:
            cli.main([str(argument) for argument in arguments])
        assert (stop.value.code or 0) == expected
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        cli.main([*map(str, arguments[:-1]), str(tmp_path / "p"), "--split", "tset"])
    assert stop.value.code == 2
    assert "unknown split 'tset' of task 'rte'. Did you mean 'test'" in capsys.readouterr().err


def test_a_file_of_ones_own(tmp_path, capsys):
    model = save(tmp_path / "model", labels=("no, never", "yes"))
    rows = "".join(f'"{a}","{b}"\n' for a, b in ROWS)
    (tmp_path / "new.csv").write_text("text1,text2\n" + rows)
    arguments = ["predict", tmp_path / "model", "--file", tmp_path / "new.csv", "--output", tmp_path / "o"]
    for wrong in ([], ["--task", "rte"]):
        with pytest.raises(SystemExit) as stop:
            cli.main([*map(str, arguments[:2] + (arguments[2:] if wrong else arguments[4:])), *wrong])
        assert stop.value.code == 2
        assert "give --task or --file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(list(map(str, arguments)))
    names = ['"no, never"' if int(logits.argmax()) == 0 else "yes" for logits in answers(model)]
    lines = [f"{i},{name}" for i, name in enumerate(names)]
    assert (tmp_path / "o" / "own_test.csv").read_text() == "\n".join(["index,prediction", *lines, ""])
