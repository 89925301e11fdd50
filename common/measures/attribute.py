"""How faithful attributions of a language model's next token to its context are, against random ones."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import track
from torch import Tensor

from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import texts
from prunelab.common.measures.bench import Bench, finite
from prunelab.common.metrics.faithfulness import faithfulness
from prunelab.common.models import devices, loading
from prunelab.common.ranking.attribution import Attribution, Explained, alike, kinds

if TYPE_CHECKING:
    from prunelab.common.tasks.attribute import Attribute


class _Counted:
    """A model that counts the contexts it reads."""

    def __init__(self, model: Any) -> None:
        self.read = 0
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = (*args, *(kwargs[name] for name in ("input_ids", "inputs_embeds") if name in kwargs))
        self.read += len(given[0])


def measure(bench: Bench[Attribute.Settings]) -> dict[str, Any]:
    """What the task gives, see `tasks.attribute`."""
    settings = bench.settings
    method = bench.method(Attribution)
    if method is None:
        raise PrunelabError("contexts are explained by an attribution method; name one under `configuration`")
    model, tokenizer = loading.language(bench.ids["model"], bench.config)
    model = devices.place(model, bench.device, half=True)
    blank = next(
        (t for t in (tokenizer.unk_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0
    )
    probe, counter = Explained(model, blank, tokenizer.eos_token_id), _Counted(model)
    services = {
        "model": probe, "next_token_logits": probe.next_token_logits,
        "replace": alike(kinds(tokenizer, model.get_input_embeddings().num_embeddings)),
    }  # fmt: skip
    own: list[Tensor] = []
    random: list[Tensor] = []
    passes, explained = 0, 0
    rng = torch.Generator().manual_seed(bench.seed)
    for prompt in track(_contexts(bench, tokenizer), "explaining", transient=True):
        tokens, sums = prompt.to(bench.device), torch.zeros(2, 2, dtype=torch.float64)
        for _ in range(settings.new):
            logits = finite(probe.next_token_logits(tokens[None])[0], "its weights")
            target, before = int(logits.argmax()), counter.read
            importance = method.importance(tokens, {n: services[n] for n in method.services}, target)
            passes, explained = passes + counter.read - before, explained + 1
            control = torch.rand(len(tokens), generator=rng).softmax(-1).to(tokens.device)
            embeddings = probe.embed(tokens)
            draws = torch.rand(settings.draws, *embeddings.shape, generator=rng).to(embeddings)
            for place, weights in enumerate((importance, control)):
                with torch.no_grad():
                    result = faithfulness(embeddings, weights, _distribution(probe), logits.softmax(-1), draws)
                values = (result.normalised_sufficiency, result.normalised_comprehensiveness)
                sums[place] += torch.stack(values).double().cpu()
            tokens = torch.cat([tokens, tokens.new_tensor([target])])
        own.append(sums[0])
        random.append(sums[1])
    return {
        "soft_ns": log_ratio(torch.stack(own)[:, 0], torch.stack(random)[:, 0]),
        "soft_nc": log_ratio(torch.stack(own)[:, 1], torch.stack(random)[:, 1]),
        "passes": {"value": round(passes / explained, 2)},
    }


def _distribution(probe: Explained) -> Any:
    return lambda embeddings: probe.from_embeddings(embeddings).softmax(-1)


def _contexts(bench: Bench[Attribute.Settings], tokenizer: Any) -> list[Tensor]:
    """Token ids [T] of every context."""
    data, settings = bench.ids["data"], bench.settings
    if data["loader"] != "lines":
        return texts.sequences(data, bench.config, tokenizer, settings.length, settings.samples)
    prompts = texts.load(data, bench.config)[: settings.samples]
    return [torch.tensor(tokenizer(prompt)["input_ids"]) for prompt in prompts]


def log_ratio(own: Tensor, control: Tensor) -> dict[str, Any]:
    """ln of the ratio of two sums [n], with its standard error by the jackknife."""
    if not float(own.sum()) > 0 or not float(control.sum()) > 0:
        raise PrunelabError(
            "no context's prediction is told apart from that of an empty one; take more contexts, or more draws"
        )
    whole = math.log(float(own.sum() / control.sum()))
    n = len(own)
    out: dict[str, Any] = {"value": round(whole, 4), "n": n}
    left, rest = own.sum() - own, control.sum() - control
    if n > 1 and bool((left > 0).all()) and bool((rest > 0).all()):
        each = (left / rest).log()
        out["stderr"] = round(float(((n - 1) / n * (each - each.mean()).square().sum()).sqrt()), 4)
    return out
