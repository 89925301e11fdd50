"""Accuracy of an image or video language model on questions with an answer of one word, its visual tokens pruned or
not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import track
from torch import Tensor, nn

from prunelab.common.core import files
from prunelab.common.core.attention_interface import record
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.hooks import run_all
from prunelab.common.costs import meter
from prunelab.common.data import questions
from prunelab.common.data.questions import Sample
from prunelab.common.measures import oracle
from prunelab.common.measures.bench import Bench, finite
from prunelab.common.metrics import uncertainty
from prunelab.common.models import devices, loading
from prunelab.common.tokens import match
from prunelab.common.tokens.adapters import adapter_for
from prunelab.common.tokens.adapters.vlm import VisionLanguage
from prunelab.common.tokens.adapters.vlm_prompt import Prompt
from prunelab.common.tokens.apply import Handle, applied
from prunelab.common.tokens.role import TokenPruner

if TYPE_CHECKING:
    from prunelab.common.tasks.answer import Answer


BATCH, TRIED = 50, 8  # samples asked together, and those that a budget is matched on
FRAMES = "frame_scores"  # the service of a method that weighs the frames of a video
NAMES = {"picture": "image", "video": "video", "film": "video", "long film": "video"}  # modalities

# Frame scores by what decides them, so that a process which makes many runs takes them once.
_SCORES: dict[str, Tensor] = {}


def measure(bench: Bench[Answer.Settings]) -> dict[str, Any]:
    """What the task gives, see `tasks.answer`."""
    settings = bench.settings
    samples = drawn(bench.ids["data"], settings.samples)
    if settings.blind:
        known = questions.guess(samples[0].kind)
        return accuracy(samples, torch.tensor([known.get(sample.question) == sample.answer for sample in samples]))
    model = devices.place(loading.vision_language(bench.ids["model"], bench.config)[0], bench.device)
    adapter = adapter_for(model)
    assert isinstance(adapter, VisionLanguage)
    method = bench.method(TokenPruner)
    if method is None:
        return accuracy(samples, right(model, samples)) | spent(adapter, samples[0])
    scores = None
    if settings.frame_scores:
        key = files.digest([bench.ids, len(samples)])
        if key not in _SCORES:
            _SCORES[key] = attended(model, samples)
        scores = Scores(_SCORES[key])
    budget = bench.budget
    if settings.match:
        budget = matched(method, adapter, budget, samples[:TRIED], scores, bench.seed)
    budgets = oracle.levels(settings.oracle, budget)
    results = []
    for each in budgets:
        with applied(method, model, each, services=_services(scores), seed=bench.seed) as handle:
            results.append(right(model, samples, scores))
            out = accuracy(samples, results[-1]) | spent(adapter, samples[0], handle)
    if settings.oracle:
        out |= oracle.chosen(torch.stack(results).float(), budgets)
    return out | {"budget": {"text": str(budget)}}


# -- questions and answers -------------------------------------------------------------------------------------------


def drawn(identity: Mapping[str, Any], count: int) -> Sequence[Sample]:
    """The first questions of a data set; composed once a process."""
    return _drawn(str(identity["loader"]), count)


@lru_cache(maxsize=2)
def _drawn(loader: str, count: int) -> Sequence[Sample]:
    return questions.samples({"loader": loader}, count)


@torch.inference_mode()
def right(model: nn.Module, samples: Sequence[Sample], scores: Scores | None = None) -> Tensor:
    """Whether the likeliest next word is the answer, bool [n]."""
    results = []
    for start in track(range(0, len(samples), BATCH), "answering", transient=True):
        part = samples[start : start + BATCH]
        if scores is not None:
            scores.first = start
        predictions = last_logits(model, part).argmax(-1)
        results.append(predictions == torch.tensor([sample.answer for sample in part], device=predictions.device))
    return torch.cat(results).cpu()


def last_logits(model: nn.Module, part: Sequence[Sample]) -> Tensor:
    """Logits [B, V] of the word behind each prompt."""
    device = next(model.parameters()).device
    given = {name: value.to(device) for name, value in questions.inputs(part).items()}
    return finite(model(**given, use_cache=False, logits_to_keep=1).logits[:, -1])


def accuracy(samples: Sequence[Sample], correct: Tensor) -> dict[str, Any]:
    """Percent of right answers, and that of each form of question."""
    out = {"accuracy": uncertainty.share(correct)}
    for form in dict.fromkeys(sample.form for sample in samples):
        own = torch.tensor([sample.form == form for sample in samples])
        out[f"accuracy of {form}"] = uncertainty.share(correct[own])
    return out


# -- what it costs ---------------------------------------------------------------------------------------------------


def shape(sample: Sample, adapter: VisionLanguage) -> tuple[Prompt, int]:
    """A sample's prompt by its shapes, and its visual tokens."""
    given, modality = questions.inputs([sample]), NAMES[sample.kind]
    visual = int((sample.prompt == getattr(adapter.config, adapter.tokens[modality])).sum())
    pixels = {name: value for name, value in given.items() if name.startswith("pixel")}
    return Prompt(pixels, len(sample.prompt) - visual, modality).to("meta"), visual


