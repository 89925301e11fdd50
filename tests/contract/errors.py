"""`python -m tests.contract.errors`: how far the adapter of every visual family is from what it should give.

Every figure is the largest difference of logits, in float32, over the methods that the contract suite bounds: with all
tokens kept from the model itself, and with half of them from a full forward pass on the kept ones, of one prompt, of a
padded batch, of samples with unlike numbers of images, and of words behind a cached prompt. `python -m
tests.contract.errors llava qwen3_vl` does so for some.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from prunelab.common.apply import apply
from prunelab.common.core.attention_interface import cache_name, with_cache
from tests.contract import kin, references, test_vit_kin, vlms
from tests.contract.test_vlm_kin import CUTS, KEEPERS
from tests.unit.tokens.test_vlm import oracle

COLUMNS = ("logits", "keep-all", "oracle", "padded", "several images", "second turn")
Row = dict[str, float]


def prompts(family: str, model: Any, questions: tuple[int, ...], images: tuple[int, ...] = ()) -> dict[str, Any]:
    """A prompt for each question of so many words, behind as many images (left out: one each); padded in front."""
    if family in kin.KIN:
        return kin.asked(family, model, questions, images)
    images = images or (1,) * len(questions)
    pixels = vlms.images(family, sum(images))
    given = {name: value for name, value in vlms.prompt(family, pixels).items() if "pixel" in name or "image" in name}
    tokens = int((vlms.prompt(family, pixels[:1])["input_ids"] == vlms.IMAGE).sum())
    if max(images) > 1 and family in ("llava_onevision", "llava_video"):  # then each image is one crop
        side = pixels.shape[-1]
        given = {"pixel_values": pixels.unsqueeze(1), "image_sizes": torch.tensor([[side, side]] * len(pixels))}
        given["batch_num_images"] = torch.tensor([sum(images)])
        tokens = (side // 8) ** 2 + 1
    shown = [[(vlms.IMAGE, tokens), ("text", 1)] * n for n in images]
    runs: list[list[tuple[Any, int]]] = [
        [("text", 3), *own, ("text", words)] for own, words in zip(shown, questions, strict=True)
    ]
    return vlms.typed(model, given | vlms.ids(runs))


def videos(family: str, model: Any, questions: tuple[int, ...], images: tuple[int, ...] = ()) -> dict[str, Any]:
    """The same behind a video each."""
    if family in kin.KIN:
        return kin.filmed(family, model, questions)
    return vlms.typed(model, vlms.film(family, words=questions))


def largest(one: Tensor, other: Tensor) -> float:
    """The largest difference."""
    return float((one - other).abs().max())


def of_kept(model: Any, given: dict[str, Any], last: bool = False) -> float:
    """From the oracle, at the tokens that stay; `last`: at the last of each sample alone."""
    worst = 0.0
    for method in CUTS:
        with apply(method, model, 0.5) as handle:
            pruned, kept = model(**given).logits, handle.kept()
        want = oracle(model, dict(given), kept, getattr(method, "positions", "") == "renumber")
        for b, places in enumerate(kept[-1][1]):
            real = places >= 0
            real = real & (torch.arange(len(real)) == len(real) - 1) if last else real
            worst = max(worst, largest(pruned[b, real], want[b, places[real]]))
    return worst


def of_a_second_turn(model: Any, given: dict[str, Any], words: int = 4) -> float:
    """From the oracle on both turns, at the words of the second, which are given at once behind the cached prompt."""
    later = torch.full((len(given["input_ids"]), words), 7) + torch.arange(words)
    start, worst = given["input_ids"].shape[1], 0.0
    longer = given | {
        "input_ids": torch.cat([given["input_ids"], later], 1),
        "attention_mask": torch.cat([given["attention_mask"], torch.ones_like(later)], 1),
        "prompt_length": start,
    }
    if "mm_token_type_ids" in given:
        longer["mm_token_type_ids"] = torch.cat([given["mm_token_type_ids"], torch.zeros_like(later)], 1)
    if "token_type_ids" in given:
        longer["token_type_ids"] = torch.cat([given["token_type_ids"], torch.ones_like(later)], 1)
    known = {name: value for name, value in longer.items() if name != "prompt_length"}
    longer["position_ids"] = model._prepare_position_ids_for_generation(longer["input_ids"], known)
    for method in CUTS:
        with apply(method, model, 0.5) as handle:
            first, kept = model(**given, use_cache=True), handle.kept()
            words_alone = {"input_ids": later, "attention_mask": longer["attention_mask"]}
            second = model(**with_cache(words_alone, getattr(first, cache_name())))
        want = oracle(model, dict(longer), kept, getattr(method, "positions", "") == "renumber")
        worst = max(worst, largest(second.logits, want[:, start:]))
    return worst


@torch.no_grad()
def of_language_model(family: str, ask: Callable[..., dict[str, Any]] = prompts) -> Row:
    """The figures of a family of image and video language models."""
    model = kin.kin(family) if family in kin.KIN else vlms.vlm(family)
    one, padded = ask(family, model, (6,)), ask(family, model, (6, 3))
    dense, worst = model(**one).logits, 0.0
    pools = ask is videos and family in ("llava_onevision", "llava_video")  # behind the projector, all of it or none
    for method in KEEPERS[pools:]:
        with apply(method, model, 1.0):
            worst = max(worst, largest(model(**one).logits, dense))
    out = {"logits": float(dense.std()), "keep-all": worst, "oracle": of_kept(model, one)}
    out |= {"padded": of_kept(model, padded)}
    if ask is prompts:
        out["several images"] = of_kept(model, ask(family, model, (4, 2), (1, 2)), last=True)
    return out | {"second turn": of_a_second_turn(model, one)}


@torch.no_grad()
def of_classifier(family: str) -> Row:
    """Those of a family of vision transformers, which has one input."""
    model, x = test_vit_kin.kin(family), references.images()
    dense, same, left = model(x), 0.0, 0.0
    for method in test_vit_kin.CUTS:
        with apply(method, model, 1.0):
            same = max(same, largest(model(x), dense))
        with apply(method, model, 0.5) as handle:
            pruned, kept = model(x), handle.kept()
        left = max(left, largest(pruned, test_vit_kin.oracle(model, x, kept, method.rest)))
    return {"logits": float(dense.std()), "keep-all": same, "oracle": left}


def rows(families: Sequence[str] = ()) -> Iterator[tuple[str, Row]]:
    """Every family by name, or those named, and again with videos where it reads them."""
    moving = {"llava_onevision", "llava_video", "qwen2_5_vl", *kin.MOVING}
    for family in (*vlms.VLMS, *kin.KIN):
        if not families or family in families:
            yield family, of_language_model(family)
            if family in moving:
                yield f"{family}, video", of_language_model(family, videos)
    for family in test_vit_kin.KIN:
        if not families or family in families:
            yield family, of_classifier(family)


def table(families: Sequence[str] = ()) -> str:
    """Families in rows; `logits` is the standard deviation of the model's own, and what a family does not have is
    left empty."""
    lines = ["| family | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for family, figures in rows(families):
        cells = [f"{figures[name]:.1e}" if name in figures else "" for name in COLUMNS]
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(sys.argv[1:]))
