"""The weight-pruning engine: streaming, statistics, order of work, memory, resuming and bad input."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from benchmarks.memory import Live
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights import masks, prune, windows
from prunelab.common.weights.accumulators import Accumulators
from prunelab.common.weights.adapters import weight_adapter
from prunelab.common.weights.calibration import Stream, finite
from prunelab.common.weights.checkpoints import Work
from prunelab.common.weights.probe import ModelProbe
from prunelab.common.weights.role import WeightPruner
from prunelab.common.weights.targets import Accumulator, Observation, Target, Unit, WeightSignals
from prunelab.methods.flap.method import FLAP
from prunelab.methods.gblm.method import GBLM
from prunelab.methods.magnitude.method import Magnitude
from prunelab.methods.random_weights.method import RandomWeights
from prunelab.methods.sparsegpt.method import SparseGPT
from prunelab.methods.wanda.method import Wanda
from tests.contract.references import LANGUAGE_MODELS, NormChannels, language_model, token_ids

ROOT = Path(__file__).resolve().parents[3]
families = pytest.mark.parametrize("family", LANGUAGE_MODELS)


@torch.no_grad()
def plain_wanda(model: nn.Module, ids: Tensor, sparsity: float) -> None:
    """Wanda the long way: the whole pruned model runs anew for every block, and rows are sorted."""
    for block in model.model.layers:
        linears = [m for m in block.modules() if isinstance(m, nn.Linear)]
        norms: dict[nn.Module, Tensor] = {m: torch.zeros(m.in_features) for m in linears}

        def note(m: nn.Module, args: tuple[Tensor], norms: dict[nn.Module, Tensor] = norms) -> None:
            norms[m] += args[0][0].square().sum(0)

        handles = [m.register_forward_pre_hook(note) for m in linears]
        for sequence in ids:
            model(input_ids=sequence[None])
        for handle in handles:
            handle.remove()
        for m in linears:
            order = (m.weight.abs() * norms[m].sqrt()).argsort(dim=1, stable=True)
            m.weight.scatter_(1, order[:, : int(m.in_features * sparsity)], 0)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_streamed_wanda_equals_running_the_whole_model_for_every_block(family):
    ours, plain, ids = language_model(family), language_model(family), token_ids()
    prune(Wanda(), ours, 0.5, ids, progress=False)
    plain_wanda(plain, ids, 0.5)
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b), name


@families
def test_the_stream_ends_where_the_model_does(family):
    model, ids = language_model(family), token_ids()
    adapter = weight_adapter(model)
    with torch.no_grad():
        stream = Stream(adapter, [*ids, ids[0, :7]])  # sequences of several lengths
        for block in range(3):
            stream.through(block)
        for sample, hidden in zip([*ids, ids[0, :7]], stream.hidden, strict=True):
            want = model.model(input_ids=sample[None], use_cache=False).last_hidden_state
            assert torch.allclose(model.model.norm(hidden), want, atol=1e-5)
    assert "forward" not in vars(adapter.blocks[0])


@families
def test_targets_cover_every_linear_of_the_blocks_and_sizes_add_up(family):
    model = language_model(family)
    adapter = weight_adapter(model)
    linear = adapter.targets("linear")
    assert len({t.name for t in linear}) == len(linear)
    for target in linear:
        assert adapter.weights(target)["weight"].shape == target.shape
        adapter.weights(target)["weight"].zero_()  # a view: the model itself changes
    left = {n.rpartition(".")[0].rpartition(".")[2] for n, p in model.model.layers.named_parameters() if bool(p.any())}
    assert all(
        "norm" in name or name in ("gate", "shared_expert_gate") or name in "q_projk_projv_proj" for name in left
    )
    for unit in ("heads", "channels", "experts"):
        for target in adapter.targets(unit):
            held = sum(t.numel() for r, t in adapter.weights(target).items() if r not in ("o.bias", "down.bias"))
            assert held == target.parameters, target.name
    outside = {t.name for t in adapter.targets("tensor")}
    assert "model.embed_tokens.weight" in outside and not outside & {f"{t.name}.weight" for t in linear}


@dataclass(frozen=True)
class Spy(WeightPruner):
    """Keeps all, and checks what it is shown."""

    unit: Unit = "linear"
    name: ClassVar[str] = "spy"

    @property
    def units(self) -> tuple[Unit, ...]:
        return (self.unit,)

    def statistics(self, unit: Unit) -> Mapping[str, type[Accumulator]]:
        return {"observations": Observations}

    def score(self, target: Target, signals: WeightSignals) -> Tensor:
        return torch.ones(target.shape)


class Observations(Accumulator):
    """Keeps everything it saw."""

    seen: ClassVar[list[tuple[Target, Observation]]] = []

    def __init__(self, target: Target) -> None:
        self.target = target

    def update(self, observed: Observation) -> None:
        self.seen.append((self.target, observed))

    def value(self) -> Tensor:
        return torch.zeros(())


def observations(family: str, unit: Unit) -> tuple[nn.Module, list[tuple[Target, Observation]]]:
    Observations.seen.clear()
    model = language_model(family)
    prune(Spy(unit), model, 1.0, token_ids(2), progress=False)
    return model, list(Observations.seen)


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"])
def test_experts_are_observed_as_they_were_routed(family):
    model, seen = observations(family, "experts")
    assert len(seen) == 2 * len(weight_adapter(model).targets("experts"))
    for target, observed in seen:
        routing, total = observed.routing, 0
        norm = model.model.layers[target.block].post_attention_layernorm
        assert torch.allclose(norm(routing.residual), observed.inputs, atol=1e-5)
        assert torch.allclose(routing.logits, observed.inputs @ observed.weights["router"].T, atol=1e-4)
        for expert in range(target.units):
            token, slot, outputs = routing.outputs(expert, observed.inputs)
            given = routing.gates[token, slot].unsqueeze(-1) * outputs
            total = total + torch.zeros_like(observed.inputs).index_add(0, token, given)
        assert torch.allclose(total, routing.routed, atol=1e-4)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_linears_of_experts_read_the_tokens_sent_to_them(family):
    _, routed = observations(family, "experts")
    _, seen = observations(family, "linear")
    by_name = {}
    for target, observed in seen:
        by_name.setdefault(target.name, []).append((target, observed))
    for place, (mixture, observed) in enumerate(o for o in routed if o[0].block == 0):
        for expert in range(mixture.units):
            token, _, outputs = observed.routing.outputs(expert, observed.inputs)
            gate, up, down = (by_name[f"{mixture.name}.{expert}.{role}"][place][1] for role in ("gate", "up", "down"))
            assert torch.allclose(gate.inputs, observed.inputs[token], atol=1e-6)
            inner = nn.functional.silu(gate.inputs @ gate.weights["weight"].T) * (up.inputs @ up.weights["weight"].T)
            assert torch.allclose(down.inputs, inner, atol=1e-5)
            assert torch.allclose(down.inputs @ down.weights["weight"].T, outputs, atol=1e-5)


@pytest.mark.parametrize("unit", ["heads", "channels", "layers", "linear"])
def test_block_states_and_inputs_are_those_of_the_model(unit):
    model, seen = observations("llama", unit)
    with torch.no_grad():
        states = model.model(input_ids=token_ids(2)[:1], output_hidden_states=True).hidden_states
    for target, observed in seen[:: 2 if unit != "linear" else 14][:1]:
        assert torch.allclose(observed.before, states[target.block][0], atol=1e-5)
        assert torch.allclose(observed.after, states[target.block + 1][0], atol=1e-5)
        assert torch.equal(observed.tokens, token_ids(2)[0])
    last = {"heads": "o", "channels": "down"}.get(unit)
    if last:
        for target, observed in seen:
            assert observed.inputs.shape[1] == observed.weights[last].shape[1] == target.units * target.span


def test_linears_that_read_one_input_share_its_statistic():
    adapter = weight_adapter(language_model())
    accumulators = Accumulators(Wanda(), [t for t in adapter.targets("linear") if t.block == 0])
    distinct = {id(a) for made in accumulators.made.values() for a in made.values()}
    assert len(distinct) == 4 and len(accumulators.owned) == 4  # q k v, o, gate up, down


def test_gradients_are_those_of_the_loss_and_leave_nothing_behind():
    class Sum(Accumulator):
        def __init__(self, target: Target) -> None:
            self.total = torch.zeros(target.shape)

        def update(self, observed: Tensor) -> None:
            self.total += observed

        def value(self) -> Tensor:
            return self.total

    for family in ("llama", "mixtral"):
        model, ids = language_model(family), token_ids()
        model.lm_head.weight.requires_grad_(False)
        adapter = weight_adapter(model)
        targets = adapter.targets("linear")
        got = ModelProbe(adapter, targets, list(ids)).gradients({"gradient": Sum})
        assert all(p.grad is None for p in model.parameters())
        assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
        for sample in ids:
            model(input_ids=sample[None], labels=sample[None]).loss.backward()
        for target in targets:
            want = adapter.view(target, adapter.parameter(target).grad)
            assert torch.allclose(got[target.name]["gradient"], want, atol=1e-6), target.name


# -- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [Wanda(), SparseGPT(), NormChannels()], ids=lambda m: m.name)
def test_peak_memory_does_not_grow_with_depth(method, tmp_path):
    def peak(depth: int) -> int:
        model = language_model(num_hidden_layers=depth)
        with Live(model) as live:
            prune(method, model, 0.5, token_ids(8, 32), folder=tmp_path / str(depth), progress=False)
        return live.peak - live.own

    shallow, deep = peak(2), peak(12)
    block = sum(p.numel() * 4 for p in language_model().model.layers[0].parameters())
    assert shallow > block / 4, "the measure sees what is allocated"
    assert deep < 1.15 * shallow + 2000, (shallow, deep)


# -- resuming --------------------------------------------------------------------------------------------------------


def test_a_crash_between_decision_and_stream_is_mended(tmp_path, monkeypatch):
    whole = language_model()
    prune(SparseGPT(), whole, 0.5, token_ids(), progress=False)
    moved = Work.moved

    def crash(self, block, hidden):
        if block == 2:
            raise KeyboardInterrupt
        moved(self, block, hidden)

    for crashes in (True, False):
        model = language_model()
        with monkeypatch.context() as patch:
            if crashes:
                patch.setattr(Work, "moved", crash)
                with pytest.raises(KeyboardInterrupt):
                    prune(SparseGPT(), model, 0.5, token_ids(), folder=tmp_path, progress=False)
            else:
                prune(SparseGPT(), model, 0.5, token_ids(), folder=tmp_path, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters(), strict=True))
    assert not list(tmp_path.glob("hidden_*"))


KILLED = """
import os, signal, sys
from prunelab.common.weights import prune
from prunelab.methods.flap.method import FLAP
from prunelab.methods.sparsegpt.method import SparseGPT
from tests.contract.references import language_model, token_ids

