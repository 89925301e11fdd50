"""`import prunelab`: what it offers, that it is light, and that its functions do what the classes do."""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import prunelab
from prunelab.common.core import index
from prunelab.common.core.errors import PrunelabError
from prunelab.methods.lexrank.method import LexRank
from prunelab.methods.tome.method import ToMe

ROOT = Path(__file__).resolve().parents[3]
HEAVY = ("torch", "numpy", "transformers", "timm", "PIL", "snakemake")
LIGHT = {
    "import": "prunelab.list_methods('fast*'); prunelab.describe('fastv'); prunelab.Budget(0.5)",
    "list": "from prunelab.common.cli import app; app(['list'], standalone_mode=False)",
    "show": "from prunelab.common.cli import app; app(['show', 'zero_tprune'], standalone_mode=False)",
    "plan": "from prunelab.common.cli import app; app(['plan'], standalone_mode=False)",
}


@pytest.mark.parametrize("code", LIGHT.values(), ids=LIGHT)
def test_what_only_tells_loads_no_library_of_models(code):
    check = f"import sys, prunelab; {code}; print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stderr.strip().endswith("[]"), done.stderr


def test_every_name_is_there_and_for_type_checkers_too():
    tree = ast.parse((ROOT / "prunelab" / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("prunelab.")
        for alias in node.names
    }
    homes = {name: f"prunelab.common.{home}" for home, names in prunelab._HOMES.items() for name in names}
    assert typed == homes
    for name in prunelab.__all__:
        assert getattr(prunelab, name) is not None and name in dir(prunelab)
        assert name not in homes or getattr(prunelab, name) is getattr(importlib.import_module(homes[name]), name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        prunelab.nothing  # noqa: B018


def test_no_option_has_the_name_of_an_argument():
    """Else it could not be given as a keyword."""
    uses = {"weight_pruner": prunelab.prune, "training_method": prunelab.prune, "ranker": prunelab.summarise}
    for entry in index.entries().values():
        taken = inspect.signature(uses.get(entry.role, prunelab.apply)).parameters.keys() - {"options"}
        taken -= {"seed"}  # which a method's own gets, too
        assert taken.isdisjoint(option.name for option in entry.options), entry


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4).eval()


def test_apply_by_name_with_options_is_apply_of_the_instance(vit):
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        with prunelab.apply("tome", vit, "3removed", proportional=False) as named:
            by_name, saved = vit(x), named.report()
        with prunelab.apply(ToMe(proportional=False), vit, prunelab.Budget(3, "removed")) as made:
            assert torch.equal(vit(x), by_name) and made.report() == saved
        with prunelab.apply("zero_tprune", vit, (0.9, 0.5), layers=(1, 2)) as handle:
            vit(x)
    assert handle.report().macs < handle.report().dense_macs


@pytest.fixture(scope="module")
def decoder():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, max_position_embeddings=64, **sizes)).eval()


def test_prune_and_summarise(decoder):
    plan = prunelab.prune("magnitude", copy.deepcopy(decoder), 0.5, progress=False)
    assert plan.report.sparsity == pytest.approx(0.5, abs=0.01)
    text = "Tokens cost time. Pruning tokens saves time. The weather was fine."
    kept = prunelab.summarise("lexrank", text, "1count", centrality="continuous")
    assert kept == LexRank(centrality="continuous").summarise(
        text.replace(". ", ".|").split("|"), prunelab.Budget(1, "count")
    )


def test_supports_gives_one_answer_for_every_role(vit, decoder):
    assert prunelab.supports("zero_tprune", vit, layers=(0,)) is True
    why = prunelab.supports("divprune", vit)
    assert not why and "packed" in why and "\n" not in why
    assert "layers 0 to 3" in str(prunelab.supports("zero_tprune", vit))
    for name in ("snapkv", "token_recycling", "wanda", "lazyllm"):
        assert prunelab.supports(name, decoder) is True, name
        assert not prunelab.supports(name, torch.nn.Linear(2, 2)), name
    assert not prunelab.supports("snapkv", vit) and not prunelab.supports("token_recycling", vit)
    assert "prunelab.summarise" in str(prunelab.supports("lexrank", vit))
    for name in prunelab.list_methods():
        answer = prunelab.supports(name, decoder)
        assert answer is True or (isinstance(answer, str) and "\n" not in answer), name
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in decoder.modules())


def test_list_methods_by_pattern_role_and_family():
    assert prunelab.list_methods("fast*") == ["fastervlm", "fastv", "fastvid"]
    assert "snapkv" in prunelab.list_methods(role="cache_pruner")
    assert set(prunelab.list_methods(family="text")) >= {"lexrank", "lead"}
    with pytest.raises(PrunelabError, match="there are cache_pruner"):
        prunelab.list_methods(role="token")
    assert "layer = 2: a whole number of at least 0" in str(prunelab.describe("fastv"))


MISTAKES = [
    (lambda vit: prunelab.apply("tomme", vit, 0.5), "did you mean tome"),
    (lambda vit: prunelab.apply("tome", vit, 0.5, proportion=True), "did you mean proportional"),
    (lambda vit: prunelab.apply("tome", vit, 0.5, proportional="no"), "proportional must be true or false, not 'no'"),
    (lambda vit: prunelab.apply("tome", vit, 64), "64count"),
    (lambda vit: prunelab.apply(ToMe(), vit, 0.5, proportional=True), "has its options already"),
    (lambda vit: prunelab.apply(3, vit, 0.5), "is no method"),
    (lambda vit: prunelab.apply("wanda", vit, 0.5), "prunelab.prune"),
    (lambda vit: prunelab.apply("lexrank", vit, 0.5), "prunelab.summarise"),
    (lambda vit: prunelab.prune("tome", vit, 0.5), "prunes no weights"),
    (lambda vit: prunelab.summarise("tome", "A text.", 1.0), "ranks no sentences"),
]


@pytest.mark.parametrize(("call", "message"), MISTAKES, ids=[m for _, m in MISTAKES])
def test_mistakes_are_one_line_before_any_work(call, message, vit):
    with pytest.raises(PrunelabError) as error:
        call(vit)
    assert message in str(error.value) and "\n" not in str(error.value)
