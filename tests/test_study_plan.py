"""The plan of a study: ids, order, what is chosen, and what is refused."""

import json
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from resformer.study.plan import RATES, TUNING_SEED, Condition, Facts, Run, Study, arm
from resformer.study.pretraining import Encoder, Pretraining
from resformer.study.problems import Problems
from resformer.study.results import Result
from resformer.study.selection import Choice, choices, chosen
from resformer.study.settings import Settings

CONDITION = Condition("rezero", 16, "sentiment")


def study(**changes):
    axes = {"schemes": ("plain", "pre_ln"), "depths": (2, 16, 8), "tasks": ("sentiment",), "seeds": 2}
    return Study(**{**axes, "learning_rates": (1e-3,), "controls": False, **changes})


def test_an_id_is_the_same_today_and_tomorrow():
    """Written down: a change of this value orphans every study that users have on disk."""
    run = Run(CONDITION, 0, 1e-3, rows_sha256="of the rows")
    assert run.id == "88a493b218a5"
    assert replace(run, seed=0).id == run.id


def test_ids_differ_wherever_what_decides_differs():
    run = Run(CONDITION, 0, 1e-3)
    condition = {"scheme": "pre_ln", "depth": 8, "task": "agreement", "weight_init": "bert", "extra_ffn": 3}
    own = {"seed": 1, "learning_rate": 3e-3, "tuning": True, "rows_sha256": "x"}
    settings = {
        "family": "electra", "width": 64, "heads": 4, "ffn_ratio": 2, "dropout": 0.1, "init": "preserve",
        "batch_size": 64, "warmup": 0.2, "schedule": "cosine", "weight_decay": 0.1, "beta2": 0.9, "epsilon": 1e-8,
        "scheme_lr_multiplier": 2.0, "clip": 0, "precision": "bf16", "max_length": 64, "train_size": 1000, "epochs": 2,
    }  # fmt: skip
    assert {*condition, *own, *settings, "data"} == set(run.config)
    others = [replace(run, condition=replace(CONDITION, **{name: value})) for name, value in condition.items()]
    others += [replace(run, **{name: value}) for name, value in own.items()]
    others += [replace(run, settings=Settings(**{name: value})) for name, value in settings.items()]
    others += [replace(run, settings=Settings(steps=100)), replace(run, encoder="123")]
    assert len({run.id, *(other.id for other in others)}) == 1 + len(others)


def test_where_data_and_checkpoint_lie_does_not_decide():
    places = [Settings(data="here", model="a"), Settings(data="there", model="b")]
    runs = [Run(CONDITION, 0, 1e-3, model_sha256="m", settings=settings) for settings in places]
    assert runs[0].id == runs[1].id
    assert replace(runs[0], model_sha256="n").id != runs[0].id
    assert {"width", "family", "weight_init"}.isdisjoint(runs[0].config)


def test_the_same_said_differently_has_the_same_id():
    ids = [study(learning_rates=rates, settings=Settings(clip=clip)).runs({})[0].id for rates, clip in
           (((1,), 1), ([1.0], 1.0))]  # fmt: skip
    assert ids[0] == ids[1]
    epochs = [Run(replace(CONDITION, task="rte"), 0, 1.0, settings=Settings(epochs=e)).config["epochs"] for e in
              (None, 20, 3)]  # fmt: skip
    assert epochs == [20.0, 20.0, 3.0]


def test_runs_are_balanced_over_seeds_and_start_with_the_deepest():
    runs = study(weight_inits=("bert", "xavier")).runs({})
    assert len(runs) == len(set(runs)) == 2 * 3 * 2 * 2
    assert [run.seed for run in runs] == [0] * 12 + [1] * 12
    assert [run.condition.depth for run in runs[:12]] == [16] * 4 + [8] * 4 + [2] * 4
    assert {run.condition for run in runs[:12]} == {run.condition for run in runs}


def test_options_in_any_order_make_the_same_run():
    texts = ["highway:bias=-2,coupled=true", "highway: coupled=True, bias=-2"]
    first, second = (study(schemes=("pre_ln", text), baseline=text) for text in texts)
    assert [run.id for run in first.runs({})] == [run.id for run in second.runs({})]
    assert first.baseline == second.baseline == texts[0]
    assert study(schemes=("hybrid:placement='pre',x=(1, 2)", "rezero")).schemes == (
        "hybrid:placement=pre,x=(1, 2)",
        "rezero",
    )
    assert study(learning_rates=(1e-3,)).runs({})[0].config["scheme"] == "plain"


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_pieces_are_even_and_no_arm_or_depth_falls_to_one(n):
    one = study(schemes=tuple("abcd"), depths=(2, 4, 8), tasks=("sentiment", "agreement"))
    pieces = [one.piece(i, n) for i in range(n)]
    assert sorted(str(c) for piece in pieces for c in piece) == sorted(map(str, one.conditions()))
    assert max(map(len, pieces)) - min(map(len, pieces)) <= 1
    for name in ("scheme", "depth", "task"):
        for value in {getattr(condition, name) for condition in one.conditions()}:
            assert sum(any(getattr(c, name) == value for c in piece) for piece in pieces) > 1, (name, value)


