"""Models as people have them: wrapped, hooked, compiled, offloaded, pruned before, sharing a config; experts that no
token reached; families that name their parts otherwise."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

from prunelab.common.apply import apply
from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights import WeightPlan, load_pruned, prune, save_pruned
from prunelab.common.weights.adapters import weight_adapter
from prunelab.common.weights.pruning import check
from prunelab.methods.darex.method import Dare
from prunelab.methods.flap.method import FLAP
from prunelab.methods.gblm.method import GBLM
from prunelab.methods.h2o.method import H2O
from prunelab.methods.random_weights.method import RandomWeights
from prunelab.methods.sparsegpt.method import SparseGPT
from prunelab.methods.stun.method import Owl
from prunelab.methods.wanda.method import Wanda
from tests.contract.families import WEIGHT_FAMILIES
from tests.contract.references import NormTokens, language_model, token_ids

# -- no evidence is not evidence of zero -----------------------------------------------------------------------------


def many_experts():
    return language_model("qwen3_moe", num_experts=32)


def unreached(model, ids):
    """Experts of each block that no token is sent to."""
    with torch.no_grad():
        seen = []
        hooks = [b.mlp.experts.register_forward_pre_hook(lambda m, a: seen.append(a[1])) for b in model.model.layers]
        for sample in ids:
            model(sample[None])
        for hook in hooks:
            hook.remove()
    depth = len(model.model.layers)
    return [sorted({*range(32)} - {*torch.cat(seen[i::depth]).flatten().tolist()}) for i in range(depth)]


@pytest.mark.parametrize("method", [Wanda(), GBLM(), GBLM(gradient_only=True)], ids=repr)
def test_experts_without_tokens_are_pruned_by_their_weights(method):
    ids = token_ids(2, 6)
    model, dense = many_experts(), many_experts()
    alone = unreached(dense, ids)[0]
    assert alone
    plan = prune(method, model, 0.5, ids, progress=False)
    for expert in alone:
        for role in ("gate", "up", "down"):
            name = f"model.layers.0.mlp.experts.{expert}.{role}"
            (target,) = [t for t in plan.targets if t.name == name]
            magnitude = weight_adapter(dense).weights(target)["weight"].abs()
            kept = plan.decision(name).mask
            worst_kept = magnitude.masked_fill(~kept, torch.inf).amin(1)
            assert bool((worst_kept >= magnitude.masked_fill(kept, 0).amax(1)).all()), name


@pytest.mark.parametrize("budget", [0.5, "2:4"])
def test_reports_count_the_zeros_that_are_there(budget):
    ids = token_ids(2, 6)
    for method in (SparseGPT(), Wanda()):
        model = many_experts()
        plan = prune(method, model, budget, ids, progress=False)
        adapter = weight_adapter(model)
        weights = [adapter.weights(target)["weight"] for target in plan.targets]
        zeros = sum(int((weight == 0).sum()) for weight in weights)
        assert plan.report.zeroed == zeros
        assert plan.report.sparsity == pytest.approx(0.5, abs=0.01), "unreached experts keep half like all others"


def test_channels_that_are_always_zero_are_counted_where_a_method_zeroes_them():
    model = language_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:10] = 0  # channels that say nothing: their readers are dead
    plan = prune(SparseGPT(), model, "2:4", token_ids(), progress=False)
    down = model.model.layers[0].mlp.down_proj.weight
    assert bool((down[:, :10] == 0).all())
    total = sum(int((weight_adapter(model).weights(t)["weight"] == 0).sum()) for t in plan.targets)
    assert plan.report.zeroed == total > sum(int((~d.mask).sum()) for _, d in plan.decisions())


# -- the host's own state --------------------------------------------------------------------------------------------


class Louder(ModelHook):
    def post_forward(self, module, output):
        return output * 1.5


@pytest.mark.parametrize("method", [Wanda(), Owl(), RandomWeights(("layers",))], ids=repr)
def test_hooks_of_accelerate_stay_where_they_are(method):
    model, ids = language_model(), token_ids(2)
    for block in model.model.layers:
        add_hook_to_module(block, Louder())
    with torch.no_grad():
        before = model(ids).logits
        prune(method, model, 1.0, token_ids(), progress=False)
        assert torch.equal(model(ids).logits, before)
    assert all("forward" in vars(block) for block in model.model.layers)


def test_a_trial_gives_a_wrapped_layer_its_forward_back():
    from prunelab.common.weights.probe import ModelProbe
    from prunelab.common.weights.targets import Decision

    model, ids = language_model(), token_ids(1)[0]
    add_hook_to_module(model.model.layers[1], Louder())
    adapter = weight_adapter(model)
    probe = ModelProbe(adapter, adapter.targets("layers"), [])
    before = probe.logits(ids)
    with probe.trial([(probe.targets[1], Decision(torch.zeros(1, dtype=torch.bool)))]):
        assert not torch.allclose(probe.logits(ids), before)
    assert torch.equal(probe.logits(ids), before)


class LowRank(nn.Module):
    """A linear in the manner of peft's."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def adapted():
    model = language_model()
    model.model.layers[1].self_attn.q_proj = LowRank(model.model.layers[1].self_attn.q_proj)
    return model


