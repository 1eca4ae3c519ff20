"""transformers' own model tests on patched models: each passes what its host passes.

    .venv/bin/python scripts/common_tests.py                               every family with every scheme of SCHEMES
    .venv/bin/python scripts/common_tests.py bert gpt2 --schemes rezero dlcl

Fetches the source archive of the installed transformers, which carries tests/test_modeling_common.py, and runs its
tests on a tiny model of each family: unpatched, and with every model patched that a test constructs. What a run gave
is kept in the cache folder, with its log, and only what is missing there is run, until resformer changes. The exit
status is 1 if any test passes unpatched and fails patched, other than those of INTENDED.

What the archive does not carry is not run: the generation tests, and the tests of a single model. Slow tests, and those
that need the hub, a GPU or another package, skip themselves on both sides.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import functools
import hashlib
import importlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

# What they carry from layer to layer: nothing, nothing (but parameters), nothing (but norms inside the sublayer), all
# former outputs, several streams.
SCHEMES = ["identity", "rezero", "sub_ln", "denseformer", "hyper_connections"]
# Tests that assert what patching changes by intent, of all families or of one, and the reason.
INTENDED = {
    "test_load_save_without_tied_weights": "opens model.safetensors, where patched weights do not lie",
    "test_model_weights_reload_no_missing_tied_weights": "overwrites model.safetensors, likewise",
    "test_can_init_all_missing_weights": "loads no weights; without the scheme's, resformer refuses",
    "t5: test_eager_matches_sdpa_inference_*_fp16_*": "as float16 T5 has parts in float32, which some schemes refuse",
    "t5: test_bc_torch_dtype": "likewise",
    "t5: test_keep_in_fp32_modules": "likewise",
}
BOTH = ("Model", "ModelForSeq2SeqLM", "ModelForSequenceClassification", "ModelForQuestionAnswering")
AUTO = (*BOTH, "ModelForCausalLM", "ModelForMaskedLM", "ModelForTokenClassification", "ModelForMultipleChoice")
TOP = Path(__file__).resolve().parents[1]
RUN = "RESFORMER_COMMON_TESTS"  # in the environment of pytest: the family and the scheme


# ------------------------------------------------------------------------------------------------ what pytest imports


class Tester:
    """What transformers' tests ask about a model: a configuration, inputs, and their sizes."""

    batch_size, seq_length, num_choices, num_hidden_layers, is_training = 7, 7, 3, 2, True

    def __init__(self, family: str, settings: dict[str, Any] | None = None):
        self.family, self.settings = family, settings
        config = self.get_config()
        self.hidden_size, self.num_attention_heads = config.hidden_size, config.num_attention_heads

    def get_config(self) -> Any:
        from resformer.testing.hosts import tiny_config

        # weights that are large enough for what tests change to be seen in what such small models compute
        depth = {"layers": self.num_hidden_layers, "num_hidden_layers": self.num_hidden_layers}  # of both stacks
        config = tiny_config(self.family, **depth, dropout=0.1, initializer_range=0.1)
        if self.settings is not None:
            config.resformer = copy.deepcopy(self.settings)  # as that of every patched model
        return config

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        import torch

        config = self.get_config()
        ids = torch.randint(3, config.vocab_size, (self.batch_size, self.seq_length))
        if config.eos_token_id is not None:  # one, at the end: heads of encoder-decoders read the state there
            ids[ids == config.eos_token_id] = 3
            ids[:, -1] = config.eos_token_id
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if config.is_encoder_decoder:
            given |= {"decoder_input_ids": ids.flip(1), "decoder_attention_mask": torch.ones_like(ids)}
        return config, given


