"""Vision Mamba: our own Vim and PlainMamba (`prunelab.common.backbones`), pruned between their layers.

Sites: `input` (what enters layer l) and `block_output`. Signals beside `hidden` and `sizes`: at `block_output` also
`scans` [B, S, N, E], the output of each of the layer's S scans (Vim: forward, backward; PlainMamba: four snakes) for
every token, in token order, after the gate: what each direction hands to the output projection.

What a plan's `positions` mean to the layers behind it (the last plan's hold for all tokens):

| positions | scans | Vim's causal convolution | PlainMamba's convolutions over the map |
|---|---|---|---|
| renumber, hold | the state is kept over a gap | sees the kept tokens as neighbours | see tokens at their places |
| decay | the state decays over a gap | sees the kept tokens as neighbours | see tokens at their places |
| original | the state is kept over a gap | sees tokens at their places | see tokens at their places |

At their places means with zeros where tokens are missing. So `hold` is plain removal bit for bit in Vim, and in
PlainMamba only `decay` differs from the others. A mixture of tokens sits where the heaviest of them sat.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.common.backbones.subset import Subset
from prunelab.common.backbones.vim import add
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.hooks import after, before, run_all
from prunelab.common.core.plan import Gather, ModelInfo, Plan, Site
from prunelab.common.tokens.adapters.passes import Application, Pass
from prunelab.common.tokens.adapters.sequence import SequenceAdapter
from prunelab.common.tokens.signals import View

_ALWAYS = frozenset({"hidden", "sizes"})


@dataclass
class MambaPass(Pass):
    """indices: [B, N] ascending index of each token in the full sequence, None until a plan has acted. align: the last
    plan's positions. class_at: [B] where the class token is among the tokens. grid: of the map, where the layers are
    told. `shown` are scans, [B, S, E, N]."""

    indices: Tensor | None = None
    align: str = "original"
    class_at: Tensor | None = None
    grid: tuple[int, int] | None = None


class _VisionMamba(SequenceAdapter[MambaPass]):
    """What both families share: where each token sits in the sequence that was scanned before anything was pruned."""

    signals = {"input": _ALWAYS, "block_output": _ALWAYS | {"scans"}}
    positions = frozenset({"original", "renumber", "hold", "decay"})

    def started(self) -> MambaPass:
        return MambaPass()

    @abstractmethod
    def prune(self, application: Application, site: Site, state: tuple[Any, ...]) -> tuple[Any, ...]:
        """Carry out the method's plan on what flows between layers."""

    @abstractmethod
    def subset(self) -> Subset | None:
        """The tokens that the next layer runs on; None where it need not know that there were others."""

    # -- hooks ---------------------------------------------------------------------------------------------------

    def install(self, application: Application) -> Callable[[], None]:
        removers: list[Callable[[], Any]] = []
        try:
            for layer, block in enumerate(self.blocks):
                enter = self._enter(application, layer)
                removers.append(before(block, enter, kwargs=True))
            for site in application.sites:
                if "scans" in application.method.requires(site):
                    removers.append(after(self._mixer(site.layer).scans, self._keep(site.layer)))
                if site.where == "block_output":
                    leave = self._leave(application, site)
                    removers.append(after(self.blocks[site.layer], leave))
            removers.append(after(self.blocks[-1], self.end))
            removers.append(self.install_head())
        except BaseException:
            run_all(removers)
            raise
        return lambda: run_all(removers)

    @abstractmethod
    def install_head(self) -> Callable[[], Any]:
        """The hook by which the head reads what is left of the tokens."""

    def _mixer(self, layer: int) -> Any:
        block = self.blocks[layer]
        return block.mixer if hasattr(block, "mixer") else block.mamba

    def _enter(self, application: Application, layer: int) -> Callable[..., Any]:
        sites = [site for site in application.sites if site.where == "input" and site.layer == layer]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            trace = application.trace
            if layer == 0:
                self.begin(module, args)
                trace.begin(len(args[0]))
                trace.kept = self.running.kept
            for site in sites:
                args = self.prune(application, site, args)
            for part in ("attention", "mlp"):  # a layer without halves: both see the same tokens
                trace.add(part, layer, args[0].shape[0] * args[0].shape[1])
            return args, kwargs | {"subset": self.subset()}

        return hook

    def _leave(self, application: Application, site: Site) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            state = self.prune(application, site, output if isinstance(output, tuple) else (output,))
            return state if isinstance(output, tuple) else state[0]

        return hook

    def _keep(self, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            self.running.shown[layer] = output

        return hook

    # -- one site ------------------------------------------------------------------------------------------------

    def sources(self, site: Site, x: Tensor) -> Mapping[str, Callable[[], Tensor]]:
        running = self.running
        return {"scans": lambda: running.shown[site.layer].transpose(-1, -2)} if site.where == "block_output" else {}

    def check_plan(self, plan: Plan) -> None:
        super().check_plan(plan)
        if plan.reduce.outputs == 0:
            raise PrunelabError(f"the plan leaves {self.family} no token to scan; give a larger budget")
        if plan.reduce.valid is not None:
            raise PrunelabError(
                f"{self.family} cannot keep a different number of tokens in each sample, since its scans have no"
                " padding; use a method with a fixed budget, or samples one by one"
            )

    def follow(self, application: Application, site: Site, plan: Plan, x: Tensor) -> None:
        super().follow(application, site, plan, x)
        running, units = self.running, x.shape[1]
        indices = (
            torch.arange(units, device=x.device).expand(len(x), -1) if running.indices is None else running.indices
        )
        reduce = plan.reduce
        owner = reduce.index if isinstance(reduce, Gather) else reduce.matrix(units).argmax(-1)  # [B, K]
        running.indices, running.align = indices.gather(1, owner), plan.positions
        if running.class_at is not None:
            running.class_at = self._find(owner == running.class_at.unsqueeze(1))
        if self.in_order():
            running.checks.expect(
                (running.indices.diff(dim=1) > 0).all(),
                f"{application.method.name} puts tokens out of order or at one place, which {self.family} cannot scan"
                f" with positions={plan.positions}; keep them in ascending order, each at a place of its own",
            )

    def in_order(self) -> bool:
        """Whether the layers behind need tokens at places of their own, in ascending order."""
        return self.running.align != "renumber"

    def _find(self, match: Tensor) -> Tensor:
        """Where in match [B, K] the class token is; of several copies the one nearest the middle."""
        reason = f"the plan takes away the class token, which the head of {self.family} reads"
        self.running.checks.expect(match.any(1).all(), reason)
        middle = (match.shape[1] - 1) / 2
        distance = (torch.arange(match.shape[1], device=match.device) - middle).abs()
        return torch.where(match, distance, torch.inf).argmin(1)


class VimAdapter(_VisionMamba):
    family = "vim"
    model_classes = ("prunelab.common.backbones.vim.Vim",)

    @property
    def blocks(self) -> Any:
        return self.model.layers

    @property
    def info(self) -> ModelInfo:
        model: Any = self.model
        _, tokens, width = model.pos_embed.shape
        return ModelInfo(
            family=self.family,
            depth=len(self.blocks),
            heads=1,
            width=width,
            tokens=tokens,
            special=1,
            class_token=True,
            class_index=model.class_place,
            grid=model.patch_embed.grid_size,
        )

    def example(self) -> Tensor:
        embed: Any = self.model.patch_embed
        weight = embed.proj.weight
        return torch.empty(1, weight.shape[1], *embed.img_size, dtype=weight.dtype, device="meta")

    def begin(self, module: nn.Module, args: Any) -> None:
        super().begin(module, args)
        x = args[0]
        self.running.class_at = torch.full((len(x),), self.info.class_index, device=x.device)

    def subset(self) -> Subset | None:
        run = self.running
        if run.indices is None or run.align in ("renumber", "hold"):
            return None  # to hold the state over a gap is to scan as if the gap were not there
        return Subset(run.indices, run.total, decay=run.align == "decay", spread=run.align == "original")

    def prune(self, application: Application, site: Site, state: tuple[Any, ...]) -> tuple[Any, ...]:
        """The mixer's output and the residual stream lose the same tokens; methods see and refine their sum."""
        hidden, residual = state
        x = add(hidden, residual).to(hidden.dtype)
        plan, signals = self.decide(application, site, x)
        self.follow(application, site, plan, x)
        hidden = plan.reduce.apply(hidden)
        residual = None if residual is None else plan.reduce.apply(residual)
        kept = plan.reduce.apply(x)
        refined = application.method.refine(site, kept, signals, plan)
        if refined is not kept:
            hidden = hidden + (refined - kept)
        return hidden, residual

    def install_head(self) -> Callable[[], Any]:
        def find(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return args, kwargs | {"place": self.running.class_at}

        model: Any = self.model
        return before(model.read, find, kwargs=True)

    def view(self, site: Site, x: Tensor) -> View:
        view, class_at = super().view(site, x), self.running.class_at
        assert class_at is not None
        return replace(view, prunable=torch.ones_like(view.prunable).scatter(1, class_at.unsqueeze(1), False))


class PlainMambaAdapter(_VisionMamba):
    family = "plain_mamba"
    model_classes = ("prunelab.common.backbones.plain_mamba.PlainMambaClassifier",)

    @property
    def blocks(self) -> Any:
        model: Any = self.model
        return model.backbone.layers

    @property
    def info(self) -> ModelInfo:
        trunk: Any = self.model.backbone
        _, tokens, width = trunk.pos_embed.shape
        return ModelInfo(
            family=self.family, depth=len(self.blocks), heads=1, width=width, tokens=tokens, grid=trunk.grid_size
        )

    def example(self) -> Tensor:
        trunk: Any = self.model.backbone
        weight = trunk.patch_embed.stem[0].weight
        return torch.empty(1, weight.shape[1], *trunk.img_size, dtype=weight.dtype, device="meta")

    def begin(self, module: nn.Module, args: Any) -> None:
        super().begin(module, args)
        self.running.grid = args[1]

    def grids(self) -> tuple[tuple[int, int], ...]:
        return super().grids() if self.running.grid is None else (self.running.grid,)

    def subset(self) -> Subset | None:
        run = self.running
        return None if run.indices is None else Subset(run.indices, run.total, decay=run.align == "decay")

    def in_order(self) -> bool:
        return True  # a map has one token a place, and step widths, B and C are taken in raster order

    def prune(self, application: Application, site: Site, state: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *others = state
        return (self.reduce(application, site, x), *others)

    def install_head(self) -> Callable[[], Any]:
        """The head takes the mean token: merged ones weigh as much as the tokens they stand for."""

        def weigh(module: nn.Module, args: Any, x: Tensor) -> Tensor:
            sizes = self.running.tokens.sizes
            return x if sizes is None else x * (sizes / sizes.mean(1, keepdim=True)).unsqueeze(-1).to(x.dtype)

        model: Any = self.model
        return after(model.backbone.ln1, weigh)
