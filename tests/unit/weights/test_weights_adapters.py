"""Weight adapters of every family: what they find, what leaves, and what the pruned model is then."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights import WeightPlan, load_pruned, prune, save_pruned
from prunelab.common.weights.adapters import weight_adapter
from prunelab.common.weights.adapters.channel_graph import ChannelGraph
from prunelab.common.weights.calibration import Stream, tapped
from prunelab.common.weights.plan import packed
from prunelab.common.weights.targets import Decision, Target, Unit
from prunelab.methods.flap.method import FLAP, MagnitudeSP, WandaSP
from prunelab.methods.gblm.method import GBLM
from prunelab.methods.magnitude.method import Magnitude
from prunelab.methods.random_weights.method import RandomWeights
from prunelab.methods.wanda.method import Wanda
from tests.contract.families import TRANSFORMERS, WEIGHT_FAMILIES, answer, calibration, images
from tests.contract.references import NormChannels, token_ids

families = pytest.mark.parametrize("family", WEIGHT_FAMILIES)
CONVOLUTIONS = ["resnet", "vgg", "efficientnet"]
VITS = [name for name in WEIGHT_FAMILIES if name.startswith("vit")]
DECODERS = [name for name, (cls, _) in TRANSFORMERS.items() if cls.endswith(("CausalLM", "LMHeadModel"))]
STRUCTURES: tuple[Unit, ...] = ("heads", "channels", "experts", "layers")


def build(family: str) -> nn.Module:
    return WEIGHT_FAMILIES[family]()


@cache
def units(family: str) -> frozenset[str]:
    adapter = weight_adapter(build(family))
    return frozenset(unit for unit in STRUCTURES if adapter.targets(unit))


def having(*wanted: str) -> Any:
    found = [(family, unit) for family in WEIGHT_FAMILIES for unit in wanted if unit in units(family)]
    return pytest.mark.parametrize(("family", "unit"), found)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@torch.no_grad()
def silence(model: nn.Module, target: Target, gone: Tensor) -> None:
    """Let units say nothing: no weight reads them, or where they pass through convolutions, none makes them."""
    adapter: Any = weight_adapter(model)
    if adapter.family == "convnet":
        for use in adapter.spaces[target.name].made:
            entries = use.part().entries[gone].flatten()
            use.module.weight[entries] = 0
            if use.module.bias is not None:
                use.module.bias[entries] = 0
        return
    last = adapter.weights(target)["o" if target.unit == "heads" else "down"]
    assert last.untyped_storage().data_ptr() in {p.untyped_storage().data_ptr() for p in model.parameters()}
    last[:, gone.repeat_interleave(target.span)] = 0


# -- targets ---------------------------------------------------------------------------------------------------------


def test_every_family_has_the_structures_it_should():
    every = {"heads", "channels", "layers"}
    wanted = dict.fromkeys((*DECODERS, *VITS, "bert"), every)
    wanted |= {family: every | {"experts"} for family in ("deepseek_v2", "deepseek_v3", "qwen3_moe_mixed")}
    wanted |= {family: {"channels"} for family in ("t5", "t5_gated", *CONVOLUTIONS)}
    assert {family: set(units(family)) for family in WEIGHT_FAMILIES} == wanted


@families
def test_weights_of_linears_are_the_models_own_as_out_by_in(family):
    model = build(family)
    adapter = weight_adapter(model)
    targets = adapter.targets("linear")
    assert targets and len({t.name for t in targets}) == len(targets)
    weights = {id(adapter.parameter(target)) for target in targets}
    for module in (m for block in adapter.blocks for m in block.modules()):
        if isinstance(module, nn.Linear) and "gate" not in type(module).__name__:
            assert id(module.weight) in weights or module.out_features == 1
    for target in targets:
        weight = adapter.weights(target)["weight"]
        assert weight.shape == target.shape
        weight.fill_(3.0)
    assert all(bool((adapter.parameter(target) == 3).all()) for target in targets)


def test_fused_and_transposed_projections_are_found():
    phi3, neox, gpt2 = (weight_adapter(build(name)) for name in ("phi3", "gpt_neox", "gpt2"))
    assert {t.role: t.shape for t in phi3.targets("linear") if t.block == 0} == {
        "self_attn.o_proj": (32, 32),
        "self_attn.qkv_proj": (64, 32),
        "mlp.gate_up_proj": (80, 32),
        "mlp.down_proj": (32, 40),
    }
    heads = phi3.targets("heads")[0]
    qkv = phi3.model.model.layers[0].self_attn.qkv_proj.weight
    assert heads.shape == (2,) and heads.span == 16
    own = phi3.weights(heads)
    assert torch.equal(torch.cat([own["q"], own["k"], own["v"]]), qkv)
    assert [own[role].shape[0] for role in "qkv"] == [32, 16, 16]

    heads = neox.targets("heads")[0]
    fused = neox.model.gpt_neox.layers[0].attention.query_key_value.weight.view(4, 3, 8, 32)
    own = neox.weights(heads)
    assert all(torch.equal(own[role], fused[:, i].flatten(0, 1)) for i, role in enumerate("qkv"))

    target = next(t for t in gpt2.targets("linear") if t.role == "mlp.c_fc")
    assert target.shape == (40, 32)
    assert torch.equal(gpt2.weights(target)["weight"], gpt2.model.transformer.h[0].mlp.c_fc.weight.T)


def test_new_values_reach_parts_that_are_no_views():
    model = build("gpt_neox")
    adapter = weight_adapter(model)
    target = adapter.targets("heads")[1]
    own = adapter.weights(target)
    values = {name: tensor + 1 for name, tensor in own.items()}
    adapter.write(target, Decision(torch.ones(4, dtype=torch.bool), values))
    assert {"q", "k", "v", "o", "q.bias", "o.bias"} <= own.keys()
    assert all(torch.equal(adapter.weights(target)[name], values[name]) for name in values)


@families
def test_sizes_are_those_of_what_leaves(family):
    """What one target loses is counted exactly where no other target shares its weights."""
    for unit in units(family) & {"heads", "channels", "experts"}:
        if family in CONVOLUTIONS:
            continue
        model = build(family)
        target = weight_adapter(model).targets(unit)[0]
        before = parameters(model)
        weight_adapter(model).remove(target, torch.arange(target.units - 1))
        assert before - parameters(model) == target.size, unit


# -- calibration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [f for f in WEIGHT_FAMILIES if f not in (*CONVOLUTIONS, "t5", "t5_gated")])
def test_the_stream_ends_where_the_model_does(family):
    model, samples = build(family), list(calibration(family))
    if family in TRANSFORMERS:
        samples.append(samples[0][:7])
    adapter = weight_adapter(model)
    ends: list[Tensor] = []
    handle = adapter.blocks[-1].register_forward_hook(lambda module, args, out: ends.append(out))
    with torch.no_grad():
        for sample in samples:
            adapter.run(sample)
        handle.remove()
        stream = Stream(adapter, samples)
        for block in range(len(adapter.blocks)):
            stream.through(block)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ends, stream.hidden, strict=True))


@pytest.mark.parametrize("family", ["t5", "t5_gated"])
def test_t5_streams_through_both_stacks(family):
    model, sample = build(family), token_ids()[0]
    adapter: Any = weight_adapter(model)
    source, target = sample[None, :6], sample[None, 6:]
    with torch.no_grad():
        want = model(input_ids=source, decoder_input_ids=adapter.model._shift_right(target))
        assert torch.allclose(adapter.run(sample).logits, want.logits, atol=1e-5)
        assert torch.equal(adapter.loss(sample), model(input_ids=source, labels=target).loss)
        stream = Stream(adapter, [sample])
        for block in range(4):
            stream.through(block)
        read = adapter.model.encoder.final_layer_norm(stream.hidden[0][:, :6])
    assert torch.allclose(read, want.encoder_last_hidden_state, atol=1e-5)


def test_t5_decoder_reads_what_the_pruned_encoder_gives():
    """Wanda block by block equals Wanda on the whole model run anew for every block."""
    ours, plain, ids = build("t5"), build("t5"), token_ids()
    prune(Wanda(), ours, 0.5, ids, progress=False)
    adapter: Any = weight_adapter(plain)
    with torch.no_grad():
        for block in range(4):
            linears = [m for m in adapter.body(block).modules() if isinstance(m, nn.Linear)]
            norms = {m: torch.zeros(m.in_features) for m in linears}

            def note(module: Any, args: tuple[Tensor], norms: dict[nn.Module, Tensor] = norms) -> None:
                norms[module] += args[0][0].square().sum(0)

            handles = [m.register_forward_pre_hook(note) for m in linears]
            for sample in ids:
                decoded = adapter.model._shift_right(sample[None, 6:])
                plain(input_ids=sample[None, :6], decoder_input_ids=decoded)
            for handle in handles:
                handle.remove()
            for m in linears:
                order = (m.weight.abs() * norms[m].sqrt()).argsort(dim=1, stable=True)
                m.weight.scatter_(1, order[:, : m.in_features // 2], 0)
    for target in adapter.targets("linear"):
        mine, other = (model.get_submodule(target.name).weight for model in (ours, plain))
        assert float((mine.ne(0) == other.ne(0)).float().mean()) > 0.995, target.name  # rounding may swap equals


@families
def test_what_a_linear_is_shown_gives_what_it_puts_out(family):
    """Also of fused and transposed projections, and of kernels, which are shown the patches under them."""
    model, sample = build(family), calibration(family)[0]
    adapter = weight_adapter(model)
    for block in range(len(adapter.blocks)):
        targets = [t for t in adapter.targets("linear") if t.block == block and t.expert < 0]
        with torch.no_grad(), tapped(adapter.blocks[block], [p for t in targets for p in adapter.taps(t)]) as seen:
            adapter.run(sample)
            for target in targets:
                path, module = adapter.taps(target)[0], model.get_submodule(target.name)
                shown = adapter.observe(target, seen, torch.zeros(1, 12, 1), torch.zeros(1, 12, 1), sample)
                out = module(seen[path][0][0])  # an activation may since have overwritten what it gave
                out = out[0].flatten(1).T if isinstance(module, nn.Conv2d) else out.flatten(0, -2)
                bias = 0 if module.bias is None else module.bias
                assert torch.allclose(shown.inputs @ shown.weights["weight"].T + bias, out, atol=1e-3), target.name


@having("heads", "channels")
def test_what_units_put_out_is_shown_in_their_order(family, unit):
    """Zeros that take the place of a unit's outputs are what the method is shown for that unit."""
    model, sample = build(family), calibration(family)[0]
    adapter = weight_adapter(model)
    for target in adapter.targets(unit)[:4]:
        gone = torch.arange(target.units) == target.units // 2
        last = "o" if unit == "heads" else "down"
        with torch.no_grad(), tapped(adapter.blocks[target.block], adapter.taps(target)) as seen:
            adapter.run(sample)
            shown = adapter.observe(target, seen, torch.zeros(1, 12, 1), torch.zeros(1, 12, 1), sample)
            assert shown.inputs.shape[1] == target.units * target.span == shown.weights[last].shape[1]
            if family in CONVOLUTIONS:
                silence(model, target, gone)
                adapter.run(sample)
                shown = adapter.observe(target, seen, torch.zeros(1, 12, 1), torch.zeros(1, 12, 1), sample)
                assert not bool(shown.inputs[:, gone].any()) and bool(shown.inputs[:, ~gone].any())


