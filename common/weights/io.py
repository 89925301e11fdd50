"""Pruned models on disk. Where a config of the family describes the pruned shape the folder is an ordinary one of
transformers; otherwise it holds the plan beside the weights, and only `load_pruned` reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights.plan import WeightPlan, write_json

WEIGHTS, PLAN_FOLDER = "pruned.safetensors", "plan"
# Stock loaders print this name when they refuse the folder.
MODEL_TYPE = "pruned layer by layer, load it with prunelab.common.weights.load_pruned"


def save_pruned(model: nn.Module, plan: WeightPlan, folder: Path | str) -> None:
    """Write a pruned model and its plan. Uniform plans of transformers' models give a folder that stock
    `from_pretrained` reads."""
    folder = Path(folder)
    plan.save(folder / PLAN_FOLDER)
    if plan.header["stock"]:
        model.save_pretrained(folder)  # type: ignore[operator]
        return
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:  # tied weights are stored once
            seen.add(tensor.data_ptr())
            tensors[name] = tensor.contiguous()
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    write_json(folder / "config.json", {"model_type": MODEL_TYPE, "architectures": [type(model).__name__]})
    if hasattr(model, "generation_config") and model.can_generate():  # type: ignore[operator]
        model.generation_config.save_pretrained(folder)  # type: ignore[operator,union-attr]


def load_pruned(folder: Path | str, dense: nn.Module | None = None) -> nn.Module:
    """A pruned model in eval mode: built dense on the meta device, cut by its plan, and filled strictly.

    dense: the unpruned model, with any weights, for what transformers cannot build; it is what is cut and returned.
    """
    folder = Path(folder)
    plan = WeightPlan.load(folder / PLAN_FOLDER)
    if dense is not None:
        plan.apply(dense)
        _fill(dense, _read(folder))
        return dense.eval()

    import transformers
    from accelerate import init_empty_weights  # type: ignore[import-untyped]

    try:
        cls: Any = getattr(transformers, plan.header["model"])
    except AttributeError:
        raise PrunelabError(
            f"this transformers has no {plan.header['model']}; install the version that saved, or give the unpruned"
            " model as `dense`"
        ) from None
    if plan.header["stock"]:
        stock: nn.Module = cls.from_pretrained(folder).eval()
        return stock
    with init_empty_weights(include_buffers=False):
        first = (*plan.earlier, plan)[0]  # whose config is the dense model's
        model = cls(cls.config_class.from_dict(first.header["config"]))
    model.tie_weights()
    plan.apply(model)
    _fill(model, _read(folder))
    if (folder / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    pruned: nn.Module = model.eval()
    return pruned


def _read(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise PrunelabError(f"{folder / WEIGHTS} cannot be read ({error}); save the model anew") from None


def _fill(model: Any, tensors: dict[str, Tensor]) -> None:
    """Give a model, on the meta device or not, its weights; every name and shape must fit."""
    first: dict[int, str] = {}
    wanted: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        wanted[name] = tuple(parameter.shape)
        stored = first.setdefault(id(parameter), name)
        if name not in tensors and stored in tensors:
            tensors[name] = tensors[stored]
    wanted |= {name: tuple(b.shape) for name, b in model.state_dict().items() if name not in wanted}
    results = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wanted != results:
        wrong = sorted(name for name in wanted.keys() | results.keys() if wanted.get(name) != results.get(name))
        raise PrunelabError(f"the weights do not fit the plan: {', '.join(wrong[:8])}; save the model anew")
    model.load_state_dict(tensors, strict=True, assign=True)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