def spent(adapter: VisionLanguage, sample: Sample, handle: Handle | None = None) -> dict[str, Any]:
    """Metrics of cost for one sample, after a method has worked on all, or without one."""
    example, visual = shape(sample, adapter)
    full = [float(example.text + visual)] * adapter.info.depth
    if handle is None:
        used = dense = meter.macs(adapter.model, example)
        scoring, tokens = 0.0, full
    else:
        report = handle.report(example)
        used, scoring, dense = report.macs, report.scoring_macs, report.dense_macs
        tokens = [seen for seen, _ in report.tokens]
    held, whole = adapter.cache_bytes(tokens), adapter.cache_bytes(full)
    return {
        "kept": {"value": round(100 * match.share_kept(tokens, example.text, visual), 3)},
        "gmacs": {"value": round(used / 1e9, 6)},
        "scoring_gmacs": {"value": round(scoring / 1e9, 6)},
        "saving": {"value": round(100 * (1 - used / dense), 3)},
        "cache_gbytes": {"value": round(held / 1e9, 9)},
        "cache_saving": {"value": round(100 * (1 - held / whole), 3)},
    }


def matched(
    method: TokenPruner,
    adapter: VisionLanguage,
    target: Budget,
    samples: Sequence[Sample],
    scores: Scores | None = None,
    seed: int = 0,
) -> Budget:
    """The method's budget under which the layers see the target's share of the visual tokens of these samples, in the
    mean, as near as it comes to that.

    The target itself stays where it means that to the method. Levels that keep too little for the method to work with
    keep nothing, as far as the search goes.
    """
    model, (example, visual) = adapter.model, shape(samples[0], adapter)

    def kept(budget: Budget) -> float:
        try:
            with (
                applied(method, model, budget, services=_services(scores), seed=seed) as handle,
                torch.inference_mode(),
            ):
                if scores is not None:
                    scores.first = 0
                last_logits(model, samples)
                seen = [count / handle.application.trace.samples for count in handle.application.trace.attention]
                sites = len(handle.application.sites)
        except PrunelabError:
            return 0.0
        sizes.append(sites)
        return match.share_kept(seen, example.text, visual)

    sizes: list[int] = []
    wanted = target.amounts[0]
    if abs(kept(target) - wanted) <= 1 / visual:
        return target
    sites = sizes[0] if sizes else 1
    return match.fit(lambda level: method.family(level, sites, adapter.info), kept, wanted, tolerance=0.5 / visual)


# -- frames ----------------------------------------------------------------------------------------------------------


@dataclass
class Scores:
    """The frame scores [samples, T] of videos that come in batches of their order, the `first` one of the next batch
    told beforehand."""

    rows: Tensor
    first: int = 0

    def __call__(self, videos: int, frames: int) -> Tensor:
        return self.rows[self.first : self.first + videos]


def _services(scores: Scores | None) -> dict[str, Any]:
    return {} if scores is None else {FRAMES: scores}


@torch.inference_mode()
def attended(model: Any, samples: Sequence[Sample]) -> Tensor:
    """[samples, T] how much the unpruned model looks at each frame of a video when it is about to answer: the share
    that a frame's tokens have in the attention that the prompt's last word pays to all of them, in the mean over heads
    and layers. So the model itself judges the frames' worth to the question, by one pass of its own."""
    adapter = adapter_for(model)
    assert isinstance(adapter, VisionLanguage)
    recorders, stops = zip(*(record(block.self_attn) for block in adapter.blocks), strict=True)
    try:
        rows = []
        for start in track(range(0, len(samples), BATCH), "weighing frames", transient=True):
            part = samples[start : start + BATCH]
            last_logits(model, part)
            ids = questions.inputs(part)["input_ids"]
            last = torch.full((len(part), 1), ids.shape[1] - 1, device=recorders[0].shown().device)
            visual = (ids[0] == adapter.config.video_token_id).nonzero().squeeze(1)
            frames = len(part[0].pixels)
            tokens = visual[: len(visual) // frames * frames].to(last.device)  # without the newline at the end
            seen = torch.stack([recorder.weights(last)[:, :, 0, tokens].mean(1) for recorder in recorders])
            frame = seen.float().unflatten(2, (frames, -1)).sum(-1)  # [layers, B, T]
            rows.append((frame / frame.sum(-1, keepdim=True)).mean(0).cpu())
        return torch.cat(rows)
    finally:
        run_all(list(stops))
