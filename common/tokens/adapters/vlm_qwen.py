"""Qwen2-VL and Qwen2.5-VL, through transformers' classes: images and videos of any size, three axes of positions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prunelab.common.core import attention
from prunelab.common.core.hooks import after, arguments, before, replaced, run_all
from prunelab.common.core.signals import Reading
from prunelab.common.tokens.adapters.passes import Application, Seen, Tokens
from prunelab.common.tokens.adapters.recorded import keeper
from prunelab.common.tokens.adapters.vlm import VisionLanguage
from prunelab.common.tokens.adapters.vlm_prompt import Encoded, Prompt, disagreement
from prunelab.common.tokens.adapters.vlm_tower import Part


def rotated(pairs: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys [T, N, 2, H, d] with their positions' rotation, [T, N, 1, d], each [T, N, H, d]."""
    pairs, cos, sin = pairs.float(), cos.float().unsqueeze(2), sin.float().unsqueeze(2)
    first, second = pairs.chunk(2, -1)
    turned = pairs * cos + torch.cat([-second, first], -1) * sin
    queries, keys = turned.unbind(2)
    return queries, keys


def received(queries: Tensor, keys: Tensor) -> Tensor:
    """Attention [T, H, N] that each patch receives from all of its frame, for queries and keys [T, H, N, d]."""
    scale, shape = queries.shape[-1] ** -0.5, (queries.shape[0], queries.shape[1], queries.shape[2])
    return attention.received(lambda start, stop: attention.weights(queries[:, :, start:stop], keys, scale), shape)


