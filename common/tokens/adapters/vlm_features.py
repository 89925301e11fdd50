"""Plans for the features of single images and videos, before the projector (site `encoded`) and behind it
(`projected`), and how what is left of them is packed into the decoder's sequence."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.plan import Gather, Mix, Plan, Positions, Site
from prunelab.common.core.signals import Reading
from prunelab.common.tokens.adapters.passes import Application, Tokens
from prunelab.common.tokens.adapters.vlm_attribution import Masses, handed_back
from prunelab.common.tokens.adapters.vlm_inside import TowerSide
from prunelab.common.tokens.adapters.vlm_prompt import (
    Encoded,
    Fresh,
    Span,
    closed,
    following,
    grid_places,
    grouped,
    in_packed_order,
    newline_order,
    spliced,
)
from prunelab.common.tokens.adapters.vlm_tower import FEATURES, Decision, Part, shaped
from prunelab.common.tokens.signals import TokenSignals, View


class FeatureSide(TowerSide):
    """What happens to features between the encoder and the decoder."""

    # -- sites ---------------------------------------------------------------------------------------------------------

    def _decide_encoded(self, application: Application, site: Site) -> Callable[..., Any]:
        """Hook before the projector: only what the method makes of each image's features goes through it. Images of
        one size are decided on together."""

        def hook(module: Any, args: tuple[Any, ...]) -> Any:
            encoding = self.encoding
            modality, given, result = encoding.modality, encoding.given, args[0]
            special = int(site.class_token and self.outside(modality))
            self._take_recorders()
            features = list(result.split(self.counts(modality, given)))
            grids = self.crop_grids(modality, given, len(features))
            pack = self.packing(modality, given)
            lengths = [len(tokens) for tokens in pack([torch.ones(*f.shape[:2], 1) for f in features])]
            encoded = Encoded(lengths, features, pack, grids, encoding, result, self.mosaics(modality, given))
            if special:
                first = (
                    encoding.seen[len(self.tower()) - 1].kept["hidden"][:, :special].split([len(f) for f in features])
                )
                features = [torch.cat(parts, 1) for parts in zip(first, features, strict=True)]
            read = encoded.read()
            for images in encoded.alike():
                shape = features[images[0]].shape
                x, view = self._units(encoded, images, [features[i] for i in images], special)
                view = replace(view, packed=read[images[0]])
                plan, signals = self.decide(application, site, x, view, encoding)
                if plan.key_bias is not None:
                    raise PrunelabError(
                        f"{application.method.name}: no attention is biased before the decoder; leave key_bias out"
                    )
                tokens = application.method.refine(site, plan.reduce.apply(x), signals, plan)
                encoding.decisions.append(Decision(images, tokens, plan, (shape[0], shape[1]), special))
            for decision in encoding.decisions:
                if (kept := decision.kept()) is not None:
                    encoding.kept.append((site, kept))
            flat = torch.cat([decision.tokens.flatten(0, 1) for decision in encoding.decisions])
            return flat.unsqueeze(0), *args[1:]

        return hook

    def _keep_features(self, module: Any, args: Any, output: Tensor) -> Tensor:
        """Features of patches that left the tower are zero, so that the others are packed as ever."""
        encoding = self.encoding
        if encoding.decisions:
            output = encoding.projected(output)
        elif encoding.reduced is not None:
            output = encoding.features(output, self.outside(encoding.modality))
        self._own.features = output
        return output

    def _units(
        self, encoded: Encoded, images: Sequence[int], features: Sequence[Tensor], special: int = 0
    ) -> tuple[Tensor, View]:
        """Features [crops, units, D] of images of one shape as the units [G, crops * units, D] of a site, `special`
        ones in front of the patches of each crop."""
        count, units = features[0].shape[:2]
        if encoded.seen.modality in self.class_features:
            special = 1  # they come with the features
        x = torch.stack([f.flatten(0, 1) for f in features])
        prunable = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        if special:
            prunable.unflatten(1, (count, units))[:, :, :special] = False

        def tower(reading: Reading) -> Tensor:
            part: Part = "class" if reading.rows == "class" else "all" if special else "patches"
            crops = self._of_patches(reading, encoded, part)
            return shaped(torch.stack([crops[i].flatten(0, 1) for i in images]), reading.name, self.tower_head)

        view = View(
            {
                "hidden": lambda: x,
                "sizes": lambda: x.new_ones(x.shape[:2], dtype=torch.float32),
                **{name: functools.partial(tower, Reading(name, -1, "tower")) for name in FEATURES},
            },
            prunable=prunable,
            units=count * (units - special),
            other=tower,
            indices=torch.arange(x.shape[1], device=x.device).expand(len(x), -1),
            grids=(encoded.grids[images[0]],) * count,
            mosaic=encoded.mosaics[images[0]],
            order=encoded.order()[images[0]],
            modality=encoded.seen.modality,
        )
        return x, view

    def projected(self, modality: str, images: Sequence[int], sequence: Tensor | None = None) -> tuple[Tensor, View]:
        """Features [G, crops * patches, D] of images of one shape, as a `projected` site sees them; with the sequence
        [B, N, D] that they stand in the words around them, too."""
        encoded = self.running.encoded[modality]
        x, view = self._units(encoded, images, [encoded.features[i] for i in images])
        text = {} if sequence is None else {"text": functools.partial(self._text, modality, images, sequence)}
        pixels = self.crop_pixels(modality, encoded.seen.given)
        return x, replace(
            view,
            sources={**view.sources, **text},
            packed=encoded.read()[images[0]],
            pixels=None if pixels is None else torch.stack([pixels[i] for i in images]),
            pack=functools.partial(encoded.packed, images),
        )

    def signals_of(self, application: Application, site: Site, x: Tensor, *args: Any, **options: Any) -> TokenSignals:
        signals = super().signals_of(application, site, x, *args, **options)
        if site.where == "packed":
            signals.pictures = functools.partial(self._pictures, application, site)
        return signals

    def _pictures(self, application: Application, site: Site) -> list[list[TokenSignals]]:
        """The images and videos of each sample, one by one."""
        running, known = self.running, {}
        samples: list[list[tuple[int, TokenSignals]]] = [[] for _ in range(len(running.prunable))]
        for modality, encoded in running.encoded.items():
            visual = running.visual[modality]
            for sample, own in enumerate(encoded.owners(visual.sum(1).tolist())):
                indices = visual[sample].nonzero().squeeze(1).split([encoded.lengths[i] for i in own])
                for i, place in zip(own, indices, strict=True):
                    if (modality, i) not in known:
                        alone, view = self.projected(modality, [i])
                        known[modality, i] = super().signals_of(application, site, alone, view)
                    samples[sample].append((int(place[0]), known[modality, i]))
        return [[signals for _, signals in sorted(own, key=lambda one: one[0])] for own in samples]

    def _text(self, modality: str, images: Sequence[int], sequence: Tensor) -> Tensor:
        """[G, D] the mean embedding of the words in the prompts [B, N, D] that the images belong to."""
        running = self.running
        words = ~running.anywhere.to(sequence.device)
        if running.tokens.valid is not None:
            words = words & running.tokens.valid
        mean = (sequence * words.unsqueeze(-1)).sum(1) / words.sum(1, keepdim=True).clamp_min(1)
        owners = running.encoded[modality].owners(running.visual[modality].sum(1).tolist())
        rows = {image: row for row, own in reversed(list(enumerate(owners))) for image in own}
        return mean[[rows[image] for image in images]]

    # -- the decoder's sequence ----------------------------------------------------------------------------------------

    def _decided(self, application: Application, site: Site, modality: str, sequence: Tensor) -> Iterator[Decision]:
        """What the method makes of each group of images, at `tower` and `encoded` already while they were encoded."""
        encoded = self.running.encoded[modality]
        if site.where == "encoded":
            yield from encoded.seen.decisions
            return
        for images in encoded.alike():
            crops, patches = encoded.features[images[0]].shape[:2]
            merged = site.where == "tower" and isinstance(encoded.seen.reduced, Mix)
            if site.where == "tower":
                tokens, plan = self._left(application, encoded, images)
            else:
                x, view = self.projected(modality, images, sequence)
                plan, signals = self.decide(application, site, x, view)
                tokens = application.method.refine(site, plan.reduce.apply(x), signals, plan)
            decision = Decision(images, tokens, plan, (crops, patches), merged=merged)
            if site.where == "projected" and (kept := decision.kept()) is not None:
                self.running.kept.append((site, kept))
            yield decision

    def _left(self, application: Application, encoded: Encoded, images: Sequence[int]) -> tuple[Tensor, Plan]:
        """Tokens [G, crops * patches, D] of images of one shape, and what is left of them behind the tower."""
        special, bounds, seen = self.outside(encoded.seen.modality), encoded.bounds(), encoded.seen
        crops, size = encoded.features[images[0]].shape[:2]
        if isinstance(seen.reduced, Mix):
            made = [seen.left_of(slice(bounds[i], bounds[i] + crops), crops, special) for i in images]
            whole = Mix(
                torch.cat([mix.target for _, mix in made]),
                torch.cat([mix.source for _, mix in made]),
                torch.cat([mix.weight for _, mix in made]),
                made[0][1].outputs,
            )
            return torch.cat([tokens for tokens, _ in made]), Plan(whole, positions=application.method.positions)
        patches = seen.patches(special)
        assert patches is not None
        first = size * torch.arange(crops, device=patches.device).unsqueeze(1)
        index = torch.stack([(patches[bounds[i] : bounds[i] + crops] + first).flatten() for i in images])
        plan = Plan(Gather(index), positions=application.method.positions)
        return plan.reduce.apply(torch.stack([encoded.features[i].flatten(0, 1) for i in images])), plan

    def _project(self, application: Application, site: Site, x: Tensor) -> Tensor:
        """Carry out the method's plans on the features of every image or video, in place of its packed tokens in the
        sequence x [B, N, D]. Images of one size are decided on together, copies of a sample only once."""
        running = self.running
        if site.where == "projected":
            self.note(application, site, None)
        batch, total = x.shape[:2]
        pool, size = [x.flatten(0, 1)], batch * total  # what the new sequence is made of: the old one, then new tokens
        spans: list[list[Span]] = [[] for _ in range(batch)]
        backs: list[tuple[str, Callable[[Tensor], Tensor]]] = []
        made_of: list[tuple[str, int, Fresh]] = []
        for modality, visual in running.visual.items():
            counts = visual.sum(1).tolist()
            if not any(counts):
                continue
            encoded = running.encoded.get(modality)
            if encoded is None or not encoded.features:
                raise PrunelabError("the model was given packed features; give it pixels to prune what is projected")
            fresh = []
            images, numbering = self._packed(application, site, modality, x)
            for number, image in enumerate(images):
                pool.append(image.tokens.to(x))
                fresh.append((torch.arange(size, size + len(image.tokens), device=x.device), image.source_index))
                size += len(image.tokens)
                made_of.append((modality, number, image))
                backs.append((modality, image.back))
            for sample, own in enumerate(encoded.owners(counts)):
                indices = visual[sample].nonzero().squeeze(1).split([encoded.lengths[i] for i in own])
                spans[sample] += [Span(place, *fresh[i]) for place, i in zip(indices, own, strict=True)]
        valid, visible = running.tokens.valid, running.anywhere
        made = []
        for sample in range(batch):
            text = ~visible[sample] if valid is None else ~visible[sample] & valid[sample].to(visible.device)
            words = text.nonzero().squeeze(1)
            made.append(spliced(words, words.to(x.device) + sample * total, spans[sample], visible.device))
        longest = max(len(rows) for rows, _ in made)
        lengths = [len(part) for part, _ in made]
        pads = [(longest - length, 0) if running.left else (0, longest - length) for length in lengths]
        rows, running.source = (
            torch.stack([nn.functional.pad(part, pad) for part, pad in zip(parts, pads, strict=True)])
            for parts in zip(*made, strict=True)
        )
        running.changed |= longest != total
        kept = None
        if len(set(lengths)) > 1:
            ones = [torch.ones(length, dtype=torch.bool, device=x.device) for length in lengths]
            kept = torch.stack([nn.functional.pad(one, pad) for one, pad in zip(ones, pads, strict=True)])
        running.prunable = rows >= batch * total
        running.rows, running.made, running.behind = rows, made_of, batch * total
        running.groups = grouped([image for _, _, image in made_of], batch * total, rows)
        sizes = [len(tokens) for tokens in pool]

        def root(mass: Tensor) -> Masses:
            parts = torch.zeros(size).scatter_add(0, rows.flatten().cpu(), mass.flatten()).split(sizes)[1:]
            results: Masses = {}
            for (modality, back), part in zip(backs, parts, strict=True):
                results.setdefault(modality, []).append(back(part))
            return results

        running.attribution.steps.append((site, running.prunable, lambda mass: mass))
        running.attribution.root = root
        positions = running.positions.gather(-1, running.source.expand(*running.positions.shape[:-1], -1))
        if numbering == "renumber":
            positions = closed(positions, kept)
            running.shift = running.shift + following(running.positions, valid) - following(positions, kept)
        running.positions = positions
        bias = None
        if any(image.bias is not None for _, _, image in made_of):
            parts = [x.new_zeros(len(image.tokens)) if image.bias is None else image.bias for _, _, image in made_of]
            bias = torch.cat([x.new_zeros(batch * total), *(part.to(x) for part in parts)])[rows]
        running.tokens = Tokens(valid=kept, bias=bias, origin=running.source)
        if running.carried is not None:
            more = [image.carried for _, _, image in made_of if image.carried is not None]
            whole = torch.cat([running.carried.flatten(0, 1), *more])
            running.carried = whole.index_select(0, rows.flatten()).view(batch, longest, -1)
        return torch.cat(pool).index_select(0, rows.flatten()).view(batch, longest, -1)

    def _carried(self, modality: str) -> list[Tensor] | None:
        """What the prompt carries of each image's tokens, [tokens, E]; see `Prefill`."""
        running = self.running
        if running.carried is None:
            return None
        encoded, visual = running.encoded[modality], running.visual[modality]
        results: dict[int, Tensor] = {}
        for sample, own in enumerate(encoded.owners(visual.sum(1).tolist())):
            indices = visual[sample].nonzero().squeeze(1).to(running.carried.device)
            parts = running.carried[sample, indices].split([encoded.lengths[i] for i in own])
            results.update(zip(own, parts, strict=True))
        return [results[i] for i in range(len(encoded.lengths))]

    def _packed(
        self, application: Application, site: Site, modality: str, sequence: Tensor
    ) -> tuple[list[Fresh], Positions]:
        """What the method's plans make of each image of the sequence [B, N, D], and how they number it."""
        encoded, numbering = self.running.encoded[modality], application.method.positions
        made: dict[int, Fresh] = {}
        carried = self._carried(modality)
        orders, newlines, newline = encoded.order(), encoded.newlines(), self.newline(modality)
        for decision in self._decided(application, site, modality, sequence):
            plan, patches, known = decision.plan, decision.patches(), decision.units()
            numbering = plan.positions
            bare = plan.layout is not None and bool((plan.layout < 0).all())
            added = None if carried is None else plan.reduce.apply(torch.stack([carried[i] for i in decision.images]))
            for g, image in enumerate(decision.images):
                real = slice(None) if plan.reduce.valid is None else plan.reduce.valid[g]
                own, order = decision.tokens[g][real], orders[image]
                units = None if known is None else known[g][real]
                turn, source_index = torch.arange(len(own), device=own.device), None
                if patches is not None and order is not None and (plan.layout is None or bare):
                    rows = newline is not None and not bare
                    turn, source_index = in_packed_order(
                        patches[g][real], order, decision.shape[0] * decision.shape[1], rows
                    )
                elif newline is not None and not bare and plan.layout is None and own.device.type == "meta":
                    most = newlines[image]  # which rows hold a token is in the values; as many as can are taken to
                    turn = turn.new_empty(len(own) + min(most, len(own)))
                elif newline is not None and not bare:
                    place = None if plan.layout is None else plan.layout[g][real]
                    if place is None and patches is not None and modality == "video":
                        place = grid_places(patches[g][real], encoded.grids[image])
                    turn = newline_order(len(own), place, newline[1], own.device)
                if plan.positions == "original" and source_index is None:
                    raise PrunelabError(
                        f"{application.method.name} makes tokens that have no place in the packed sequence; let it"
                        " number them anew (positions='renumber')"
                    )
                if newline is not None:
                    own = torch.cat([own, newline[0].to(own).unsqueeze(0)])  # where `turn` is -1
                    units = None if units is None else nn.functional.pad(units, (0, 1), value=-1)
                back = functools.partial(
                    handed_back, turn=turn, reduce=plan.reduce, row=g, shape=decision.shape, special=decision.special
                )
                units = None if units is None else units[turn]
                fresh = Fresh(own[turn], source_index, back, units, bool(decision.special))
                if plan.groups is not None:
                    fresh.groups = nn.functional.pad(plan.groups[g][real], (0, 1), value=-1)[turn]
                fresh.carried = None if added is None else added[g][real][turn]
                if plan.key_bias is not None:
                    fresh.bias = nn.functional.pad(plan.key_bias[g][real], (0, 1))[turn]
                made[image] = fresh
        return [made[image] for image in range(len(orders))], numbering
