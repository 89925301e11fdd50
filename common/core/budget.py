"""Budgets: how much may stay, in the unit that a paper counts in."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from prunelab.common.core.errors import PrunelabError

Unit = Literal["ratio", "count", "removed", "pattern", "bits", "words", "bytes", "macs", "cost"]


@dataclass(frozen=True)
class Budget:
    """How much may stay: one amount for every site, or one amount a site.

    unit: `ratio` keeps that share of the units, `count` keeps that many, `removed` takes that many away,
    `pattern` keeps that many of each `every` consecutive ones (2:4), `bits` is what a weight takes on average,
    `words` and `bytes` limit text, `macs` names multiply-accumulates and `cost` a share of the dense ones (both are
    turned into one of the first three by `prunelab.common.tokens.match.match`).
    names: of the components of a model that the amounts are for, where it has some (see `by`).
    """

    amount: float | tuple[float, ...]
    unit: Unit = "ratio"
    every: int = 0
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.amount, Sequence) and not isinstance(self.amount, (str, tuple)):
            object.__setattr__(self, "amount", tuple(self.amount))
        if self.unit not in get_args(Unit):
            raise PrunelabError(f"budget unit '{self.unit}' is unknown; use one of {', '.join(get_args(Unit))}")
        for value in self.amounts:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise PrunelabError(f"budget amount {value!r} is not a finite number")
            if value < 0 or (self.unit in ("ratio", "cost") and value > 1):
                allowed = "between 0 and 1" if self.unit in ("ratio", "cost") else "at least 0"
                number = f"; a number of units is written {value:g}count" if value > 1 and value == int(value) else ""
                raise PrunelabError(f"budget {value:g} {self.unit} is out of range: it must be {allowed}{number}")
        if self.names and (len(self.names) != len(self.amounts) or len({*self.names}) < len(self.names)):
            raise PrunelabError(f"{len(self.amounts)} amounts cannot be those of {', '.join(self.names)}")
        if not self.amounts:
            raise PrunelabError("a budget needs at least one amount")
        if (self.unit == "pattern") != (self.every > 0):
            raise PrunelabError("a pattern names how many stay of how many, and nothing else does; write it as 2:4")
        if self.unit == "pattern" and any(a != int(a) or a > self.every for a in self.amounts):
            raise PrunelabError(f"the pattern {self} is out of range: whole numbers up to {self.every} can stay")

    @property
    def amounts(self) -> tuple[float, ...]:
        """The amounts as a tuple, also where there is only one."""
        return self.amount if isinstance(self.amount, tuple) else (self.amount,)

    @classmethod
    def by(cls, amounts: Mapping[str, float | str | Budget]) -> Budget:
        """A budget for each named component of a model: `Budget.by({"text_encoder": 0.525, "unet": 0.65})`. All are in
        one unit."""
        each = [b if isinstance(b, Budget) else cls.parse(str(b)) for b in amounts.values()]
        if not each or len({(b.unit, b.every) for b in each}) > 1 or any(b.names or len(b.amounts) > 1 for b in each):
            raise PrunelabError("the components of a model have one amount each, all in one unit")
        return cls(tuple(b.amounts[0] for b in each), each[0].unit, each[0].every, tuple(amounts))

    def at(self, index: int | str) -> Budget:
        """The budget of the index-th site, or of a component by its name. A single amount serves every site."""
        if self.names:
            if index not in self.names:
                raise PrunelabError(f"the budget {self} is for components of a model, and '{index}' is none of them")
            return replace(self, amount=self.amounts[self.names.index(str(index))], names=())
        if len(self.amounts) == 1:
            return replace(self, amount=self.amounts[0])
        if isinstance(index, str) or index >= len(self.amounts):
            raise PrunelabError(f"the budget names {len(self.amounts)} amounts but the method prunes at more sites")
        return replace(self, amount=self.amounts[index])

    def count(self, available: int) -> int:
        """Units kept out of `available`, rounded down as the token-pruning papers do.

        Ratios pass through six decimals first, so that 0.7 stored in single precision still means 0.7.
        """
        if len(self.amounts) != 1:
            raise PrunelabError("this budget has one amount a site; take `budget.at(index)` first")
        amount = self.amounts[0]
        if self.unit == "ratio":
            return int(round(amount * available, 6)) if amount < 1 else available
        if self.unit == "count":
            return min(int(amount), available)
        if self.unit == "removed":
            return max(available - int(amount), 0)
        if self.unit == "pattern":
            if available % self.every:
                raise PrunelabError(f"{available} units do not divide into groups of {self.every}, as {self} needs")
            return available // self.every * int(amount)
        raise PrunelabError(f"a budget in {self.unit} does not count units; use ratio, count or removed")

    def pruned(self, available: int) -> int:
        """Units taken away out of `available`. Of a ratio this number is rounded down, as the weight-pruning papers
        do, where `count` rounds down the number that stays."""
        if self.unit == "ratio" and len(self.amounts) == 1:
            return int(round((1 - self.amounts[0]) * available, 6))
        return available - self.count(available)

    @classmethod
    def of(cls, value: Budget | float | str | Sequence[float]) -> Budget:
        """A budget as people write it: `0.7`, `(0.9, 0.8, 0.7)`, `"2:4"`, `"64count"`; see `parse`."""
        if isinstance(value, Budget):
            return value
        if isinstance(value, str):
            return cls.parse(value)
        return cls(tuple(value) if isinstance(value, list | tuple) else value)  # type: ignore[arg-type]

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read `0.7`, `0.9,0.8,0.7`, `13removed`, `64count`, `2:4`, `665bytes`, `100words`, `3bits`, `0.75cost` or
        `2.97e9macs`, and of components `text_encoder=0.525,unet=0.65`."""
        if "=" in text:
            return cls.by({n.strip(): a for n, _, a in (part.partition("=") for part in text.split(","))})
        if pattern := re.fullmatch(r"\s*(\d+(?:,\d+)*):(\d+)\s*", text):
            kept = tuple(int(part) for part in pattern[1].split(","))
            return cls(kept if len(kept) > 1 else kept[0], "pattern", int(pattern[2]))
        match = re.fullmatch(r"\s*([-+.,\d\s]+(?:e\+?\d+)?)\s*([a-z]*)\s*", text)
        try:
            if match is None:
                raise ValueError
            amounts = [float(part) for part in match[1].split(",")]
        except ValueError:
            raise PrunelabError(
                f"cannot read the budget '{text}';"
                " write 0.7, 0.9,0.8,0.7, 13removed, 64count, 2:4, 665bytes, 100words or 3bits"
            ) from None
        plain = tuple(int(a) if a.is_integer() and match[2] not in ("", "ratio", "cost") else a for a in amounts)
        return cls(plain if len(plain) > 1 else plain[0], match[2] or "ratio")  # type: ignore[arg-type]

    def __str__(self) -> str:
        unit = "" if self.unit == "ratio" else f":{self.every}" if self.unit == "pattern" else self.unit
        amounts = [f"{a:.10g}" for a in self.amounts]
        if self.names:
            return ",".join(f"{name}={amount}{unit}" for name, amount in zip(self.names, amounts, strict=True))
        return ",".join(amounts) + unit
