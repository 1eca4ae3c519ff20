"""Kinds of models that cannot be patched: each is one clear error, and the model stays as it was."""

import socket
import warnings

import pytest
import torch
from torch import distributed, nn
from transformers import AutoModelForSequenceClassification
from wrong_specs import refused

import resformer
from resformer.testing.hosts import batch, tiny_host

CLASSIFY = AutoModelForSequenceClassification


def dynamic(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


class FakeLinear(nn.Module):
    pass


def test_quantized_models_are_refused(monkeypatch):
    with warnings.catch_warnings():  # torch.ao is to move
        warnings.simplefilter("ignore")
        model = dynamic(tiny_host("bert", dtype=torch.float32))
    with pytest.raises(ValueError, match=r"quantized model .'encoder.layer.0.attention.self.query' is a torch.ao"):
        resformer.patch(model, "rezero")
    for module in ("bitsandbytes.nn.modules", "torchao.dtypes", "optimum.quanto.nn"):
        monkeypatch.setattr(FakeLinear, "__module__", module)
        model = tiny_host("bert")
        model.encoder.layer[0].intermediate.dense.quantized = FakeLinear()
        with refused(model, f"quantized model .* is a {module}.FakeLinear"):
            resformer.patch(model, "rezero")
    model = tiny_host("bert")
    model.is_quantized = True
    with refused(model, r"\(is_quantized\); patch the full-precision model"):
        resformer.patch(model, "rezero")
    model = tiny_host("bert")
    model.config.quantization_config = {"quant_method": "gptq"}
    with refused(model, r"\(config.quantization_config\)"):
        resformer.patch(model, "rezero")
    for dtype in (torch.uint8, torch.float8_e4m3fn):
        model = tiny_host("bert")
        dense = model.encoder.layer[1].output.dense
        dense.weight = nn.Parameter(torch.zeros(16, 20, dtype=dtype), requires_grad=False)
        with pytest.raises(ValueError, match=f"'encoder.layer.1.output.dense.weight' is of {dtype}"):
            resformer.patch(model, "rezero")


def test_layerdrop_is_refused_where_a_stream_is_carried():
    for key in ("layerdrop", "encoder_layerdrop"):
        model = tiny_host("bert")
        setattr(model.config, key, 0.1)
        with refused(model, f"config.{key} = 0.1 leaves layers out"):
            resformer.patch(model, "denseformer")
        refusing = str(resformer.describe(model)).partition("refused by")[2]
        assert "denseformer" in refusing
        assert "rezero" not in refusing
        resformer.patch(model, "rezero")


def test_values_of_the_first_layer_need_every_layer_too():
    model = tiny_host("opt")
    model.config.layerdrop = model.decoder.layerdrop = 0.5
    with pytest.raises(ValueError, match="needs every layer of a forward pass"):
        resformer.patch(model, "value_residual")


def test_models_that_are_wrapped_or_shared_out_are_patched_before():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    mesh = init_device_mesh("cpu", (1,))

    def shard(model):
        for layer in model.encoder.layer:
            fully_shard(layer, mesh=mesh)
        return model

    wrappers = {
        "DistributedDataParallel": nn.parallel.DistributedDataParallel,
        "DataParallel": nn.DataParallel,
        "FullyShardedDataParallel": lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu")),
        "OptimizedModule": torch.compile,
    }
    try:
        for name, wrap in wrappers.items():
            with pytest.raises(ValueError, match=f"this {name} holds a model; patch the model itself before wrapping"):
                resformer.patch(wrap(tiny_host("bert")), "rezero")
        for model in (shard(tiny_host("bert")), fully_shard(tiny_host("bert"), mesh=mesh)):
            with pytest.raises(ValueError, match=r"is sharded .FSDP.; patch the model before fully_shard"):
                resformer.patch(model, "rezero")
        patched = shard(resformer.patch(tiny_host("bert"), "rezero"))
        with pytest.raises(ValueError, match=r"is sharded .FSDP.; unpatch the model before"):
            resformer.unpatch(patched)
        assert "rezero" in str(resformer.describe(patched))
    finally:
        distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # what PEFT itself does
def test_adapters_are_put_on_after_patching():
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(task_type="SEQ_CLS", target_modules="all-linear")
    model = peft.get_peft_model(tiny_host("bert", CLASSIFY), lora)
    for wrapper in (model, model.base_model):
        with pytest.raises(ValueError, match=f"this {type(wrapper).__name__} holds a model; patch the model itself"):
            resformer.patch(wrapper, "rezero")


def test_a_forward_that_was_exchanged_is_noticed():
    """As accelerate does for mixed precision and for parts on several devices."""
    for pick in (lambda model: model, lambda model: model.bert, lambda model: model.bert.encoder.layer[1]):
        model = tiny_host("bert", CLASSIFY)
        module = pick(model)
        module.forward = module.forward
        with refused(model, "has a forward of its own"):
            resformer.patch(model, "rezero")


def test_compiled_in_place_is_compiled_anew():
    model = tiny_host("bert", CLASSIFY, dtype=torch.float32)
    model.compile(backend="eager")
    before = model(**batch()).logits
    resformer.patch(model, "plain", init="paper")
    expected = resformer.patch(tiny_host("bert", CLASSIFY, dtype=torch.float32), "plain", init="paper")(
        **batch()
    ).logits
    torch.testing.assert_close(model(**batch()).logits, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, before, atol=1e-2)
    torch._dynamo.reset()


def test_a_subclass_with_another_forward_is_refused():
    class Other(type(tiny_host("bert").encoder.layer[0])):
        def forward(self, *args, **kwargs):
            return 2 * super().forward(*args, **kwargs)

    model = tiny_host("bert")
    for layer in model.encoder.layer:
        layer.__class__ = Other
    with refused(model, "no family describes this BertModel.*Other.*exact class.*register_family"):
        resformer.patch(model, "rezero")


def test_an_unpatched_model_is_described_with_why_schemes_are_refused():
    text = " ".join(str(resformer.describe(tiny_host("albert"))).split())
    assert "normformer: acts inside the sublayers (o, down), which all layers of this AlbertModel share" in text
    model = resformer.patch(tiny_host("t5"), "highway", layers={"decoder": range(2)})
    text = " ".join(str(resformer.describe(model)).split())
    assert "encoder layers 3, not patched: as the host has them" in text
    assert "decoder layers 0 to 1 of 2" in text