# -- removal ---------------------------------------------------------------------------------------------------------


@having("heads", "channels")
def test_removed_units_are_as_if_they_said_nothing(family, unit):
    pruned, dense = build(family), build(family)
    plan = prune(RandomWeights((unit,)), pruned, Budget(0.5), progress=False)
    for target, decision in plan.decisions():
        assert 0 < decision.kept < target.units
        silence(dense, target, ~decision.mask)
    assert torch.allclose(answer(pruned, family), answer(dense, family), atol=1e-5)
    report = plan.report
    assert report.parameters == parameters(pruned) < report.dense_parameters == parameters(dense)
    assert report.prunable <= report.dense_parameters
    if family not in CONVOLUTIONS:  # their columns leave with other targets
        assert report.removed == report.dense_parameters - report.parameters


@having(*STRUCTURES)
def test_keeping_all_is_the_identity(family, unit):
    model = build(family)
    plan = prune(RandomWeights((unit,)), model, Budget(1.0), progress=False)
    assert same(model, build(family))
    assert torch.equal(answer(model, family), answer(build(family), family))
    assert plan.report.removed == 0


@having("layers")
def test_removed_layers_are_skipped(family, unit):
    pruned, dense = build(family), build(family)
    plan = prune(RandomWeights(("layers",)), pruned, Budget(1, "removed"), progress=False)
    adapter = weight_adapter(dense)
    blocks = adapter.blocks
    for target, decision in plan.decisions():
        if not decision.kept:
            blocks[target.block].forward = lambda hidden, *args, **kwargs: hidden
    assert len(weight_adapter(pruned).blocks) == len(blocks) - 1
    assert torch.allclose(answer(pruned, family), answer(dense, family), atol=1e-5)


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("unit", STRUCTURES)
def test_pruned_decoders_generate_with_their_cache(family, unit):
    if unit not in units(family):
        pytest.skip("not in this family")
    model: Any = build(family)
    prune(RandomWeights((unit,)), model, Budget(0.67), progress=False)
    ids = token_ids(2)
    with torch.no_grad():
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        grown = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        for length in range(12, 17):  # without a cache
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
            assert torch.equal(grown[:, : length + 1], ids)


