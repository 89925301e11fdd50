"""Quantised models on disk in the format of compressed-tensors (`pack-quantized`), which that library, transformers and
vLLM read. Writing needs none of them; reading by transformers takes the extra `export`.

Of each rounded linear the folder holds `weight_packed`, its codes of b bits as a row of bits, least significant first,
in words of 32, those of a sparse weight's zeros among them; `weight_scale` [R, G]; where grids are not symmetric
`weight_zero_point`, packed alike along the rows; and `weight_shape`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights.plan import WeightPlan, write_json
from prunelab.common.weights.targets import Quantised, Target

WORD = 32


def packed_words(codes: Tensor, bits: int) -> Tensor:
    """Codes [R, C] below 2^bits as int32 [R, ceil(C bits / 32)]; element i of a row begins at bit i * bits."""
    rows, columns = codes.shape
    each = np.unpackbits(codes.cpu().to(torch.uint8).numpy()[..., None], axis=-1, bitorder="little", count=bits)
    string = each.reshape(rows, columns * bits)
    padded = np.pad(string, ((0, 0), (0, -string.shape[1] % WORD)))
    words = np.packbits(padded, axis=-1, bitorder="little").view("<i4")
    return torch.from_numpy(words.astype(np.int32))


def save_compressed(model: nn.Module, plan: WeightPlan, folder: Path | str) -> None:
    """Write a model of transformers whose linears a plan has rounded, for `from_pretrained` of transformers (with
    compressed-tensors installed) and for vLLM. Where grids are not symmetric, transformers reads it with
    `quantization_config=CompressedTensorsConfig(dequantize=True)`: version 0.20 of compressed-tensors expects their
    zeros unpacked otherwise.

    Raises PrunelabError where the format has no place for what the plan holds: experts that are fused, codes of signs,
    groups out of order or that do not divide a row, weights whose inputs have to be rotated, shapes that no config of
    the family describes.
    """
    decided = [(target, decision) for target, decision in plan.decisions() if decision.code is not None]
    if not decided:
        raise PrunelabError(f"{plan.header['method']} has rounded nothing; write the model with save_pruned")
    if not plan.header["stock"] or not hasattr(model, "save_pretrained"):
        raise PrunelabError("no config of transformers describes this model; write it with save_pruned")
    state = dict(model.state_dict())
    groups: dict[tuple[int, int, bool], list[str]] = {}
    for target, decision in decided:
        code = decision.code
        assert code is not None
        _check(model, target, code)
        weight = state.pop(f"{target.name}.weight")
        state |= {f"{target.name}.{name}": tensor for name, tensor in tensors(code, weight.dtype).items()}
        groups.setdefault((code.bits, code.group, code.symmetric), []).append(target.name)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_once(state), folder / "model.safetensors", {"format": "pt"})
    model.config.save_pretrained(folder)  # type: ignore[union-attr,operator]
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)  # type: ignore[union-attr,operator]
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"architectures": [type(model).__name__]}
    write_json(path, config | {"quantization_config": _config(model, groups, {t.name: t for t, _ in decided})})


def tensors(code: Quantised, dtype: torch.dtype) -> dict[str, Tensor]:
    """A rounded weight [R, C] under the format's names."""
    results = {
        "weight_packed": packed_words(code.codes, code.bits),
        "weight_scale": code.scale.to(dtype).cpu().contiguous(),
        "weight_shape": torch.tensor(code.codes.shape),
    }
    if not code.symmetric:
        results["weight_zero_point"] = packed_words(code.zero.T, code.bits).T.contiguous()
    return results


def _check(model: nn.Module, target: Target, code: Quantised) -> None:
    says = ""
    if target.expert >= 0 or not isinstance(model.get_submodule(target.name), nn.Linear):
        says = "is no layer of its own, as that format needs it"
    elif code.turned:
        says = "reads inputs that have to be rotated while the model runs; round it without (`online=False`)"
    elif code.index is not None:
        says = "has groups out of order; round it with `static_groups`"
    elif bool((code.zero != code.zero.round()).any()):
        says = "has codes of signs, with a zero between them; give it 2 or more bits"
    elif code.codes.shape[1] % code.group:
        says = f"has {code.codes.shape[1]} columns, which do not divide into groups of {code.group}"
    if says:
        raise PrunelabError(f"{target.name} {says}; or write the model with save_pruned")


def _once(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tied weights are stored once."""
    seen: set[int] = set()
    kept = {}
    for name, tensor in state.items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:
            seen.add(tensor.data_ptr())
            kept[name] = tensor.contiguous()
    return kept


def _config(
    model: nn.Module, groups: dict[tuple[int, int, bool], list[str]], targets: dict[str, Target]
) -> dict[str, Any]:
    """What the config says of the codes: a group of layers for every kind of grid, and the linears left as they are."""
    schemes = {}
    for number, ((bits, group, symmetric), names) in enumerate(groups.items()):
        whole = all(targets[name].shape[1] == group for name in names)
        weights: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False}
        weights |= {"strategy": "channel"} if whole else {"strategy": "group", "group_size": group}
        schemes[f"group_{number}"] = {"targets": names, "weights": weights}
    left = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name not in targets]
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": schemes, "ignore": left,
    }  # fmt: skip
