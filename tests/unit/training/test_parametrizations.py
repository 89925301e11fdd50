"""What training puts on weights, in every layout, and how it comes off again."""

from __future__ import annotations

import copy
import io

import pytest
import timm
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrize

from prunelab.common.core.errors import PrunelabError
from prunelab.common.training.method import masked
from prunelab.common.training.parametrizations import (
    Attachment,
    FakeQuantised,
    Gate,
    LowRank,
    NoiseGate,
    put_on,
    straight_through,
)
from prunelab.common.weights.adapters import weight_adapter
from prunelab.common.weights.targets import Decision
from tests.contract.references import language_model, token_ids


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=61, n_positions=32, n_embd=16, n_layer=2, n_head=4, n_inner=24)
    return transformers.GPT2LMHeadModel(config).eval()


MODELS = {"llama": language_model, "gpt2": gpt2, "mixtral": lambda: language_model("mixtral")}


def logits(model):
    with torch.no_grad():
        return model(token_ids(2)).logits


@pytest.mark.parametrize(
    ("family", "unit"),
    [
        *((family, unit) for family in ("llama", "gpt2") for unit in ("linear", "heads", "channels")),
        *(("mixtral", unit) for unit in ("linear", "heads", "experts")),
    ],
)
def test_a_masked_unit_is_as_good_as_removed(family, unit):
    """Zeroed by a mask, the model computes what it computes without the unit; taken off, what it did before."""
    model = MODELS[family]()
    adapter = weight_adapter(model)
    targets = [t for t in adapter.targets(unit) if t.expert < 0][:2]
    dense, names = logits(model), [name for name, _ in model.named_parameters()]
    attachments = [masked(target) for target in targets]
    take_off = put_on(adapter, attachments)
    assert torch.equal(logits(model), dense)
    chosen = {}
    for attachment in attachments:
        mask = chosen[attachment.target.name] = torch.ones(attachment.target.shape, dtype=torch.bool)
        mask[..., 0] = False
        attachment.module.mask.copy_(mask)
    masked_logits = logits(model)
    assert not torch.equal(masked_logits, dense)
    take_off(False)
    assert torch.equal(logits(model), dense) and [name for name, _ in model.named_parameters()] == names
    if unit == "experts":
        return  # a removed expert is routed around, a masked one is not
    for target in targets:
        adapter.write(target, Decision(chosen[target.name]))
    assert torch.allclose(logits(model), masked_logits, atol=1e-5)


@pytest.mark.parametrize("family", MODELS)
def test_low_rank_factors_start_at_nothing_and_stay_when_kept(family):
    model = MODELS[family]()
    adapter = weight_adapter(model)
    target = next(t for t in adapter.targets("linear") if t.expert < 0)
    dense, weight = logits(model), adapter.weights(target)["weight"].clone()
    attachment = Attachment(target, LowRank(target.shape, 2, 3.0))
    take_off = put_on(adapter, [attachment])
    assert torch.equal(logits(model), dense), "up is zero"
    module: LowRank = attachment.module
    nn.init.normal_(module.up)
    changed = logits(model)
    take_off(True)
    assert torch.equal(logits(model), changed)
    expected = weight + 3 * module.up.detach() @ module.down.detach()
    assert torch.allclose(adapter.weights(target)["weight"], expected, atol=1e-6)


def test_a_gate_on_a_layer_lets_it_pass_or_not():
    model = language_model()
    adapter = weight_adapter(model)
    target = adapter.targets("layers")[1]
    attachment = Attachment(target, Gate(1, 50.0), "units")
    dense, take_off = logits(model), put_on(adapter, [attachment])
    assert torch.allclose(logits(model), dense)
    nn.init.constant_(attachment.module.logit, -200.0)
    closed = logits(model)
    assert any(name.endswith("logit") for name, _ in model.named_parameters())
    take_off(False)
    assert torch.equal(logits(model), dense) and not any(name.endswith("logit") for name, _ in model.named_parameters())
    adapter.write(target, Decision(torch.tensor([False])))
    adapter.finish()
    assert torch.allclose(logits(model), closed, atol=1e-6)