def test_t5_generates_after_pruning():
    model: Any = build("t5_gated")
    prune(WandaSPChannels(), model, 0.5, token_ids(), progress=False)
    assert model.encoder.block[0].layer[1].DenseReluDense.wi_0.out_features == 20
    assert model.generate(token_ids(1), max_new_tokens=3, do_sample=False).shape[0] == 1


class WandaSPChannels(WandaSP):
    """Wanda-sp for models without heads."""

    @property
    def units(self) -> tuple[Unit, ...]:
        return ("channels",)


# -- experts of DeepSeek ---------------------------------------------------------------------------------------------


def keep_experts(model: nn.Module, kept: list[int]) -> WeightPlan:
    targets = weight_adapter(model).targets("experts")
    mask = torch.zeros(6, dtype=torch.bool)
    mask[kept] = True
    plan = WeightPlan({}, targets, {t.block: {f"{t.name}|mask": packed(Decision(mask))["mask"]} for t in targets})
    plan.header["stock"] = plan.apply(model)
    return plan


def test_experts_of_like_groups_route_as_if_the_others_were_masked():
    pruned, dense = build("deepseek_v3"), build("deepseek_v3")
    plan = keep_experts(pruned, [0, 2, 3, 5])
    for block in (1, 2):
        dense.model.layers[block].mlp.gate.e_score_correction_bias[[1, 4]] = float("-inf")
    with torch.no_grad():
        ids = token_ids(2, seed=9)
        assert torch.allclose(pruned(ids).logits, dense(ids).logits, atol=1e-5)
    assert pruned.config.n_routed_experts == 4 and pruned.config.n_group == 2 and plan.header["stock"]


