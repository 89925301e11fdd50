"""Speculative decoding of prompts: mean accepted tokens, steps saved, and wall clock against plain greedy decoding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import track
from torch import Tensor

from prunelab.common import speculative
from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import prompts
from prunelab.common.measures.bench import Bench
from prunelab.common.metrics import uncertainty
from prunelab.common.models import devices, loading
from prunelab.common.speculative import Decoded, baselines
from prunelab.common.speculative.role import DraftDecoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from prunelab.common.tasks.decode import Decode

Answering = Callable[[Tensor], Decoded]


def measure(bench: Bench[Decode.Settings]) -> dict[str, Any]:
    """What the task gives, see `tasks.decode`."""
    settings = bench.settings
    model, tokenizer = loading.language(bench.ids["model"], bench.config)
    model = devices.place(model, bench.device, half=True)
    asked = prompts.load(bench.ids["data"], bench.config, tokenizer, settings.prompt, settings.samples, settings.task)
    draft = _draft(bench, model)
    plain = partial(baselines.plain, model, max_new_tokens=settings.new)
    with torch.inference_mode():
        decode = None if _is_plain(bench) else _decoder(bench, model, draft)
        for _ in range(settings.warmup):
            answer(asked[0], plain, tokenizer)
            if decode is not None:
                answer(asked[0], decode, tokenizer)
        greedy, found = [], []
        for prompt in track(asked, "decoding", transient=True):
            greedy.append(answer(prompt, plain, tokenizer))
            found.append(greedy[-1] if decode is None else answer(prompt, decode, tokenizer))
    return summary(found, greedy)


def _is_plain(bench: Bench[Decode.Settings]) -> bool:
    return bench.chosen is None and bench.options.get("decoding", "plain") == "plain"


def _draft(bench: Bench[Decode.Settings], like: PreTrainedModel) -> PreTrainedModel | None:
    """The draft model, where the run names one."""
    if "draft" not in bench.ids:
        return None
    return loading.language(bench.ids["draft"], bench.config)[0].to(like.device, like.dtype)


def _decoder(bench: Bench[Decode.Settings], model: PreTrainedModel, draft: PreTrainedModel | None) -> Answering:
    """How the run answers prompts [N]. A method keeps its state from prompt to prompt."""
    method, new = bench.method(DraftDecoder), bench.settings.new
    if method is None:
        options = dict(bench.options)
        name = options.pop("decoding", "plain")
        if name == "prompt_lookup":
            return partial(baselines.prompt_lookup, model, max_new_tokens=new, **options)
        if name != "assistant":
            raise PrunelabError(f"there is no baseline '{name}' of decoding; use plain, prompt_lookup or assistant")
        if draft is None:
            raise PrunelabError("an assistant is a draft model; name one of the catalogue in the setting `draft`")
        return partial(baselines.assistant, model, max_new_tokens=new, draft=draft, **options)
    services = {"draft": draft} if draft is not None and "draft" in method.services else {}
    budget, seed = bench.budget, bench.seed
    with speculative.applied(method, model, budget, services=services) as handle:
        state = handle.session.state

    def decode(ids: Tensor) -> Decoded:
        return speculative.generate(
            method, model, ids, max_new_tokens=new, budget=budget, services=services, seed=seed, state=state
        )

    return decode


@dataclass(frozen=True)
class Answer:
    """All turns of one prompt."""

    turns: tuple[Decoded, ...]

    @property
    def tokens(self) -> int:
        return sum(len(turn.tokens) for turn in self.turns)

    @property
    def steps(self) -> int:
        return sum(turn.steps for turn in self.turns)

    @property
    def seconds(self) -> float:
        return sum(turn.seconds for turn in self.turns)

    @property
    def drafting(self) -> float:
        return sum(turn.drafting or 0.0 for turn in self.turns)

    def same(self, other: Answer) -> bool:
        """Whether every turn has the other's tokens."""
        return all(torch.equal(a.tokens, b.tokens) for a, b in zip(self.turns, other.turns, strict=True))


def answer(prompt: prompts.Prompt, decode: Answering, tokenizer: PreTrainedTokenizerBase) -> Answer:
    """A prompt answered turn by turn."""
    turns: list[Decoded] = []
    said: list[str] = []
    while len(turns) < prompt.turns:
        turns.append(decode(prompt.ids(said)))
        said.append(tokenizer.decode(turns[-1].tokens, skip_special_tokens=True))
    return Answer(tuple(turns))


def summary(found: Sequence[Answer], greedy: Sequence[Answer]) -> dict[str, Any]:
    """The metrics of answers and of plain greedy decoding's answers to the same prompts; see `tasks.decode`."""
    tokens, steps = [float(a.tokens) for a in found], [float(a.steps) for a in found]
    rate, plain = ([a.tokens / a.seconds for a in answers] for answers in (found, greedy))
    seconds = [a.seconds for a in found]
    saved = ratio(steps, tokens, percent=True)
    return {
        "mat": ratio(tokens, steps),
        "steps": {"value": int(sum(steps))},
        "steps_saved": {
            **saved,
            "value": round(100 - saved["value"], 4),
            "samples": [100 - s for s in saved["samples"]],
        },
        "tokens_per_second": uncertainty.mean(rate),
        "speedup": {**ratio(rate, plain), "samples": [round(a / b, 4) for a, b in zip(rate, plain, strict=True)]},
        "drafting": ratio([a.drafting for a in found], seconds, percent=True),
        "identical": uncertainty.share(torch.tensor([a.same(b) for a, b in zip(found, greedy, strict=True)])),
        "tokens": {"value": int(sum(tokens))},
    }


def ratio(above: Sequence[float], below: Sequence[float], percent: bool = False) -> dict[str, Any]:
    """Ratio of two sums over prompts, its standard error, and the ratio of each prompt."""
    n, scale = len(above), 100.0 if percent else 1.0
    a, b = (scale * torch.tensor(above, dtype=torch.float64), torch.tensor(below, dtype=torch.float64))
    centre = a.sum() / b.sum()
    spread = float((a - centre * b).std() / b.mean()) / math.sqrt(n) if n > 1 else 0.0
    samples = [round(value, 4) for value in (a / b).tolist()]
    return {"value": round(float(centre), 4), "n": n, "stderr": round(spread, 4), "samples": samples}
