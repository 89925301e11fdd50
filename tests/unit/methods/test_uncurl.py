"""UNCURL: clusters are those that were planted, means are weighted, sizes are met, edges."""

from __future__ import annotations

import pytest
import torch

from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights import prune, save_pruned
from prunelab.common.weights.merging import alike, gram, leaders, spectral_clusters
from prunelab.methods.uncurl.method import Uncurl
from tests.contract.references import language_model, token_ids


def test_planted_clusters_are_found():
    g = torch.Generator().manual_seed(0)
    centres, labels = torch.randn(3, 50, generator=g), torch.tensor([0, 1, 2, 0, 1, 2, 0, 0])
    columns = centres[labels] + 0.2 * torch.randn(8, 50, generator=g)
    found = spectral_clusters(alike(gram([columns])), 3)
    assert torch.equal(found[:, None] == found, labels[:, None] == labels)


@pytest.mark.parametrize("groups", [1, 2, 3, 5])
def test_experts_all_alike_still_make_as_many_groups_as_asked(groups):
    found = spectral_clusters(torch.ones(5, 5), groups)
    assert sorted(found.unique().tolist()) == list(range(groups))


def test_the_most_used_member_leads():
    labels, usage = torch.tensor([0, 1, 0, 1, 2]), torch.tensor([1.0, 5, 4, 5, 0])
    assert leaders(labels, usage).tolist() == [2, 1, 2, 1, 4]


@pytest.mark.parametrize("affinity", ["cosine", "correlation"])
@pytest.mark.parametrize("router", ["mean", "leader"])
def test_permuted_copies_of_an_expert_merge_to_the_same_function(affinity, router, tmp_path):
    model, ids = language_model("olmoe"), token_ids(2, seed=9)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in model.model.layers:
            experts, gate = layer.mlp.experts, layer.mlp.gate.weight
            inner = experts.down_proj.shape[2]
            for copy, of in ((2, 0), (3, 1)):
                order = torch.randperm(inner, generator=g)
                experts.gate_up_proj[copy] = experts.gate_up_proj[of][torch.cat([order, inner + order])]
                experts.down_proj[copy] = experts.down_proj[of][:, order]
                gate[copy] = gate[of]
    before = [layer.mlp.experts.down_proj.clone() for layer in model.model.layers]
    plan = prune(Uncurl(affinity, router=router), model, "2count", token_ids(), progress=False)
    for block, (target, decision) in enumerate(plan.decisions()):
        assert decision.kept == 2 and target.unit == "experts"
        kept = decision.mask.nonzero().flatten().tolist()
        assert {index % 2 for index in kept} == {0, 1}
        assert torch.allclose(model.model.layers[block].mlp.experts.down_proj, before[block][kept], atol=1e-5)
    save_pruned(model, plan, tmp_path)
    stock = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.allclose(stock(ids).logits, model(ids).logits, atol=1e-5)


def test_fewer_experts_than_a_token_is_sent_to_are_refused():
    with pytest.raises(PrunelabError, match="fewer than the 2 of a token"):
        prune(Uncurl(), language_model("mixtral"), "1count", token_ids(), progress=False)