def eight_bit():
    model = language_model()
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.zeros(40, 32, dtype=torch.int8), requires_grad=False)
    return model


def spread():
    model = language_model()
    model.hf_device_map = {"model": 0, "lm_head": "cpu"}
    return model


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (adapted, r"layers\.1\.self_attn\.q_proj has adapters of peft; merge them first"),
        (eight_bit, r"layers\.0\.mlp\.up_proj\.weight holds int8 codes"),
        (spread, "spread over several devices"),
        (lambda: cpu_offload(language_model(), execution_device="cpu"), "is not in memory; load the model whole"),
        (lambda: torch.compile(language_model(), backend="eager"), "the model is compiled; prune what it was made of"),
    ],
)
def test_models_whose_weights_lie_elsewhere_are_refused_before_any_work(make, says):
    for method in (Wanda(), RandomWeights(("heads",))):
        with pytest.raises(PrunelabError, match=says):
            prune(method, make(), 0.5, token_ids(), progress=False)
        with pytest.raises(PrunelabError, match=says):
            check(method, make())
    with pytest.raises(PrunelabError, match=says):
        prune(Dare(), language_model(), 0.5, base=make(), progress=False)


# -- pruned before, and models that share ----------------------------------------------------------------------------


@pytest.mark.parametrize("second", [Wanda(), RandomWeights(("channels",)), RandomWeights(("layers",))], ids=repr)
def test_a_model_pruned_in_two_stages_comes_back_from_disk(second, tmp_path):
    model, ids = language_model(), token_ids(2)
    first = prune(FLAP(), model, 0.6, token_ids(), progress=False)
    assert not first.header["stock"]
    plan = prune(second, model, 0.5, token_ids(), progress=False, folder=tmp_path / "run")
    assert plan.earlier == (first,) and not plan.header["stock"]
    with torch.no_grad():
        want = model(ids).logits
        save_pruned(model, plan, tmp_path / "saved")
        assert torch.equal(load_pruned(tmp_path / "saved")(ids).logits, want)
        for where in ("saved/plan", "run"):
            dense, halfway = language_model(), language_model()
            WeightPlan.load(tmp_path / where).apply(dense)
            assert torch.equal(dense(ids).logits, want)
            first.apply(halfway)
            WeightPlan.load(tmp_path / where).apply(halfway)
            assert torch.equal(halfway(ids).logits, want)
        again = copy.deepcopy(model)
        assert torch.equal(again(ids).logits, want)