def test_experts_of_unlike_groups_are_chosen_among_all(tmp_path):
    pruned, dense = build("deepseek_v3"), build("deepseek_v3")
    plan = keep_experts(pruned, [0, 1, 2, 5])
    for block in (1, 2):
        gate = dense.model.layers[block].mlp.gate
        gate.num_group = gate.topk_group = 1
        gate.e_score_correction_bias[[3, 4]] = float("-inf")
    with torch.no_grad():
        ids = token_ids(2, seed=9)
        assert torch.allclose(pruned(ids).logits, dense(ids).logits, atol=1e-5)
    assert plan.header["stock"] and pruned.config.n_group == pruned.config.topk_group == 1
    pruned.save_pretrained(tmp_path)
    stock = type(pruned).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(stock(ids).logits, pruned(ids).logits)


# -- coupled channels ------------------------------------------------------------------------------------------------


class Tangle(nn.Module):
    """Adds, concatenates, gates, groups, and ends in an unknown operation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a = nn.Conv2d(8, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.b = nn.Conv2d(8, 6, 1)
        self.norm = nn.BatchNorm2d(14)
        self.joined = nn.Conv2d(14, 8, 1)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)
        self.sorted = nn.Conv2d(8, 5, 1)
        self.out = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.depthwise(self.a(x))
        x = self.norm(torch.cat([x, self.b(x)], 1))
        x = self.grouped(self.joined(x))
        return self.out(self.sorted(x).sort(1).values.mean((2, 3)))


def tangle() -> Tangle:
    torch.manual_seed(0)
    model = Tangle().eval()
    model.norm.running_mean.normal_()
    return model


def test_channels_that_meet_leave_together_and_unknown_operations_hold_theirs():
    spaces = {space.made[0].path: space for space in ChannelGraph(tangle()).open()}
    assert set(spaces) == {"stem", "b"}, "joined, grouped and sorted are held by a grouping and a sort"
    assert [use.path for use in spaces["stem"].made] == ["stem", "a", "depthwise", "norm"]
    assert [use.path for use in spaces["stem"].read] == ["a", "b", "joined"]
    assert [use.path for use in spaces["b"].made] == ["b", "norm"]

    model, dense, x = tangle(), tangle(), images("vgg")
    adapter = weight_adapter(model)
    stem, b = adapter.targets("channels")
    with torch.no_grad():
        adapter.remove(stem, torch.tensor([0, 2, 3, 5, 7]))  # what stands behind in the concatenation moves up
        adapter.remove(b, torch.tensor([1, 4]))
        for target, gone in ((stem, [1, 4, 6]), (b, [0, 2, 3, 5])):
            mask = torch.zeros(target.units, dtype=torch.bool)
            mask[gone] = True
            silence(dense, target, mask)
        assert model.depthwise.groups == 5 and model.norm.num_features == 7
        assert torch.allclose(model(x), dense(x), atol=1e-6)


class Twice(nn.Module):
    """Calls one layer twice, and reads the weight of another."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.again, self.read = (nn.Conv2d(n, 8, 3, padding=1) for n in (3, 8, 8))
        self.free, self.out = nn.Conv2d(8, 6, 1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.read(self.again(self.again(self.stem(x)).relu()))
        return self.out(self.free(x).relu().mean((2, 3))) + self.read.weight.mean()


def test_layers_used_twice_stay_whole():
    assert [t.name for t in weight_adapter(Twice()).targets("channels")] == ["free"]


def test_scores_of_channels_see_what_makes_and_what_reads_them():
    model = build("vgg")
    adapter = weight_adapter(model)
    first, second, third = adapter.targets("channels")
    assert [t.name for t in (first, second, third)] == ["0", "4", "9"]
    own = adapter.weights(second)
    assert own["up"].shape == (12, 72) and own["down"].shape == (20 * 64, 12)
    linear = model.get_submodule("9").weight.view(20, 12, 64)
    assert torch.equal(own["down"], linear.transpose(1, 2).flatten(0, 1))
    for method in (MagnitudeSPChannels(), WandaSPChannels()):
        plan = prune(method, build("vgg"), 0.5, images("vgg"), progress=False)
        assert [decision.kept for _, decision in plan.decisions()] == [4, 6, 10]


class MagnitudeSPChannels(MagnitudeSP):
    """Mag-sp for models without heads."""

    @property
    def units(self) -> tuple[Unit, ...]:
        return ("channels",)


# -- on disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0.5, (1.0, 0.5, 0.5)], ids=["uniform", "adaptive"])
@pytest.mark.parametrize("unit", ["heads", "channels"])
@pytest.mark.parametrize("family", [f for f in TRANSFORMERS if not f.startswith("t5")])
def test_pruned_transformers_come_back_from_disk(family, unit, budget, tmp_path):
    model: Any = build(family)
    plan = prune(RandomWeights((unit,)), model, Budget(budget), progress=False)
    uniform = isinstance(budget, float) or len(weight_adapter(model).targets(unit)) == 1
    without_head_size = unit == "heads" and family in ("gpt_neox", "gpt2", "opt", "bert")
    assert plan.header["stock"] is (uniform and not without_head_size)
    save_pruned(model, plan, tmp_path)
    assert torch.equal(answer(load_pruned(tmp_path), family), answer(model, family))
    if plan.header["stock"]:
        stock = type(model).from_pretrained(tmp_path).eval()
        assert torch.equal(answer(stock, family), answer(model, family))


@pytest.mark.parametrize("family", ["t5", "t5_gated"])
@pytest.mark.parametrize("budget", [0.5, (1.0, 0.5, 0.5, 0.25)], ids=["uniform", "adaptive"])
def test_pruned_t5_comes_back_from_disk(family, budget, tmp_path):
    model: Any = build(family)
    plan = prune(RandomWeights(("channels",)), model, Budget(budget), progress=False)
    assert plan.header["stock"] is isinstance(budget, float)
    save_pruned(model, plan, tmp_path)
    assert torch.equal(answer(load_pruned(tmp_path), family), answer(model, family))


@pytest.mark.parametrize("family", [f for f in DECODERS if f != "gpt2"])
def test_fewer_layers_and_experts_are_stock(family, tmp_path):
    for unit in units(family) & {"layers", "experts"}:
        model: Any = build(family)
        plan = prune(RandomWeights((unit,)), model, Budget(1, "removed"), seed=2, progress=False)
        save_pruned(model, plan, tmp_path / unit)
        stock = type(model).from_pretrained(tmp_path / unit).eval()
        assert plan.header["stock"] and torch.equal(answer(stock, family), answer(model, family))


@pytest.mark.parametrize("family", [*VITS, *CONVOLUTIONS])
def test_plans_of_vision_models_rebuild_them_from_the_dense_architecture(family, tmp_path):
    model = build(family)
    plan = prune(RandomWeights(("channels",)), model, Budget(0.5), progress=False)
    save_pruned(model, plan, tmp_path)
    again = load_pruned(tmp_path, build(family))
    assert same(again, model) and torch.allclose(answer(again, family), answer(model, family), atol=1e-4)
    with pytest.raises(PrunelabError, match="give the unpruned model as `dense`"):
        load_pruned(tmp_path)


# -- the contract, for methods that see little and methods that see all -----------------------------------------------


@families
@pytest.mark.parametrize("method", [Magnitude("row"), Wanda(), RandomWeights()], ids=lambda m: m.name)
def test_single_weights_keep_the_contract(family, method):
    identity, pruned, again = build(family), build(family), build(family)
    prune(method, identity, Budget(1.0), calibration(family), progress=False)
    assert torch.allclose(answer(identity, family), answer(build(family), family), atol=1e-6)
    plan = prune(method, pruned, Budget(0.5), calibration(family), progress=False)
    for target, decision in plan.decisions():
        assert bool((decision.mask.sum(-1) == target.shape[-1] - target.shape[-1] // 2).all())
        assert not bool(weight_adapter(pruned).weights(target)["weight"][~decision.mask].any())
    assert bool(torch.isfinite(answer(pruned, family)).all())
    plan.apply(again)
    assert same(pruned, again) and plan.report.zeroed > 0 and plan.report.removed == 0


# -- bad input -------------------------------------------------------------------------------------------------------


def test_missing_targets_are_named_before_any_work():
    for family, unit in (("t5", "heads"), ("t5", "layers"), ("resnet", "heads"), ("vit_plain", "experts")):
        model = build(family)
        with pytest.raises(PrunelabError, match=rf"prunes {unit}, and this {type(model).__name__} has none"):
            prune(RandomWeights((unit,)), model, 0.5, progress=False)  # type: ignore[arg-type]
    with pytest.raises(PrunelabError, match=r"no weight adapter for Linear; supported: .*GPT2LMHeadModel"):
        prune(Magnitude(), nn.Linear(3, 4), 0.5, progress=False)


def test_structures_that_cannot_leave_alone_are_no_targets():
    import timm

    def heads(**options: Any) -> list[Target]:
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
        model = timm.create_model("vit_small_patch16_224", **sizes, **options)
        return weight_adapter(model).targets("heads")

    assert heads() and not heads(scale_attn_norm=True)


def test_what_cannot_stay_whole_is_refused():
    for family in ("phi3", "gpt2", "bert", "vit_plain"):
        with pytest.raises(PrunelabError, match="keep more"):
            prune(RandomWeights(("heads",)), build(family), 0.0, progress=False)
    with pytest.raises(PrunelabError, match=r"would keep 1 experts, fewer than the 2 of a token"):
        prune(RandomWeights(("experts",)), build("deepseek_v3"), Budget(1, "count"), progress=False)
    with pytest.raises(PrunelabError, match=r"would remove everything under 0"):
        prune(RandomWeights(("layers",)), build("gpt2"), 0.0, progress=False)


def test_patterns_that_do_not_divide_a_row_name_the_layer():
    for family, layer in (("gpt2", "transformer.h.0.attn.c_attn"), ("vit_plain", "blocks.0.attn.qkv"), ("vgg", "0")):
        with pytest.raises(PrunelabError, match=rf"{layer}: \d+ units do not divide into groups of 5"):
            prune(Wanda(), build(family), "2:5", calibration(family), progress=False)


def test_tied_weights_are_refused():
    import transformers

    _, values = TRANSFORMERS["gpt2"]
    tied = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**values, "tie_word_embeddings": True}))
    with pytest.raises(PrunelabError, match=r"transformer.wte.weight and lm_head.weight are one tied parameter"):
        prune(RandomWeights(("tensor",)), tied, 0.5, progress=False)
    prune(Magnitude(), tied, 0.5, progress=False)  # its blocks hold nothing tied