class Qwen2VL(VisionLanguage):
    """Qwen2-VL: two by two patches of the encoder make one token; a token's position has a time, a row and a column.

    Its encoder has no class token. What a token receives in a layer of it is the mean over its patches of what they
    receive from their frame; its keys and values there are the means of theirs.
    """

    family = "qwen2_vl"
    model_classes = ("transformers.models.qwen2_vl.modeling_qwen2_vl.Qwen2VLForConditionalGeneration",)
    tokens = {"image": "image_token_id", "video": "video_token_id"}
    towers = {"image": "visual", "video": "visual"}
    tower_reads = frozenset({"received", "keys", "values"})
    signals = VisionLanguage.without("tower", "encoded")

    def pixels(self) -> dict[str, Any]:
        return self._pixels("image", torch.tensor([[1, *self.grid()]]))

    def video(self, frames: int) -> dict[str, Any]:
        pairs = -(-frames // self.config.vision_config.temporal_patch_size)
        return self._pixels("video", torch.tensor([[pairs, *self.grid()]]))

    def _pixels(self, modality: str, grid: Tensor) -> dict[str, Any]:
        vision = self.config.vision_config
        patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        pixels = self.blank(int(grid.prod(-1).sum()), patch)
        places = torch.empty(len(pixels), 2, dtype=torch.long, device="meta")  # the encoder's own follow the grid
        name = "pixel_values" if modality == "image" else "pixel_values_videos"
        return {name: pixels, f"{modality}_grid_thw": grid, f"{modality}_position_ids": places}

    def shaped(self, given: Mapping[str, Any]) -> Prompt:
        plain = super().shaped(given)
        return replace(plain, pixels=self._pixels(plain.modality, given[f"{plain.modality}_grid_thw"]))

    def grid(self, modality: str = "image") -> tuple[int, int]:
        return 32, 32  # assumption: an image of 448 pixels, since there is no standard size

    # -- the encoder ---------------------------------------------------------------------------------------------

    def encoder(self, name: str | None = None) -> Sequence[Any]:
        blocks: Sequence[Any] = self.body.visual.blocks
        return blocks

    def tower(self) -> Sequence[Any]:
        return self.encoder()

    @property
    def tower_info(self) -> None:
        """No token leaves before its end."""

    @property
    def tower_head(self) -> int:
        size: int = self.tower()[0].attn.head_dim
        return size

    def _watch_tower_layer(self, tower: str, layer: int, names: set[str]) -> Iterator[Callable[[], Any]]:
        """Keeps queries and keys of all patches before windows part them, and how they are turned."""
        attention = self.tower()[layer].attn

        def turned(module: Any, args: Any, given: dict[str, Any]) -> None:
            seen = self.encoding.seen[layer] = Seen(Tokens())
            seen.kept["cos"], seen.kept["sin"] = given["position_embeddings"]

        yield before(attention, turned, kwargs=True)
        yield after(attention.qkv, keeper(functools.partial(self._seen, layer), "qkv"))

    def _of_patches(self, reading: Reading, encoded: Encoded, part: Part = "patches") -> list[Tensor]:
        """[frames, tokens, channels] what each token of each image receives, or the means of its patches' keys or
        values."""
        seen, head = encoded.seen.seen[self.tower_layer(reading)], self.tower_head
        merge = self.config.vision_config.spatial_merge_size**2
        sizes = [merge * features.shape[0] * features.shape[1] for features in encoded.features]
        parts = zip(*(seen.kept[name].split(sizes) for name in ("qkv", "cos", "sin")), strict=True)
        results = []
        for (qkv, cos, sin), grid, features in zip(parts, encoded.grids, encoded.features, strict=True):
            frames = qkv.view(len(features), -1, 3, qkv.shape[1] // 3 // head, head)  # [T, patches, 3, H, d]
            angles = (x.view(len(features), -1, 1, head) for x in (cos, sin))
            if reading.name == "values":
                value = frames[:, :, 2].flatten(2)  # [T, patches, channels]
            else:
                queries, keys = rotated(frames[:, :, :2], *angles)
                if reading.name == "keys":
                    value = keys.flatten(2)
                else:
                    value = received(queries.transpose(1, 2), keys.transpose(1, 2)).transpose(1, 2)
            means = value.unflatten(1, (-1, merge)).mean(2)
            results.append(means[:, self._windows(grid).argsort().to(means.device)])
        return results

    def _windows(self, grid: tuple[int, int]) -> Tensor:
        """The tokens [N] of a frame in the order in which the encoder has them."""
        return torch.arange(grid[0] * grid[1])

    @property
    def class_token(self) -> bool:
        return False

    def install(self, application: Application) -> Callable[[], None]:
        remove = super().install(application)
        original = self.body.get_rope_index

        @functools.wraps(original)
        def number(*args: Any, **kwargs: Any) -> Any:
            try:
                return original(*args, **kwargs)
            except (RuntimeError, StopIteration):  # placeholders that no grid accounts for
                given = arguments(self.body, "get_rope_index", args, kwargs)
                grids = {m: given.get(f"{m}_grid_thw") for m in self.tokens}
                features = sum(
                    int(self._grids(m, given).prod(-1).sum()) for m, grid in grids.items() if grid is not None
                )
                visual = [given["input_ids"] == getattr(self.config, token) for token in self.tokens.values()]
                raise disagreement(sum(int(mask.sum()) for mask in visual), features) from None

        removers = [remove, replaced(self.body, "get_rope_index", number)]
        return lambda: run_all(removers)

    def token_types(self, ids: Tensor) -> dict[str, Tensor]:
        kinds = (ids == self.config.image_token_id).int() + 2 * (ids == self.config.video_token_id).int()
        return {"mm_token_type_ids": kinds}

    def axes(self, positions: Tensor) -> Tensor:
        if positions.dim() == 2:
            return positions.expand(3, -1, -1)
        return positions[-3:]  # `generate` puts the text's own numbers in front

    def counts(self, modality: str, given: Mapping[str, Any]) -> list[int]:
        return [int(t) for t in self._grids(modality, given)[:, 0]]

    def _grids(self, modality: str, given: Mapping[str, Any]) -> Tensor:
        merge = self.config.vision_config.spatial_merge_size
        return given[f"{modality}_grid_thw"].cpu() // torch.tensor([1, merge, merge])

    def crops(self, modality: str, given: Mapping[str, Any], output: Any) -> list[Tensor]:
        counts = self.counts(modality, given)
        return [tokens.unflatten(0, (t, -1)) for tokens, t in zip(output.pooler_output, counts, strict=True)]

    def crop_grids(self, modality: str, given: Mapping[str, Any], count: int) -> list[tuple[int, int]]:
        return [(int(h), int(w)) for _, h, w in self._grids(modality, given)]


class Qwen25VL(Qwen2VL):
    """Qwen2.5-VL: as Qwen2-VL, but most layers of the encoder attend within windows. What a token receives in one of
    them is what it would if every patch of the frame attended to every other, as methods for this model have it.
    """

    family = "qwen2_5_vl"
    model_classes = ("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLForConditionalGeneration",)

    def _windows(self, grid: tuple[int, int]) -> Tensor:
        """The tokens [N] of a frame in the order in which the encoder has them: window by window."""
        vision = self.config.vision_config
        side = vision.window_size // vision.spatial_merge_size // vision.patch_size
        rows, columns = torch.arange(grid[0]).unsqueeze(1), torch.arange(grid[1])
        window = rows // side * -(-grid[1] // side) + columns // side
        return window.flatten().argsort(stable=True)
