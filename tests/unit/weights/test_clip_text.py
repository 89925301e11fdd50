"""CLIP's text encoder: its structures leave, its padding is read, and what its layers read is measured."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights import WeightPlan, load_pruned, prune, save_pruned
from prunelab.common.weights.adapters import weight_adapter
from prunelab.methods.random_weights.method import RandomWeights
from prunelab.methods.wanda.method import Wanda

IDS = torch.randint(3, 40, (3, 10), generator=torch.Generator().manual_seed(0))
IDS[:, 7:] = 0  # padding


def encoder(cls: type = CLIPTextModel) -> nn.Module:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=10, bos_token_id=1, eos_token_id=2, pad_token_id=0, projection_dim=16,
    )  # fmt: skip
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.dim() > 1 else 1.0).add_(0.02 * torch.randn(parameter.shape))
    return model


def states(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).last_hidden_state


@pytest.mark.parametrize("units", [("heads",), ("channels",), ("heads", "channels")])
@pytest.mark.parametrize("cls", [CLIPTextModel, CLIPTextModelWithProjection])
def test_what_leaves_is_as_if_nothing_read_it(units, cls, tmp_path):
    model, silent = encoder(cls), encoder(cls)
    plan = prune(RandomWeights(units), model, 0.5, progress=False)
    adapter = weight_adapter(silent)
    with torch.no_grad():
        for target, decision in plan.decisions():
            for reader in adapter.readers(target):
                reader.silence(~decision.mask)
    assert torch.allclose(states(model), states(silent), atol=1e-5)
    save_pruned(model, plan, tmp_path)
    assert torch.equal(states(load_pruned(tmp_path)), states(model))
    again = encoder(cls)
    WeightPlan.load(tmp_path / "plan").apply(again)
    assert torch.equal(states(again), states(model))


def test_linears_of_layers_alone_are_targets_and_see_padding():
    model, seen = encoder(), []
    adapter = weight_adapter(model)
    targets = adapter.targets("linear")
    assert len(targets) == 18 and all(".layers." in target.name for target in targets)
    first = next(target for target in targets if target.role == "mlp.fc1")
    module = model.get_submodule(first.name)
    handle = module.register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for row in IDS:
            model(input_ids=row[None])
    handle.remove()
    assert seen[0].shape == (10, 32)
    weight = module.weight.detach().clone()
    plan = prune(Wanda(), model, 0.5, IDS, progress=False)
    other = {t.name for t in targets if t.role.startswith("self_attn")}
    assert other <= {t.name for t in plan.targets}
    assert int((weight != module.weight).sum()) == weight.numel() // 2


def test_captions_that_are_too_long_are_refused():
    with pytest.raises(PrunelabError, match="exceed the model's 10"):
        prune(Wanda(), encoder(), 0.5, torch.ones(2, 11, dtype=torch.long), progress=False)
