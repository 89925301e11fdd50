"""The signals of training data, computed with the models that they speak of: one forward pass a model and batch, and
nothing that no method asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.common.core import attention_interface
from prunelab.common.core.attention import BLOCK
from prunelab.common.core.attention_interface import Recorder
from prunelab.common.core.context import refuse_long
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.hooks import before
from prunelab.common.data_selection.losses import IGNORED, counted, token_entropy, token_loss

Batch = Mapping[str, Any]
Forward = Callable[[nn.Module, Batch], Tensor]

ATTENTION = frozenset(("prompt_attention", "last_attention", "rater_attention"))  # of one layer
OWN = frozenset(("loss", "entropy", "logits", "embedding")) | ATTENTION  # what the model that is trained says
SERVICES = {"reference_loss": "reference", "history_loss": "history"}
WEIGHT = "loss_weight"  # field of a batch: what each sample or token counts
GRADES = "grades"  # column of a batch: what graders gave each sample
# `fused_lm_head`: by which TRL asks for logarithms of probabilities in place of logits
_NO_INPUT = ("labels", "num_items_in_batch", "fused_lm_head", WEIGHT, GRADES, *SERVICES)


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """The logits of a model of transformers for a batch; its labels are not shown to it."""
    inputs = {name: value for name, value in batch.items() if name not in _NO_INPUT}
    if "input_ids" in inputs and inputs.get("position_ids") is None:
        refuse_long(model, inputs["input_ids"].shape[1], "a sample")
    if hasattr(getattr(model, "config", None), "use_cache"):
        inputs["use_cache"] = False
    output = model(**inputs)
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode and without gradients; its own mode comes back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def sources(
    required: frozenset[str],
    batch: Batch,
    model: nn.Module | None,
    services: Mapping[str, Any],
    layer: int = -1,
    forward: Forward = logits_of,
) -> dict[str, Callable[[], Tensor]]:
    """By name, what computes the signals that can be had of a batch. Losses that a batch brings as a column, measured
    earlier, are taken from there."""
    labels: Tensor | None = batch.get("labels")
    available: dict[str, Callable[[], Tensor]] = {GRADES: lambda: batch[GRADES]} if GRADES in batch else {}
    if model is not None:
        own = _Own(required, batch, model, layer, forward)
        available |= {"logits": lambda: own.logits, "embedding": lambda: own.embedding}
        available |= {name: lambda name=name: own.attention(name) for name in ATTENTION}  # type: ignore[misc]
        if labels is not None:
            available |= {
                "loss": lambda: token_loss(own.logits, labels),
                "entropy": lambda: token_entropy(own.logits) * counted(labels),
            }
    for name, service in SERVICES.items():
        if name in batch:
            available[name] = lambda name=name: batch[name]  # type: ignore[misc]
        elif service in services and labels is not None:
            available[name] = lambda other=services[service]: _loss(other, batch, labels, forward)  # type: ignore[misc]
    return available


def _loss(model: nn.Module, batch: Batch, labels: Tensor, forward: Forward) -> Tensor:
    with evaluating(model):
        return token_loss(forward(model, batch), labels)


class _Own:
    """One forward pass of the model that is trained, run when its first signal is read."""

    def __init__(self, required: frozenset[str], batch: Batch, model: nn.Module, layer: int, forward: Forward) -> None:
        self.batch, self.model, self.layer, self.forward = batch, model, layer, forward
        self.read = sorted(required & ATTENTION)
        self.embeds = "embedding" in required
        self._attention: dict[str, Tensor] = {}
        self._hidden: Tensor | None = None
        self._logits: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        """[B, N, V], or [B, V] of a classifier."""
        if self._logits is None:
            with evaluating(self.model):
                stop = self._watched() if self.embeds else None
                try:
                    self._logits = self._recorded() if self.read else self.forward(self.model, self.batch)
                finally:
                    if stop is not None:
                        stop()
        return self._logits

    def _watched(self) -> Callable[[], Any]:
        """Keep what the output layer is given, until the function that comes back is called."""

        def see(_: nn.Module, args: tuple[Any, ...]) -> None:
            self._hidden = args[0]

        return before(self.model.get_output_embeddings(), see)  # type: ignore[operator]

    @property
    def embedding(self) -> Tensor:
        """[B, D]."""
        _ = self.logits
        assert self._hidden is not None
        tokens = self.batch["input_ids"]
        valid = self.batch.get("attention_mask", torch.ones_like(tokens)).unsqueeze(-1).float()
        return (self._hidden.float() * valid).sum(1) / valid.sum(1).clamp_min(1)

    def attention(self, name: str) -> Tensor:
        """[B, N]."""
        _ = self.logits
        return self._attention[name]

    def _recorded(self) -> Tensor:
        recorder, stop = attention_interface.record(attention_layer(self.model, self.layer))
        try:
            logits = self.forward(self.model, self.batch)
            labels, tokens = self.batch["labels"], self.batch["input_ids"]
            valid = self.batch.get("attention_mask", torch.ones_like(tokens)).bool()
            prompt = (labels == IGNORED) & valid
            for name in self.read:
                if name == "last_attention":
                    result = last_attention(recorder, valid)
                else:
                    seen = prompt if name == "prompt_attention" else self._raters(tokens, prompt)
                    result = prompt_attention(recorder, seen)
                self._attention[name] = result * counted(labels)
        finally:
            stop()
        return logits

    def _raters(self, tokens: Tensor, prompt: Tensor) -> Tensor:
        embed: Any = self.model.get_input_embeddings()  # type: ignore[operator]
        return raters(embed(tokens).float(), prompt, counted(self.batch["labels"]))


def attention_layer(model: nn.Module, layer: int) -> Any:
    """An attention layer of a decoder, counted from the end where negative."""
    layers = attention_interface.attention_layers(attention_interface.decoder_of(model))
    if not -len(layers) <= layer < len(layers):
        raise PrunelabError(f"the model has {len(layers)} layers, and the method reads the attention of layer {layer}")
    return layers[layer]


def last_attention(recorder: Recorder, valid: Tensor) -> Tensor:
    """What the last of the valid [B, N] tokens pays to every token [B, N], the mean over heads."""
    indices = torch.arange(valid.shape[1], device=valid.device)
    rows = (indices * valid).amax(1, keepdim=True)
    return recorder.weights(rows).float().mean(1).squeeze(1)


def raters(embedded: Tensor, prompt: Tensor, answers: Tensor) -> Tensor:
    """The tokens of the prompt [B, N] that the answers look most alike: those with more than the mean of the softmax
    over the prompt of their products with the embedded tokens [B, N, D], averaged over answer tokens."""
    batch, total, _ = embedded.shape
    result, step = embedded.new_zeros(batch, total), max(1, BLOCK // (batch * total))
    for start in range(0, total, step):
        rows = answers[:, start : start + step]
        alike = (embedded[:, start : start + step] @ embedded.mT).masked_fill(~prompt[:, None], float("-inf"))
        result += (alike.softmax(-1).nan_to_num() * rows.unsqueeze(-1)).sum(1)
    mean = result.sum(1, keepdim=True) / prompt.sum(1, keepdim=True).clamp_min(1)
    best = prompt & (result > mean)
    return torch.where(best.any(1, keepdim=True), best, prompt)


def prompt_attention(recorder: Recorder, prompt: Tensor) -> Tensor:
    """What every token pays to the prompt [B, N], the mean over heads, a block of rows at a time."""
    batch, heads, total, _ = recorder.shown().shape
    paid, step = [], max(1, BLOCK // (batch * heads * total))
    for start in range(0, total, step):
        rows = torch.arange(start, min(start + step, total), device=prompt.device).expand(batch, -1)
        weights = recorder.weights(rows).float().mean(1)  # [B, R, N]
        paid.append((weights @ prompt.float().unsqueeze(-1)).squeeze(-1))
    return torch.cat(paid, 1)
