"""FTP's router on `code_lm`, with the shares of the blocks that its searches found; the model itself stays as it is."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunelab.common.core import registry
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.evolution import Genetic
from prunelab.common.data import code
from prunelab.common.testbeds.base import Testbed
from prunelab.common.testbeds.code_lm import CodeLM
from prunelab.common.tokens.adapters import adapter_for
from prunelab.common.tokens.apply import applied
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.training.distillation import distillation
from prunelab.common.training.recipe import read_log
from prunelab.common.training.tokens import lesson

METHOD = "ftp"
QUICK, FULL = 8, 32


@dataclass(frozen=True)
class CodeFTP(Testbed):
    """In the paper's three stages: a genetic search of the shares under the static router, the training of the router
    by its three losses, and the search again, from what it found, under the trained router.

    length: of its sequences; `batch` counts them. budget: the shares that go through a block under which every batch
    passes, and by which the searches count. population, generations: of the searches. calibration: sequences that they
    are measured on, by the distance to what the unpruned model says. start: sha256 of the weights of `code_lm` that it
    routes, by default those that ship; weights that were trained anew since ask for a new router.
    """

    steps: int = 160
    batch: int = 4
    rate: float = 3e-3
    decay: float = 0.0
    check_every: int = 40
    length: int = 256
    budget: str = "0.7; 0.5"
    population: int = 10
    generations: int = 6
    calibration: int = 4
    start: str = ""

    name: ClassVar[str] = "code_ftp"
    needs: ClassVar[tuple[str, ...]] = CodeLM.needs

    def __post_init__(self) -> None:
        from prunelab.common.testbeds import SHIPPED

        if not self.start:
            object.__setattr__(self, "start", read_log(SHIPPED / CodeLM.name)["sha256"])

    @property
    def budgets(self) -> list[Budget]:
        """The budgets that every batch passes under."""
        return [Budget.parse(part.strip()) for part in self.budget.split(";")]

    def build(self) -> nn.Module:
        model, start = target()
        if start != self.start:
            raise PrunelabError(f"{self.name} routes other weights of {CodeLM.name}; train {self.name} again")
        router: Any = method().build(adapter_for(model).info)
        router.weights = self.searched((0.5,) * len(router.weights), None)
        return router

    def settle(self, model: nn.Module) -> None:
        router: Any = model.eval()
        router.weights = self.searched(router.weights, router)

    def searched(self, begin: tuple[float, ...], router: nn.Module | None) -> tuple[float, ...]:
        """The shares that the search finds from those, under the static router or a learned one."""
        stream = code.stream("train", CodeLM().vocabulary)
        tokens = code.windows(stream, self.calibration, self.length, torch.Generator().manual_seed(0))
        genetic = Genetic(self.population, self.generations)

        def cost(shares: tuple[float, ...]) -> float:
            static = {} if router is not None else {"router": "static"}
            return sum(distance(method(schedule=shares, **static), b, tokens, router) for b in self.budgets)

        results: tuple[float, ...] = _of_method("searched")(cost, begin, genetic)
        return results

    def loss(self, model: nn.Module, progress: float, generator: torch.Generator) -> Tensor:
        stream = code.stream("train", CodeLM().vocabulary)
        tokens = code.windows(stream, self.batch, self.length, generator)
        lm = target()[0].train()
        return lesson(method(), lm, self.budgets, lambda net: net(tokens, use_cache=False), parts=model)

    def evaluate(self, model: nn.Module, quick: bool = False) -> dict[str, float]:
        """Loss of held-out tokens in nats: unpruned, and under each budget by the learned and the static router, both
        at the shares found."""
        stream = code.stream("held_out", CodeLM().vocabulary)
        tokens = code.windows(stream, QUICK if quick else FULL, self.length)
        router: Any = model
        results = {"loss": surprise(tokens)}
        for budget in self.budgets:
            static = method(router="static", schedule=router.weights)
            with applied(method(), target()[0].eval(), budget, parts=model):
                results[f"loss_{budget}"] = surprise(tokens)
            with applied(static, target()[0].eval(), budget):
                results[f"static_{budget}"] = surprise(tokens)
        return results


def method(**options: Any) -> TokenPruner:
    """The method with options."""
    made = registry.create(METHOD, **options)
    assert isinstance(made, TokenPruner)
    return made


def distance(pruner: TokenPruner, budget: Budget, tokens: Tensor, parts: nn.Module | None) -> float:
    """Mean divergence in nats of what the pruned model says of tokens [B, T] from what the unpruned one says."""
    model = target()[0].eval()
    with torch.inference_mode():
        dense = model(tokens, use_cache=False).logits
        with applied(pruner, model, budget, parts=parts):
            return float(distillation(model(tokens, use_cache=False).logits, dense))


def surprise(tokens: Tensor) -> float:
    """Mean negative log likelihood of tokens [B, T] by the model as it stands."""
    model = target()[0].eval()
    rows = [model(part, use_cache=False).logits[:, :-1].float() for part in tokens.split(8)]
    return float(F.cross_entropy(torch.cat(rows).flatten(0, 1), tokens[:, 1:].flatten()))


@cache
def target() -> tuple[Any, str]:
    """The frozen language model that ships, and the sha256 of its weights."""
    from prunelab.common import testbeds

    model, log = testbeds.load(CodeLM.name)
    return model.requires_grad_(False), log["sha256"]


def _of_method(name: str) -> Any:
    """A function beside the method. Found by the method's name: this package knows no method."""
    return getattr(importlib.import_module(f"prunelab.methods.{registry.slug(registry.get(METHOD))}.method"), name)
