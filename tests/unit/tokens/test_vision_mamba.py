"""Vision Mamba: official names, what pruning does to scans and convolutions, and the method beyond its golden cases."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from prunelab.common.apply import apply
from prunelab.common.backbones import plain_mamba, vim
from prunelab.common.backbones.scan import scan_flops_vmamba, scan_macs, selective_scan
from prunelab.common.backbones.subset import Subset
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.plan import Gather, Mix, ModelInfo, Plan, Positions, Site
from prunelab.common.costs import meter
from prunelab.common.models import loading
from prunelab.common.tokens.adapters import adapter_for
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals
from prunelab.methods.random_drop.method import RandomDrop
from prunelab.methods.tome.method import ToMe
from prunelab.methods.vim_token_pruning.method import VimTokenPruning, importance, kept

KEYS = Path(__file__).parents[2] / "golden" / "vim_token_pruning"
OFFICIAL = {
    "vim_tiny": vim.vim_tiny,
    "vim_small": vim.vim_small,
    "plainmamba_l1": plain_mamba.plain_mamba_l1,
    "plainmamba_l2": plain_mamba.plain_mamba_l2,
    "plainmamba_l3": plain_mamba.plain_mamba_l3,
}
ALIGN: tuple[Positions, ...] = ("hold", "decay", "original", "renumber")


def tiny(family: str, **sizes) -> torch.nn.Module:
    """A small random model whose weights are large enough for every part to matter."""
    torch.manual_seed(0)
    if family == "vim":
        model = vim.Vim(**{"size": 20, "patch": 4, "width": 16, "depth": 4, "states": 4, "classes": 5, **sizes})
    else:
        given = {"size": 16, "patch": 4, "width": 16, "depth": 4, "states": 4, "convolutions": 1, "depthwise": (0, 2)}
        model = plain_mamba.PlainMambaClassifier(5, **{**given, **sizes})
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 and not name.endswith("_log"):
                p.copy_(torch.randn(p.shape) * 0.4)
    return model.eval()


def images(family: str, batch: int = 3) -> Tensor:
    size = 20 if family == "vim" else 16
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


families = pytest.mark.parametrize("family", ["vim", "plain_mamba"])


@dataclass(frozen=True)
class Fixed(TokenPruner):
    """Carries out one given plan."""

    plans: tuple[Plan, ...] = ()
    layers: tuple[int, ...] = (1,)
    where: Literal["input", "block_output"] = "block_output"
    name: ClassVar[str] = "fixed"

    def sites(self, info: ModelInfo) -> list[Site]:
        return [Site(layer, self.where) for layer in self.layers]

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset({"hidden"})

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        return self.plans[site.index]


def run(model: torch.nn.Module, x: Tensor, method: TokenPruner, budget: Budget | float = 0.5) -> Tensor:
    with torch.no_grad(), apply(method, model, budget):
        return model(x)


# -- backbones -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OFFICIAL)
def test_names_and_shapes_are_the_official_ones(name):
    with torch.device("meta"):
        model = OFFICIAL[name]()
    official = json.loads((KEYS / f"keys_{name}.json").read_text())
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == official


def test_vim_base_has_its_published_size():
    with torch.device("meta"):
        assert sum(p.numel() for p in vim.vim_base().parameters()) == pytest.approx(98e6, rel=0.01)


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (5, 1), (2, 2), (3, 5), (4, 7)])
def test_scans_are_snakes_over_neighbours(grid):
    orders, ranks, moves = plain_mamba.scan_orders(*grid)
    rows, columns = orders // grid[1], orders % grid[1]
    assert bool(((rows.diff().abs() + columns.diff().abs()) == 1).all())
    assert torch.equal(orders.gather(1, ranks), torch.arange(orders.shape[1]).expand(4, -1))
    assert torch.equal(orders[1], orders[0].flip(0))
    assert torch.equal(orders[3], orders[2].flip(0))
    assert bool((moves[:, 0] == plain_mamba.START).all())
    assert bool((moves[:, 1:] > 0).all())


@families
def test_gradients_reach_every_parameter(family):
    model, x = tiny(family), images(family)
    with apply(VimTokenPruning(layers=(1,)), model, 0.5):
        model(x).square().sum().backward()
    idle = {n for n, p in model.named_parameters() if p.grad is None or not bool(p.grad.isfinite().all())}
    assert not idle
    assert all(bool(p.grad.any()) for n, p in model.named_parameters() if n.endswith(("A_log", "conv1d_b.weight")))


def test_reordered_parameters_are_another_model():
    """With `permute_ssm_params` each direction is a plain scan of the tokens as it visits them."""
    torch.manual_seed(0)
    mixer = plain_mamba.Mixer(8, 4, permute_ssm_params=True)
    u, grid = torch.randn(2, 16, 12), (3, 4)
    orders, ranks, moves = plain_mamba.scan_orders(*grid)
    with torch.no_grad():
        y = mixer.scan(u, grid)
        step, b, c = mixer.x_proj(u.transpose(1, 2)).split([mixer.rank, 4, 4], -1)
        step = mixer.dt_proj(step)
        for k, order in enumerate(orders):
            parts = (x[:, order].transpose(1, 2) for x in (step, b + mixer.direction_Bs[moves[k, ranks[k]]], c))
            delta, b_k, c_k = parts
            bias = mixer.dt_proj.bias
            want = selective_scan(u[..., order], delta, -mixer.A_log.exp(), b_k, c_k, mixer.D, None, bias, True)
            assert torch.allclose(y[:, k], want[..., ranks[k]], atol=1e-5)
        mixer.permute_ssm_params = False
        assert not torch.allclose(mixer.scan(u, grid), y, atol=1e-2)


def test_image_sizes():
    with pytest.raises(PrunelabError, match="channels, 20x20"):
        tiny("vim")(torch.randn(1, 3, 24, 20))
    model = tiny("plain_mamba")
    with pytest.raises(PrunelabError, match="takes images"):
        model(torch.randn(3, 16, 16))
    for size in ((17, 23), (4, 40), (3, 3)):
        x = torch.randn(2, 3, *size)
        assert run(model, x, VimTokenPruning(layers=(1,)), 0.3).isfinite().all()


# -- checkpoints -----------------------------------------------------------------------------------------------------


@families
def test_official_files_load(family, tmp_path):
    source, x = tiny(family), images(family)
    state = source.state_dict()
    root = {"vim": "model", "plain_mamba": "state_dict"}[family]
    averages = {f"ema_{name.replace('.', '_')}": value for name, value in state.items()}
    content = {root: {**state, **averages}, "epoch": 3, "args": argparse.Namespace(lr=1.0)}
    torch.save(content, tmp_path / "official.pth")
    torch.save(state, tmp_path / "plain.pth")
    save_file(state, tmp_path / "plain.safetensors")
    module = {"vim": vim, "plain_mamba": plain_mamba}[family]
    for file in ("official.pth", "plain.pth", "plain.safetensors"):
        model = tiny(family)
        torch.nn.init.zeros_(next(iter(model.parameters())))
        module.load_checkpoint(model, tmp_path / file)
        with torch.no_grad():
            assert torch.equal(model(x), source(x))


def test_wrong_checkpoints_are_named(tmp_path):
    model = tiny("vim")
    state = model.state_dict()
    before = {name: value.clone() for name, value in state.items()}
    state["unheard.of"] = state.pop("head.bias")
    state["norm_f.weight"] = torch.ones(3)
    torch.save({"model": state}, tmp_path / "wrong.pth")
    with pytest.raises(PrunelabError) as error:
        vim.load_checkpoint(model, tmp_path / "wrong.pth")
    assert "\n" not in str(error.value)
    for part in ("missing: head.bias", "not the model's: unheard.of", "norm_f.weight (3,) for (16,)"):
        assert part in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    (tmp_path / "cut.pth").write_bytes((tmp_path / "wrong.pth").read_bytes()[:500])
    (tmp_path / "cut.safetensors").write_bytes(b"12")
    torch.save({"model": {"a": 1}}, tmp_path / "empty.pth")
    torch.save({"model": {"a": pytest.raises}}, tmp_path / "code.pth")
    for file, what in {
        "cut.pth": "cannot be read",
        "cut.safetensors": "cannot be read",
        "empty.pth": "no weights",
        "code.pth": "cannot be read",
        "nobody.pth": "does not exist",
    }.items():
        with pytest.raises(PrunelabError, match=what):
            vim.load_checkpoint(model, tmp_path / file)


# -- gaps ------------------------------------------------------------------------------------------------------------


def walk(dt: Tensor, u: Tensor, A: Tensor, B: Tensor, C: Tensor, steps: list[int], decay: bool) -> Tensor:
    """The scan as the paper tells it, over every position of the full sequence: y [B, E, K] of the tokens at `steps`.

    dt (after softplus), u [B, E, K]; B, C [B, N, K]. At a missing position the state is copied, or decays with the
    step width of the token before it.
    """
    state, out, j = u.new_zeros(*u.shape[:2], A.shape[1]), [], -1
    for position in range(steps[-1] + 1):
        if position in steps:
            j += 1
            state = torch.exp(dt[:, :, j, None] * A) * state + (dt * u)[:, :, j, None] * B[:, None, :, j]
            out.append((state * C[:, None, :, j]).sum(-1))
        elif decay and j >= 0:
            state = torch.exp(dt[:, :, j, None] * A) * state
    return torch.stack(out, -1)


STEPS = [1, 2, 5, 9, 10, 14]


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_vim_scans_walk_over_the_gaps(decay, backward, monkeypatch):
    torch.manual_seed(0)
    mixer, total = vim.Mixer(8, 4), 17
    u, z = torch.randn(2, 2, 16, len(STEPS))
    suffix = "_b" if backward else ""
    subset = Subset(torch.tensor(STEPS).expand(2, -1), total, decay=decay)
    steps = [total - 1 - s for s in reversed(STEPS)] if backward else STEPS
    with torch.no_grad():
        x = F.silu(getattr(mixer, f"conv1d{suffix}")(F.pad(u, (3, 0))))
        step, b, c = getattr(mixer, f"x_proj{suffix}")(x.transpose(1, 2)).split([1, 4, 4], -1)
        dt = F.softplus(getattr(mixer, f"dt_proj{suffix}")(step)).transpose(1, 2)
        A = -getattr(mixer, f"A{suffix}_log").exp()
        want = walk(dt, x, A, b.transpose(1, 2), c.transpose(1, 2), steps, decay)
        want = (want + getattr(mixer, f"D{suffix}")[:, None] * x) * F.silu(z)
        got = mixer.scan(u, z, subset.reversed() if backward else subset, suffix)
    assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("decay", [False, True])
def test_plain_mamba_scans_walk_over_the_gaps(decay):
    torch.manual_seed(0)
    mixer, grid = plain_mamba.Mixer(8, 4), (3, 5)
    u = torch.randn(2, 16, len(STEPS))
    orders, _, moves = plain_mamba.scan_orders(*grid)
    with torch.no_grad():
        got = mixer.scan(u, grid, Subset(torch.tensor(STEPS).expand(2, -1), 15, decay=decay))
        step, b, c = mixer.x_proj(u.transpose(1, 2)).split([1, 4, 4], -1)
        dt = F.softplus(mixer.dt_proj(step) + mixer.dt_proj.bias).transpose(1, 2)
        for k in range(4):
            visited = [t for t in range(15) if int(orders[k, t]) in STEPS]
            tokens = [STEPS.index(int(orders[k, t])) for t in visited]  # among the kept
            b_k = (b + mixer.direction_Bs[moves[k, visited]]).transpose(1, 2)
            y = walk(dt, u[..., tokens], -mixer.A_log.exp(), b_k, c.transpose(1, 2), visited, decay)
            y = y + mixer.D[:, None] * u[..., tokens]
            assert torch.allclose(got[:, k][..., tokens], y, atol=1e-5)


def test_a_held_state_is_plain_removal_bit_for_bit():
    """Walking over every position with a copied state changes nothing against a scan of the kept tokens alone."""
    g = torch.Generator().manual_seed(0)
    dt, u = (torch.rand(2, 6, len(STEPS), generator=g) for _ in range(2))
    b, c = (torch.randn(2, 4, len(STEPS), generator=g) for _ in range(2))
    A = -torch.rand(6, 4, generator=g)
    alone = selective_scan(u, dt, A, b, c, implementation="reference")
    assert torch.equal(walk(dt, u, A, b, c, STEPS, decay=False), alone)

    model, x = tiny("vim"), images("vim")
    held = run(model, x, VimTokenPruning(layers=(0, 1), align="hold"))
    with torch.no_grad(), apply(VimTokenPruning(layers=(0, 1), align="hold"), model, 0.5) as handle:
        model(x)
        places = [origin for _, origin in handle.kept()]
        tokens = model.patch_embed(x)
        tokens = torch.cat([tokens[:, :12], model.cls_token.expand(3, -1, -1), tokens[:, 12:]], 1) + model.pos_embed
    hidden, residual, full = tokens, None, torch.arange(26).expand(3, -1)
    with torch.no_grad():
        for number, layer in enumerate(model.layers):  # no adapter, no subset: the model on fewer tokens
            hidden, residual = layer(hidden, residual)
            if number < 2:
                index = torch.stack([torch.isin(f, p).nonzero().flatten() for f, p in zip(full, places[number])])
                full = full.gather(1, index)
                hidden, residual = (t.gather(1, index[..., None].expand(-1, -1, 16)) for t in (hidden, residual))
        where = (full == model.class_place).int().argmax(1)
        removed = model.head(model.norm_f(hidden + residual)[torch.arange(3), where])
    assert torch.equal(held, removed)
    assert torch.equal(held, run(model, x, VimTokenPruning(layers=(0, 1), align="renumber")))
    for align in ("decay", "original"):
        assert not torch.allclose(held, run(model, x, VimTokenPruning(layers=(0, 1), align=align)), atol=1e-3)


def test_in_plain_mamba_only_decay_differs():
    model, x = tiny("plain_mamba"), images("plain_mamba")
    held, decayed, *others = (run(model, x, VimTokenPruning(layers=(1,), align=a)) for a in ALIGN)
    assert all(torch.equal(held, other) for other in others)
    assert not torch.allclose(held, decayed, atol=1e-3)


def test_convolutions_at_original_places_see_zeros():
    torch.manual_seed(0)
    mixer, index = vim.Mixer(8, 4), torch.tensor([[0, 3, 4, 8]])
    x = torch.randn(1, 4, 8)
    with torch.no_grad():
        u, z = mixer.in_proj(x).transpose(1, 2).chunk(2, 1)
        full = torch.zeros(1, 16, 11)
        full[:, :, index[0]] = u
        seen = []
        mixer.conv1d.register_forward_hook(lambda _, args, out: seen.append(args[0]))
        mixer.scan(u, z, Subset(index, 11, spread=True))
    assert torch.equal(seen[0], F.pad(full, (3, 0)))


def test_convolutions_over_the_map_see_zeros():
    torch.manual_seed(0)
    conv, index = torch.nn.Conv2d(6, 6, 3, padding=1, groups=6), torch.tensor([[0, 3, 4, 8], [2, 5, 7, 11]])
    x = torch.randn(2, 6, 4)
    maps = torch.zeros(2, 6, 12)
    for i in range(2):
        maps[i][:, index[i]] = x[i]
    with torch.no_grad():
        full = conv(maps.view(2, 6, 3, 4)).flatten(2)
        got = plain_mamba.on_map(conv, x, (3, 4), Subset(index, 12))
    assert torch.equal(got, torch.stack([full[i][:, index[i]] for i in range(2)]))


@families
def test_places_are_those_of_the_full_sequence_after_every_site(family):
    model, x = tiny(family), images(family)
    layers, seen = (model if family == "vim" else model.backbone).layers, []
    with torch.no_grad(), apply(VimTokenPruning(layers=(0, 1, 2)), model, 0.7) as handle:
        for layer in layers:
            layer.register_forward_pre_hook(lambda _, args, named: seen.append(named["subset"]), with_kwargs=True)
        model(x)
        kept_places = [origin for _, origin in handle.kept()]
    assert seen[0] is None
    for subset, origin in zip(seen[1:], kept_places, strict=True):
        assert torch.equal(subset.places, origin)
        assert subset.total == adapter_for(model).info.tokens


@families
@pytest.mark.parametrize("align", ALIGN)
def test_keeping_all_is_the_identity(family, align):
    model, x = tiny(family), images(family)
    with torch.no_grad():
        dense = model(x)
    assert torch.allclose(run(model, x, VimTokenPruning(layers=(0, 2), align=align), 1.0), dense, atol=1e-5)


# -- adapters --------------------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("where", ["input", "block_output"])
@pytest.mark.parametrize("layer", [0, 3])
def test_any_site_prunes(family, where, layer):
    index = torch.arange(1, 16, 2).expand(3, -1)
    index = index if family == "plain_mamba" else torch.cat([index[:, :6], index.new_full((3, 1), 12), index[:, 6:]], 1)
    model, x = tiny(family), images(family)
    method = Fixed(plans=(Plan(Gather(index), positions="decay"),), layers=(layer,), where=where)
    with torch.no_grad(), apply(method, model, 1.0) as handle:
        assert model(x).isfinite().all()
        assert torch.equal(handle.kept()[0][1], index)
    behind, units = layer + (where == "block_output"), adapter_for(model).info.tokens
    want = [3.0 * (index.shape[1] if number >= behind else units) for number in range(4)]
    assert handle.application.trace.mlp == want


def test_the_class_token_is_kept_found_and_read():
    model, x = tiny("vim"), images("vim", 8)
    with torch.no_grad():
        seen = []
        with apply(VimTokenPruning(layers=(0, 2)), model, 0.4) as handle:  # our hook comes behind the adapter's
            model.read.register_forward_pre_hook(
                lambda _, args, named: seen.append((args[0], named["place"])), with_kwargs=True
            )
            logits = model(x)
            (_, first), (_, last) = handle.kept()
        assert bool((first == 12).sum(1).eq(1).all() and (last == 12).sum(1).eq(1).all())
        normed, place = seen[0]
        assert len(place.unique()) > 1, "it moves differently in each sample"
        assert torch.equal(last.gather(1, place[:, None]), torch.full((8, 1), 12))
        assert torch.equal(logits, model.head(normed[torch.arange(8), place]))


@families
def test_other_pruners_run(family):
    model, x = tiny(family), images(family)
    with torch.no_grad(), apply(RandomDrop(layers=(1, 2)), model, 0.5) as handle:
        assert model(x).isfinite().all()
        assert handle.report().tokens[3] == ((7.0, 7.0) if family == "vim" else (4.0, 4.0))
        assert handle.report().saving > 0
    with pytest.raises(PrunelabError, match="after_attention"), apply(ToMe(), model, 1.0):
        pass


def pairs(units: int, batch: int = 3) -> Mix:
    """Every two neighbours averaged; an odd one is left alone."""
    target = (torch.arange(units) // 2).expand(batch, -1)
    count = torch.zeros(batch, (units + 1) // 2).scatter_add(1, target, torch.ones(batch, units))
    return Mix(target, torch.arange(units).expand(batch, -1), 1 / count.gather(1, target), (units + 1) // 2)


@families
@pytest.mark.parametrize("align", ALIGN)
def test_mixtures_flow(family, align):
    model, x = tiny(family), images(family)
    units = adapter_for(model).info.tokens
    plan = Plan(pairs(units), positions=align)
    with torch.no_grad():
        assert run(model, x, Fixed(plans=(plan,))).isfinite().all()
        same = Plan(Mix.from_matrix(torch.eye(units).expand(3, -1, -1)), positions=align)
        assert torch.allclose(run(model, x, Fixed(plans=(same,))), model(x), atol=1e-5)


def test_pooling_weighs_merged_tokens_by_their_size():
    model, x = tiny("plain_mamba"), images("plain_mamba")
    sizes = torch.tensor([4.0] + [1.0] * 12)
    target = (torch.arange(16) - 3).clamp_min(0).expand(3, -1)  # the first four become one
    mix = Mix(target, torch.arange(16).expand(3, -1), 1 / sizes[target], 13)
    seen = []
    model.head.register_forward_pre_hook(lambda _, args: seen.append(args[0].mean(1)))
    model.backbone.ln1.register_forward_hook(lambda _, args, out: seen.append(out))
    run(model, x, Fixed(plans=(Plan(mix),)))
    tokens, pooled = seen
    assert torch.allclose(pooled, (tokens * sizes[:, None]).sum(1) / 16, atol=1e-5)


def plan_of(index: list[int], **options) -> Plan:
    return Plan(Gather(torch.tensor(index).expand(3, -1)), **options)


BROKEN = [
    ("vim", plan_of([0, 1, 2]), "takes away the class token"),
    ("vim", plan_of([3, 12, 5]), "out of order"),
    ("plain_mamba", plan_of([3, 2], positions="renumber"), "out of order"),
    ("plain_mamba", plan_of([3, 3], positions="hold"), "out of order or at one place"),
    ("vim", plan_of([0, 12], rest="bypass"), "cannot carry out"),
    ("vim", Plan(Gather(torch.tensor([[0, 12]] * 3), torch.tensor([[True, True]] * 3))), "different number of tokens"),
]


@pytest.mark.parametrize(("family", "plan", "message"), BROKEN)
def test_plans_that_cannot_be_carried_out_are_named(family, plan, message):
    with pytest.raises(PrunelabError, match=message):
        run(tiny(family), images(family), Fixed(plans=(plan,)))


def test_a_reordered_sequence_closes_up():
    assert run(tiny("vim"), images("vim"), Fixed(plans=(plan_of([3, 12, 5], positions="renumber"),))).isfinite().all()


@dataclass(frozen=True)
class Doubling(Fixed):
    """Keeps all and doubles the tokens."""

    name: ClassVar[str] = "doubling"

    def refine(self, site: Site, hidden: Tensor, signals: TokenSignals, plan: Plan) -> Tensor:
        return 2 * hidden


@families
def test_refined_tokens_go_on(family):
    model, x = tiny(family), images(family)
    units = adapter_for(model).info.tokens
    streams = []
    last = model.layers[3] if family == "vim" else model.backbone.layers[3]

    def note(module, args):
        streams.append(args[0] + args[1] if family == "vim" else args[0])

    last.register_forward_pre_hook(note)
    with torch.no_grad():
        model(x)
    run(model, x, Doubling(plans=(plan_of(list(range(units))),), layers=(2,)))
    assert torch.allclose(streams[1], 2 * streams[0], atol=1e-4)


def hooks(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@families
def test_the_model_is_left_as_it_was(family):
    model, x = tiny(family), images(family)
    with torch.no_grad():
        dense, before = model(x), hooks(model)
        with apply(VimTokenPruning(layers=(1,)), model, 0.5):
            assert hooks(model) > before
        with pytest.raises(RuntimeError), apply(VimTokenPruning(layers=(1,)), model, 0.5):
            raise RuntimeError
        assert hooks(model) == before
        with pytest.raises(PrunelabError, match="layers 0 to 3"), apply(VimTokenPruning(layers=(9,)), model, 0.5):
            pass
        assert hooks(model) == before
        assert torch.equal(model(x), dense)


@families
@pytest.mark.parametrize("align", ALIGN)
def test_batch_equals_single_and_report_leaves_the_method_on(family, align):
    model, x, method = tiny(family), images(family), VimTokenPruning(layers=(0, 2), align=align)
    with torch.no_grad(), apply(method, model, 0.6) as handle:
        together = model(x)
        assert 0 < handle.report().macs < handle.report().dense_macs
        assert torch.equal(model(x), together)
        alone = torch.cat([model(x[i : i + 1]) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-5)


@families
def test_bfloat16_is_finite_and_nan_is_named(family):
    model, x = tiny(family), images(family)
    method = VimTokenPruning(layers=(1,))
    with torch.no_grad():
        assert torch.isfinite(run(tiny(family).bfloat16(), x.bfloat16(), method).float()).all()
        next(p for n, p in model.named_parameters() if n.endswith("in_proj.weight"))[0, 0] = torch.nan
        with pytest.raises(PrunelabError, match="'scans' holds NaN"):
            run(model, x, method)


# -- the method ------------------------------------------------------------------------------------------------------


def signals(scans: Tensor, class_place: int) -> TokenSignals:
    batch, _, units, _ = scans.shape
    prunable = torch.ones(batch, units, dtype=torch.bool)
    prunable[:, class_place] = False
    info = ModelInfo("vim", 24, 1, 8, units, 1, True, class_place)
    return TokenSignals({"scans": lambda: scans}, prunable=prunable, units=units - 1, info=info)


def test_metrics_are_those_of_the_ablation():
    y = torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(importance(y), y.clamp_min(0).sum(-1)[:, 0] + y.clamp_min(0).sum(-1)[:, 1])
    assert torch.allclose(importance(y, "none"), y.sum(-1).sum(1))
    assert torch.allclose(importance(y, "l1"), y.abs().sum(-1).sum(1))
    assert torch.allclose(importance(y, "l2"), y.square().sum(-1).sqrt().sum(1))


def test_the_best_tokens_stay_in_order_with_the_class_token_of_every_sample():
    scans = -torch.ones(2, 2, 9, 3)
    scans[0, :, [7, 1, 8]] = 1.0  # both directions, in token order
    scans[1, 0, [2, 3, 5]] = 1.0
    plan = VimTokenPruning(layers=(0,)).plan(Site(0), signals(scans, 4), Budget(3, "count"))
    assert plan.reduce.index.tolist() == [[1, 4, 7, 8], [2, 3, 4, 5]]
    assert plan.positions == "decay"


def test_the_kept_share_is_rounded_up():
    assert [kept(Budget(r), 196) for r in (1.0, 0.8, 0.7, 0.5, 0.0)] == [196, 157, 138, 98, 0]
    assert kept(Budget(0.07), 100) == 7  # the product is 7.000000000000001
    assert kept(Budget(13, "removed"), 196) == 183


@pytest.mark.parametrize(("share", "tokens"), [(0.8, (157, 125, 101)), (1.0, (197, 197, 197)), (0.0, (1, 1, 1))])
def test_the_released_schedule(share, tokens):
    """197 -> 157 -> 125 -> 101 tokens behind blocks 5, 10 and 15 at 0.8, the class token always in the middle."""
    model = loading.architecture({"library": "backbones", "name": "vim:vim_small"})
    with apply(VimTokenPruning(released=True), model, Budget(share)) as handle:
        counts = [a for a, _ in handle.report().tokens]
    assert (counts[4], counts[5], counts[10], counts[15]) == (197, *tokens)


def test_what_the_release_does_and_the_paper_does_not():
    method = VimTokenPruning(layers=(0,), released=True)
    scans = torch.zeros(2, 2, 9, 3)
    scans[:, 1, 0] = 1.0  # the backward scan speaks for token 0: the release credits token 8
    scans[:, 1, 4] = 9.0  # and for the class token, which only the first sample protects
    scans[:, 0, 6] = 99.0  # the forward scan is not heard
    plan = method.plan(Site(0), signals(scans, 4), Budget(2, "count"))
    assert plan.positions == "renumber"
    assert plan.reduce.index[0].tolist() == [0, 4, 8]
    assert plan.reduce.index[1].tolist() == [4, 4, 8]
    model, x = tiny("vim", size=24), torch.randn(3, 3, 24, 24)
    with torch.no_grad(), apply(method, model, 0.5) as handle:
        assert model(x).isfinite().all()
        middle = handle.kept()[0][1]
        assert bool((middle[:, middle.shape[1] // 2] == 18).all())
    with pytest.raises(PrunelabError, match="class token in the middle"):
        run(tiny("plain_mamba"), images("plain_mamba"), method)


@pytest.mark.parametrize("option", [{"metric": "l3"}, {"align": "copy"}])
def test_unknown_options_are_named(option):
    with pytest.raises(PrunelabError, match="must be one of"):
        VimTokenPruning(**option)


# -- cost ------------------------------------------------------------------------------------------------------------

# (channels, GFLOPs that the PlainMamba paper prints, where a scan counts as in VMamba's repository)
PRINTED = {"plain_mamba_l1": (384, 3.0), "plain_mamba_l2": (768, 8.1), "plain_mamba_l3": (896, 14.4)}


def as_printed(macs: float, tokens: list[float], channels: int) -> float:
    """Our count with VMamba's count of the scans in place of ours."""
    scan = (channels, 16, False)
    return macs + sum(4 * (scan_flops_vmamba(int(t), *scan) - scan_macs(int(t), *scan)) for t in tokens)


