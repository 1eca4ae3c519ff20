"""Signal propagation against slow loops on the hidden states, and closed forms."""

import itertools
import math

import pytest
import torch
from diagnosed import given, subject

import resformer
from resformer.diagnostics.signal_propagation import angle, cka, effective_rank, signal_propagation


def states_of(model, inputs):
    """What each layer reads and what the last one gives, from the unpatched model."""
    with torch.no_grad():
        states = list(model.base_model(**inputs, output_hidden_states=True).hidden_states)
    return states


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_against_loops_over_the_hidden_states(family):
    model, inputs = subject(family), given(family)
    rows = [row for row in signal_propagation(model, inputs).rows if row["site"] in ("attn", "end")]
    del inputs["labels"]
    texts = inputs["attention_mask"].sum(1).tolist()
    states = states_of(model, inputs)
    embedded = [states[0][text, t].tolist() for text in range(2) for t in range(texts[text])]
    for row, state in zip(rows, states[:3], strict=False):
        tokens = [state[text, t].tolist() for text in range(2) for t in range(texts[text])]
        flat = [x for token in tokens for x in token]
        assert row["state"] == pytest.approx(math.sqrt(sum(x * x for x in flat) / len(flat)), rel=1e-9)
        spread = [sum((x - sum(token) / len(token)) ** 2 for x in token) / len(token) for token in tokens]
        assert row["variance"] == pytest.approx(sum(spread) / len(spread), rel=1e-9)
        turned = [cosine(a, b) for a, b in zip(tokens, embedded, strict=True)]
        assert row["input_cosine"] == pytest.approx(sum(turned) / len(turned), rel=1e-9)
        means = []
        for text in range(2):
            own = [state[text, t].tolist() for t in range(texts[text])]
            pairs = [cosine(a, b) for a, b in itertools.permutations(own, 2)]
            means.append(sum(pairs) / len(pairs))
        assert row["token_cosine"] == pytest.approx(sum(means) / 2, rel=1e-9)
        x = torch.tensor(tokens, dtype=torch.float64)
        sizes = torch.linalg.svdvals(x - x.mean(0))
        p = sizes[sizes > 1e-9 * sizes[0]] / sizes.sum()
        assert row["rank"] == pytest.approx(math.exp(-sum(q * math.log(q) for q in p.tolist())), rel=1e-6)


def test_branches_and_norms_of_a_pre_ln_host():
    model, inputs = subject("gpt2"), given("gpt2")
    rows = signal_propagation(model, inputs).rows
    seen = {}
    model.transformer.h[1].ln_2.register_forward_hook(lambda _, args, out: seen.update(read=args[0], normed=out))
    model.transformer.h[1].mlp.register_forward_hook(lambda _, args, out: seen.update(wrote=out))
    with torch.no_grad():
        model(**inputs)
    text = inputs["attention_mask"] > 0
    size = {name: float(x[text].square().mean().sqrt()) for name, x in seen.items()}
    row = next(row for row in rows if (row["layer"], row["site"]) == (1, "ffn"))
    assert row["branch"] == pytest.approx(size["wrote"], rel=1e-9)
    assert row["ratio"] == pytest.approx(size["wrote"] / size["read"], rel=1e-9)
    assert row["pre_norm"] == pytest.approx(size["normed"] / size["read"], rel=1e-9)
    assert row["carried"] == pytest.approx(row["state"], rel=1e-9)
    assert "post_norm" not in row
    after = next(row for row in rows if (row["layer"], row["site"]) == (2, "attn"))
    total = seen["read"] + seen["wrote"]
    assert after["state"] == pytest.approx(float(total[text].square().mean().sqrt()), rel=1e-9)
    turned = [math.acos(cosine(a, b)) for a, b in zip(seen["read"][text].tolist(), total[text].tolist(), strict=True)]
    assert row["angle"] == pytest.approx(sum(turned) / len(turned) / math.pi, rel=1e-9)


def test_the_norm_after_the_add():
    model, inputs = subject("bert"), given("bert")
    row = signal_propagation(model, inputs).rows[1]
    seen = {}
    norm = model.bert.encoder.layer[0].output.LayerNorm
    norm.register_forward_hook(lambda _, args, out: seen.update(read=args[0], normed=out))
    with torch.no_grad():
        model(**inputs)
    text = inputs["attention_mask"] > 0
    expected = seen["normed"][text].norm() / seen["read"][text].norm()
    assert row["post_norm"] == pytest.approx(float(expected), rel=1e-9)
    assert "pre_norm" not in row


