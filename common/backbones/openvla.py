"""OpenVLA (Kim et al., 2024), for which transformers has no class: a reconstruction of LLaVA's class, two encoders of
timm, and Llama 2. Code that comes with a checkpoint is never run.

- A picture enters DINOv2 (with registers) and SigLIP as six channels, three for each; the patches behind the last layer
  but one of either, without its norm, stand beside one another and go through three linear layers.
- They stand behind the prompt's first token. Here placeholders say so (`with_image`), as elsewhere in transformers.
- An action is seven tokens, the last of Llama's vocabulary, each a bin of a number between -1 and 1 (`actions`), which
  a data set's quantiles scale (`scaled`).
- OpenVLA-OFT (Kim et al., 2025) reads a chunk of actions off one pass (`chunk`): their places are read as zeros, and
  all of the sequence sees all of itself. What stands there are the actions' tokens, or what a head makes of states.

Facts are those of the authors' code (openvla/openvla at c8f03f4 and moojink/openvla-oft at 213c5ff, MIT), and so are
the names of the official checkpoint that `official_name` reads. That OFT's attention is not causal is said there, while
the class that does it is in a changed transformers. Nothing here was compared with these checkpoints' own output: they
are too large to fetch where this was written. Left out are OFT's proprioception, FiLM, several pictures and diffusion.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.configuration_llava import LlavaConfig
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration, LlavaModel, LlavaPreTrainedModel

from prunelab.common.backbones.checkpoint import fill, read, read_all
from prunelab.common.core.errors import PrunelabError

if TYPE_CHECKING:
    from PIL import Image

TOWERS = ("vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224")
NORMS = (((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))  # mean, deviation
PROMPT = "In: What action should the robot take to {}?\nOut:"
NAMES = (  # where the official checkpoint keeps each part, and where the class has it
    (r"vision_backbone\.", "model.vision_tower."),
    (r"projector\.", "model.multi_modal_projector."),
    (r"language_model\.model\.", "model.language_model."),
    (r"language_model\.(?=lm_head)", ""),
)
COUNTED = ("position_ids", "rotary_emb.inv_freq")  # tables that older code saved, and a model makes for itself


class OpenVLAConfig(LlavaConfig):
    """The settings of an official config.json, of which these are read: `text_config`, `timm_model_ids`, `image_sizes`,
    `n_action_bins`, `pad_to_multiple_of` and `norm_stats`. `timm_arguments` gives encoders other sizes. Placeholders of
    pictures and of actions are rows of the vocabulary's padding; every prompt of the training ended in the empty token,
    every chunk of OFT's in the stop token."""

    model_type = "openvla"
    image_token_index: int = 32001
    action_token_id: int = 32002
    empty_token_id: int = 29871
    stop_token_id: int = 2
    timm_model_ids: tuple[str, ...] | list[str] = TOWERS
    timm_arguments: tuple[dict[str, Any], ...] | list[dict[str, Any]] = ({}, {})
    image_sizes: tuple[int, ...] | list[int] = (224, 224)
    n_action_bins: int = 256
    pad_to_multiple_of: int = 64
    norm_stats: dict[str, Any] | None = None


class Towers(nn.Module):
    """DINOv2 and SigLIP, side by side."""

    def __init__(self, config: OpenVLAConfig) -> None:
        super().__init__()
        import timm

        both = zip(config.timm_model_ids, config.image_sizes, config.timm_arguments, strict=True)
        self.featurizer, self.fused_featurizer = (
            timm.create_model(name, pretrained=False, num_classes=0, img_size=side, **arguments)
            for name, side, arguments in both
        )
        self.width = self.featurizer.embed_dim + self.fused_featurizer.embed_dim

    @property
    def grid(self) -> tuple[int, int]:
        """Patches of a picture, by height and width."""
        height, width = self.featurizer.patch_embed.grid_size
        return height, width

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Features [B, patches, width] of pictures [B, 6, H, W]."""
        towers = (self.featurizer, self.fused_featurizer)
        seen = [
            tower.get_intermediate_layers(pixels, n=[len(tower.blocks) - 2])[0]
            for tower, pixels in zip(towers, pixel_values.split(3, 1), strict=True)
        ]
        return torch.cat(seen, -1)


class Projector(nn.Module):
    """From features to the decoder, through four times their width."""

    def __init__(self, width: int, text: int) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(width, 4 * width), nn.Linear(4 * width, text), nn.Linear(text, text)

    def forward(self, features: Tensor) -> Tensor:
        hidden: Tensor = self.fc2(nn.functional.gelu(self.fc1(features)))
        output: Tensor = self.fc3(nn.functional.gelu(hidden))
        return output


class OpenVLAModel(LlavaModel):
    """LLaVA's model with these encoders. `token_type_ids`, zeros, say that the sequence sees all of itself."""

    config_class = OpenVLAConfig

    def __init__(self, config: OpenVLAConfig) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.vision_tower = Towers(config)
        self.multi_modal_projector = Projector(self.vision_tower.width, config.text_config.hidden_size)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_image_features(self, pixel_values: Tensor, return_dict: bool = True, **kwargs: Any) -> Any:
        """Projected patches of each picture [B, 6, H, W]."""
        features = self.vision_tower(pixel_values)
        pooled: Any = list(self.multi_modal_projector(features))
        output = BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=pooled)
        return output if return_dict else output.to_tuple()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if token_type_ids is not None:
            if input_ids is None:
                raise PrunelabError("a chunk of actions is read off token ids; give input_ids")
            inputs_embeds = self.get_input_embeddings()(input_ids)
            blank = (input_ids == self.config.action_token_id).unsqueeze(-1)
            inputs_embeds, valid = inputs_embeds.masked_fill(blank, 0), attention_mask
            seen = torch.ones_like(input_ids) if valid is None else valid
            attention_mask = seen.bool()[:, None, None].expand(-1, -1, input_ids.shape[1], -1)
            input_ids = None
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )


