"""Images that a text-to-image model makes of captions, its weights pruned or not."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from prunelab.common import weights
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.files import inside
from prunelab.common.data import captions, images
from prunelab.common.data.captions import Captioned
from prunelab.common.measures.bench import Bench, finite
from prunelab.common.measures.language import sizes
from prunelab.common.metrics import uncertainty
from prunelab.common.metrics.generation import frechet_distance, recogniser
from prunelab.common.models import loading
from prunelab.common.weights import WeightReport
from prunelab.common.weights.role import WeightPruner

if TYPE_CHECKING:
    from prunelab.common.tasks.generate import Generate

STEPS, GUIDANCE = 12, 2.0  # of the testbed's sampler
INCEPTION_SIDE = 299  # pixels that Inception sees


class Painter(Protocol):
    """A text-to-image model. model: what is pruned, which has `components`."""

    model: Any

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Token ids [N, T] of captions, padded as the model reads them."""

    def paint(self, texts: Sequence[str], seed: int) -> Tensor:
        """Images [N, C, H, W] of captions: bytes in colour, or the testbed's digits."""


def measure(bench: Bench[Generate.Settings]) -> dict[str, Any]:
    """What the task gives, see `tasks.generate`."""
    settings = bench.settings
    captioned = captions.drawn(bench.ids["data"], bench.config, settings.samples, bench.seed)
    painter = of_digits(bench) if "testbed" in bench.ids["model"] else of_diffusers(bench)
    judges: Judges = Digits() if "testbed" in bench.ids["model"] else Networks(bench)
    report, method = None, bench.method(WeightPruner)
    if method is not None:
        calibration = calibrated(bench, method, painter) if method.calibrated else None
        plan = weights.prune(method, painter.model, bench.budget, calibration, seed=bench.seed, progress=False)
        report = with_others(plan.report, painter.model, bench.budget.names)
    parts = [m for m in painter.model.components.values() if isinstance(m, nn.Module)]
    for start in track(range(0, len(captioned), settings.batch), "painting", transient=True):
        part = captioned[start : start + settings.batch]
        judges.see(part, painter.paint([caption.text for caption in part], bench.seed + start))
    return {**judges.verdict(), **sizes(nn.ModuleList(parts), report)}


def with_others(report: WeightReport, model: Any, names: Sequence[str]) -> WeightReport:
    """The report on the components that were pruned, with the sizes of all."""
    others = [m for n, m in model.components.items() if n not in names and isinstance(m, nn.Module)]
    weights = [parameter for module in others for parameter in module.parameters()]
    count, size = sum(w.numel() for w in weights), sum(w.numel() * w.element_size() for w in weights)
    return replace(
        report, dense_parameters=report.dense_parameters + count, parameters=report.parameters + count,
        dense_bytes=report.dense_bytes + size, bytes=report.bytes + size,
    )  # fmt: skip


def calibrated(bench: Bench[Generate.Settings], method: WeightPruner, painter: Painter) -> dict[str, Any]:
    """What each component that the method measures is called with: captions, or what a generation calls it with."""
    names = bench.budget.names
    if not names:
        raise PrunelabError("a text-to-image model has components; give a budget such as text_encoder=0.5,unet=0.65")
    captioned = captions.drawn(bench.ids["calibration"], bench.config, bench.settings.calibration, bench.seed)
    texts = [caption.text for caption in captioned]
    results: dict[str, Any] = {}
    for name in names:
        if name == "text_encoder":
            results[name] = painter.tokens(texts)
        elif method.measures(name):
            results[name] = calls(painter, name, texts, bench.seed)
    return results


