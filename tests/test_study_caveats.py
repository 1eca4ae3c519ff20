"""What the report says against itself, where the data call for it."""

from dataclasses import replace

import pytest
from study_folders import ended, study, told, write_study

from resformer.study.apart import split
from resformer.study.document import study_document
from resformer.study.plan import Facts, arm
from resformer.study.rates import bounded, grids
from resformer.study.reading import read_runs

RATES = (3e-4, 1e-3, 3e-3)
EQUATIONS = {
    "plain": "x ← N(F(x))",
    "post_ln": "x ← N(x + F(x))",
    "pre_ln": "x ← x + F(N(x))",
    "rezero": "x ← x + a F(x)",
    "denseformer": "x ← Σ_j a_ij X_j, j ≤ i; in the layers x ← N(x + F(x))",
    "static_mix": "x ← Σ_j a_ij X_j, j ≤ i, a_i drawn uniformly",  # as earlier versions wrote it
    "dlcl": "x ← Σ_k W_lk N'_k(y_k), k ≤ l; in the layers x ← x + F(N(x))",
    "res_post_norm": "x ← x + N(F(x))",
    "depth_lstm": "x ← σ(o) ⊙ c, [i f o g] = N'(W [F(x); x] + b)",
}


def caveats(path, words):
    return [text for text in study_document(path)["caveats"] if words in text]


def with_norms(run):
    name = run.condition.scheme
    patched = {"host": "bert", "scheme": name, "placement": "native"}
    return ended(run, 0.8, diagnostics={"equation": EQUATIONS[name]}, patched=patched)


def test_arms_that_differ_in_where_their_norms_act(tmp_path):
    path = write_study(tmp_path / "out", study(tuple(EQUATIONS), (2,)), outcome=with_norms)
    (said,) = caveats(path, "where their norms act")
    for words in (
        "plain, post_ln, denseformer and static_mix are post-LN",
        "pre_ln and dlcl are pre-LN",
        "rezero is without norms",
        "res_post_norm is normed on the branch's output",
        "depth_lstm is normed in another way",
    ):
        assert words in said
    assert caveats(path, "The weights of static_mix are one draw, the same for every seed")
    same = write_study(tmp_path / "same", study(("plain", "post_ln"), (2,)), outcome=with_norms)
    assert not caveats(same, "norms act") + caveats(same, "one draw")


def of_rates(best):
    """A run at `best[arm]` ends lower on the slice; `None`: at chance at every rate."""

    def outcome(run):
        rate = best[run.condition.scheme]
        loss = 0.7 if rate is None else 0.3 if run.learning_rate == rate else 0.4
        return ended(run, 0.8, train_loss=loss, metrics={"majority": 0.5, "loss": loss})

    return outcome


@pytest.mark.parametrize(
    ("best", "edges", "says"),
    [
        ({"pre_ln": 3e-3, "rezero": 1e-3, "plain": None}, 1, "in 1 of 2 cells the largest that was tried (3e-3):"),
        ({"pre_ln": 3e-3, "rezero": 3e-4, "plain": 3e-3}, 3, "3e-3) and in 1 the smallest that was tried (3e-4):"),
        ({"pre_ln": 3e-3, "rezero": 1e-3, "plain": 1e-3}, 1, ""),
        ({"pre_ln": None, "rezero": None, "plain": None}, 0, ""),
    ],
)
def test_a_grid_that_was_too_short(tmp_path, best, edges, says):
    path = write_study(tmp_path / "out", study(tuple(best), (2,), learning_rates=RATES), outcome=of_rates(best))
    reading = read_runs(path)
    (setting,) = split(reading.runs)
    tried = grids(setting, reading)
    assert sum(grid.choice.edge is not None for grid in tried) == edges, "no edge where no rate learned"
    assert says in (said := bounded(tried))
    assert bool(says) == bool(said)


def test_rates_chosen_by_one_loss_and_judged_by_another(tmp_path):
    def outcome(run):
        lower = run.learning_rate == 3e-3 and run.condition.scheme == "rezero"
        chosen = 0.3 if run.learning_rate == 1e-3 else 0.4
        return ended(run, 0.8, train_loss=0.2 if lower else chosen, metrics={"majority": 0.5, "loss": chosen})

    one = study(("pre_ln", "rezero"), (2,), learning_rates=RATES, endpoint="train_loss")
    path = write_study(tmp_path / "out", one, outcome=outcome)
    assert caveats(path, "in 1 of 2 cells another rate ended tuning with a lower training loss, by up to 0.100.")
    assert "spread of loss on the slice" in told(path)
    path = write_study(tmp_path / "score", replace(one, endpoint="score"), outcome=outcome)
    assert not caveats(path, "another rate ended")


def test_parameters_are_compared_without_embeddings(tmp_path):
    def outcome(run):
        scheme = 2_500 * (arm(run.config) == "highway")
        return ended(run, 0.8, cost={"parameters": 90_000 + (10_000 + scheme) * run.condition.depth})

    one = study(("pre_ln", "highway"), (2, 4))
    path = write_study(tmp_path / "out", one, outcome=outcome)
    assert caveats(path, "differ in parameters of their layers by up to 25%")
    cells = {(c["arm"], c["depth"]): c["cost"] for c in study_document(path)["settings"][0]["cells"]}
    assert cells["pre_ln", 2]["layer_parameters"] == 20_000
    assert cells["highway", 4]["layer_parameters"] == 50_000
    shallow = write_study(tmp_path / "one", replace(one, depths=(2,)), outcome=outcome)
    assert caveats(shallow, "differ in parameters by up to 5%")


def test_what_the_measures_cannot_tell(tmp_path):
    def outcome(run):
        flags = ["gradient_spikes"] if run.seed == 0 and run.condition.scheme == "rezero" else []
        cost = {"seconds": 10.0 * (1 + run.seed)}
        return ended(run, 0.8 + run.seed / 100, flags=flags, cost=cost, examples={"validation": 872})

    one = study(("pre_ln", "rezero"), (2,), 3, controls=True, facts=Facts(wider={"2": 0}))
    path = write_study(tmp_path / "out", one, outcome=outcome)
    for words in (
        "872 on sentiment (where an accuracy has a standard error of up to 1.7 points)",
        "In 1 of 6 runs on sentiment a gradient was over 10 times",
        "up to 3.0 times as long as each other (rezero at depth 2), in 2 cells of 2 over 1.5 times",
        "the first window of 25 steps",
        "There is no control with a wider feed-forward at depth 2",
    ):
        assert caveats(path, words), words


def test_sizes_that_can_be_found_are_in_units_of_the_endpoint(tmp_path):
    one = study(("pre_ln", "rezero", "highway"), (2,), 3)
    gains = {"pre_ln": (0, 0, 0), "rezero": (0.01, 0.02, 0.03), "highway": (0.0, 0.04, 0.08)}
    path = write_study(
        tmp_path / "out", one, outcome=lambda run: ended(run, 0.8 + gains[run.condition.scheme][run.seed])
    )
    (said,) = caveats(path, "The first of 2 declared ones")
    assert "0.12 in score at the median spread of the pairs, from 0.046 to 0.18 at the others." in said
