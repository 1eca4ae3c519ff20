"""Pre-training, end to end, on a little text of which the words can be told from their neighbours."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

import resformer
from resformer.data.masking import EVALUATION
from resformer.data.packing import Packed, order
from resformer.data.shards import tokenize_corpus
from resformer.data.tokenizer import train_tokenizer
from resformer.train.job import Evaluation, Outcome
from resformer.train.loop import Step
from resformer.train.masked_head import find_head, pick, picking
from resformer.train.pretrain import pretrain, pretraining
from resformer.train.result import describe_run
from resformer.train.settings import Settings
from resformer.train.text import Text, context_free_loss, frequencies, unigram_loss

torch.set_num_threads(1)
SETTINGS = {"steps": 60, "batch_size": 8, "learning_rate": 1e-2, "warmup": 0.1}
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def counting(folder):
    """Texts that count, of which each word follows from the one before it: their shards, and a tokenizer."""
    texts = [" ".join(WORDS[(start + i) % 10] for i in range(23)) for start in range(200)]
    if not (folder / "counting.txt").exists():
        (folder / "counting.txt").write_text("\n\n".join(texts))
    tokenizer = train_tokenizer(texts, max_length=32)
    return tokenize_corpus([str(folder / "counting.txt")], tokenizer, folder / "shards"), tokenizer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return counting(tmp_path_factory.mktemp("corpus"))


def packed_of(corpus, length=16, causal=False):
    shards, tokenizer = corpus
    return Packed(shards, length, None if causal else (tokenizer.cls_token_id, tokenizer.sep_token_id))


def model_of(tokenizer, auto=AutoModelForMaskedLM, family="bert", scheme="rezero", dropout=0.0, weight_init="bert"):
    torch.manual_seed(0)
    sizes = {"depth": 2, "width": 32, "heads": 2, "max_length": 32, "dropout": dropout}
    names = {"scheme": scheme, "family": family, "weight_init": weight_init}
    return resformer.build_encoder(**sizes, **names, tokenizer=tokenizer, auto=auto)


def run(output, corpus, *, model=None, causal=False, length=16, **given):
    names = ("objective", "held_out", "tokens", "resume", "overwrite", "save_model", "describe")
    others = {name: given.pop(name) for name in names if name in given}
    packed = packed_of(corpus, length, causal)
    settings = Settings(**(SETTINGS | given))
    return pretrain(
        model or model_of(corpus[1]),
        corpus[1],
        packed,
        output,
        settings,
        **({"held_out": 40, "progress": False, "save_model": False} | others),
    )


def log(output):
    return [json.loads(line) for line in (output / "train.jsonl").read_text().splitlines()]


def test_masked_words_are_learned(tmp_path, corpus):
    model = model_of(corpus[1], scheme="pre_ln", weight_init="xavier")
    result = run(
        tmp_path / "run", corpus, model=model, steps=300, learning_rate=3e-3, save_model=True, evaluate_every=100
    )
    metrics = result["metrics"]
    assert result["status"] == "ok"
    assert metrics["unigram_loss"] == pytest.approx(math.log(10), rel=0.02), "ten words, equally frequent"
    assert metrics["loss"] < metrics["unigram_loss"] - 0.5
    assert result["flags"] == []
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    assert result["score"] == -metrics["loss"]
    assert result["best"]["step"] in (100, 200, 300)
    assert result["config"]["samples"] + result["config"]["held_out"] == len(packed_of(corpus))
    assert result["cost"]["tokens_per_second"] == pytest.approx(300 * 8 * 16 / result["cost"]["seconds"])
    again = resformer.from_pretrained(tmp_path / "run" / "model", AutoModelForSequenceClassification)
    assert again.config.num_hidden_layers == 2


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_causal(tmp_path, corpus, family):
    model = model_of(corpus[1], AutoModelForCausalLM, family)
    result = run(tmp_path / "run", corpus, model=model, causal=True, objective="clm", steps=150)
    assert result["metrics"]["loss"] < 0.5 * result["metrics"]["unigram_loss"]


def test_a_run_that_learned_nothing_is_flagged(tmp_path, corpus):
    model = model_of(corpus[1])
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(100.0)  # far too sure of itself
    result = run(tmp_path / "run", corpus, model=model, steps=2, learning_rate=1e-9)
    assert result["flags"] == ["loss_above_chance", "no_context"]


def test_the_loss_of_evaluation_is_that_of_every_masked_token_once(tmp_path, corpus):
    """By hand, on 13 samples in batches of 8, with the head on all tokens."""
    model, packed = model_of(corpus[1]), packed_of(corpus)
    result = run(tmp_path / "run", corpus, model=model, held_out=13, steps=3)
    last = range(len(packed) - 13, len(packed))
    inputs, labels = Text(packed, last, corpus[1], True).hidden(np.arange(13), EVALUATION)
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.from_numpy(inputs)).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(labels).flatten())
    assert result["metrics"]["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert result["cost"]["tokens"] == 3 * 8 * 16


@pytest.mark.parametrize("scheme", ["rezero", "hyper_connections"])
@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "modernbert", "distilbert", "deberta_v2"])
def test_the_head_on_masked_tokens_alone_gives_loss_and_gradients_of_all(corpus, family, scheme):
    model = model_of(corpus[1], family=family, scheme=scheme).eval()
    ids = torch.from_numpy(packed_of(corpus).batch(np.arange(4)))
    labels = torch.where(torch.arange(16) % 5 == 2, ids, -100)
    batch = {"input_ids": ids, "labels": labels}
    head = find_head(model, batch)
    assert head is not None

    def gradients(given):
        model.zero_grad()
        loss = model(**given).loss
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    whole, expected = gradients(batch)
    seen = []
    with picking(model, head):
        hook = head.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
        picked, found = gradients(pick(batch))
        hook.remove()
        again, _ = gradients(batch)  # without positions all are computed
    torch.testing.assert_close(picked, whole)
    torch.testing.assert_close(again, whole)
    assert seen == [(12, 32)], "3 of 16 tokens in each of 4 samples"
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_masks_and_order_follow_from_seed_epoch_and_sample(corpus):
    """Whatever the process, the parts and the step at which a run goes on."""
    text = Text(packed_of(corpus), range(50), corpus[1], True, seed=3)

    def rows(size, begin, processes, steps):
        found = {}
        for rank in range(processes):
            feed = text.batches(8, size, begin, rank, processes)
            for step, parts in zip(range(begin, begin + steps), feed, strict=False):
                for batch, part in parts:
                    if part:
                        pairs = zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
                        found.setdefault(step, set()).update((tuple(x), tuple(y)) for x, y in pairs)
        return found

    whole = rows(None, 0, 1, 15)  # more than two epochs of 6 steps
    assert all(len(step) == 8 for step in whole.values())
    assert rows(3, 0, 3, 15) == whole
    assert rows(2, 9, 1, 6) == {step: whole[step] for step in range(9, 15)}
    assert not whole[0] & whole[6], "the second epoch has other masks"
    again, other = (Text(packed_of(corpus), range(50), corpus[1], True, seed=seed) for seed in (3, 4))
    for epoch, same in ((EVALUATION, True), (0, False)):
        assert np.array_equal(again.hidden(np.arange(9), epoch)[1], other.hidden(np.arange(9), epoch)[1]) == same
    for seed in (3, 4):  # of text that is not masked the order alone
        plain = Text(packed_of(corpus), range(50), corpus[1], False, seed=seed).batches(8, None, 7, 0, 1)
        found = torch.cat([batch["input_ids"] for _, ((batch, _),) in zip(range(5), plain, strict=False)])
        chosen = np.random.default_rng((seed, 1)).permutation(50)[8:48]  # step 7 is the second of the second epoch
        assert np.array_equal(found, packed_of(corpus).batch(chosen))


def test_parts_weigh_by_their_predicted_tokens(tmp_path):
    """Samples of words that the tokenizer does not know have few, or none, that could be predicted."""
    tokenizer = train_tokenizer(["one two three four"] * 3, max_length=32)
    texts = ["one two three four " * 10, "ж " * 42, "one " * 3 + "ж " * 80]
    (tmp_path / "text.txt").write_text("\n\n".join(texts))
    packed = Packed(tokenize_corpus([str(tmp_path / "text.txt")], tokenizer, tmp_path / "shards"), 16, (2, 3))
    text = Text(packed, range(len(packed)), tokenizer, True)
    chosen = np.arange(len(packed))
    labels = text.hidden(chosen, 0)[1]
    counts = (labels != -100).sum(1)
    assert text.counts(chosen).tolist() == counts.tolist()
    assert {0, 2} <= set(counts), "some samples have nothing to predict, most the usual share"
    for processes, size in ((1, None), (1, 1), (2, 2), (3, None), (len(packed) + 2, None)):
        found = [text.parts(chosen, 0, rank, processes, size) for rank in range(processes)]
        parts = [(batch, part) for one in found for batch, part in one]
        assert sum(part for _, part in parts) == pytest.approx(1.0)
        for batch, part in parts:
            assert (batch["labels"] != -100).any(), "the loss of every part is a number"
            assert part in (0.0, pytest.approx(int((batch["labels"] != -100).sum()) / counts.sum()))
    model = model_of(tokenizer).eval()
    with torch.no_grad():
        whole = model(**text.batch(chosen, 0)).loss
        apart = sum(model(**batch).loss * part for batch, part in text.parts(chosen, 0, 0, 1, 1))
    torch.testing.assert_close(apart, whole)


def test_what_could_be_told_without_context(corpus):
    """By hand; and no guess from a token's own place is better than the one that is taken."""
    text = Text(packed_of(corpus), range(150), corpus[1], True)
    held = Text(packed_of(corpus), range(150, 200), corpus[1], True)
    seen = frequencies(text)
    ids = text.packed.batch(range(150)).flatten().tolist()
    ordinary = sorted(set(range(len(corpus[1]))) - set(corpus[1].all_special_ids))
    total = sum(ids.count(i) + 1 for i in ordinary)
    assert seen.tolist() == pytest.approx(
        [(ids.count(i) + 1) / total if i in ordinary else 0 for i in range(len(seen))]
    )
    words = [i for i in held.packed.batch(range(150, 200)).flatten().tolist() if i in ordinary]
    assert unigram_loss(seen, held) == pytest.approx(-sum(math.log(seen[i]) for i in words) / len(words))
    nats = []
    for row, labels in zip(*held.hidden(np.arange(50), EVALUATION), strict=True):
        for given, label in zip(row.tolist(), labels.tolist(), strict=True):
            if label == -100:
                continue
            joint = {
                y: seen[y] * (0.8 if given == corpus[1].mask_token_id else 0.1 * (y == given) + 0.1 / len(ordinary))
                for y in ordinary
            }
            nats.append(-math.log(joint[label] / sum(joint.values())))
    assert context_free_loss(seen, held) == pytest.approx(sum(nats) / len(nats))
    assert context_free_loss(seen, held) < unigram_loss(seen, held) - 0.1