@pytest.mark.parametrize(
    ("unit", "at", "module"),
    [
        ("layers", "units", lambda target: Gate(1, 0.0)),
        ("heads", "units", lambda target: Gate(target.units, 0.0)),
        ("linear", "input", lambda target: nn.LayerNorm(target.shape[1])),
        ("linear", "output", lambda target: nn.LayerNorm(target.shape[0])),
        ("linear", "weight", lambda target: LowRank(target.shape, 2, 3.0)),
    ],
)
def test_a_copy_made_while_training_has_parts_of_its_own(unit, at, module):
    """As averaged weights are kept: what is put on goes with the copy, and follows the copy's values alone."""
    model = language_model()
    adapter = weight_adapter(model)
    target = adapter.targets(unit)[0]
    attachment = Attachment(target, module(target), at)
    take_off, saved = put_on(adapter, [attachment]), io.BytesIO()
    before = logits(model)
    twins = [copy.deepcopy(model)]
    if at != "weight" and unit != "heads":  # torch saves no parametrized modules whole
        torch.save(model, saved)
        saved.seek(0)
        twins.append(torch.load(saved, weights_only=False))
    with torch.no_grad():
        for parameter in attachment.module.parameters():
            parameter.add_(0.7)
    changed = logits(model)
    assert not torch.equal(changed, before)
    for twin in twins:
        assert torch.equal(logits(twin), before)
        twin.load_state_dict(model.state_dict())
        assert torch.equal(logits(twin), changed)
    take_off(False)
    assert torch.equal(logits(twins[0]), changed)


def test_channels_of_a_convolutional_network_are_masked_wherever_they_are_read():
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=3).eval()
    adapter, x = weight_adapter(model), torch.randn(1, 3, 32, 32)
    target = max(adapter.targets("channels"), key=lambda t: len(adapter.readers(t)))
    assert len(adapter.readers(target)) > 1
    attachment = masked(target)
    take_off, mask = put_on(adapter, [attachment]), torch.arange(target.units) % 3 > 0
    attachment.module.mask.copy_(mask)
    with torch.no_grad():
        pruned = model(x)
        take_off(False)
        adapter.write(target, Decision(mask))
        assert torch.allclose(model(x), pruned, atol=1e-5)


def test_a_convolution_reads_its_kernels_as_rows():
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=3).eval()
    adapter, x = weight_adapter(model), torch.randn(1, 3, 32, 32)
    target = adapter.targets("linear")[0]
    attachment = masked(target)
    take_off = put_on(adapter, [attachment])
    with torch.no_grad():
        attachment.module.mask[0] = False
        pruned = model(x)
        take_off(True)
        assert torch.equal(model(x), pruned) and not bool(adapter.weights(target)["weight"][0].any())


def test_what_cannot_carry_something_says_so():
    model = language_model("mixtral")
    adapter = weight_adapter(model)
    expert = next(t for t in adapter.targets("linear") if t.expert >= 0)
    with pytest.raises(PrunelabError, match="no parameter by itself"):
        put_on(adapter, [masked(adapter.targets("heads")[0]), masked(expert)])
    assert not any(parametrize.is_parametrized(module) for module in model.modules()), "nothing is left half done"
    with pytest.raises(PrunelabError, match="lower the rank"):
        LowRank(adapter.targets("linear")[0].shape, 99)
    with pytest.raises(PrunelabError, match="2 to 16"):
        FakeQuantised(1)
    with pytest.raises(PrunelabError, match="with a weight"):
        put_on(adapter, [Attachment(adapter.targets("heads")[0], FakeQuantised(4), "input")])


def test_straight_through_is_exact_and_passes_gradients():
    soft = torch.tensor([0.1, 0.7, 1e-8], requires_grad=True)
    out = straight_through(soft.detach() > 0.5, soft)
    assert out.tolist() == [0, 1, 0]
    (out * torch.tensor([2.0, 3.0, 4.0])).sum().backward()
    assert soft.grad.tolist() == [2, 3, 4]


def test_the_quantiser_learns_its_step():
    x, quantiser = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)), FakeQuantised(4)
    y = quantiser(x)
    step = quantiser.step.item()
    assert step == pytest.approx(2 * float(x.abs().mean()) / 7**0.5, rel=1e-5)
    levels = (y / step).round().unique()
    assert len(levels) <= 16 and float((y - x).detach().abs().max()) < 4
    inside = (x / step).clamp(-8, 7)
    (y * x).sum().backward()  # LSQ: d y / d step is round(v) - v inside of the range and the bound outside, scaled
    slope = torch.where((x / step > 7) | (x / step < -8), inside, inside.round() - x / step)
    assert float(quantiser.step.grad) == pytest.approx(float((slope * x).sum() / (x.numel() * 7) ** 0.5), rel=1e-3)


def test_noise_is_drawn_while_training_alone():
    torch.manual_seed(0)
    gate = NoiseGate(5)
    assert not torch.equal(gate.factors(), gate.factors())
    gate.eval()
    assert torch.equal(gate.factors(), gate.mean)
    assert bool((gate.log_alpha() < 0).all()) and gate.divergence().item() > 0