class OpenVLAForConditionalGeneration(LlavaForConditionalGeneration):
    """The policy: `generate` writes an action behind a prompt, `chunk` reads a chunk of them off it at once."""

    config_class = OpenVLAConfig

    def __init__(self, config: OpenVLAConfig) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.model = OpenVLAModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def with_image(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        """Prompts [B, N] with a picture's placeholders behind their first token, padded in front, and the empty token
        at their ends, as `input_ids` and `attention_mask`."""
        height, width = self.model.vision_tower.grid
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if not bool(mask[:, -1].all()):
            raise PrunelabError("prompts of a policy are padded in front; set the tokenizer's padding_side='left'")
        empty = self.config.empty_token_id
        if not bool((input_ids[:, -1] == empty).all()):
            input_ids = torch.cat([input_ids, input_ids.new_full((len(input_ids), 1), empty)], 1)
            mask = torch.cat([mask, mask[:, -1:]], 1)
        shown = input_ids.new_full((height * width,), self.config.image_token_id)
        rows = []
        for row, first in zip(input_ids, mask.int().argmax(1).tolist(), strict=True):
            rows.append(torch.cat([row[: first + 1], shown, row[first + 1 :]]))
        front = mask.new_zeros(len(mask), mask.shape[1] + len(shown))
        length = mask.sum(1, keepdim=True) + len(shown)
        real = torch.arange(front.shape[1], device=mask.device) >= front.shape[1] - length
        return {"input_ids": torch.stack(rows), "attention_mask": real.to(mask.dtype)}

    def actions(self, tokens: Tensor) -> Tensor:
        """Numbers between -1 and 1 of an action's tokens [...]: the middles of bins, counted from the vocabulary's
        end."""
        edges = torch.linspace(-1, 1, self.config.n_action_bins, dtype=torch.float64, device=tokens.device)
        words = self.config.text_config.vocab_size - self.config.pad_to_multiple_of
        return ((edges[:-1] + edges[1:]) / 2)[(words - tokens - 1).clamp(0, len(edges) - 2)]

    def scaled(self, actions: Tensor, data: str | None = None) -> Tensor:
        """Numbers between -1 and 1 [..., D] in the units of the data set that the policy learned from: between its
        quantiles of 1 and 99 %, where its `mask` has them scaled."""
        known: Mapping[str, Any] = self.config.norm_stats or {}
        name = next(iter(known)) if data is None and len(known) == 1 else data
        if name is None or name not in known:
            raise PrunelabError(f"name the data set whose units actions have: {', '.join(known) or 'none is known'}")
        own = known[name]["action"]
        low, high = (torch.tensor(own[part], dtype=actions.dtype, device=actions.device) for part in ("q01", "q99"))
        there = torch.tensor(own.get("mask", [True] * len(low)), device=actions.device)
        return torch.where(there, 0.5 * (actions + 1) * (high - low) + low, actions)

    def chunk(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor,
        steps: int = 8,
        size: int = 7,
        head: nn.Module | None = None,
    ) -> Tensor:
        """Numbers [B, steps, size] of a chunk of actions behind prompts with pictures, read off one pass: by their
        tokens, or by a head from states [B, steps, size * D]."""
        count = steps * size
        blanks = input_ids.new_full((len(input_ids), count), self.config.action_token_id)
        tokens = torch.cat([input_ids, blanks, input_ids.new_full((len(input_ids), 1), self.config.stop_token_id)], 1)
        mask = torch.cat([attention_mask, attention_mask.new_ones(len(tokens), count + 1)], 1)
        given = {"input_ids": tokens, "attention_mask": mask, "pixel_values": pixel_values}
        hidden = self.model(**given, token_type_ids=torch.zeros_like(tokens), use_cache=False).last_hidden_state
        states = hidden[:, -count - 2 : -2]  # each is read off the place before its own
        if head is None:
            return self.actions(self.lm_head(states).argmax(-1)).unflatten(1, (steps, size))
        output: Tensor = head(states.unflatten(1, (steps, size)).flatten(2))
        return output


class ActionHead(nn.Module):
    """OFT's head for continuous actions: from states [..., size * D] to numbers [..., size]."""

    def __init__(self, width: int = 4096, hidden: int = 4096, size: int = 7, blocks: int = 2) -> None:
        super().__init__()
        self.layer_norm1, self.fc1 = nn.LayerNorm(width * size), nn.Linear(width * size, hidden)
        parts = [nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, hidden), nn.ReLU()) for _ in range(blocks)]
        self.mlp_resnet_blocks = nn.ModuleList(nn.ModuleDict({"ffn": part}) for part in parts)
        self.layer_norm2, self.fc2 = nn.LayerNorm(hidden), nn.Linear(hidden, size)

    def forward(self, states: Tensor) -> Tensor:
        hidden = self.fc1(self.layer_norm1(states)).relu()
        for block in self.mlp_resnet_blocks:
            hidden = hidden + block["ffn"](hidden)  # type: ignore[index]
        output: Tensor = self.fc2(self.layer_norm2(hidden))
        return output