def test_models_that_share_a_config_are_pruned_apart():
    config = language_model().config
    one, other = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
    untouched, ids = copy.deepcopy(other), token_ids(2)
    prune(RandomWeights(("heads", "channels")), one, 0.5, progress=False)
    assert config.intermediate_size == 40 and other.config is config and one.config.intermediate_size == 20
    with torch.no_grad():
        assert torch.equal(other(ids).logits, untouched(ids).logits)
        prune(RandomWeights(("layers",)), other, "1removed", progress=False)
        assert other(ids).logits.shape == one(ids).logits.shape == (2, 12, 61)
    assert len(one.model.layers) == 3 and len(other.model.layers) == 2


# -- scope by structure, not by names --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "phi", "gemma", "deepseek_v3", "bert", "t5", "vit_plain"])
def test_dare_covers_attention_and_mlp_of_every_family(family):
    base = WEIGHT_FAMILIES[family]()
    fine = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in fine.parameters():
            parameter.add_(0.05)
    plan = prune(Dare(), fine, 0.1, base=base, progress=False)
    before = dict(base.named_parameters())
    linear = {id(weight_adapter(fine).parameter(t)) for t in weight_adapter(fine).targets("linear")}
    for name, parameter in fine.named_parameters():
        changed = float(((parameter - before[name]).abs() > 1e-6).float().mean())
        if id(parameter) in linear:
            assert changed == pytest.approx(0.1, abs=0.05), name
        elif "embed" in name or name.endswith(("wte.weight", "wpe.weight")):
            assert changed == 1, f"{name} lies in no layer"
    assert {t.part for t in plan.targets if t.unit == "linear"} and all(t.part for t in plan.targets)


def test_experts_without_tokens_say_nothing_of_a_blocks_outliers():
    from prunelab.common.weights.probe import ModelProbe
    from prunelab.common.weights.statistics import InputNorm
    from prunelab.methods.stun.outliers import importance, outlier_share, outlier_shares

    ids, model = token_ids(2, 6), many_experts()
    alone = set(unreached(model, ids)[0])
    adapter = weight_adapter(model)
    targets = [t for t in adapter.targets("linear") if t.block == 0]
    probe = ModelProbe(adapter, targets, list(ids))
    norms = probe.statistics({"linear": {"norm": InputNorm}})
    scores = [importance(adapter.weights(t)["weight"], norms[t.name]["norm"]) for t in targets if t.expert not in alone]
    found = outlier_shares(probe, targets, 5.0)
    assert alone and len(scores) < len(targets)
    want = pytest.approx(outlier_share(scores, 5.0))
    assert all(float(share["outliers"]) == want for share in found.values())


def test_what_else_holds_or_runs_a_model_is_refused_in_a_line():
    def normed(old):
        model = language_model()
        (nn.utils.weight_norm if old else nn.utils.parametrizations.weight_norm)(model.model.layers[0].mlp.up_proj)
        return model

    def coarse():
        model = language_model()
        weight = model.model.layers[0].mlp.up_proj.weight
        weight.data = weight.data.to(torch.float8_e4m3fn)
        return model

    with torch.inference_mode():
        made = language_model()
    for said, model, method in (
        ("up_proj is computed from", normed(False), Wanda()),
        ("up_proj.weight is computed from", normed(True), Wanda()),
        ("stored as float8_e4m3fn", coarse(), Wanda()),
        ("load the model outside of it", made, GBLM()),
    ):
        with pytest.raises(PrunelabError, match=said) as error:
            prune(method, model, 0.5, token_ids(), progress=False)
        assert "\n" not in str(error.value)
    for method in (H2O(), NormTokens()):
        model = language_model()
        with apply(method, model, 0.5), pytest.raises(PrunelabError, match=f"runs {method.name} now"):
            prune(Wanda(), model, 0.5, token_ids(), progress=False)
    models = [language_model() for _ in range(2)]
    prune(GBLM(), models[0], 0.5, token_ids(), progress=False)
    with torch.inference_mode():
        prune(GBLM(), models[1], 0.5, token_ids(), progress=False)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)
