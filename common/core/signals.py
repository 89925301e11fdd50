"""Signals: what a site of a network lets a method see, computed when it is first read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.plan import ModelInfo


@dataclass(frozen=True)
class Reading:
    """A signal of another layer than the site's own: named among what a method requires, read by `signals.at`.

    Parameters
    ----------
    name : str
        The signal as it is right behind that layer: `hidden`, `queries`, `keys`, `values`, `cls_row`, `last_row`,
        `received`, or `attention` of some `rows`. Of a decoder also what its two sublayers read, behind their norms,
        and add to the stream, before they do: `attention_input`, `attention_output`, `mlp_input`, `mlp_output`.
    layer : int
        Counted from 0. In the image encoder negative numbers count backwards. For `hidden` of a decoder, -1 is what
        enters its first layer.
    where : str
        `layer` of the model (or decoder) itself, before the site; of the image encoder, `tower` counts the layers up to
        the one that gives the features, which is -1, and `encoder` all of them, also those behind.
    rows : str, optional
        Whose attention `attention` is: that of the `text` tokens behind the visual ones, [B, H, R, N]; samples with
        fewer have rows of zeros in front. Of other signals of the image encoder, `class` are those of the class tokens
        in place of the patches', one a crop.
    """

    name: str
    layer: int
    where: Literal["layer", "tower", "encoder"] = "layer"
    rows: Literal["text", "class"] | None = None

    def __str__(self) -> str:
        rows = f" of the {self.rows}" if self.rows else ""
        return f"{self.name}{rows} of {'' if self.where == 'layer' else f'the {self.where}, '}layer {self.layer}"


Signal = str | Reading


class Checks:
    """What has to hold of values on a device, gathered there and looked at once: a look stops the device's queue."""

    def __init__(self) -> None:
        self._holds: list[Tensor] = []
        self._messages: list[str] = []

    def expect(self, holds: Tensor, message: str) -> None:
        """Where `holds`, a bool scalar, turns out False, `read` raises the message."""
        if holds.device.type == "meta":
            return
        if message in self._messages:
            at = self._messages.index(message)
            self._holds[at] = self._holds[at] & holds.to(self._holds[at].device)
        else:
            self._holds.append(holds)
            self._messages.append(message)

    def include(self, other: Checks) -> None:
        """What another has gathered, too."""
        for holds, message in zip(other._holds, other._messages, strict=True):
            self.expect(holds, message)
        other._holds, other._messages = [], []

    def read(self) -> None:
        """Look, and forget. Raises PrunelabError with the first message whose condition does not hold."""
        holds, messages, self._holds, self._messages = self._holds, self._messages, [], []
        if holds and not all(result := torch.stack([h.to(holds[0].device) for h in holds]).tolist()):
            raise PrunelabError(messages[result.index(False)])


class Signals:
    """What a site lets a method see, whatever its units are; each role adds what it knows besides.

    Every signal is computed when it is first read, and only if it was required; it is then an attribute of that name.
    Always at hand: `prunable` (which units may go), `units` (how many may, the same for all samples unless `valid`
    says otherwise), `valid` (False marks padding, None where there is none), `rng` for methods that draw, `info` of the
    model, `services` handed to `apply`, and `memory`, a dictionary that outlives the site.
    """

    def __init__(
        self,
        sources: Mapping[Any, Callable[[], Tensor]],
        *,
        prunable: Tensor,
        units: int,
        info: ModelInfo,
        valid: Tensor | None = None,
        rng: torch.Generator | None = None,
        required: frozenset[Any] | None = None,
        services: Mapping[str, Any] | None = None,
        memory: dict[str, Any] | None = None,
        checks: Checks | None = None,
    ) -> None:
        self._sources = dict(sources)
        self._required = frozenset(sources) if required is None else required
        self.prunable = prunable
        self.units = units
        self.info = info
        self.valid = valid
        self.rng = rng
        self.services = services or {}
        self._checks = checks
        self.memory: dict[str, Any] = {} if memory is None else memory
        missing = self._required - set(self._sources)
        if missing:
            raise PrunelabError(
                f"this site cannot give the signals {', '.join(sorted(map(str, missing)))} that the method reads"
            )

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("_") or name not in self._sources or name not in self._required:
            raise AttributeError(f"signal '{name}' was not required at this site; name it in requires()")
        value = self._read(name)
        setattr(self, name, value)
        return value

    def _read(self, name: str | Reading) -> Tensor:
        value, checks = self._sources[name](), self._checks or Checks()
        if value.numel():
            message = f"the signal '{name}' holds NaN or infinite values; check the input and the weights"
            checks.expect(_bounded(value.detach(), name), message)
        if self._checks is None:  # nobody looks later
            checks.read()
        return value


def _bounded(value: Tensor, name: str | Reading) -> Tensor:
    """No NaN and no infinity, in one pass (extremes carry NaN); logits may be -inf where a column is masked."""
    low, high = value.aminmax()
    return high < float("inf") if name == "attention_logits" else (high < float("inf")) & (low > float("-inf"))