AutoConfig.register(OpenVLAConfig.model_type, OpenVLAConfig, exist_ok=True)
AutoModelForImageTextToText.register(OpenVLAConfig, OpenVLAForConditionalGeneration, exist_ok=True)


def openvla(**settings: Any) -> OpenVLAForConditionalGeneration:
    """The model of the given settings of `OpenVLAConfig`, at random."""
    return OpenVLAForConditionalGeneration(OpenVLAConfig(**settings))


def openvla_7b() -> OpenVLAForConditionalGeneration:
    """OpenVLA-7B: DINOv2-L and SigLIP-so400m at 224 pixels, Llama-2-7B."""
    return openvla(text_config={"model_type": "llama", "vocab_size": 32064, "rms_norm_eps": 1e-6})


def observed(picture: Image.Image, side: int = 224) -> Tensor:
    """The channels [1, 6, side, side] of a picture, squeezed to a square, as each encoder has them."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as tvf

    small = tvf.resize(picture.convert("RGB"), [side, side], InterpolationMode.BICUBIC)
    plain = tvf.to_tensor(small)
    return torch.cat([tvf.normalize(plain, list(mean), list(spread)) for mean, spread in NORMS]).unsqueeze(0)


def official_name(name: str) -> str:
    """The name in this class of a weight of an official checkpoint, where layer scales are no `gamma`."""
    for pattern, here in NAMES:
        if re.match(pattern, name):
            name = re.sub(f"^{pattern}", here, name)
            break
    return name.removesuffix("scale_factor") + "gamma" if name.endswith(".scale_factor") else name


def load_checkpoint(model: nn.Module, path: Path | str) -> None:
    """Load an official checkpoint, a .safetensors file or the folder of all its shards, with every name checked."""
    results = {official_name(name): weight for name, weight in read_all(path).items()}
    fill(model, {name: weight for name, weight in results.items() if not name.endswith(COUNTED)}, path)


def load_head(head: ActionHead, path: Path | str) -> None:
    """Load OFT's head from its official file, whose names begin with `model.`, and with `module.` where it was trained
    on several devices."""
    fill(head, {re.sub(r"^(module\.)?model\.", "", name): weight for name, weight in read(Path(path)).items()}, path)


def convert(official: Path, out: Path) -> None:
    """Write a folder that this class is loaded from: the weights and settings of the folder `official`."""
    if out.exists() and any(out.iterdir()):
        raise PrunelabError(f"{out} is not empty; name a new folder")
    config = OpenVLAConfig.from_pretrained(official, local_files_only=True, trust_remote_code=False)
    model = OpenVLAForConditionalGeneration(config).to(getattr(config, "dtype", None) or torch.bfloat16)
    load_checkpoint(model, official)
    model.save_pretrained(out)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m prunelab.common.backbones.openvla OFFICIAL OUT (two folders)")
    try:
        convert(Path(sys.argv[1]), Path(sys.argv[2]))
    except PrunelabError as error:
        sys.exit(f"error: {error}")