def calls(painter: Painter, component: str, texts: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """The arguments, by name, that a component gets while captions are painted."""
    module, results = painter.model.components[component], []
    signature = inspect.signature(module.forward)

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        results.append(dict(signature.bind(*args, **kwargs).arguments))

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        painter.paint(texts, seed)
    finally:
        handle.remove()
    return results


# -- who paints ------------------------------------------------------------------------------------------------------


class DigitPainter:
    """The testbed."""

    def __init__(self, model: Any, settings: Generate.Settings) -> None:
        self.model, self.settings = model, settings

    def tokens(self, texts: Sequence[str]) -> Tensor:
        return captions.encoded(texts)

    def paint(self, texts: Sequence[str], seed: int) -> Tensor:
        steps = self.settings.steps or STEPS
        guidance = GUIDANCE if self.settings.guidance is None else self.settings.guidance
        ids = captions.encoded(texts)
        result: Tensor = self.model.generate(ids, steps, guidance, torch.Generator().manual_seed(seed))
        return finite(result, "its weights and the budget")


def of_digits(bench: Bench[Generate.Settings]) -> Painter:
    """The testbed's painter."""
    return DigitPainter(loading.load(bench.ids["model"], bench.config)[0], bench.settings)


class PipelinePainter:
    """A pipeline of diffusers, with its own sampler, number of steps and guidance unless settings say otherwise."""

    def __init__(self, pipeline: Any, settings: Generate.Settings) -> None:
        self.model, self.settings = pipeline, settings

    def tokens(self, texts: Sequence[str]) -> Tensor:
        tokenizer = self.model.tokenizer
        length = tokenizer.model_max_length
        read = tokenizer(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        ids: Tensor = read.input_ids
        return ids

    def paint(self, texts: Sequence[str], seed: int) -> Tensor:
        given = {"num_inference_steps": self.settings.steps, "guidance_scale": self.settings.guidance}
        options = {name: value for name, value in given.items() if value is not None}
        draws = torch.Generator().manual_seed(seed)
        with torch.inference_mode():
            result = self.model(list(texts), generator=draws, output_type="pt", **options).images
        return (finite(result, "its weights and the budget").float() * 255).round().to(torch.uint8).cpu()


def of_diffusers(bench: Bench[Generate.Settings]) -> Painter:
    """The painter of a published pipeline, in half precision on a GPU, as its authors run it."""
    pipeline = loading.text_to_image(bench.ids["model"], bench.config, half=bench.device.type == "cuda")
    pipeline.set_progress_bar_config(disable=True)
    return PipelinePainter(pipeline.to(bench.device), bench.settings)


# -- who judges ------------------------------------------------------------------------------------------------------


class Judges(Protocol):
    """What is made of images as they come."""

    def see(self, captioned: Sequence[Captioned], painted: Tensor) -> None:
        """Take in captions and what was painted of them."""

    def verdict(self) -> dict[str, Any]:
        """The metrics."""


class Digits:
    """Pixels against those of real digits, and a recogniser."""

    def __init__(self) -> None:
        self.painted: list[Tensor] = []
        self.right: list[Tensor] = []

    def see(self, captioned: Sequence[Captioned], painted: Tensor) -> None:
        self.painted.append(painted.flatten(1))
        self.right.append(recogniser()(painted) == torch.tensor([caption.of for caption in captioned]))

    def verdict(self) -> dict[str, Any]:
        real, _ = captions.real_digits()
        distance = frechet_distance(torch.cat(self.painted), real.flatten(1))
        return {"fid": {"value": round(distance, 6)}, "right": uncertainty.share(torch.cat(self.right))}


class Networks:
    """Inception's features of both sets, and CLIP's of images and captions, by torchmetrics and transformers."""

    def __init__(self, bench: Bench[Any]) -> None:
        if not {"inception", "clip"} <= bench.ids.keys():
            raise PrunelabError("give the settings `inception` and `clip`: whose features are compared")
        self.device = bench.device
        self.fid = inception(Path(bench.config["checkpoints"]), bench.ids["inception"]["file"]).to(self.device)
        self.clip, self.processor = loading.clip(bench.ids["clip"], bench.config)
        self.clip.to(self.device)
        self.cosines: list[Tensor] = []

    def see(self, captioned: Sequence[Captioned], painted: Tensor) -> None:
        real = torch.stack([images.read(caption.of, _sized) for caption in captioned])
        for pictures, own in ((real, True), (torch.stack([sized(image) for image in painted]), False)):
            self.fid.update(pictures.to(self.device), real=own)
        self.cosines.append(cosines(self.clip, self.processor, [c.text for c in captioned], painted))

    def verdict(self) -> dict[str, Any]:
        distance = float(self.fid.compute())
        return {"fid": {"value": round(distance, 4)}, "clip_score": uncertainty.mean(torch.cat(self.cosines).tolist())}


def inception(folder: Path, name: str) -> Any:
    """torchmetrics' Fréchet distance of Inception's last features, with weights from the checkpoints folder."""
    path = inside(folder, name)
    try:
        torch.load(path, weights_only=True)  # the library below unpickles what it is given: tensors alone, then
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        reason = next(iter(str(error).splitlines()), "it is empty")
        raise PrunelabError(f"{path} holds no weights of Inception ({reason}); download it again") from None
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance

        return FrechetInceptionDistance(feature=2048, feature_extractor_weights_path=str(path))
    except ModuleNotFoundError:
        raise PrunelabError('a Fréchet distance needs torchmetrics; pip install -e ".[generation]"') from None


def sized(image: Tensor) -> Tensor:
    """An image [3, H, W] of bytes as Inception sees it: 299 pixels a side, bicubic, still bytes."""
    from torchvision.transforms.v2.functional import to_pil_image

    return _sized(to_pil_image(image))


def _sized(image: Any) -> Tensor:
    from PIL import Image
    from torchvision.transforms.v2.functional import pil_to_tensor

    small: Tensor = pil_to_tensor(image.resize((INCEPTION_SIDE, INCEPTION_SIDE), Image.Resampling.BICUBIC))
    return small


@torch.inference_mode()
def cosines(model: Any, processor: Any, texts: Sequence[str], painted: Tensor) -> Tensor:
    """Cosine [N] of CLIP's features of each image [N, 3, H, W] of bytes and its caption."""
    read: Mapping[str, Tensor] = processor(
        text=list(texts), images=list(painted), return_tensors="pt", padding=True, truncation=True
    )
    out = model(**{name: tensor.to(model.device) for name, tensor in read.items()})
    return F.cosine_similarity(out.image_embeds.float(), out.text_embeds.float()).cpu()
