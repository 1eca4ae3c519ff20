"""Which parameter is in which group."""

import pytest
import torch
from torch import nn
from training_fakes import tiny_bert

from resformer.optim import describe_groups, param_groups, scheme_parameters
from resformer.schemes.base import Scheme


class Mixing(Scheme):
    """A scheme with a matrix, which must not decay."""

    def __init__(self):
        nn.Module.__init__(self)
        self.mix = nn.Parameter(torch.eye(4))
        self.gate = nn.Linear(4, 4)


def named(model, groups):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["name"]: {names[id(parameter)] for parameter in group["params"]} for group in groups}


def test_every_trainable_parameter_of_a_host_is_in_one_group():
    model = tiny_bert()
    model.bert.pooler.requires_grad_(False)
    groups = param_groups(model, 1e-3)
    members = [parameter for group in groups for parameter in group["params"]]
    assert len({id(parameter) for parameter in members}) == len(members)
    assert {id(p) for p in members} == {id(p) for p in model.parameters() if p.requires_grad}
    found = named(model, groups)
    assert set(found) == {"decayed", "undecayed"}
    assert all(name.endswith("bias") or "LayerNorm" in name for name in found["undecayed"])
    assert "bert.embeddings.word_embeddings.weight" in found["decayed"]


def test_scheme_parameters_never_decay_and_have_their_own_rate():
    model = tiny_bert()
    layer = model.bert.encoder.layer[0]
    layer.resformer = nn.ModuleDict({"attn": Mixing(), "norms": nn.ModuleDict({"pre": nn.LayerNorm(4)})})
    groups = {group["name"]: group for group in param_groups(model, 1e-3, 0.1, 10.0)}
    own = {name for name, _ in model.named_parameters() if ".resformer." in name}
    assert named(model, groups.values())["scheme"] == own
    assert len(scheme_parameters(model)) == len(own) == 5
    assert groups["scheme"]["lr"] == pytest.approx(1e-2)
    assert groups["scheme"]["weight_decay"] == 0
    assert (groups["decayed"]["lr"], groups["decayed"]["weight_decay"]) == (1e-3, 0.1)
    assert groups["undecayed"]["weight_decay"] == 0


def test_schemes_in_a_plain_module_are_found_by_their_class():
    model = nn.Sequential(nn.Linear(4, 4), Mixing())
    found = named(model, param_groups(model, 1e-3))
    assert found == {
        "decayed": {"0.weight"},
        "undecayed": {"0.bias"},
        "scheme": {"1.mix", "1.gate.weight", "1.gate.bias"},
    }


def test_tied_parameters_count_once():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    assert [len(group["params"]) for group in param_groups(model, 1e-3)] == [1]


def test_a_norm_of_two_dimensions_does_not_decay():
    assert [group["name"] for group in param_groups(nn.LayerNorm((3, 4)), 1e-3)] == ["undecayed"]


def test_a_step_of_adamw_leaves_the_scheme_where_its_gradient_is_zero():
    model = nn.Sequential(nn.Linear(4, 4), Mixing())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.AdamW(param_groups(model, 0.1, 0.5)).step()
    after = dict(model.named_parameters())
    torch.testing.assert_close(after["1.mix"].detach(), before["1.mix"], rtol=0, atol=0)
    torch.testing.assert_close(after["0.weight"].detach(), before["0.weight"] * (1 - 0.1 * 0.5))


def test_the_table_has_a_line_for_each_group():
    table = describe_groups(param_groups(nn.Sequential(nn.Linear(40, 40), Mixing()), 5e-5, 0.01, 2.0))
    assert [line.split() for line in table.splitlines()[1:]] == [
        ["decayed", "1", "1,600", "5e-05", "0.01"],
        ["undecayed", "1", "40", "5e-05", "0"],
        ["scheme", "3", "36", "0.0001", "0"],
    ]
    assert max(map(len, table.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0,), "lr is 0.0"),
        ((float("nan"),), "lr is nan"),
        ((1e-3, -1.0), "weight_decay is -1.0"),
        ((1e-3, 0.0, 0.0), "scheme_lr_multiplier is 0.0.*requires_grad_"),
    ],
)
def test_impossible_rates_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        param_groups(nn.Linear(2, 2), *arguments)


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="nothing would be trained"):
        param_groups(nn.Linear(2, 2).requires_grad_(False), 1e-3)