@pytest.mark.parametrize("name", PRINTED)
def test_dense_costs_are_the_printed_ones(name):
    model = loading.architecture({"library": "backbones", "name": f"plain_mamba:{name}"})
    channels, printed = PRINTED[name]
    dense = meter.macs(model, adapter_for(model).example())
    counted = as_printed(dense, [196.0] * len(model.backbone.layers), channels)
    assert counted / 1e9 == pytest.approx(printed, abs=0.05)


def test_scans_are_counted_by_the_formula():
    model = loading.architecture({"library": "backbones", "name": "vim:vim_tiny"})
    layer = model.layers[0].mixer
    x = torch.empty(1, 197, 192, device="meta")
    linear = 197 * (192 * 768 + 384 * 192 + 2 * 384 * (44 + 12 + 4))
    assert meter.flops(lambda: layer(x)) / 2 == linear + 2 * scan_macs(197, 384, 16)


@pytest.mark.parametrize(
    ("budget", "saved", "saved_as_printed"), [("0.71,0.71,0.7", 41.6, 42.5), ("0.715", 40.7, 41.6)]
)
def test_a_configuration_saves_the_reported_share_of_plain_mamba_l3(budget, saved, saved_as_printed):
    model = loading.architecture({"library": "backbones", "name": "plain_mamba:plain_mamba_l3"})
    with apply(VimTokenPruning(), model, Budget.parse(budget)) as handle:
        report = handle.report()
    assert 100 * report.saving == pytest.approx(saved, abs=0.05)
    pruned = as_printed(report.macs, [a for a, _ in report.tokens], 896)
    assert 100 * (1 - pruned / as_printed(report.dense_macs, [196.0] * 36, 896)) == pytest.approx(
        saved_as_printed, abs=0.05
    )


def readme_costs() -> list[tuple[str, str, float]]:
    text = (Path(__file__).parents[3] / "methods" / "vim_token_pruning" / "README.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "Mamba-L" in line[:14]
    ]
    rows += [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "| Vim-" in line[:6]
    ]
    shares = ("1.0", "0.9", "0.8", "0.7", "0.6", "0.5")
    return [(row[0], share, float(value)) for row in rows for share, value in zip(shares, row[1:], strict=True)]


NAMED = {
    "Vim-T": "vim:vim_tiny",
    "Vim-S": "vim:vim_small",
    **{f"PlainMamba-L{n}": f"plain_mamba:plain_mamba_l{n}" for n in (1, 2, 3)},
}


@pytest.mark.parametrize("name", NAMED)
def test_the_costs_of_the_readme_are_measured(name):
    rows = [(share, value) for row, share, value in readme_costs() if row == name]
    assert len(rows) == 6
    model = loading.architecture({"library": "backbones", "name": NAMED[name]})
    for share, value in rows:
        with apply(VimTokenPruning(), model, Budget.parse(share)) as handle:
            assert handle.macs() / 1e9 == pytest.approx(value, abs=6e-4)
