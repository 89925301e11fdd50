"""SparseVLM 1.0, 1.5 and +: scores, clusters, and whole decoder runs through our LLaVA adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from prunelab.common.apply import apply
from prunelab.common.core.budget import Budget
from prunelab.methods.sparsevlm import method as sparse
from prunelab.methods.sparsevlm.method import SparseVLM
from tests.golden.llava import entering, llava

TOLERANCE = {"(index|mask|length|position|merged_per|rank)": (0.0, 0.0), "": (1e-5, 1e-4)}
SETTINGS = {
    "1_0": {},
    "2_0": {"share": 0.0, "positions": "original", "debias": True, "heads": 14},
    "rank": {"adaptive": True},
}


@torch.no_grad()
def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    if "in_tokens" in inputs:
        tokens, noise = torch.from_numpy(inputs["in_tokens"]), torch.from_numpy(inputs["in_noise01"]) * 1e-6
        count = int(inputs["hp_cluster_num"])
        slot = sparse.clusters(tokens, count, noise)
        sizes = torch.zeros(len(slot), count).scatter_add(1, slot, torch.ones(slot.shape))
        share = 1 / (sizes.gather(1, slot) + 1e-6)
        member = torch.nn.functional.one_hot(slot, count).transpose(1, 2) * share.unsqueeze(1)
        return {"out_merged": (member @ tokens).numpy()}
    if "in_attention_text_rows" in inputs:
        rows = torch.from_numpy(inputs["in_attention_text_rows"])
        raters = torch.zeros(1, rows.shape[2], dtype=torch.bool)
        raters[0, torch.from_numpy(inputs["in_rater_index"]).flatten().long()] = True
        start, image = int(inputs["hp_system"]), int(inputs["hp_image"])
        score = sparse.rated(rows, raters)[:, start : start + image]
        kept = score.argsort(dim=1, descending=True)[:, : min(int(inputs["hp_count"]), image - 1)]
        mask = torch.zeros(score.shape, dtype=torch.bool).scatter(1, kept, True)
        return {"out_score": score[0].numpy(), "out_keep_mask": mask[0].numpy()}
    return whole(inputs)


def whole(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    embeds, span = torch.from_numpy(inputs["in_inputs_embeds"]), (int(inputs["hp_system"]), int(inputs["hp_image"]))
    depth = len(inputs["w_q"])
    if depth - 1 in inputs["hp_prune_layers"]:  # tokens leave behind the last layer: one more that adds nothing
        more = {n: np.concatenate([w, 0 * w[:1]]) for n, w in inputs.items() if n.startswith("w_") and n != "w_norm"}
        inputs = {**inputs, **more}
    model, prompt = llava(inputs, embeds, [span])
    version = str(inputs["hp_version"])
    layers = tuple(layer + 1 for layer in inputs["hp_prune_layers"].tolist() if layer < depth)
    options = SETTINGS[version] | (
        {"scale": float(inputs["hp_scale"]), "bias": float(inputs["hp_bias"])} if version == "rank" else {}
    )
    budget = Budget(1.0)
    if "hp_counts" in inputs:
        budget = Budget(tuple(inputs["hp_counts"].tolist()[: len(layers)]), "count")
    plans: list[tuple[torch.Tensor, int, int]] = []
    ranks: list[int] = []

    class Watched(SparseVLM):
        def plan(self, site, signals, given):  # type: ignore[no-untyped-def]
            made = super().plan(site, signals, given)
            plans.append(seen_of(made, signals.prunable[0]))
            raters.append(signals.state["raters"][0])
            return made

        def stays(self, units, budget, attention, raters, visual):  # type: ignore[no-untyped-def]
            ranks.append(sparse.rank(attention, raters, visual) if self.adaptive else 0)
            return super().stays(units, budget, attention, raters, visual)

    raters: list[torch.Tensor] = []
    with apply(Watched(layers, **options), model, budget), entering(model) as seen:
        output = model.model(**prompt, use_cache=True)
    found = {
        "out_rater_index": raters[0].nonzero().squeeze(1).numpy(),
        "out_merged_per_stage": np.array([merged for _, merged, _ in plans if merged]),
        "out_sequence_length_per_layer": np.array([seen[layer]["x"].shape[1] for layer in range(depth)]),
        "out_position_ids_last_layer": seen[depth - 1]["position_ids"][0].numpy(),
        "out_last_hidden": output.last_hidden_state.numpy(),
        "out_rank_per_stage": np.array(ranks),
    }
    return found | {f"out_keep_mask_stage{number}": mask.numpy() for number, (mask, _, _) in enumerate(plans)}


def seen_of(plan, visual):  # type: ignore[no-untyped-def]
    """Which of the visual tokens stay as they are, and how many merged ones come."""
    total = len(visual)
    matrix = plan.reduce.matrix(total)[0]
    alone = (matrix == 1).any(0)
    return alone[visual], plan.reduce.outputs - int((alone | ~visual).sum()), total
