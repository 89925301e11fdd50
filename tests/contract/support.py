"""`python -m tests.contract.support`: every token pruner of visual tokens on every image or video language model, as
Markdown: supported, or why not. The tests assert the same cells."""

from __future__ import annotations

from collections.abc import Sequence

from prunelab.common.core import registry
from prunelab.common.core.errors import PrunelabError
from prunelab.common.experiments import listing
from prunelab.common.tokens.adapters import adapter_for
from prunelab.common.tokens.role import TokenPruner
from prunelab.methods.random_drop.method import RandomDrop
from tests.contract.vlms import VLMS, vlm

CONTROLS = (
    RandomDrop((0,), "projected", positions="renumber"),
    RandomDrop((0,), "packed"),
    RandomDrop((2,), "input"),
)


def pruners() -> list[TokenPruner]:
    """The methods whose paper is about such models, with their defaults, and random dropping at each kind of site."""
    found = [cls for cls in registry.load().values() if issubclass(cls, TokenPruner)]
    about = {cls: listing.paper(registry.slug(cls)) for cls in found}  # None while there is no paper.yaml yet
    return [cls() for cls, paper in about.items() if paper and paper.family == "vlm"] + list(CONTROLS)


def verdict(method: TokenPruner, family: str) -> str:
    """`yes`, or what the model refuses the method with."""
    adapter = adapter_for(vlm(family))
    try:
        adapter.check(method, method.sites(adapter.info))
    except PrunelabError as error:
        return str(error)
    return "yes"


def table(families: Sequence[str] = VLMS) -> str:
    """Methods in rows, models in columns."""
    lines = ["| method | " + " | ".join(families) + " |", "|---" * (len(families) + 1) + "|"]
    lines += [f"| `{m!r}` | " + " | ".join(verdict(m, f) for f in families) + " |" for m in pruners()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
