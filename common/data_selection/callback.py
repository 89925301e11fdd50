"""A data selector as a callback of transformers' `Trainer`, and of TRL's, which are derived from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from transformers import TrainerCallback

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.method import Method
from prunelab.common.data_selection.engine import Handle, applied


class SelectionCallback(TrainerCallback):
    """Chooses from each batch of a `Trainer`: `Trainer(..., callbacks=[SelectionCallback(method, budget)])`.

    `report()` says what was chosen, with samples to read. A training that ends with an exception leaves the hooks on
    the model; `with applied(method, model, budget): trainer.train()` takes them off in any case.
    """

    def __init__(
        self,
        method: Method,
        budget: Budget | float | str | Sequence[float],
        services: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        self.method, self.budget, self.services, self.seed = method, budget, services, seed
        self.handle: Handle | None = None
        self._tokenizer: Any = None
        self._block = ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        if getattr(args, "loss_type", None) == "dft":
            raise PrunelabError("TRL's loss_type='dft' weighs tokens by itself; use loss_type='nll'")
        self._tokenizer = rest.get("processing_class")
        block = applied(self.method, model, self.budget, services=self.services, seed=self.seed)
        self.handle = self._block.enter_context(block)

    def on_log(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if self.handle is not None:
            self.handle.refuse_broken()

    def on_train_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self._block.close()

    def report(self) -> str:
        """Shares of samples and tokens that entered the loss, and some that did not, to read."""
        if self.handle is None:
            raise PrunelabError(f"{self.method.name} has seen no training; give the callback to a Trainer first")
        return self.handle.report(self._tokenizer)
