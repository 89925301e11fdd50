"""What the catalogue's models weigh: `configs/sizes.lock.json`, counted on the meta device, so that planning need not.

`python -m prunelab.common.measures.sizing` writes it. A model that it does not hold, or holds with another
architecture, is judged by what its download takes. Imports no torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache

from prunelab.common.catalogue import lookup
from prunelab.common.core import files
from prunelab.common.core.errors import PrunelabError

FILE = files.ROOT / "configs" / "sizes.lock.json"


@dataclass(frozen=True)
class Sizes:
    """parameters: held. active: that a token uses, fewer in a mixture of experts. gbytes: of the weights in 16 bits, as
    they compute on a GPU. input_gmacs, frame_gmacs: of the encoder or the whole image model, for a standard image and
    for one frame of a video. input_tokens, frame_tokens: that a language model then reads for either. cache: bytes a
    token in the key-value cache. exact: counted on the meta device, and not judged by the download."""

    parameters: float
    active: float
    gbytes: float
    input_gmacs: float = 0.0
    input_tokens: int = 0
    frame_gmacs: float = 0.0
    frame_tokens: float = 0.0
    cache: int = 0
    exact: bool = True


def key(name: str) -> str:
    """What a line of the lock is of."""
    return files.digest(lookup.model(name).get("architecture", {}))[:12]


@cache
def _lock() -> dict[str, dict[str, float | str]]:
    try:
        return dict(json.loads(FILE.read_text(encoding="utf-8"))) if FILE.exists() else {}
    except ValueError as error:
        raise PrunelabError(f"configs/sizes.lock.json is no JSON ({error}); restore it") from None


def of(name: str) -> Sizes | None:
    """The sizes of a model of the catalogue; None where neither its architecture nor its download is known."""
    line = dict(_lock().get(name, {}))
    if line.pop("of", None) == key(name):
        return Sizes(**line)  # type: ignore[arg-type]
    gb = lookup.model(name).get("paper", {}).get("gb")
    return Sizes(gb * 1e9 / 2, gb * 1e9 / 2, gb, exact=False) if gb else None
