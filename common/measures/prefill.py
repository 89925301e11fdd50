"""Time to the first token, speed of writing and memory of a language model, also of images or video, on a CUDA GPU: the
published architecture with random weights, since weights do not change the speed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prunelab.common.core.errors import PrunelabError
from prunelab.common.measures.bench import Bench
from prunelab.common.models import devices, loading
from prunelab.common.tokens.adapters import adapter_for
from prunelab.common.tokens.adapters.vlm import VisionLanguage
from prunelab.common.tokens.adapters.vlm_prompt import Prompt

if TYPE_CHECKING:
    from prunelab.common.tasks.prefill import Prefill


WARM_UP, REPEATS = 10, 30
NEW = 64  # assumption: tokens of an answer


def measure(bench: Bench[Prefill.Settings]) -> dict[str, Any]:
    """What the task gives, see `tasks.prefill`."""
    return timed(bench, devices.gpu(), WARM_UP, REPEATS)


def timed(bench: Bench[Prefill.Settings], device: torch.device, warm_up: int, repeats: int) -> dict[str, Any]:
    """See `measure`; on a CPU there is no allocator to ask, and no `memory_gb`."""
    torch.manual_seed(0)
    model = loading.initialised(bench.ids["model"], str(device))
    devices.note(model)
    settings, new, method = bench.settings, bench.settings.new, bench.method()
    given: Any
    given, protocol = inputs(model, settings, device)
    dense = answered(model, given, new, warm_up, repeats) if settings.against_dense else None
    if method is not None and method.role == "weight_pruner":
        cutting = importlib.import_module("prunelab.common.measures.size")  # by name, see `by_role`
        cutting.cut(method, model, bench.budget)
        method = None
    elif method is not None and method.role == "ranker":
        if hasattr(model.config, "vision_config"):
            raise PrunelabError("only prompts of text alone are shortened; choose a language model")
        shortening = importlib.import_module("prunelab.common.measures.shortened")
        given, method = shortening.prompt(bench, model, given), None
    with bench.at_work(method, model):
        own = answered(model, given, new, warm_up, repeats)
    results: dict[str, float | None] = {
        "ttft": own.first,
        "ttft_ms": 1000 * own.first,
        "decode": own.decode,
        "token_ms": 1000 / own.decode,
        "total": own.total,
        "memory_gb": None if own.memory is None else own.memory / 1e9,
        "memory_mib": None if own.memory is None else own.memory / 2**20,
    }
    if dense is not None:
        results |= {"ttft_speedup": dense.first / own.first, "total_speedup": dense.total / own.total}
        results["decode_speedup"] = own.decode / dense.decode
    where = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    protocol = f"random weights in {dtype} on {where}; {protocol}, {new} written"
    return {
        name: {"value": round(value, 5), "n": repeats, "protocol": protocol}
        for name, value in results.items()
        if value is not None
    }


def inputs(model: Any, settings: Prefill.Settings, device: torch.device) -> tuple[dict[str, Any], str]:
    """Arguments of the model's `generate` for a prompt, and its size in words."""
    if hasattr(model.config, "vision_config"):
        adapter = adapter_for(model)
        assert isinstance(adapter, VisionLanguage)
        prompt = adapter.prompt(settings.frames, settings.text)
        seen = adapter.visual_tokens(prompt)
        return contents(adapter, prompt, device), f"{prompt.text} text tokens and {seen} visual ones before pruning"
    if settings.text is None or settings.text < 2 or settings.frames:
        raise PrunelabError("this language model reads text alone; give text=2 tokens of it or more, and no frames")
    ids = torch.randint(3, model.config.vocab_size, (1, settings.text)).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, f"a prompt of {settings.text} tokens"


def contents(adapter: VisionLanguage, prompt: Prompt, device: torch.device) -> dict[str, Any]:
    """Arguments of the model's forward and `generate` for a prompt of that shape, batch 1: noise for pixels, and words
    drawn from those that mean nothing special."""
    given: dict[str, Any] = {}
    for name, value in prompt.pixels.items():
        if value.device.type != "meta":  # sizes and grids
            given[name] = value.to(device)
        elif value.is_floating_point():  # positions of patches are the encoder's own matter
            given[name] = torch.randn(value.shape, device=device, dtype=adapter.body.dtype)
    special = {modality: int(getattr(adapter.config, name)) for modality, name in adapter.tokens.items()}
    words = torch.randint(3, min(special.values()), (1, prompt.text))
    seen = torch.full((1, adapter.visual_tokens(prompt)), special[prompt.modality])
    ids = torch.cat([words[:, : prompt.text // 2], seen, words[:, prompt.text // 2 :]], 1)
    given |= {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}
    return given | adapter.token_types(given["input_ids"])


@dataclass(frozen=True)
class Timing:
    """Median seconds to the first token and of the whole answer of `new` tokens, and bytes held at most."""

    first: float
    total: float
    new: int
    memory: int | None

    @property
    def decode(self) -> float:
        """Tokens a second behind the first."""
        return (self.new - 1) / max(self.total - self.first, 1e-9)


@torch.inference_mode()
def answered(
    model: nn.Module, given: Mapping[str, Any] | Callable[[], Mapping[str, Any]], new: int, warm_up: int, repeats: int
) -> Timing:
    """Time a greedy answer of `new` tokens, which never ends early, to what is given or what makes it within the
    time."""
    if new < 2:
        raise PrunelabError(f"an answer of {new} tokens has no token behind the first to time; give new=2 or more")
    net: Any = model
    device = next(model.parameters()).device

    def write(tokens: int) -> Tensor:
        written: Tensor = net.generate(
            **(given() if callable(given) else given),
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            pad_token_id=0,
        )
        return written

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    first = devices.median_seconds(lambda: write(1), device, warm_up=warm_up, repeats=repeats)
    total = devices.median_seconds(lambda: write(new), device, warm_up=1, repeats=repeats)
    return Timing(first, total, new, torch.cuda.max_memory_allocated() if device.type == "cuda" else None)