def killed(method, name, role, folder):
    step = getattr(method, name)
    def die(self, target, *rest):
        if target.block == 1 and target.role == role:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, target, *rest)
    setattr(method, name, die)
    prune(method(), language_model(), 0.7, token_ids(), folder=folder, progress=False)

for case in ((SparseGPT, "solve", "mlp.gate_proj"), (FLAP, "score", "channels"), (FLAP, "update", "channels")):
    child = os.fork()
    if child == 0:
        killed(*case, os.path.join(sys.argv[1], case[1]))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """Work folders of three runs that were killed within block 1, by the step they died in."""
    folder = tmp_path_factory.mktemp("killed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # a process with one thread can be forked
    script = [sys.executable, "-c", KILLED, str(folder)]
    done = subprocess.run(script, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.split() == [str(-signal.SIGKILL)] * 3, done.stderr
    return folder


@pytest.mark.parametrize(
    ("method", "step", "left"),
    [(SparseGPT(), "solve", "block"), (FLAP(), "score", "evidence"), (FLAP(), "update", "block")],
    ids=["deciding block by block", "measuring", "deciding at the end"],
)
def test_a_process_killed_within_a_block_loses_that_block_alone(method, step, left, killed, monkeypatch):
    folder = killed / step
    assert (folder / f"{left}_0000.safetensors").exists() and not (folder / f"{left}_0001.safetensors").exists()
    whole, resumed = language_model(), language_model()
    plan = prune(method, whole, 0.7, token_ids(), progress=False)
    again, original = [], getattr(type(method), step)
    monkeypatch.setattr(
        type(method), step, lambda self, target, *rest: again.append(target.block) or original(self, target, *rest)
    )
    repeated = prune(method, resumed, 0.7, token_ids(), folder=folder, progress=False)
    assert set(again) == ({0, 1, 2} if step == "update" else {1, 2})  # decisions at the end take no time to repeat
    assert plan.diff(repeated) == "the plans are equal"
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_a_folder_of_a_run_killed_before_it_began_is_taken(tmp_path):
    (tmp_path / "run.part").write_text("{")
    plan = prune(Wanda(), language_model(), 0.5, token_ids(), folder=tmp_path, progress=False)
    assert plan.report.sparsity == pytest.approx(0.5) and (tmp_path / "run.json").exists()


@pytest.mark.parametrize("method", [SparseGPT(), FLAP()], ids=lambda m: m.name)
def test_damaged_files_of_an_interrupted_run_are_named_and_made_anew(method, tmp_path, monkeypatch):
    whole = language_model()
    prune(method, whole, 0.7, token_ids(), progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(Work, "close", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prune(method, language_model(), 0.7, token_ids(), folder=tmp_path, progress=False)
    for path in [*tmp_path.glob("hidden_*"), *tmp_path.glob("evidence_*")][:1]:
        path.write_bytes(b"cut short")
        for pattern in ("block_0002*", "evidence_0002*"):  # so that what was kept is read
            for later in set(tmp_path.glob(pattern)) - {path}:
                later.unlink()
        with pytest.raises(PrunelabError, match=f"{path.name} cannot be read .*move it away"):
            prune(method, language_model(), 0.7, token_ids(), folder=tmp_path, progress=False)
        path.unlink()
    model = language_model()
    prune(method, model, 0.7, token_ids(), folder=tmp_path, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters(), strict=True))
    (tmp_path / "run.json").write_text("[")
    with pytest.raises(PrunelabError, match="does not describe a run"):
        prune(method, language_model(), 0.7, token_ids(), folder=tmp_path, progress=False)


def test_a_folder_of_another_run_is_refused(tmp_path):
    prune(Wanda(), language_model(), 0.5, token_ids(), folder=tmp_path / "run", progress=False)
    again = {"folder": tmp_path / "run", "progress": False}
    with pytest.raises(PrunelabError, match="other budget"):
        prune(Wanda(), language_model(), 0.6, token_ids(), **again)
    with pytest.raises(PrunelabError, match="other weights"):
        prune(Wanda(), language_model(seed=1), 0.5, token_ids(), **again)
    with pytest.raises(PrunelabError, match="other calibration"):
        prune(Wanda(), language_model(), 0.5, token_ids(seed=4), **again)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(PrunelabError, match="not empty"):
        prune(Wanda(), language_model(), 0.5, token_ids(), folder=tmp_path / "mine", progress=False)


# -- budgets and bad input -------------------------------------------------------------------------------------------


def test_budgets_of_weights():
    assert Budget.parse("2:4") == Budget(2, "pattern", 4)
    assert str(Budget.parse("2,4,4:8")) == "2,4,4:8"
    assert Budget.parse("2,4,4:8").at(1) == Budget(4, "pattern", 8)
    assert Budget(2, "pattern", 4).count(64) == Budget(2, "pattern", 4).pruned(64) == 32
    assert Budget(0.45).pruned(30) == 16 and Budget(0.45).count(30) == 13
    assert Budget(7, "removed").pruned(30) == Budget(23, "count").pruned(30) == 7
    for wrong in ("5:4", "2:0"):
        with pytest.raises(PrunelabError):
            Budget.parse(wrong)
    with pytest.raises(PrunelabError, match="2:4"):
        Budget(2, "pattern")
    with pytest.raises(PrunelabError, match="groups of 4"):
        Budget.parse("2:4").count(30)


def test_one_budget_a_block():
    _, plan = (model := language_model()), prune(Wanda(), language_model(), Budget((1.0, 0.5, 0.25)), token_ids())
    shares = [plan.decision(f"model.layers.{i}.mlp.down_proj").mask.float().mean() for i in range(3)]
    assert [round(float(s), 3) for s in shares] == [1.0, 0.5, 0.25]
    with pytest.raises(PrunelabError, match="2 amounts for 3 blocks"):
        prune(Wanda(), model, Budget((0.5, 0.5)), token_ids(), progress=False)


def test_bad_input_is_named_before_any_work():
    model, ids = language_model(), token_ids()
    before = [p.clone() for p in model.parameters()]

    def refused(match: str, method: WeightPruner, budget="0.5", calibration=ids, on: nn.Module = model, **options):
        with pytest.raises(PrunelabError, match=match):
            prune(method, on, budget, calibration, progress=False, **options)

    refused("no weight adapter for Linear; supported: .*LlamaForCausalLM", Wanda(), on=nn.Linear(2, 2))
    refused("prunes experts, and this LlamaForCausalLM has none", RandomWeights(("experts",)))
    refused("needs a calibration set", Wanda(), calibration=None)
    refused("needs a calibration set", Wanda(), calibration=[])
    refused("outside the vocabulary of 61", Wanda(), calibration=ids + 60)
    refused("at least two token ids", Wanda(), calibration=[torch.tensor([3])])
    refused("exceed the model's 64", Wanda(), calibration=token_ids(1, 65))
    refused("do not divide into groups of 3", Wanda(), budget="2:3")
    refused("is for single weights", RandomWeights(("heads",)), budget="1:2")
    refused("would remove everything under 0:4", Wanda(), budget="0:4")
    refused("would remove everything in model.layers.0.self_attn", RandomWeights(("heads",)), budget="2removed")
    refused("would remove all layers", RandomWeights(("layers",)), budget="3removed")
    refused("reads no base model", Wanda(), base=language_model())
    refused("prunes a ratio, not 2:4", Wanda(variant=True), budget="2:4")
    refused("sparsegpt prunes ratios", SparseGPT(), budget="100count")
    moe = language_model("mixtral")
    refused("fewer than the 2 of a token", RandomWeights(("experts",)), budget="1count", on=moe)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_calibration_texts_too_short_are_refused():
    with pytest.raises(PrunelabError, match="63 tokens, fewer than one sequence of 64; give more text"):
        windows(torch.arange(63), 64, 4)
    assert windows(torch.arange(64), 64, 2).tolist() == [list(range(64))] * 2
    for wrong in ((torch.arange(64)[None], 8, 2), (torch.arange(64), 0, 2), (torch.arange(64), 8, 0)):
        with pytest.raises(PrunelabError, match="vector of token ids"):
            windows(*wrong)


@pytest.mark.parametrize("method", [Magnitude(), Magnitude("model"), RandomWeights(), Wanda(), SparseGPT(), GBLM()])
def test_rows_that_no_pattern_divides_are_named_before_any_work(method, monkeypatch):
    model = language_model(intermediate_size=42)  # down_proj alone reads 42
    before = [p.clone() for p in model.parameters()]
    with monkeypatch.context() as patch:
        patch.setattr(Stream, "through", None)
        patch.setattr(ModelProbe, "gradients", None)
        with pytest.raises(PrunelabError, match=r"layers.0.mlp.down_proj: 42 units do not divide into groups of 4"):
            prune(method, model, "2:4", token_ids(), progress=False)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    prune(method, model, "1:2", token_ids(), progress=False)
    assert bool((model.model.layers[0].mlp.down_proj.weight.unflatten(1, (-1, 2)).ne(0).sum(-1) <= 1).all())


@dataclass(frozen=True)
class Drastic(WeightPruner):
    """Prunes everything of a block's targets of one unit."""

    unit: Unit
    block: int
    atonce: bool
    name: ClassVar[str] = "drastic"

    @property
    def sequential(self) -> bool:
        return not self.atonce

    @property
    def units(self) -> tuple[Unit, ...]:
        return (self.unit,)

    def score(self, target: Target, signals: WeightSignals) -> Tensor:
        return torch.ones(target.shape)

    def mask(self, target: Target, scores: Tensor, budget: Budget) -> Tensor:
        return torch.full(target.shape, target.block != self.block)


@pytest.mark.parametrize("atonce", [True, False])
@pytest.mark.parametrize(
    ("unit", "family", "says"),
    [
        ("heads", "llama", "all heads of model.layers.0.self_attn"),
        ("channels", "llama", "all channels of model.layers.0.mlp"),
        ("experts", "mixtral", "all experts of model.layers.0.mlp.experts"),
        ("linear", "llama", "all weights of model.layers.0.self_attn.q_proj"),
    ],
)
def test_nothing_is_removed_whole(unit, family, says, atonce):
    model = language_model(family)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(PrunelabError, match=f"would remove {says}; keep more"):
        prune(Drastic(unit, 0, atonce), model, 0.5, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_layer_less_is_a_plan_and_none_left_is_not():
    model = language_model()
    prune(Drastic("layers", 1, True), model, 0.5, progress=False)
    assert len(model.model.layers) == 2
    with pytest.raises(PrunelabError, match="would remove all layers; keep more"):
        prune(RandomWeights(("layers",)), language_model(num_hidden_layers=1), "1removed", progress=False)


def test_windows_are_drawn_by_seed_and_lie_in_the_text():
    text = torch.arange(1000)
    drawn = windows(text, 16, 8, seed=1)
    assert torch.equal(drawn, windows(text, 16, 8, seed=1)) and not torch.equal(drawn, windows(text, 16, 8, seed=2))
    assert bool((drawn.diff(dim=1) == 1).all())


def test_tied_parameters_are_not_pruned_twice():
    model = language_model()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(
        PrunelabError, match=r"layers.0.mlp.up_proj.weight and model.layers.1.mlp.up_proj.weight are one"
    ):
        prune(Magnitude(), model, 0.5, progress=False)
    tied = language_model(tie_word_embeddings=True)
    prune(Wanda(), tied, 0.5, token_ids(), progress=False)  # embeddings are not its targets
    with pytest.raises(PrunelabError, match=r"model.embed_tokens.weight and lm_head.weight are one tied"):
        prune(RandomWeights(("tensor",)), tied, 0.5, progress=False)


@pytest.mark.parametrize("method", [Wanda(), SparseGPT(), FLAP()], ids=lambda m: m.name)
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("layer", ["self_attn.v_proj", "mlp.down_proj", "post_attention_layernorm"])
def test_bad_activations_name_layer_and_sequence(method, bad, layer):
    model = language_model()
    with torch.no_grad():
        model.get_parameter(f"model.layers.1.{layer}.weight")[0] = bad
    match = rf"model\.layers\.1\.{layer} gives NaN or infinite activations on calibration sequence 0; check the weights"
    with pytest.raises(PrunelabError, match=match):
        prune(method, model, 0.7, token_ids(), progress=False)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_bad_embedding_is_named_by_the_sequence_that_reads_it():
    model, ids = language_model(), token_ids()
    absent = next(i for i in range(61) if i not in ids[0] and i in ids[1])
    with torch.no_grad():
        model.model.embed_tokens.weight[absent] = float("nan")
    with pytest.raises(PrunelabError, match=r"what comes before the first block gives NaN .* calibration sequence 1"):
        prune(Wanda(), model, 0.5, ids, progress=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_large_activations_are_no_infinite_ones(dtype):
    """In half precision their sum is infinite long before they are."""
    large = torch.full((2048, 64), 60.0, dtype=dtype)
    assert finite(large) and finite(torch.zeros(0)) and finite(torch.ones(2, dtype=torch.int64))
    for bad in (float("nan"), float("inf"), -float("inf")):
        assert not finite(large.index_fill(0, torch.tensor(7), bad))


def test_bad_weights_are_named_where_nothing_is_measured():
    model = language_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    for method in (Magnitude(), Magnitude("model")):
        with pytest.raises(PrunelabError, match=r"scores of model\.layers\.1\.mlp\.up_proj hold NaN"):
            prune(method, model, 0.5, progress=False)


def test_a_singular_hessian_names_its_layer():
    few, enough = token_ids(1, 4), token_ids(8)  # four tokens for 32 channels
    with pytest.raises(PrunelabError, match=r"model\.layers\.0\.self_attn\.q_proj: a Hessian is singular; give more"):
        prune(SparseGPT(damping=0), language_model(), 0.5, few, progress=False)
    prune(SparseGPT(), damped := language_model(), 0.5, few, progress=False)
    assert all(finite(p) for p in damped.parameters())

    def dead(twins: bool) -> nn.Module:
        model = language_model()
        with torch.no_grad():
            mlp = model.model.layers[1].mlp
            if twins:  # two channels that always say the same: no more text can tell them apart
                mlp.up_proj.weight[1], mlp.gate_proj.weight[1] = mlp.up_proj.weight[0], mlp.gate_proj.weight[0]
            else:
                mlp.up_proj.weight[:2] = 0
        return model

    with pytest.raises(PrunelabError, match=r"model\.layers\.1\.mlp\.down_proj: a Hessian is singular"):
        prune(SparseGPT(damping=0), dead(twins=True), 0.5, enough, progress=False)
    model = dead(twins=False)
    plan = prune(SparseGPT(damping=0), model, 0.5, enough, progress=False)
    assert not bool(model.model.layers[1].mlp.down_proj.weight[:, :2].any()), "dead inputs go first"
    assert not bool(plan.decision("model.layers.1.mlp.down_proj").mask[:, :2].any())
    assert all(finite(p) for p in model.parameters())


def test_training_mode_and_hooks_are_as_before():
    model = language_model().train()
    prune(Wanda(), model, 0.5, token_ids(), progress=False)
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_smallest_scores_of_all_leave_one_target_at_a_time():
    generator = torch.Generator().manual_seed(0)
    for number in range(60):
        scores = [torch.randn(1 + number % 5, 5, generator=generator) for _ in range(1 + number % 4)]
        scores = [(2 * s).round() for s in scores] if number % 3 == 0 else scores  # ties, zeros of either sign
        joined = torch.cat([s.flatten() for s in scores])
        for gone in (0, 1, len(joined) // 2, len(joined)):
            want = masks.per_row(joined, Budget(gone, "removed")).split([s.numel() for s in scores])
            kept = masks.Leaving(scores, gone)
            assert all(torch.equal(a.view_as(b), b) for a, b in zip(want, kept, strict=True))
