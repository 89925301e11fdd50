"""The authors' checkpoints (detrex names) on our detector and parts.

`python -m methods.focus_detr.checkpoint AUTHORS.pth OURS.safetensors` writes a file for the folder of checkpoints;
`load(model, parts, read(path))` fills a `dino_r50(value="features")` and `FocusDETR().build(info)` directly.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prunelab.common.backbones import swin
from prunelab.common.backbones.checkpoint import Names, renamed
from prunelab.common.core.errors import PrunelabError

PARTS = "pruning_parts."  # where a model carries the method's learned parts

FIRST_STAGE = r"^(transformer\.encoder\.enhance_MCSP|enhance_MCSP_layerlist)\.\d+\."  # copies of its class head

NAMES: Names = [
    *swin.names(r"^backbone\."),
    (r"^backbone\.stem\.conv1\.norm\.", "backbone.bn1."),
    (r"^backbone\.stem\.", "backbone."),
    (r"^backbone\.res(\d)\.(\d+)\.shortcut\.norm\.", lambda m: f"backbone.layer{int(m[1]) - 1}.{m[2]}.downsample.1."),
    (r"^backbone\.res(\d)\.(\d+)\.shortcut\.", lambda m: f"backbone.layer{int(m[1]) - 1}.{m[2]}.downsample.0."),
    (r"^backbone\.res(\d)\.(\d+)\.conv(\d)\.norm\.", lambda m: f"backbone.layer{int(m[1]) - 1}.{m[2]}.bn{m[3]}."),
    (r"^backbone\.res(\d)\.", lambda m: f"backbone.layer{int(m[1]) - 1}."),
    (r"^neck\.convs\.(\d)\.conv\.", r"neck.lateral.\1.0."),
    (r"^neck\.convs\.(\d)\.norm\.", r"neck.lateral.\1.1."),
    (r"^neck\.extra_convs\.(\d)\.conv\.", r"neck.extra.\1.0."),
    (r"^neck\.extra_convs\.(\d)\.norm\.", r"neck.extra.\1.1."),
    (r"^transformer\.alpha$", PARTS + "alpha"),
    (r"^transformer\.enc_mask_predictor\.layer1\.", PARTS + "scorer.embed."),
    (r"^transformer\.enc_mask_predictor\.layer2\.", PARTS + "scorer.rank."),
    (r"^transformer\.encoder\.layers\.(\d+)\.attentions\.0\.attn\.", PARTS + r"dual.\1.attention."),
    (r"^transformer\.encoder\.layers\.(\d+)\.norm2\.", PARTS + r"dual.\1.norm."),
    (r"^transformer\.encoder\.layers\.(\d+)\.attentions\.1\.", r"encoder.layers.\1.self_attn."),
    (r"^transformer\.encoder\.layers\.(\d+)\.norms\.0\.", r"encoder.layers.\1.self_attn_layer_norm."),
    (r"^transformer\.encoder\.layers\.(\d+)\.norms\.1\.", r"encoder.layers.\1.final_layer_norm."),
    (r"^transformer\.encoder\.layers\.(\d+)\.ffns\.0\.layers\.0\.0\.", r"encoder.layers.\1.mlp.fc1."),
    (r"^transformer\.decoder\.layers\.(\d+)\.ffns\.0\.layers\.0\.0\.", r"decoder.\1.mlp.fc1."),
    (r"^transformer\.encoder\.layers\.(\d+)\.ffns\.0\.layers\.1\.", r"encoder.layers.\1.mlp.fc2."),
    (r"^transformer\.decoder\.layers\.(\d+)\.ffns\.0\.layers\.1\.", r"decoder.\1.mlp.fc2."),
    (r"^transformer\.decoder\.layers\.(\d+)\.attentions\.0\.attn\.out_proj\.", r"decoder.\1.self_attn.o_proj."),
    (r"^transformer\.decoder\.layers\.(\d+)\.attentions\.0\.attn\.in_proj_", r"decoder.\1.self_attn.qkv_proj."),
    (r"^transformer\.decoder\.layers\.(\d+)\.attentions\.1\.", r"decoder.\1.encoder_attn."),
    (r"^transformer\.decoder\.layers\.(\d+)\.norms\.0\.", r"decoder.\1.self_attn_layer_norm."),
    (r"^transformer\.decoder\.layers\.(\d+)\.norms\.1\.", r"decoder.\1.encoder_attn_layer_norm."),
    (r"^transformer\.decoder\.layers\.(\d+)\.norms\.2\.", r"decoder.\1.final_layer_norm."),
    (r"^transformer\.decoder\.ref_point_head\.", "reference_embed."),
    (r"^transformer\.decoder\.norm\.", "decoder_norm."),
    (r"^(transformer\.decoder\.)?class_embed\.", "class_embed."),
    (r"^(transformer\.decoder\.)?bbox_embed\.", "box_embed."),
    (r"^transformer\.level_embeds$", "level_embed"),
    (r"^transformer\.tgt_embed\.", "query_content."),
    (r"^transformer\.(enc_output(_norm)?)\.", r"\1."),
    (r"^label_enc\.", "label_content."),
]


def convert(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """The authors' entries under our names (those of the parts marked by `PARTS`), and the names that mean nothing.

    state: as stored, also below `model` and with `module.` before each name. Raises PrunelabError where entries that
    are one tensor in the model differ.
    """
    state = {name.removeprefix("module."): value for name, value in state.get("model", state).items()}
    heads = [int(m[1]) for name in state if (m := re.match(r"class_embed\.(\d+)\.", name))]
    first = f"class_embed.{max(heads, default=0)}."  # the last of the list is the first stage's
    return renamed(state, [(FIRST_STAGE, first), *NAMES])


def load(model: nn.Module, parts: nn.Module, state: Mapping[str, Any]) -> None:
    """Fill the detector and the method's parts. Every entry must be used and none may be missing or misshapen; all
    that is wrong is named in one PrunelabError (what is missing under our names), and then nothing was changed."""
    result, unknown = convert(state)
    wanted = dict(model.state_dict()) | {PARTS + name: value for name, value in parts.state_dict().items()}
    wrong = [
        _list("missing", wanted.keys() - result.keys()),
        _list("unknown", [*unknown, *(result.keys() - wanted.keys())]),
        _list("of another shape", [k for k in wanted.keys() & result.keys() if wanted[k].shape != result[k].shape]),
    ]
    if any(wrong):
        raise PrunelabError(f"the checkpoint does not fit this detector: {'; '.join(w for w in wrong if w)}")
    model.load_state_dict({name: result[name] for name in model.state_dict()})
    parts.load_state_dict({name: result[PARTS + name] for name in parts.state_dict()})


def _list(what: str, names: Iterable[str]) -> str:
    names = sorted(names)
    return f"{len(names)} {what}: {', '.join(names)}" if names else ""


def read(path: str | Path) -> Mapping[str, Any]:
    """The entries of a `.safetensors` file, or of a PyTorch file that holds tensors only."""
    path = Path(path)
    if not path.is_file():
        raise PrunelabError(f"there is no checkpoint at {path}; unpack the authors' archive and name the file in it")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise PrunelabError(f"{path} cannot be read as a checkpoint of tensors: {error}".splitlines()[0]) from None


def main(source: str, target: str) -> None:
    """Write the authors' checkpoint under our names."""
    results, unknown = convert(read(source))
    if unknown or not results:
        raise PrunelabError(f"{source} is no checkpoint of Focus-DETR: {_list('unknown', unknown) or 'nothing in it'}")
    save_file({name: value.clone() for name, value in results.items()}, target)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (PrunelabError, TypeError) as error:
        sys.exit(str(error) if isinstance(error, PrunelabError) else "give the authors' file and the one to write")