def test_several_streams_and_a_history():
    """What is read is one state; what is carried is all of it."""
    copies = signal_propagation(resformer.patch(subject("gpt2"), "hyper_connections"), given("gpt2"))
    assert copies.rows[0]["carried"] == pytest.approx(copies.rows[0]["state"], rel=1e-9)  # of one state
    model, inputs = subject("bert", "denseformer"), given("bert")
    rows = signal_propagation(model, inputs).rows
    kept = {}
    model.bert.encoder.layer[1].register_forward_hook(lambda _, args, out: kept.update(stream=out[1:]))
    with torch.no_grad():
        model(**inputs)
    assert len(kept["stream"]) == 4  # the state, and the outputs of the embedding and two layers
    text = inputs["attention_mask"] > 0
    values = torch.cat([tensor[text].flatten() for tensor in kept["stream"]])
    row = next(row for row in rows if (row["layer"], row["site"]) == (2, "attn"))
    assert row["carried"] == pytest.approx(float(values.square().mean().sqrt()), rel=1e-9)
    assert row["state"] == pytest.approx(float(kept["stream"][0][text].square().mean().sqrt()), rel=1e-9)


def test_rank_of_known_spectra():
    eye = torch.eye(6, dtype=torch.float64)
    assert effective_rank(eye[:4]) == pytest.approx(4)
    assert effective_rank(torch.outer(torch.arange(1.0, 5), torch.arange(1.0, 9)).double()) == pytest.approx(1)
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0])).double()) == pytest.approx(
        math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    )
    assert effective_rank(torch.zeros(3, 5).double()) == 0


def test_small_angles():
    unit = lambda x: torch.nn.functional.normalize(x, dim=-1)
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    for size in (1e-9, 0.3, 3.0):
        turn = torch.tensor([[math.cos(size), -math.sin(size)], [math.sin(size), math.cos(size)]], dtype=torch.float64)
        assert angle(unit(x), unit(5 * x @ turn.T)) == pytest.approx(size / math.pi, rel=1e-6)


def test_cka_is_the_mean_over_four_different_tokens():
    """HSIC of Song et al.: K_ij (L_ij + L_qr - 2 L_iq) over all i, j, q, r that differ."""
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(6, 3, generator=generator, dtype=torch.float64) for _ in range(2)]
    states.append(states[0] @ torch.linalg.qr(states[1][:3])[0] * 7)  # turned and scaled: the same
    grams = [(x - x.mean(0)) @ (x - x.mean(0)).T for x in states]

    def hsic(k, other):
        terms = [
            k[i][j] * (other[i][j] + other[q][r] - 2 * other[i][q])
            for i, j, q, r in itertools.permutations(range(6), 4)
        ]
        return sum(terms) / len(terms)

    found, lists = cka(grams), [gram.tolist() for gram in grams]
    scale = [math.sqrt(hsic(k, k)) for k in lists]
    for i, j in itertools.product(range(3), repeat=2):
        assert found[i][j] == pytest.approx(hsic(lists[i], lists[j]) / scale[i] / scale[j], abs=1e-10)
    assert found[0][2] == pytest.approx(1)


def test_growth_of_a_stream_that_is_multiplied():
    model = subject("gpt2", "scaled", layers=4, shortcut=1.5, branch=1e-9, learned=False)
    measured = signal_propagation(model, given("gpt2"))
    assert measured.facts["growth"] == pytest.approx(1.5**4, rel=1e-6)  # of the variance, over two sites
    assert measured.facts["growth_r2"] == pytest.approx(1)
    assert measured.column("token_cosine")[0] == pytest.approx(measured.column("token_cosine")[-1], rel=1e-6)


def test_two_stacks_have_a_matrix_each():
    measured = signal_propagation(subject("t5"), given("t5"))
    assert set(measured.matrices) == {"cka encoder", "cka decoder"}
    assert len(measured.matrices["cka decoder"]) == 3 * 3 + 1
    assert {row["stack"] for row in measured.rows} == {"encoder", "decoder"}
