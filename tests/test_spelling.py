"""How schemes and their options are written."""

import pytest

from resformer.spelling import parse_scheme, with_options


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
        ("a:verify=false", "of resformer.patch and not of a scheme"),
    ],
)
def test_malformed_schemes_are_refused(text, says):
    with pytest.raises(ValueError, match=says) as error:
        parse_scheme(text)
    assert repr(text) in str(error.value)


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
