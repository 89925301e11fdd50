"""`python -m prunelab.common.measures.sizing`: count on the meta device what the catalogue's models weigh, and write it
to configs/sizes.lock.json. Lines of models whose architecture has not changed stay."""

from __future__ import annotations

import json
import re
from typing import Any

from rich.progress import track
from torch import nn

from prunelab.common.catalogue import lookup, sizes
from prunelab.common.core import files
from prunelab.common.core.errors import PrunelabError
from prunelab.common.costs import meter
from prunelab.common.models import loading
from prunelab.common.tokens.adapters import adapter_for
from prunelab.common.tokens.adapters.vlm import VisionLanguage

FRAMES = 8  # of the video that a frame's share is taken of


def count(name: str) -> sizes.Sizes:
    """The sizes of a model of the catalogue."""
    model = loading.architecture(lookup.architecture(name))
    parameters = sum(p.numel() for p in model.parameters())
    common: dict[str, Any] = {
        "parameters": parameters,
        "active": _active(model),
        "gbytes": round(2 * parameters / 1e9, 4),
    }
    try:
        adapter: Any = adapter_for(model)
    except PrunelabError:  # tokens of it are not pruned: a convolutional network, or an encoder of texts
        return sizes.Sizes(**common, cache=_cache(model))
    if not isinstance(adapter, VisionLanguage):
        inputs = 0.0 if adapter.decodes else meter.macs(model, adapter.example()) / 1e9
        return sizes.Sizes(**common, input_gmacs=round(inputs, 3), cache=_cache(model))
    common["cache"] = adapter.cache_bytes([1] * adapter.info.depth)
    image = adapter.prompt()
    common |= {"input_gmacs": _encoder(model, image), "input_tokens": adapter.visual_tokens(image)}
    if "video" in adapter.tokens:
        video = adapter.prompt(FRAMES)
        common["frame_gmacs"] = round(_encoder(model, video) / FRAMES, 3)
        common["frame_tokens"] = round(adapter.visual_tokens(video) / FRAMES, 1)
    return sizes.Sizes(**common)


def _encoder(model: nn.Module, prompt: Any) -> float:
    return round(meter.macs(model, prompt.encoding()) / 1e9, 3)


def _active(model: nn.Module) -> int:
    """Parameters that a token uses: of a layer's experts those that it is sent to."""
    config = getattr(model, "config", None)
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    share = 1.0 if config is None or not experts else config.num_experts_per_tok / experts
    sizes_of = [(".experts." in name, p.numel()) for name, p in model.named_parameters()]
    return round(sum(n * (share if expert else 1.0) for expert, n in sizes_of))


def _cache(model: nn.Module) -> int:
    """Bytes a token, in 16 bits, of a decoder of transformers; 0 of what writes no text."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "num_attention_heads") or not hasattr(config, "vocab_size"):
        return 0
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * 2 * config.num_hidden_layers * heads * head)


def main() -> None:
    """Bring the lock up to date."""
    before = json.loads(sizes.FILE.read_text(encoding="utf-8")) if sizes.FILE.exists() else {}
    lines = {}
    for name in track([n for n, entry in lookup.models().items() if {"architecture", "paper"} <= entry.keys()]):
        key = sizes.key(name)
        lines[name] = before[name] if before.get(name, {}).get("of") == key else {"of": key, **_numbers(count(name))}
    text = json.dumps(lines, indent=1)
    files.write_text(sizes.FILE, re.sub(r"\n  +", " ", text).replace("\n }", " }") + "\n")


def _numbers(result: sizes.Sizes) -> dict[str, float]:
    return {key: value for key, value in vars(result).items() if value and key != "exact"}


if __name__ == "__main__":
    main()