def make_case(family: str, settings: dict[str, Any] | None) -> type:
    """The common tests on all models of a family that have a class of their own."""
    import unittest

    import transformers

    stub("tests.exporters.test_export", "ExportTesterMixin")
    stub("tests.generation.test_utils", "GenerationTesterMixin")
    common = importlib.import_module("tests.test_modeling_common")

    config = Tester(family).get_config()
    heads = BOTH if config.is_encoder_decoder else AUTO  # other heads have one stack, where the tests expect both
    mappings = [getattr(transformers, f"Auto{name}")._model_mapping for name in heads]
    models = [mapping[type(config)] for mapping in mappings if type(config) in mapping]
    body = {
        "all_model_classes": tuple(dict.fromkeys(models)),
        "is_encoder_decoder": config.is_encoder_decoder,
        "test_can_init_all_missing_weights_before_2023": True,
        "test_generation_tester_mixin_inheritance": None,  # asks for the generation tests
        "setUp": lambda self: setattr(self, "model_tester", Tester(family, settings)),
    }
    return type("CommonTest", (common.ModelTesterMixin, unittest.TestCase), body)


def stub(path: str, name: str) -> None:
    """An empty class where the archive lacks a module."""
    for module in (path.rpartition(".")[0], path):
        sys.modules.setdefault(module, ModuleType(module))
    setattr(sys.modules[path], name, type(name, (), {}))


def patch_all(family: str, scheme: str) -> tuple[dict[str, Any], Counter]:
    """Have every model of a family patched when its construction ends. How they are, and how many there were."""
    import transformers

    import resformer
    from resformer.host import find_host
    from resformer.patching import check_still_described
    from resformer.testing.hosts import can_preserve

    resformer.install()
    spec = resformer.families()[family]
    init = "preserve" if can_preserve(scheme, {}, spec.kind) else "paper"
    model = resformer.patch(transformers.AutoModel.from_config(Tester(family).get_config()), scheme, init=init)
    check_still_described(find_host(model))  # now, and kept: the plain model that loading looks at must not be patched
    found: Counter = Counter()
    within: list[Any] = []  # the models under construction, the outermost first

    def patching(construct: Any) -> Any:
        @functools.wraps(construct)
        def constructed(self: Any, *args: Any, **kwargs: Any) -> None:
            within.append(self)
            try:
                construct(self, *args, **kwargs)
            finally:
                within.pop()
            if within or getattr(type(self), "_resformer_loading", False):  # a part; or patched when it is loaded
                return
            if any(p.is_meta for p in self.parameters()):
                found["without weights"] += 1
                return
            resformer.patch(self, scheme, init=init)
            found["patched"] += 1

        return constructed

    for path in {stack.layer.rpartition(".")[0] for stack in spec.stacks}:
        for cls in vars(importlib.import_module(path)).values():
            if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel) and cls.__module__ == path:
                cls.__init__ = patching(cls.__init__)  # type: ignore[misc]
    return model.config.resformer, found


if RUN in os.environ:
    import pytest

    FAMILY, SCHEME = json.loads(os.environ[RUN])
    SETTINGS, FOUND = patch_all(FAMILY, SCHEME) if SCHEME else (None, Counter())
    CommonTest = make_case(FAMILY, SETTINGS)

    @pytest.fixture(scope="session", autouse=True)
    def _count(record_testsuite_property: Any) -> Any:
        yield
        for name, number in FOUND.items():
            record_testsuite_property(name, number)


# ------------------------------------------------------------------------------------------------ what runs pytest


def main() -> None:
    from resformer import families, schemes

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=list(families()), help="default: all")
    parser.add_argument("--schemes", nargs="+", default=SCHEMES, help=f"default: {' '.join(SCHEMES)}")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "resformer_common_tests")
    parser.add_argument("--minutes", type=float, default=30, help="the longest a run of one model may take")
    given = parser.parse_args()
    for name, known in [*((f, families()) for f in given.families), *((s, schemes()) for s in given.schemes)]:
        if name not in known:
            parser.error(f"{name!r} is not known; allowed: {', '.join(known)}")

    root = fetch(given.cache)
    results = given.cache / f"results-{version('transformers')}-{digest()}"
    results.mkdir(exist_ok=True)
    rows, wrong = [], []
    for family in given.families:
        host = run(family, "", root, results, given.minutes)
        for scheme in given.schemes:
            tried = run(family, scheme, root, results, given.minutes)
            same = {"passed": ("passed",), "skipped": ("passed", "skipped")}
            differ = [test for test, kind in host.items() if tried.get(test) not in same.get(kind, tried.values())]
            found = [test for test in differ if not intended(family, test)]
            rows.append((family, scheme, count(host), count(tried), len(differ) - len(found), len(found)))
            wrong += [f"{family} with {scheme}: {test}" for test in found]
    print("\nTests passed/failed/skipped (in part, or whole); those that only the host passes")
    form = "{:16}{:20}{:>14}{:>14}{:>12}{:>8}".format
    print(form("family", "scheme", "host", "patched", "by intent", "else"), *(form(*row) for row in rows), sep="\n")
    print("\nBy intent:", *(f"{test}: {reason}" for test, reason in INTENDED.items()), sep="\n  ")
    print("Else:", *(wrong or ["none"]), sep="\n  ")
    print(f"\nLogs and results: {results}")
    sys.exit(bool(wrong))


