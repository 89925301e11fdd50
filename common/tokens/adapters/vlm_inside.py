"""Hooks inside the image encoder of a language model: what methods read of its layers, and tokens that leave before its
end (site `tower`)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.common.core.attention_interface import record
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.hooks import after, before
from prunelab.common.core.plan import Site, take
from prunelab.common.core.signals import Reading
from prunelab.common.tokens.adapters.passes import Application, Seen, Tokens
from prunelab.common.tokens.adapters.recorded import first_row, keeper, received
from prunelab.common.tokens.adapters.vlm_prompt import Encoded
from prunelab.common.tokens.adapters.vlm_tower import FEATURES, OWN, Part, shaped
from prunelab.common.tokens.adapters.vlm_vision import VisionSide
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import View

INSIDE = frozenset({"queries", "keys", "attention_logits", "attention", "cls_row", "received"})


class TowerSide(VisionSide):
    """What happens in the layers of the encoder."""

    def check_encoder(self, method: TokenPruner, sites: Sequence[Site]) -> None:
        """Refuse sites that this model's encoder does not have."""
        places, depth = {site.where for site in sites}, len(self.tower())
        if any(site.where == "tower" and not 0 <= site.layer < depth for site in sites):
            raise PrunelabError(f"{method.name}: this model's encoder has {depth} layers before its features")
        if len(places & {"tower", "encoded", "projected"}) > 1:
            raise PrunelabError(f"{method.name} prunes inside the encoder and right behind it; do one of them")
        if any(site.class_token for site in sites) and not (depth and self.class_token):
            raise PrunelabError(f"{method.name} keeps the encoder's class token, and this model's has none")
        if any(site.class_token for site in sites) and "tower" not in self.signals:
            raise PrunelabError(
                f"{method.name} keeps the encoder's class token, which cannot stand among patches that {self.family}"
                " joins"
            )

    def readable_of_tower(self, site: Site, reading: Reading) -> str | None:
        """Why a reading of the encoder's layers cannot be had; None where it can."""
        depth = len(self.tower())
        if not depth:
            return "this model's encoder gives no signals"
        if reading.name not in self.tower_reads:
            return f"methods read {', '.join(sorted(self.tower_reads))} of the encoder's layers"
        if (reading.name == "cls_row" or reading.rows == "class") and not self.class_token:
            return "its encoder has no class token"
        if reading.rows == "class" and (reading.name not in OWN or site.where not in ("encoded", "projected")):
            return f"of class tokens, {', '.join(sorted(OWN))} are read, where one image is by itself"
        last = len(self.encoder()) if reading.where == "encoder" else depth
        if not -last <= reading.layer < last:
            if reading.where == "encoder":
                return f"it has layers 0 to {last - 1}"
            return f"its features come from layer {depth - 1}, the last that can be read"
        if site.where == "tower" and self.tower_layer(reading) >= site.layer:
            return f"layers 0 to {site.layer - 1} have run there" if site.layer else "no layer has run there"
        return None

    # -- hooks ---------------------------------------------------------------------------------------------------------

    def _watch_tower(self, application: Application) -> Iterator[Callable[[], Any]]:
        """Hooks on the layers of the tower that are read, and that tokens leave before."""
        names = dict.fromkeys(self.towers[modality] for modality in self.tokens)
        features, wanted = len(self.tower()) - 1, self._read_of_tower(application)
        sites = [site for site in application.sites if site.where == "tower"]
        for layers in map(self.encoder, names if sites else ()):
            yield before(layers[0], self._begin_tower, first=True)
            for site in sites:  # before what reads the layer
                yield before(layers[site.layer], self._cut_tower(application, site))
        for site in application.sites:
            required = application.method.requires(site)
            if site.class_token:
                wanted.setdefault(features, set()).add("hidden")
            if site.where == "tower":
                if required & INSIDE:
                    wanted.setdefault(site.layer - 1, set())
            elif required & FEATURES and (site.where != "input" or not site.layer):
                wanted.setdefault(features, set())
        for name in names:
            for layer, signals in wanted.items():
                yield from self._watch_tower_layer(name, layer, signals)

    def _read_of_tower(self, application: Application) -> dict[int, set[str]]:
        """What is read of the tower's layers: names by layer."""
        results: dict[int, set[str]] = {}
        for site in application.sites:
            for reading in application.method.requires(site):
                if isinstance(reading, Reading) and reading.where != "layer":
                    results.setdefault(self.tower_layer(reading), set()).add(reading.name)
        return results

    def _watch_tower_layer(self, tower: str, layer: int, names: set[str]) -> Iterator[Callable[[], Any]]:
        """Hooks that keep what these signals of a tower's layer are made from."""
        block = self.encoder(tower)[layer]
        attention = getattr(block, self.tower_attention)
        self.all_recorders.setdefault(tower, {})[layer], stop = record(attention)
        yield stop
        yield before(block, self._see_tower(layer))
        if "hidden" in names:
            yield after(block, keeper(functools.partial(self._seen, layer), "hidden"))
        if "values" in names:
            yield after(attention.v_proj, keeper(functools.partial(self._seen, layer), "values"))

    def _seen(self, layer: int) -> Seen:
        return self.encoding.seen[layer]

    def _see_tower(self, layer: int) -> Callable[..., None]:
        def hook(module: Any, args: Any) -> None:
            self.encoding.seen[layer] = Seen(Tokens())
            self.encoding.total = self.encoding.total or args[0].shape[1]

        return hook

    def _begin_tower(self, module: Any, args: Any) -> None:
        self.encoding.total = args[0].shape[1]

    def _cut_tower(self, application: Application, site: Site) -> Callable[..., Any]:
        def hook(module: Any, args: tuple[Any, ...]) -> Any:
            x, encoding = args[0], self.encoding
            if site.index == 0:
                encoding.kept = []
            plan, signals = self.decide(application, site, x, self._inside(site, x), encoding)
            if plan.reduce.valid is not None or plan.key_bias is not None:
                raise PrunelabError(
                    f"{application.method.name}: inside an image encoder as many tokens of every crop go on, and no"
                    " attention is biased"
                )
            encoding.reduce(plan.reduce)
            special = int(self.class_token)
            if encoding.left is not None:
                encoding.kept.append((site, encoding.left[:, special:] - special))
            return application.method.refine(site, plan.reduce.apply(x), signals, plan), *args[1:]

        return hook

    def _inside(self, site: Site, x: Tensor) -> View:
        """The tokens x [C, N, D] of crops that enter a layer of the tower."""
        encoding, special = self.encoding, int(self.class_token)
        prunable = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        prunable[:, :special] = False
        results: dict[str, Callable[[], Tensor]] = {}
        recorder = self.tower_recorders.get(site.layer - 1)
        if recorder is not None:
            results = {
                "queries": recorder.shown,
                "keys": lambda: recorder.keys,
                "attention_logits": recorder.logits,
                "attention": recorder.weights,
                "cls_row": lambda: first_row(recorder),
                "received": lambda: received(recorder),
            }
        indices = encoding.left
        if encoding.reduced is None:
            indices = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        return View(
            {"hidden": lambda: x, "sizes": lambda: torch.ones_like(prunable, dtype=torch.float32), **results},
            prunable,
            other=lambda reading: encoding.own(reading.name, self.tower_layer(reading), self.tower_head),
            units=x.shape[1] - special,
            indices=indices,
            grids=(self.grid(),),
            modality=encoding.modality,
            info=self.tower_info,
        )

    # -- what the encoder says, at later sites -------------------------------------------------------------------------

    def _of_patches(self, reading: Reading, encoded: Encoded, part: Part = "patches") -> list[Tensor]:
        """A signal of a layer of the tower, [crops, N, channels] of each image."""
        layer, modality = self.tower_layer(reading), encoded.seen.modality
        if part == "patches" and modality in self.class_features:
            part = "all"
        whole = encoded.seen.signal(reading.name, layer, self.tower_head, int(self.class_token), part)
        if part == "patches":
            whole = self.pooled(modality, whole)
        return list(whole.split([len(features) for features in encoded.features]))

    def _from_tower(self, reading: Reading, x: Tensor) -> Tensor:
        """The same for what became each token of the sequence, in the shape of a site's signal: it is packed as
        features are. Text and newlines get zeros."""
        running = self.running
        if not running.encoded:
            raise PrunelabError(f"'{reading}' is read off the image encoder; give the model pixels, not features")
        if running.rows is not None:
            return self._from_units(reading, x, running.rows)
        out: Tensor | None = None
        for modality, encoded in running.encoded.items():
            visual = running.visual[modality]
            images = encoded.pack(self._of_patches(reading, encoded))
            owners = encoded.owners(visual.sum(1).tolist())
            if out is None:
                out = x.new_zeros(*visual.shape, images[0].shape[-1])
            for row, (places, own) in enumerate(zip(visual, owners, strict=True)):
                if own:
                    spots = places.nonzero().squeeze(1).to(out.device)
                    out[row] = out[row].index_copy(0, spots, torch.cat([images[i] for i in own]).to(out))
        assert out is not None
        return shaped(take(out, running.source), reading.name, self.tower_head)

    def _from_units(self, reading: Reading, x: Tensor, rows: Tensor) -> Tensor:
        """The same once images have plans of their own: the tokens at hand are those with the numbers rows [B, N]."""
        parts: list[Tensor] = []
        values = {
            (modality, special): self._of_patches(reading, encoded, "all" if special else "patches")
            for modality, encoded in self.running.encoded.items()
            for special in {fresh.special for of, _, fresh in self.running.made if of == modality}
        }
        for modality, number, fresh in self.running.made:
            if fresh.units is None:
                raise PrunelabError(f"'{reading}' is of patches, which tokens that were mixed of several cannot tell")
            value = values[modality, fresh.special][number].flatten(0, 1)
            parts.append(nn.functional.pad(value, (0, 0, 0, 1))[fresh.units])  # newlines, -1, are zero
        whole = torch.cat([parts[0].new_zeros(self.running.behind, parts[0].shape[1]), *parts]).to(x)
        return shaped(whole[rows], reading.name, self.tower_head)