def test_what_is_known_without_context_is_known_of_the_text_for_training(tmp_path, corpus):
    tokenizer = corpus[1]
    (tmp_path / "other.txt").write_text("one two one three one four one " * 40)
    other = Packed(tokenize_corpus([str(tmp_path / "other.txt")], tokenizer, tmp_path / "shards"), 16, (2, 3))
    model = model_of(tokenizer)
    job = pretraining(model, tokenizer, packed_of(corpus), Settings(batch_size=8), held_out=other)
    text, held = (Text(packed, range(len(packed)), tokenizer, True) for packed in (packed_of(corpus), other))
    floors = unigram_loss(frequencies(text), held), context_free_loss(frequencies(text), held)
    assert floors[0] > unigram_loss(frequencies(held), held) + 0.3
    with job.around():
        metrics = job.evaluate(model).metrics
    assert (metrics["unigram_loss"], metrics["context_free_loss"]) == floors


def test_a_scheme_is_calibrated_on_the_whole_first_batch(tmp_path, corpus):
    """However it is divided."""
    model, calibrated = (model_of(corpus[1], scheme="admin", weight_init="xavier") for _ in range(2))
    text = Text(packed_of(corpus), range(len(packed_of(corpus)) - 40), corpus[1], True, seed=5)
    resformer.calibrate(calibrated, text.batch(order(len(text.samples), 5, 0)[:8], 0))
    run(tmp_path / "run", corpus, model=model, steps=1, learning_rate=1e-12, seed=5, micro_batch_size=3)
    torch.testing.assert_close(model.state_dict(), calibrated.state_dict())