@pytest.mark.parametrize("family", ["bert", "vit_plain", "resnet"])
def test_losses_need_labels_and_say_so(family):
    with pytest.raises(PrunelabError, match=r"the loss of a \w+ needs labels"):
        prune(GBLM(), build(family), 0.5, calibration(family), progress=False)


def test_gradients_reach_transposed_and_joint_models():
    for family in ("gpt2", "gpt_neox", "t5", "deepseek_v3"):
        model = build(family)
        plan = prune(GBLM(), model, 0.5, calibration(family), progress=False)
        assert plan.report.sparsity == pytest.approx(0.5, abs=0.02)


def test_samples_of_the_wrong_sort_are_refused():
    with pytest.raises(PrunelabError, match=r"an image \[C, H, W\] of 3 channels"):
        prune(Wanda(), build("vit_plain"), 0.5, token_ids(), progress=False)
    with pytest.raises(PrunelabError, match=r"an image \[C, H, W\] of 3 channels"):
        prune(Wanda(), build("vgg"), 0.5, images("vgg")[:, :2], progress=False)
    with pytest.raises(PrunelabError, match="at least four token ids"):
        prune(Wanda(), build("t5"), 0.5, token_ids(2, 3), progress=False)
    with pytest.raises(PrunelabError, match=r"sequences of 80 tokens exceed the model's 64"):
        prune(Wanda(), build("gpt2"), 0.5, token_ids(1, 80), progress=False)


def test_a_bias_for_what_is_removed_goes_where_there_is_a_place():
    for family in ("phi3", "gpt2", "deepseek_v2"):
        plan = prune(FLAP(), build(family), 0.6, token_ids(), progress=False)
        assert any("o.bias" in decision.values for _, decision in plan.decisions())
    with pytest.raises(PrunelabError, match=r"convnet has no place for the value 'down.bias' of"):
        prune(NormChannels(), build("vgg"), 0.5, images("vgg"), progress=False)
    with pytest.raises(PrunelabError, match="contiguous"):
        prune(Magnitude(), build("vgg").to(memory_format=torch.channels_last), 0.5, progress=False)
