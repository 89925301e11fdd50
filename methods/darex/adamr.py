"""AdamR, the optimiser of DAREx-L2: Adam that pulls weights back to where fine-tuning began, so that few and small
deltas remain to be dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from prunelab.common.core.errors import PrunelabError


class AdamR(torch.optim.Optimizer):
    """Adam with decay towards the pre-trained weights, as strong for every weight (stable weight decay).

    anchors: pre-trained weights in the order of params; None takes what the params hold now. l1: pull by the sign of
    the delta instead of the delta. lr, betas, eps, amsgrad as for Adam.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        anchors: Sequence[Tensor] | None = None,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-4,
        l1: bool = False,
        amsgrad: bool = False,
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise PrunelabError("AdamR: lr, eps and weight_decay are at least 0, and betas lie in [0, 1)")
        params = list(params)
        anchors = params if anchors is None else anchors
        if [p.shape for p in params] != [a.shape for a in anchors]:
            raise PrunelabError(
                "AdamR: the anchors do not fit the parameters; give the pre-trained ones in their order"
            )
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "l1": l1, "amsgrad": amsgrad}
        super().__init__(params, options)
        for param, anchor in zip(params, anchors, strict=True):
            zeros = torch.zeros_like(param)
            self.state[param] = {
                "step": 0,
                "anchor": anchor.detach().to(param.device, param.dtype, copy=True),
                "mean": zeros,
                "square": zeros.clone(),
                "largest": zeros.clone() if amsgrad else None,
            }

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step: moments, the pull by their common scale, and Adam's own step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moved = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        energy, entries = 0.0, 0
        for group, p in moved:
            state, (beta1, beta2) = self.state[p], group["betas"]
            state["step"] += 1
            state["mean"].mul_(beta1).add_(p.grad, alpha=1 - beta1)
            state["square"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
            if group["amsgrad"]:
                torch.maximum(state["largest"], state["square"], out=state["largest"])
            energy += float(_square(state, beta2).sum())
            entries += p.numel()
        scale = (energy / entries) ** 0.5 if energy else 1.0
        for group, p in moved:
            state, (beta1, beta2) = self.state[p], group["betas"]
            pull = p - state["anchor"]
            p.sub_(pull.sign() if group["l1"] else pull, alpha=group["weight_decay"] * group["lr"] / scale)
            root = _square(state, beta2).sqrt().add_(group["eps"])
            p.addcdiv_(state["mean"], root, value=-group["lr"] / (1 - beta1 ** state["step"]))
        return loss


def _square(state: dict[str, Any], beta2: float) -> Tensor:
    """The second moment without the bias of its start."""
    square: Tensor = state["square"] if state["largest"] is None else state["largest"]
    return square / (1 - beta2 ** state["step"])