def test_controls_and_arms():
    one = study(controls=True, facts=Facts(wider={"2": 0, "8": 3, "16": 5}))
    wider = [condition for condition in one.conditions() if condition.extra_ffn]
    assert [(c.scheme, c.depth, c.extra_ffn) for c in wider] == [("pre_ln", 16, 5), ("pre_ln", 8, 3)]
    assert arm(one.runs({})[2].config) == "pre_ln + wider ffn"
    assert arm(one.runs({})[0].config) == "plain"
    assert not any(c.extra_ffn for c in replace(one, controls=False).conditions())


def test_the_width_of_a_depth():
    runs = study(facts=Facts(widths={"2": 48, "8": 24, "16": 16})).runs({})
    assert {run.condition.depth: run.config["width"] for run in runs} == {2: 48, 8: 24, 16: 16}


def test_every_condition_is_tuned_by_itself():
    one = study(learning_rates=(1e-3, 3e-3))
    condition = one.conditions()[0]
    runs = one.tuning(condition)
    assert [(run.seed, run.tuning, run.learning_rate) for run in runs] == [(TUNING_SEED, True, r) for r in (1e-3, 3e-3)]
    assert study().tuning(condition) == []
    assert all(run.learning_rate is None for run in one.runs({}))
    found = one.runs({condition: 3e-3})
    assert {run.condition: run.learning_rate for run in found} == dict.fromkeys(one.conditions()) | {condition: 3e-3}


def result(rate, *, score=0.5, loss=0.7, status="ok"):
    config = {"learning_rate": rate, "task": "sst2"}
    return Result(None, config, status, score, metrics={"loss": loss}, train_loss=0.4)


@pytest.mark.parametrize(
    ("endpoint", "found", "rate", "edge"),
    [
        ("score", {1: {"score": 0.6}, 2: {"score": 0.8}, 3: {"score": 0.7, "loss": 0.1}}, 2, None),
        ("train_loss", {1: {"score": 0.6}, 2: {"score": 0.8}, 3: {"score": 0.7, "loss": 0.1}}, 3, "largest"),
        ("score", {1: {"loss": 0.5}, 2: {"loss": 0.6}, 3: {"loss": 0.6}}, 1, "smallest"),  # equal scores: by loss
        ("score", {1: {"score": 0.1}, 2: {}, 3: {}}, 2, None),  # all equal: the smaller rate
        ("score", {1: {"score": 0.1}, 2: {"status": "diverged", "score": None}, 3: {}}, 3, "largest"),
        ("score", {r: {"status": "diverged", "score": None} for r in (1, 2, 3)}, None, None),
        ("score", {1: {}, 2: {"status": "failed", "score": None}, 3: {}}, None, None),
    ],
)
def test_the_best_rate_of_a_grid(endpoint, found, rate, edge):
    choice = Choice({rate: result(rate, **entry) for rate, entry in found.items()}, endpoint)
    assert (choice.rate, choice.edge) == (rate, edge)


def test_rates_are_chosen_from_what_is_on_disk():
    one = study(depths=(2,), learning_rates=(3e-3, 1e-3))
    plain, pre = one.conditions()

    def look(run):
        assert run.tuning
        if run.condition == plain and run.learning_rate == 1e-3:
            return Result(None, run.config, "unfinished")
        return result(run.learning_rate, status="ok" if run.condition == plain else "diverged", score=None)

    assert chosen(one, look) == {plain: None, pre: 1e-3}  # where all diverged the smallest
    assert list(choices(one, look)[pre].results) == [1e-3, 3e-3]
    assert chosen(study(), look) == {}


def test_encoders_are_shared_by_tasks_and_seeds():
    one = study(tasks=("sentiment", "agreement"), seeds=3, pretraining=Pretraining(["a.txt"], seeds=2))
    encoders = one.encoders()
    assert len(encoders) == len({encoder.id for encoder in encoders}) == 2 * 3 * 2  # schemes, depths, seeds
    by_id = {encoder.id: encoder for encoder in encoders}
    for run in one.runs({}):
        encoder = by_id[run.encoder]
        assert replace(encoder.condition, task="sentiment") == replace(run.condition, task="sentiment")
        assert Encoder.read(json.loads(json.dumps(encoder.config))).id == encoder.id
        assert encoder.seed == run.seed % 2
    moved = replace(one, pretraining=Pretraining(["b.txt"], seeds=2))
    assert moved.encoders()[0].id == encoders[0].id
    other = replace(one, facts=Facts(corpus="another"))
    assert other.encoders()[0].id != encoders[0].id
    assert other.runs({})[0].id != one.runs({})[0].id


def test_rates_by_default():
    assert study(learning_rates=()).learning_rates == RATES
    assert study(learning_rates=(), pretraining=Pretraining(["a"])).learning_rates == (3e-5, 1e-4, 3e-4)
    assert study(learning_rates=(), settings=Settings(model="m")).learning_rates == (3e-5, 1e-4, 3e-4)


