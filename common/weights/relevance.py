"""What flows back through a network, layer by layer: gradients, or relevance under a rule of layer-wise relevance
propagation (Bach et al., PLoS ONE 2015).

Relevance starts at the outputs and is shared out among the inputs of each layer by what they gave to its outputs, so
that its sum stays about what it was. Layers without weights of their own follow three plain laws: what works entry by
entry hands it on, what pools or adds shares it out as it mixed its inputs, and what only reshapes reshapes it too.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from prunelab.common.core.errors import PrunelabError

Product = Callable[[Tensor, Tensor], Tensor]  # of inputs and a weight, without bias
Start = Literal["one", "logit"]
RuleName = Literal["z+", "simple", "alphabeta", "zB"]
EPSILON = 1e-9

_Conv, _Norm = nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm
_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_POOL_CALLS: set[Any] = {F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, torch.mean, "mean"}
_POOL_CALLS |= {operator.add, operator.iadd, torch.add, "add", "add_"}
_SHAPES: tuple[type[nn.Module], ...] = (nn.Flatten, nn.Unflatten)
_SHAPE_CALLS: set[Any] = {torch.flatten, "flatten", "view", "reshape", "contiguous", torch.cat, torch.concat, "size"}
_SHAPE_CALLS |= {operator.getitem, getattr, F.pad}


@dataclass(frozen=True)
class Rule:
    """How a layer with weights shares relevance out among its inputs.

    Parameters
    ----------
    name : str
        `z+` counts positive weights alone, `simple` all, `alphabeta` positive ones `alpha` times and negative ones
        1 - `alpha` times, `zB` all of them against inputs between `low` and `high`, for the first layer.
    """

    name: RuleName = "z+"
    alpha: float = 2.0
    low: float = -1.0
    high: float = 1.0

    def __call__(self, product: Product, x: Tensor, weight: Tensor, relevance: Tensor) -> Tensor:
        """Relevance of the inputs x, of their shape, from that of the outputs."""
        positive, negative = weight.clamp_min(0), weight.clamp_max(0)
        if self.name == "alphabeta":  # as released, it is the inputs that are kept off zero
            x = x + EPSILON
            more = _shared(product, [(x, positive, 1)], relevance, 0.0)
            return self.alpha * more + (1 - self.alpha) * _shared(product, [(x, negative, 1)], relevance, 0.0)
        if self.name == "zB":
            low, high = torch.full_like(x, self.low), torch.full_like(x, self.high)
            return _shared(product, [(x, weight, 1), (low, positive, -1), (high, negative, -1)], relevance, EPSILON)
        return _shared(product, [(x, positive if self.name == "z+" else weight, 1)], relevance, EPSILON)


def _shared(product: Product, parts: list[tuple[Tensor, Tensor, int]], relevance: Tensor, epsilon: float) -> Tensor:
    """Relevance by the share of each input in the sum of these products."""
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x, _, _ in parts]
        total = sum(sign * product(x, weight) for x, (_, weight, sign) in zip(inputs, parts, strict=True))
        assert isinstance(total, Tensor)
        whole = total.detach() + epsilon
        each = torch.where(whole == 0, 0.0, relevance / whole)  # an output that nothing gave to hands nothing back
        gradients = torch.autograd.grad(total, inputs, each.to(total.dtype))
    shares = [x.detach() * gradient for x, gradient in zip(inputs, gradients, strict=True)]
    return torch.stack(shares).sum(0)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module, rule: Rule) -> Tensor:
        ctx.save_for_backward(x)
        ctx.module, ctx.rule = module, rule
        result: Tensor = module(x)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (x,), module = ctx.saved_tensors, ctx.module
        return ctx.rule(_product(module), x, module.weight.detach(), gradients[0]), None, None


class _Entrywise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        result = call(x.clone())  # some work in place
        if result.shape != x.shape:
            raise PrunelabError(f"relevance has no rule for what makes {list(result.shape)} of {list(x.shape)}")
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _Mixed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        ctx.call = call
        return call(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            total = ctx.call(*inputs)
            result = torch.autograd.grad(total, inputs, gradients[0] / (total.detach() + EPSILON))
        return None, *(x.detach() * g for x, g in zip(inputs, result, strict=True))


def _product(module: Any) -> Product:
    if isinstance(module, nn.Linear):
        return F.linear
    if module.transposed or module.padding_mode != "zeros":
        raise PrunelabError("relevance does not pass transposed convolutions, nor any but padding by zeros")
    call = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(module.kernel_size)]
    settings = (module.stride, module.padding, module.dilation, module.groups)
    return lambda x, weight: call(x, weight, None, *settings)


class _Interpreter(fx.Interpreter):
    """Runs a traced network and keeps what its layers give; with a rule, going back follows that."""

    def __init__(self, model: fx.GraphModule, rule: Rule | None, first: Rule | None) -> None:
        super().__init__(model)
        self.rule, self.first = rule, first
        self.outputs: dict[str, Tensor] = {}

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module: nn.Module = self.fetch_attr(target)
        if isinstance(module, _Conv | nn.Linear):
            rule = self.rule if self.outputs or self.first is None else self.first
            result = module(*args) if rule is None else _Layer.apply(args[0], module, rule)
            self.outputs[target] = result
            return result.clone()  # what comes next may work in place
        if self.rule is None or isinstance(module, _SHAPES):
            return module(*args, **kwargs)
        if isinstance(module, _POOLS):
            return _Mixed.apply(module, *args)
        return _Entrywise.apply(args[0], module)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._called(super().call_function, target, args, kwargs)

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._called(super().call_method, target, args, kwargs)

    def _called(self, run: Callable[..., Any], target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = [value for value in args if isinstance(value, Tensor)]
        if self.rule is None or target in _SHAPE_CALLS:
            return run(target, args, kwargs)
        rest = args[len(tensors) :]
        if target in _POOL_CALLS and len(tensors) in (1, 2):
            plain = {operator.iadd: operator.add, "add_": "add"}.get(target, target)
            return _Mixed.apply(lambda *x: run(plain, (*x, *rest), kwargs), *tensors)
        if len(tensors) == 1:
            return _Entrywise.apply(tensors[0], lambda x: run(target, (x, *rest), kwargs))
        name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
        raise PrunelabError(f"relevance has no rule for '{name}' of several tensors; use another criterion")


def flowed_back(
    model: nn.Module,
    graph: fx.Graph,
    x: Tensor,
    labels: Tensor,
    rule: Rule | None = None,
    first: Rule | None = None,
    start: Start = "one",
) -> dict[str, tuple[Tensor, Tensor]]:
    """What every layer with weights puts out for inputs x [B, ...] with labels [B], and what flows back to there, both
    of one shape, by the layer's path.

    Without a rule that is the gradient of the mean cross entropy. With one, and maybe another for the first layer, it
    is the relevance of the true class, which begins with one, or with the class's logit.
    """
    runner = _Interpreter(fx.GraphModule(model, graph), rule, first)
    with torch.enable_grad():
        logits = runner.run(x.detach().clone().requires_grad_())
        if rule is None:
            loss = F.cross_entropy(logits, labels)
            gradients = torch.autograd.grad(loss, list(runner.outputs.values()), allow_unused=True)
        else:
            chosen = F.one_hot(labels, logits.shape[-1]).to(logits)
            chosen = chosen * logits.detach() if start == "logit" else chosen
            gradients = torch.autograd.grad(logits, list(runner.outputs.values()), chosen, allow_unused=True)
    return {
        path: (out.detach(), torch.zeros_like(out) if back is None else back)
        for (path, out), back in zip(runner.outputs.items(), gradients, strict=True)
    }
