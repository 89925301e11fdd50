"""Speculative decoding of prompts: mean accepted tokens, steps saved, and wall clock against plain greedy decoding."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import track
from torch import Tensor, nn

from prunelab.common import speculative
from prunelab.common.backbones import checkpoint
from prunelab.common.catalogue import hub
from prunelab.common.core import registry
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import prompts, texts
from prunelab.common.measures.bench import Bench
from prunelab.common.metrics import uncertainty
from prunelab.common.models import devices, loading
from prunelab.common.speculative import Decoded, baselines
from prunelab.common.speculative.reader import info
from prunelab.common.speculative.role import DraftDecoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from prunelab.common.tasks.decode import Decode

Answering = Callable[[Tensor], Decoded]
CUT_BY = 8  # texts, as long as a prompt with its answer, that a pruner of the draft model measures on


def measure(bench: Bench[Decode.Settings]) -> dict[str, Any]:
    """What the task gives, see `tasks.decode`."""
    settings = bench.settings
    model, tokenizer = loading.language(bench.ids["model"], bench.config)
    model = devices.place(model, bench.device, half=True)
    dialogues = prompts.load(
        bench.ids["data"], bench.config, tokenizer, settings.prompt, settings.samples, settings.task
    )
    sampling = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
    options: dict[str, Any] = {"max_new_tokens": settings.new, **(sampling if settings.temperature else {})}
    plain = partial(baselines.plain, model, **options)
    torch.manual_seed(bench.seed)
    with torch.inference_mode():
        decode = None if _is_plain(bench) else _decoder(bench, model, tokenizer, options)
        for _ in range(settings.warmup):
            answer(dialogues[0], plain, tokenizer)
            if decode is not None:
                answer(dialogues[0], decode, tokenizer)
        greedy, result = [], []
        for prompt in track(dialogues, "decoding", transient=True):
            greedy.append(answer(prompt, plain, tokenizer))
            result.append(greedy[-1] if decode is None else answer(prompt, decode, tokenizer))
    return summary(result, greedy)


def _is_plain(bench: Bench[Decode.Settings]) -> bool:
    return bench.chosen is None and bench.options.get("decoding", "plain") == "plain"


def _draft(
    bench: Bench[Decode.Settings], like: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel | None:
    """The draft model, where the run names one; its weights pruned, where the run says how."""
    settings = bench.settings
    if "draft" not in bench.ids:
        if settings.cut is not None:
            raise PrunelabError("there is no draft model to cut; name one of the catalogue in the setting `draft`")
        return None
    draft = loading.language(bench.ids["draft"], bench.config)[0].to(like.device, like.dtype)
    if settings.cut is not None:
        pruning = importlib.import_module("prunelab.common.weights.pruning")  # by name, see `Decode.files`
        method: Any = registry.create(settings.cut.method, **settings.cut.options)
        length = settings.prompt + settings.new
        drawn = (
            texts.windows(bench.ids["data"], bench.config, tokenizer, length, CUT_BY, bench.seed)
            if method.calibrated
            else None
        )
        pruning.prune(method, draft, Budget.parse(settings.cut.budget), drawn, seed=bench.seed, progress=False)
    return draft


def _parts(bench: Bench[Decode.Settings], method: DraftDecoder, model: PreTrainedModel) -> nn.Module | None:
    """The learned parts of the method, where the run names some: a testbed, or a file of the hub with its weights."""
    if "heads" not in bench.ids:
        return None
    identity = bench.ids["heads"]
    if "testbed" in identity:
        parts = loading.load(identity, bench.config)[0]
    else:
        built = method.build(info(model))
        if built is None:
            raise PrunelabError(f"{method.name} has no learned parts; leave the setting `heads` out")
        checkpoint.load_checkpoint(built, hub.file(identity, "model", bench.config))
        parts = built
    return parts.to(model.device, model.dtype).eval()


def _store(bench: Bench[Decode.Settings], tokenizer: PreTrainedTokenizerBase) -> Tensor | None:
    """The texts to retrieve from as one stream of tokens [M], where the run names some."""
    if "store" not in bench.ids:
        return None
    documents = texts.load(bench.ids["store"], bench.config, "train")
    read = (tokenizer(document, verbose=False)["input_ids"] for document in documents)
    return torch.cat([torch.tensor(ids, dtype=torch.int32) for ids in read])


def _decoder(
    bench: Bench[Decode.Settings],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    decoding: Mapping[str, Any],
) -> Answering:
    """How the run answers prompts [N]. A method keeps its state from prompt to prompt."""
    method, draft = bench.method(DraftDecoder), _draft(bench, model, tokenizer)
    if method is None:
        options = {**decoding, **bench.options}
        name = options.pop("decoding", "plain")
        if name == "prompt_lookup":
            return partial(baselines.prompt_lookup, model, **options)
        if name != "assistant":
            raise PrunelabError(f"there is no baseline '{name}' of decoding; use plain, prompt_lookup or assistant")
        if draft is None:
            raise PrunelabError("an assistant is a draft model; name one of the catalogue in the setting `draft`")
        return partial(baselines.assistant, model, draft=draft, **options)
    given = {"draft": draft, "store": _store(bench, tokenizer) if "store" in method.services else None}
    services = {name: value for name, value in given.items() if value is not None and name in method.services}
    budget, seed = bench.budget, bench.seed
    with speculative.applied(method, model, budget, services=services, parts=_parts(bench, method, model)) as handle:
        state = handle.session.state

    def decode(ids: Tensor) -> Decoded:
        return speculative.generate(
            method, model, ids, budget=budget, services=services, seed=seed, state=state, **decoding
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
    replies: list[str] = []
    while len(turns) < prompt.turns:
        turns.append(decode(prompt.ids(replies)))
        replies.append(tokenizer.decode(turns[-1].tokens, skip_special_tokens=True))
    return Answer(tuple(turns))


def summary(results: Sequence[Answer], greedy: Sequence[Answer]) -> dict[str, Any]:
    """The metrics of answers and of plain greedy decoding's answers to the same prompts; see `tasks.decode`."""
    tokens, steps = [float(a.tokens) for a in results], [float(a.steps) for a in results]
    rate, plain = ([a.tokens / a.seconds for a in answers] for answers in (results, greedy))
    seconds = [a.seconds for a in results]
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
        "ms_per_token": ratio([1000 * s for s in seconds], tokens),
        "speedup": {**ratio(rate, plain), "samples": [round(a / b, 4) for a, b in zip(rate, plain, strict=True)]},
        "drafting": ratio([a.drafting for a in results], seconds, percent=True),
        "identical": uncertainty.share(torch.tensor([a.same(b) for a, b in zip(results, greedy, strict=True)])),
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
