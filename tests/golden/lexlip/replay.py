"""LexLIP: lexicon and bottleneck vectors, and the losses of both phases with their queues."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch.nn import functional as F

from prunelab.common.training.distillation import flops
from prunelab.methods.lexlip.method import bottleneck, enqueued, lexicon, phase_one, phase_two

TOLERANCE = {"out_": (1e-6, 1e-4)}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    given = {name: torch.from_numpy(value) for name, value in inputs.items() if value.dtype.kind not in "US"}
    if "in_text_logits" in given:
        return encoded(given, str(inputs["in_mode"]))
    text, image, temperature = given["in_text_lexicon"], given["in_image_lexicon"], float(given["in_temperature"])
    if "in_text_queue" not in given:
        return {
            "out_loss": phase_one(text, image, temperature).numpy(),
            "out_flops_term_text": flops(F.normalize(text, dim=-1)).numpy(),
            "out_flops_term_image": flops(F.normalize(image, dim=-1)).numpy(),
        }
    others = [given[f"in_{name}"] for name in ("momentum_text", "momentum_image", "text_queue", "image_queue")]
    found = {"out_loss": phase_two(text, image, *others, temperature).numpy()}
    for side, keys, queue in zip(("text", "image"), others[:2], others[2:]):
        after, pointer = enqueued(queue, keys, int(given[f"in_{side}_ptr"]))
        found |= {f"out_{side}_queue": after.numpy(), f"out_{side}_ptr": np.array([pointer])}
    return found


def encoded(given: Mapping[str, torch.Tensor], mode: str) -> dict[str, np.ndarray]:
    """Lexicon vectors of texts come from a second, unmasked pass where both kinds of vectors are asked for."""
    mask, image, words = given["in_text_mask"], given["in_image_logits"], given["in_word_embeddings"]
    again = given["in_text_logits_unmasked_pass" if mode == "both" else "in_text_logits"]
    return {
        "out_text_lexicon": lexicon(again, mask).numpy(),
        "out_image_lexicon": lexicon(image).numpy(),
        "out_text_bottleneck_dense": bottleneck(given["in_text_logits"], words, mask).numpy(),
        "out_image_bottleneck_dense": bottleneck(image, words).numpy(),
    }
