"""The plan of a study: ids, order, and what is refused."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest

from resformer.spelling import parse_scheme, with_options
from resformer.study.plan import Run, Settings, Study


def study(**changes):
    axes = {"schemes": ("plain", "pre_ln"), "depths": (2, 16, 8), "tasks": ("sentiment",), "seeds": 2}
    return Study(**{**axes, **changes})


def test_an_id_is_the_same_today_and_tomorrow():
    """Written down: a change of this value orphans every study that users have on disk."""
    run = Run("rezero", 16, "sentiment", 0, 1e-3)
    assert run.id == "5956fddad10f"
    assert replace(run, seed=0).id == run.id


def test_ids_differ_wherever_a_field_differs():
    run = Run("rezero", 16, "sentiment", 0, 1e-3)
    changed = {"scheme": "pre_ln", "depth": 8, "task": "agreement", "seed": 1, "learning_rate": 3e-3}
    settings = {
        "width": 64, "heads": 4, "ffn": 64, "dropout": 0.1, "init": "preserve", "weight_init": "bert", "steps": 500,
        "batch_size": 64, "warmup": 0.1, "schedule": "linear", "weight_decay": 0.1, "scheme_lr_multiplier": 2.0,
        "clip": 0, "precision": "bf16", "max_length": 64, "train_size": 1000, "data": "glue",
    }  # fmt: skip
    assert {*changed, *settings} == set(run.config)
    others = [replace(run, **{name: value}) for name, value in changed.items()]
    others += [replace(run, settings=Settings(**{name: value})) for name, value in settings.items()]
    assert len({run.id, *(other.id for other in others)}) == 1 + len(others)


def test_the_same_said_differently_has_the_same_id():
    assert Settings() == Settings(ffn=128, dropout=0, warmup=0, clip=1)
    ids = [[run.id for run in study(learning_rates=rates).runs()] for rates in ((1,), [1.0])]
    assert ids[0] == ids[1]


def test_runs_are_balanced_over_seeds_and_start_with_the_deepest():
    runs = study(learning_rates=(1e-3, 3e-3)).runs()
    assert len(runs) == len(set(runs)) == 2 * 3 * 2 * 2
    assert [run.seed for run in runs] == [0] * 12 + [1] * 12
    assert [run.depth for run in runs[:12]] == [16] * 4 + [8] * 4 + [2] * 4
    half = {(run.scheme, run.depth, run.learning_rate) for run in runs[:12]}
    assert half == {(run.scheme, run.depth, run.learning_rate) for run in runs}


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("rezero", "rezero", {}),
        (" exclusive_gate:bias=0 ", "exclusive_gate", {"bias": 0}),
        ("hyper_connections:num_streams=4,placement=pre", "hyper_connections", {"num_streams": 4, "placement": "pre"}),
        ("a: x = -1e-3 , y = (1, 2), z='a,b'", "a", {"x": -1e-3, "y": (1, 2), "z": "a,b"}),
        ("a:x=True,y=None,z=pre-ln", "a", {"x": True, "y": None, "z": "pre-ln"}),
    ],
)
def test_schemes_are_read(text, name, options):
    assert parse_scheme(text) == (name, options)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "NAME:OPTION=VALUE"),
        ("rezero:", "NAME:OPTION=VALUE"),
        (":x=1", "NAME:OPTION=VALUE"),
        ("pre-ln", "NAME:OPTION=VALUE"),
        ("a:0.5", "NAME:OPTION=VALUE"),
        ("a:x=", "NAME:OPTION=VALUE"),
        ("a:x=1)(y=2", "NAME:OPTION=VALUE"),
        ("a:x=1) or f(y=2", "NAME:OPTION=VALUE"),
        ("a:x=1\0", "NAME:OPTION=VALUE"),
        ("a:**{'x': 1}", "need a name"),
        ("a:x=1,x=2", "'x' is given twice"),
    ],
)
def test_malformed_schemes_are_refused(text, says):
    with pytest.raises(ValueError, match=says) as error:
        parse_scheme(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"depths": (2, 0)}, "depths must be a whole number of at least 1, got 0"),
        ({"depths": (2, 2.5)}, "got 2.5"),
        ({"depths": ()}, "depths must be a list of at least one"),
        ({"schemes": "rezero"}, "schemes must be a list"),
        ({"schemes": ["a:x=1,y=2", "b", "a:y=2, x=1"]}, "schemes has 'a:x=1,y=2' 2 times"),
        ({"schemes": ["a", "b:"]}, "cannot read scheme 'b:'"),
        ({"tasks": ["sentiment", "sentiment"]}, "tasks has 'sentiment' 2 times"),
        ({"depths": (2, 8, 8)}, "depths has 8 2 times"),
        ({"seeds": 0}, "seeds must be a whole number of at least 1, got 0"),
        ({"learning_rates": (1e-3, 0)}, "learning_rates must be a finite number above 0, got 0"),
        ({"learning_rates": (float("nan"),)}, "got nan"),
    ],
)
def test_axes_that_make_no_sense_are_refused(changes, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        study(**changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"width": 0}, "width must be a whole number of at least 1, got 0"),
        ({"steps": True}, "steps must be a whole number"),
        ({"batch_size": -1}, "batch_size"),
        ({"width": 96, "heads": 7}, "got heads 7 with width 96; choose heads among 3, 4, 6, 8"),
        ({"ffn": 0}, "ffn"),
        ({"train_size": 0}, "train_size"),
        ({"warmup": 1.0}, "warmup must be at least 0 and below 1, got 1.0"),
        ({"dropout": -0.1}, "dropout"),
        ({"weight_decay": float("inf")}, "weight_decay must be a finite number"),
        ({"clip": -1}, "clip must be a finite number of at least 0"),
        ({"scheme_lr_multiplier": "2"}, "scheme_lr_multiplier"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        Settings(**changes)


def test_planning_and_reading_need_only_the_standard_library():
    code = (
        "import sys; before = set(sys.modules); import resformer.study.plan, resformer.study.results; "
        "names = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "sys.exit(', '.join(sorted(names - set(sys.stdlib_module_names) - {'resformer'})) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------- options of a scheme


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ('{"bias": 0}', {"bias": 0}),
        ('{"a": -1.5e-3, "b": true, "c": null, "d": "x, y", "e": [1, 2]}',
         {"a": -1.5e-3, "b": True, "c": None, "d": "x, y", "e": [1, 2]}),
        ("{}", {}),
    ],
)  # fmt: skip
def test_options_as_json(given, read):
    assert parse_scheme(with_options("exclusive_gate", given)) == ("exclusive_gate", read)


def test_without_options():
    assert with_options("rezero", None) == "rezero"
    assert with_options(None, None) is None


@pytest.mark.parametrize(
    ("scheme", "options", "message"),
    [
        ("rezero", "{bias: 0}", r"cannot read the scheme options '\{bias: 0\}'.*line 1 column 2.*write a JSON object"),
        ("rezero", "", "cannot read the scheme options ''"),
        ("rezero", "[1]", "are no JSON object; write a JSON object"),
        ("rezero", '{"a": NaN}', "NaN is no JSON number"),
        ("rezero", '{"a": 1, "a": 2}', "'a' is there twice"),
        ("rezero", '{"a b": 1}', "hold 'a b', which is no name"),
        (None, '{"a": 1}', "are of a scheme; give the scheme as well"),
        ("rezero:a=1", '{"b": 1}', "use one of the two ways"),
    ],
)
def test_bad_options(scheme, options, message):
    with pytest.raises(ValueError, match=message):
        with_options(scheme, options)
