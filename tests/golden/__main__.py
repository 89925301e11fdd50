"""`python -m tests.golden DIR [slug ...]`: replay stored cases of the authors' code and compare every output.

DIR holds `<slug>/*.npz`. Arrays named `(^|_)out_` or `^true_` are outputs, all others but `note` are inputs. Each
`tests/golden/<slug>/replay.py` has `replay(case, inputs, wanted) -> outputs`, `wanted` being the names of the outputs
with their shapes, which say how far a case goes (how many words are written), and may set `TOLERANCE` (name pattern ->
(atol, rtol), the first that matches counts), `NOT_APPLICABLE` (name pattern -> reason) and `RANKED_BY` (name pattern of
an order -> name of the stored scores that it sorts: orders agree where they put equal scores in the same places, since
the order of ties is chance).
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

OUTPUT = re.compile(r"^(?!w_|in_)(?:.*_)?out_|^true_")
DEFAULT = (1e-5, 1e-5)


@dataclass(frozen=True)
class Verdict:
    """Outcome of one case: arrays compared, the largest absolute error among floats, and what did not match."""

    slug: str
    case: str
    compared: int
    error: float
    problems: tuple[str, ...]
    skipped: tuple[str, ...] = ()

    def __str__(self) -> str:
        verdict = "match" if not self.problems else "DIFFERS: " + "; ".join(self.problems)
        note = (
            f" ({len(self.skipped)} not applicable: {'; '.join(dict.fromkeys(self.skipped))})" if self.skipped else ""
        )
        return f"{self.slug}/{self.case}: {self.compared} arrays, max error {self.error:.1e}, {verdict}{note}"


def implemented() -> list[str]:
    """Slugs that have a replay module."""
    return sorted(p.parent.name for p in Path(__file__).parent.glob("*/replay.py"))


def compare(name: str, got: np.ndarray, want: np.ndarray, tolerance: tuple[float, float]) -> tuple[float, str | None]:
    """Largest error and, where it does not match, why."""
    got = np.asarray(got)
    if got.shape != want.shape:
        return 0.0, f"{name} has shape {got.shape}, not {want.shape}"
    if want.dtype.kind in "fc":
        atol, rtol = tolerance
        got = got.astype(np.float64)
        close = np.isclose(got, want, atol=atol, rtol=rtol, equal_nan=True)
        finite = np.isfinite(got) & np.isfinite(want)
        error = float(np.abs(got - want)[finite].max()) if finite.any() else 0.0
        return error, None if close.all() else f"{name} is off by {error:.1e} in {int((~close).sum())} places"
    same = (got == want) if want.dtype.kind in "US" else (got.astype(np.int64) == want.astype(np.int64))
    return 0.0, None if np.all(same) else f"{name} differs in {int(np.sum(~same))} places"


def check(path: Path) -> Verdict:
    """Replay one case."""
    slug, case = path.parent.name, path.stem
    module = importlib.import_module(f"tests.golden.{slug}.replay")
    tolerances: dict[str, tuple[float, float]] = getattr(module, "TOLERANCE", {})
    reasons: dict[str, str] = getattr(module, "NOT_APPLICABLE", {})
    with np.load(path, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    orders: dict[str, str] = getattr(module, "RANKED_BY", {})
    outputs = {n: a for n, a in arrays.items() if OUTPUT.search(n)}
    inputs = {n: a for n, a in arrays.items() if n not in outputs and n != "note"}
    excused = {n: r for n in outputs for pattern, r in reasons.items() if re.search(pattern, n)}
    problems: list[str] = []
    worst, compared = 0.0, 0
    try:
        got = module.replay(case, inputs, {n: a.shape for n, a in outputs.items() if n not in excused})
    except Exception as error:  # a case that cannot be replayed is a finding, not the end of the run
        return Verdict(slug, case, 0, 0.0, (f"replay failed: {type(error).__name__}: {error}",), ())
    skipped = {n: r for n, r in excused.items() if n not in got}  # what one case lacks another may have
    for name in (n for n in outputs if n not in skipped):
        if name not in got:
            problems.append(f"{name} was not computed")
            continue
        match = next((t for pattern, t in tolerances.items() if re.search(pattern, name)), DEFAULT)
        have, want = np.asarray(got[name]), outputs[name]
        ranked = next((re.sub(p, scores, name) for p, scores in orders.items() if re.search(p, name)), None)
        if ranked is not None and sorted(have.tolist()) == sorted(want.tolist()):
            have, want = outputs[ranked][have], outputs[ranked][want]
        error, problem = compare(name, have, want, match)
        worst, compared = max(worst, error), compared + 1
        if problem:
            problems.append(problem)
    return Verdict(slug, case, compared, worst, tuple(problems), tuple(skipped.values()))


def verdicts(folder: Path, slugs: Sequence[str] = ()) -> Iterator[Verdict]:
    """Every case of the folder; without slugs, those of the methods implemented here."""
    for slug in slugs or [s for s in implemented() if (folder / s).is_dir()]:
        cases = sorted((folder / slug).glob("*.npz"))
        if slug not in implemented():
            yield Verdict(slug, "*", 0, 0.0, ("no replay module: the method is not implemented",))
        elif not cases:
            yield Verdict(slug, "*", 0, 0.0, (f"no cases in {folder / slug}",))
        else:
            yield from map(check, cases)


def main(arguments: Sequence[str]) -> int:
    if not arguments or not Path(arguments[0]).is_dir():
        print("usage: python -m tests.golden DIR [slug ...]   (DIR holds <slug>/*.npz)", file=sys.stderr)
        return 2
    total = matched = 0
    for verdict in verdicts(Path(arguments[0]), arguments[1:]):
        print(verdict, flush=True)
        total += 1
        matched += not verdict.problems
    print(f"{total} cases, {matched} match")
    return 0 if total and total == matched else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