def intended(family: str, test: str) -> bool:
    return any(fnmatch.fnmatch(name, known) for known in INTENDED for name in (test, f"{family}: {test}"))


def fetch(cache: Path) -> Path:
    """The folder above transformers' tests, fetched once, and beside it what they import."""
    root = cache / f"transformers-{version('transformers')}"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    if not (cache / "packages").exists():
        subprocess.run(
            [*pip, "install", "--no-deps", "--target", cache / "packages", "parameterized==0.9.0"], check=True
        )
    if not root.exists():
        package = f"transformers=={version('transformers')}"
        source = ["--no-deps", "--no-build-isolation", "--no-binary", ":all:"]
        subprocess.run([*pip, "download", *source, "--dest", cache, package], check=True)
        with tarfile.open(cache / f"{root.name}.tar.gz") as archive:
            members = [one for one in archive if one.name.startswith(f"{root.name}/tests/")]
            archive.extractall(cache, members, filter="data")
    return root


def digest() -> str:
    """Of all that a result depends on besides transformers."""
    files = [Path(__file__), *sorted((TOP / "resformer").rglob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def run(family: str, scheme: str, root: Path, results: Path, minutes: float) -> dict[str, str]:
    """Test -> "passed", "failed" or "skipped"; of a run that was made before, what it gave then."""
    name = f"{family}-{scheme or 'unpatched'}"
    report, log, partial = (results / f"{name}.{end}" for end in ("xml", "log", "partial"))
    if not report.exists():
        print(f"{name} ...", end=" ", flush=True)
        start = time.monotonic()
        env = os.environ | {RUN: json.dumps([family, scheme]), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        env["PYTHONPATH"] = os.pathsep.join(map(str, (root.parent / "packages", root, TOP)))
        options = ["-q", "-c", os.devnull, "--rootdir", root, "-p", "no:cacheprovider", "--tb=short"]
        command = [sys.executable, "-m", "pytest", *options, "--junitxml", partial, __file__]
        with log.open("w") as out:
            status = subprocess.run(
                command, cwd=root, env=env, stdout=out, stderr=subprocess.STDOUT, timeout=60 * minutes
            ).returncode
        if status not in (0, 1):
            sys.exit(f"pytest did not run (status {status}); its words: {log}")
        if scheme and not patched(partial):
            sys.exit(f"no model was patched, so the tests say nothing; their words: {log}")
        partial.rename(report)
        print(f"{time.monotonic() - start:.0f} s", flush=True)
    return outcomes(report)


def patched(report: Path) -> int:
    """How many models were."""
    found = ElementTree.parse(report).iter("property")
    return sum(int(one.attrib["value"]) for one in found if one.attrib["name"] == "patched")


def outcomes(report: Path) -> dict[str, str]:
    """What a report of pytest says of each test. One of which any part was skipped counts as skipped."""
    found: dict[str, str] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        if found.get(case.attrib["name"]) != "failed":
            found[case.attrib["name"]] = outcome
    return found


def count(tests: dict[str, str]) -> str:
    numbers = Counter(tests.values())
    return "/".join(str(numbers[kind]) for kind in ("passed", "failed", "skipped"))


if __name__ == "__main__":
    main()