@pytest.mark.parametrize("pretraining", [None, Pretraining(["a.txt"], steps=3)])
def test_a_study_goes_through_json(pretraining):
    one = study(facts=Facts({"sentiment": "x"}, widths={"2": 8}, wider={"2": 1}), pretraining=pretraining)
    assert Study.read(json.loads(json.dumps(asdict(one)))) == one
    with pytest.raises(ValueError, match="another version of resformer"):
        Study.read({"schemes": ["plain"], "settings": {"ffn": 3}})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"depths": (2, 0)}, ["depths must be a whole number of at least 1, got 0"]),
        ({"depths": (2, 2.5)}, ["depths must be a whole number of at least 1, got 2.5"]),
        ({"depths": ()}, ["depths must be a list of at least one, got ()"]),
        ({"schemes": "rezero"}, ["schemes must be a list of at least one, got 'rezero'"]),
        ({"schemes": ["a:x=1,y=2", "b", "a:y=2, x=1"]},
         ["schemes has 'a:y=2, x=1' more than once, also written as 'a:x=1,y=2'; give each once"]),
        ({"tasks": ["sentiment", "sentiment"]}, ["tasks has 'sentiment' more than once; give each once"]),
        ({"schemes": ("a", "a", "b", "c", "c")},
         ["schemes has 'a' more than once; give each once", "schemes has 'c' more than once; give each once"]),
        ({"learning_rates": (1, 1.0)}, ["learning_rates has 1.0 more than once, also written as 1; give each once"]),
        ({"schemes": (3,)}, ["schemes must be names of schemes, got 3"]),
        ({"depths": (2, 8, 8)}, ["depths has 8 more than once; give each once"]),
        ({"learning_rates": (float("nan"),)}, ["learning_rates must be a finite number above 0, got nan"]),
        ({"weight_inits": ("zero",)}, ["weight_inits must be among bert, xavier, width_scaled, got 'zero'"]),
        ({"endpoint": "speed"}, ["endpoint must be among score, train_loss, got 'speed'"]),
        ({"baseline": "rezero"}, ["baseline must be one of the schemes: plain, pre_ln, got 'rezero'"]),
        ({"settings": Settings(model="m"), "weight_inits": ("bert", "xavier")},
         ["weight_inits must be left out where a checkpoint brings the weights, got ['bert', 'xavier']"]),
        ({"settings": Settings(model="m"), "pretraining": Pretraining(["a"])},
         ["model must be left out where the study pre-trains encoders, got 'm'"]),
        ({"seeds": 0, "depths": (0,), "learning_rates": (1e-3, -1)},
         ["depths must be a whole number of at least 1, got 0", "seeds must be a whole number of at least 1, got 0",
          "learning_rates must be a finite number above 0, got -1"]),
    ],
)  # fmt: skip
def test_axes_that_make_no_sense_are_refused(changes, says):
    with pytest.raises(Problems) as error:
        study(**changes)
    assert [problem.text for problem in error.value.found] == says


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"width": 0}, "width must be a whole number of at least 1, got 0"),
        ({"steps": True}, "steps must be a whole number"),
        ({"width": 96, "heads": 7}, "heads must be a divisor of the width, 96: 3, 4, 6, 8, got 7"),
        ({"ffn_ratio": 0}, "ffn_ratio must be a finite number above 0, got 0"),
        ({"train_size": 0}, "train_size"),
        ({"warmup": 1.0}, "warmup must be a number of at least 0 and below 1, got 1.0"),
        ({"dropout": -0.1}, "dropout"),
        ({"beta2": 1}, "beta2 must be a number of at least 0 and below 1, got 1"),
        ({"weight_decay": float("inf")}, "weight_decay must be a finite number"),
        ({"scheme_lr_multiplier": "2"}, "scheme_lr_multiplier"),
        ({"max_length": 7}, "max_length must be at least 8 tokens, got 7"),
        ({"init": "random"}, "init must be paper or preserve, got 'random'"),
        ({"steps": 3, "epochs": 1}, "epochs must be left out where steps are given"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, says):
    with pytest.raises(Problems) as error:
        Settings(**changes)
    (problem,) = error.value.found
    assert problem.text.startswith(says)


@pytest.mark.parametrize(
    ("changes", "key"),
    [({"corpus": "a.txt"}, "corpus"), ({"corpus": []}, "corpus"), ({"steps": 0}, "steps"), ({"warmup": 1}, "warmup"),
     ({"learning_rate": 0}, "learning_rate"), ({"weight_decay": -1}, "weight_decay"), ({"seeds": 1.5}, "seeds")],
)  # fmt: skip
def test_pretraining_that_makes_no_sense_is_refused(changes, key):
    with pytest.raises(Problems) as error:
        Pretraining(**{"corpus": ["a.txt"], **changes})
    assert [problem.key for problem in error.value.found] == [key]


def test_planning_and_reading_need_no_torch():
    code = (
        "import sys; import resformer.study.plan, resformer.study.results, resformer.study.selection; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
