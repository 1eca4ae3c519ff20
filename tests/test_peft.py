"""LoRA on patched models: the scheme is trained and saved with the adapter, or a word is said."""

import copy
import warnings

import pytest
import torch
from test_trainer import make_trainer, patched
from transformers import AutoModelForSequenceClassification

import resformer
from resformer import families, schemes
from resformer.layer import Residual
from resformer.testing.hosts import batch, tiny_host

peft = pytest.importorskip("peft")
CLASSIFY = AutoModelForSequenceClassification
pytestmark = [  # what PEFT itself does
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]
HOSTS = [("bert", name) for name in schemes()]
HOSTS += [(family, name) for family in ("gpt2", "modernbert") for name in ("rezero", "hyper_connections", "sub_ln")]


def fresh(family, name):
    return resformer.patch(tiny_host(family, CLASSIFY, layers=2, attention="sdpa"), name, init="paper", verify=False)


def hooked(family: str, name: str) -> list[str]:
    """The projections that a scheme acts inside of."""
    points = [site.points for site in families()[family].stacks[0].sites if not site.when]
    return sorted({at[point].path for at in points for point in schemes()[name].points if point in at})


def lora(family="bert", name="highway", **changes):
    settings = {"task_type": "SEQ_CLS", "target_modules": "all-linear", "modules_to_save": ["resformer"]}
    return peft.LoraConfig(**settings | {"exclude_modules": hooked(family, name) or None} | changes)


def stir(model) -> None:
    """As if trained: every parameter that would be, elsewhere."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))


@pytest.mark.parametrize(("family", "name"), HOSTS)
def test_train_save_reload_merge(tmp_path, family, name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = fresh(family, name)
        bare = copy.deepcopy(model)
    before = model(**batch()).logits
    adapted = peft.get_peft_model(model, lora(family, name)).eval()
    torch.testing.assert_close(adapted(**batch()).logits, before, rtol=1e-12, atol=1e-12)
    assert not [key for key, _ in adapted.named_parameters() if "lora" in key and "resformer" in key]

    assert schemes()[name].card()["reference"][:20] in str(resformer.describe(adapted.base_model.model))

    adapted.train()(**batch(labels=True), use_cache=False).loss.backward()
    trained = {key: p for key, p in adapted.named_parameters() if p.requires_grad}
    own = sum(len(list(m.parameters())) for m in model.modules() if isinstance(m, Residual))
    assert len([key for key in trained if "resformer" in key]) * 2 == own, "original and copy, of which one is trained"
    assert all(p.grad is not None for key, p in trained.items()), [k for k, p in trained.items() if p.grad is None]

    stir(adapted)
    after = adapted.eval()(**batch()).logits
    assert (after - before).abs().max() > 1e-3
    with adapted.disable_adapter():
        torch.testing.assert_close(adapted(**batch()).logits, before, rtol=1e-12, atol=1e-12)

    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path / "adapter").eval()
    torch.testing.assert_close(again(**batch()).logits, after, rtol=1e-12, atol=1e-12)

    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(**batch()).logits, after, rtol=1e-9, atol=1e-9)
    merged.save_pretrained(tmp_path / "merged")
    found = resformer.from_pretrained(tmp_path / "merged", CLASSIFY).eval()
    torch.testing.assert_close(found(**batch()).logits, after, rtol=1e-9, atol=1e-9)
    resformer.unpatch(merged)
    assert merged.state_dict().keys() == tiny_host(family, CLASSIFY).state_dict().keys()


@pytest.mark.parametrize("family", ["bert", "gpt2", "modernbert"])
def test_a_projection_that_a_scheme_acts_inside_of_cannot_be_adapted(family):
    adapted = peft.get_peft_model(fresh(family, "sub_ln"), lora(family, "sub_ln", exclude_modules=None))
    with pytest.raises(ValueError, match=r"scheme 'sub_ln' acts inside it.*exclude_modules=\['att"):
        adapted(**batch())


def test_a_scheme_that_would_be_frozen_and_lost_is_noticed(tmp_path):
    with pytest.warns(UserWarning, match=r"'highway' added will not be trained.*modules_to_save=\[\"resformer\"\]"):
        frozen = peft.get_peft_model(fresh("bert", "highway"), lora(modules_to_save=None))
    frozen.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="will not be trained"):
        fresh("bert", "highway").add_adapter(lora(modules_to_save=None))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*will not be trained")
        peft.PeftModel.from_pretrained(fresh("bert", "highway"), tmp_path)  # for inference
        peft.get_peft_model(fresh("bert", "post_ln"), lora(modules_to_save=None))  # nothing to train
        peft.get_peft_model(tiny_host("bert", CLASSIFY), lora(modules_to_save=None))


def test_an_adapter_of_a_patched_model_needs_one(tmp_path):
    peft.get_peft_model(fresh("bert", "highway"), lora()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"BertForSequenceClassification is not patched.*resformer.patch"):
        peft.PeftModel.from_pretrained(tiny_host("bert", CLASSIFY), tmp_path)


@pytest.mark.parametrize("name", ["rezero", "post_ln", "concat"])  # with other parameters, and with none
def test_an_adapter_of_another_scheme_is_refused(tmp_path, name):
    peft.get_peft_model(fresh("bert", "highway"), lora()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"patched in another way: for scheme '{name}', as here, its file lacks"):
        peft.PeftModel.from_pretrained(fresh("bert", name), tmp_path)


def test_trainer_resumes_and_finds_the_best_adapter(tmp_path):
    def adapted():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return peft.get_peft_model(patched("bert", "highway"), lora())

    scores = iter([0.0, 1.0, 0.5])
    best = {"load_best_model_at_end": True, "metric_for_best_model": "score", "eval_strategy": "steps", "eval_steps": 2}
    model = adapted()
    trainer = make_trainer(model, tmp_path, metrics=lambda prediction: {"score": next(scores)}, **best)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    resumed = adapted()
    make_trainer(resumed, tmp_path / "again").train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for found, checkpoint in ((model, "checkpoint-4"), (resumed, "checkpoint-6")):
        saved = peft.PeftModel.from_pretrained(patched("bert", "highway"), tmp_path / checkpoint)
        expected = peft.get_peft_model_state_dict(saved)
        assert any("resformer" in key for key in expected)
        for key, value in peft.get_peft_model_state_dict(found).items():
            assert torch.equal(value, expected[key]), key