def test_flags_of_the_gradients_and_of_the_evaluation(corpus):
    model, settings = model_of(corpus[1]), Settings(batch_size=8, steps=120)
    job = pretraining(model, corpus[1], packed_of(corpus), settings, held_out=40)
    steps = [Step(step, 9.0, 1e-3, 50.0 if step == 100 else 1.0) for step in range(1, 121)]
    last = Evaluation(-9.0, {"loss": 9.0, "unigram_loss": 2.3})
    result = describe_run(Outcome(steps=steps, last=last), job, model, settings)
    assert result["flags"] == ["gradient_spikes", "loss_above_chance", "no_context"]


def test_interrupted_it_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch, corpus):
    from training_runs import stopped_by

    whole = run(tmp_path / "whole", corpus, model=model_of(corpus[1], dropout=0.1), save_every=7, save_model=True)
    with stopped_by(monkeypatch, 31):
        first = run(tmp_path / "run", corpus, model=model_of(corpus[1], dropout=0.1), save_every=7)
    assert first["status"] == "stopped"
    second = run(tmp_path / "run", corpus, model=model_of(corpus[1], dropout=0.1), save_every=7, save_model=True)
    assert log(tmp_path / "run") == log(tmp_path / "whole")
    assert second["metrics"] == whole["metrics"]
    files = [tmp_path / name / "model" / "model.resformer.safetensors" for name in ("run", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_length_in_tokens(tmp_path, corpus):
    result = run(tmp_path / "run", corpus, steps=None, tokens=8 * 16 * 5)
    assert result["config"]["steps"] == result["cost"]["steps"] == 5
    with pytest.raises(ValueError, match="tokens is a length of the run, and so are steps"):
        run(tmp_path / "other", corpus, tokens=100)


def test_what_does_not_fit_is_refused_before_any_work(tmp_path, corpus):
    for given, message in [
        ({"objective": "nsp"}, "unknown objective 'nsp'"),
        ({"objective": "clm"}, "trains a model that ends in LMHeadModel or ForCausalLM, and this is a BertForMaskedLM"),
        ({"length": 33}, "samples have 33 tokens, and the model takes 32"),
        ({"held_out": 10**6}, "too few for one batch of 8"),
        ({"batch_size": 10**6}, "too few for one batch of 1000000"),
        ({"held_out": 0}, "held_out is 0"),
        ({"tokens": 0, "steps": None}, "tokens is 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "run", corpus, **given)
    seeing = AutoModelForCausalLM.from_config(model_of(corpus[1]).config)
    with pytest.raises(ValueError, match="this BertLMHeadModel sees those after it as well; set is_decoder=True"):
        run(tmp_path / "run", corpus, model=seeing, objective="clm", causal=True)
    foreign = corpus[0].folder.parent / "foreign.txt"
    foreign.write_text("ж " * 400)
    shards = tokenize_corpus([str(foreign)], corpus[1], corpus[0].folder.parent / "foreign")
    unknown = Packed(shards, 16, (corpus[1].cls_token_id, corpus[1].sep_token_id))
    with pytest.raises(ValueError, match=r"no token of the .* held-out samples can be predicted"):
        run(tmp_path / "run", corpus, held_out=unknown)
    small = model_of(train_tokenizer(["one two"]))
    with pytest.raises(ValueError, match=r"the tokenizer has 15 tokens, BertForMaskedLM has"):
        run(tmp_path / "run", corpus, model=small)
    assert not (tmp_path / "run").exists()
