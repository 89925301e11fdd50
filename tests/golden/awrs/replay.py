"""AWRS: the paper's estimator and the later ones of the authors' library, draw for draw."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from prunelab.methods.awrs import method as awrs

TOLERANCE = {"logw": (1e-9, 1e-9), "": (1e-12, 1e-12)}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    paper = "in_logw" in inputs
    log_p = inputs["in_logw" if paper else "in_logps"]
    allowed = inputs["in_accept"]
    mass = np.exp(log_p) * allowed
    out: dict[str, np.ndarray] = {"true_Z": mass.sum(), "true_posterior": mass / max(mass.sum(), np.finfo(float).tiny)}
    rejects = float(inputs.get("in_max_rejects", np.inf))
    accepts = int(inputs.get("in_max_accepts", 2))
    estimators: dict[str, Callable[..., awrs.Outcome]]
    if paper:
        estimators = {"out": awrs.two_passes, "out_lcd": awrs.one_pass}
    else:
        estimators = {
            "out_recursive_awrs": lambda *a: awrs.recursive(*a, max_rejects=rejects),
            "out_geometric_awrs": lambda *a: awrs.geometric(*a, max_accepts=accepts, max_rejects=rejects),
            "out_improper": lambda *a: awrs.one_pass(*a, max_rejects=rejects),
        }
    lengths = {"out_lcd": 100, "out_improper": 50}
    for name, estimate in estimators.items():
        rows = [draw(estimate, log_p, allowed, int(s), not paper) for s in inputs["in_seeds"][: lengths.get(name)]]
        for part, values in zip(("token", "logw", "ncalls"), zip(*rows, strict=True), strict=True):
            out[f"{name}_{part}"] = np.array(values)
    if paper:  # which names no token where there is none
        out["out_lcd_token"][np.isneginf(out["out_lcd_logw"])] = awrs.DEAD
    return {name: np.asarray(out[name]) for name in wanted if name in out}


def draw(
    estimate: Callable[..., awrs.Outcome], log_p: np.ndarray, allowed: np.ndarray, seed: int, remember: bool
) -> tuple[int, float, int]:
    """Token, log weight and the number of times the constraint was asked."""
    calls = 0

    def accept(token: int) -> bool:
        nonlocal calls
        calls += 1
        return bool(allowed[token])

    token, log_weight = estimate(log_p, awrs.remembered(accept) if remember else accept, np.random.default_rng(seed))
    return token, log_weight, calls
