"""The selective scan: the plain recurrence and the chunked scan against Mamba's own reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from prunelab.common.backbones.scan import selective_scan

TOLERANCE = {"": (1e-5, 1e-5)}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    arguments = {name.removeprefix("in_"): torch.from_numpy(array) for name, array in inputs.items()}
    softplus = bool(arguments.pop("delta_softplus"))
    results = {}
    for implementation in ("reference", "chunked"):
        y, state = selective_scan(**arguments, softplus=softplus, return_state=True, implementation=implementation)
        results[implementation] = {"out_y": y.numpy(), "out_last_state": state.numpy()}
    for name, array in results["reference"].items():
        np.testing.assert_allclose(results["chunked"][name], array, atol=1e-5, rtol=1e-5, err_msg=name)
    return results["reference"]
