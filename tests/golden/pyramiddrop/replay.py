"""PyramidDrop: whole decoder runs and single stages, through our LLaVA adapter, against the authors' code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from transformers import DynamicCache

from prunelab.common.apply import apply
from prunelab.common.core.budget import Budget
from prunelab.common.core.plan import Plan, Site
from prunelab.common.tokens.signals import TokenSignals
from prunelab.methods.pyramiddrop.method import PyramidDrop, similarity
from tests.golden.llava import entering, llava, positions

TOLERANCE = {"": (1e-5, 1e-4)}


def counts(tokens: int, inputs: Mapping[str, np.ndarray]) -> list[int]:
    """Image tokens of so many that each stage leaves; the authors cut floating point products off."""
    return [int(tokens * float(ratio)) for ratio in inputs["hp_ratio_list"]]


@torch.no_grad()
def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    return stage(inputs) if "in_features" in inputs else whole(inputs)


def whole(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    embeds = torch.from_numpy(inputs["in_inputs_embeds"])
    later = torch.from_numpy(inputs["in_decode_embeds"]) if "in_decode_embeds" in inputs else embeds[0, :0]
    span = int(inputs["in_image_start"][0]), int(inputs["in_image_tokens"][0])
    model, prompt = llava(inputs, embeds, [span], later)
    layers = tuple(inputs["hp_layer_list"].tolist())
    method, budget = PyramidDrop(layers, of="image"), Budget(tuple(counts(span[1], inputs)), "count")
    depth, cache = len(model.model.language_model.layers), DynamicCache(config=model.config.text_config)
    found: dict[str, np.ndarray] = {}
    with apply(method, model, budget) as handle, entering(model) as seen:
        output = model.model(**prompt, past_key_values=cache, use_cache=True)
        kept = [index[0] for _, index in handle.kept()]
        found["out_last_hidden"] = output.last_hidden_state.numpy()
        before = torch.arange(embeds.shape[1])
        for number, (layer, index) in enumerate(zip(layers, kept, strict=True)):
            places = torch.searchsorted(before, index)
            image = (index >= span[0]) & (index < sum(span))
            found[f"out_kept_stage{number}_sample0"] = places[image].numpy()
            found[f"out_position_ids_after_stage{number}"] = seen[layer]["position_ids"].numpy()
            before = index
        found["out_cache_lengths"] = np.array([cache.get_seq_length(layer) for layer in range(depth)])
        steps, states = [], []
        for number in range(len(later)):
            word = torch.tensor([[embeds.shape[1] + number]])
            states.append(model.model(input_ids=word, past_key_values=cache).last_hidden_state[0, -1])
            steps.append(positions(handle.adapter, depth))
        if steps:
            found["out_decode_position_per_layer"] = np.stack(steps)
            found["out_decode_hidden"] = torch.stack(states).numpy()
    return found


def stage(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One stage alone: a decoder of the one layer that ranks, before which tokens leave."""
    mask = torch.from_numpy(inputs["in_attention_mask"])
    text = torch.from_numpy(inputs["in_prompt_len_without_image"])
    starts = inputs["in_image_start"].tolist()
    images = [(start, int(n - words)) for start, n, words in zip(starts, mask.sum(1), text, strict=True)]
    model, prompt = llava(inputs, torch.from_numpy(inputs["in_features"]), images)
    number = int(inputs["hp_stage"])
    left = [counts(tokens, inputs)[number] for tokens in inputs["in_image_tokens_original"].tolist()]

    class Counted(PyramidDrop):
        """A stage of its own knows neither what came before nor, in an amount for all, unlike images."""

        def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
            return Plan(signals.keep(left, scores=similarity(signals.coming_row)), positions=self.positions)

    with apply(Counted((0,)), model, 1.0) as handle, entering(model) as seen:
        model.model(**prompt, attention_mask=mask.long())
        running = handle.adapter.running  # type: ignore[attr-defined]
        valid = torch.ones_like(seen[0]["x"][..., 0]).bool() if running.tokens.valid is None else running.tokens.valid
        return {
            "out_features": (seen[0]["x"] * valid.unsqueeze(-1)).numpy(),
            "out_attention_mask": valid.numpy(),
            "out_position_ids": (running.positions * valid).numpy(),
        }
