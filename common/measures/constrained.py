"""Text that a language model writes under a constraint, in places where real text satisfies it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from rich.progress import track
from torch import Tensor, nn

from prunelab.common.constrained import constraints, smc
from prunelab.common.constrained.role import ConstrainedSampler
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import texts
from prunelab.common.measures.bench import Bench
from prunelab.common.metrics import uncertainty
from prunelab.common.models import loading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from prunelab.common.tasks.constrained import Constrained


def measure(bench: Bench[Constrained.Settings]) -> dict[str, Any]:
    """What the task gives, see `tasks.constrained`."""
    settings = bench.settings
    model, tokenizer = loading.language(bench.ids["model"], bench.config)
    pattern = settings.pattern + ("" if settings.json_depth is None else constraints.json_pattern(settings.json_depth))
    sampler = bench.method(ConstrainedSampler) or Unconstrained()
    constraint = constraints.Regular.of(pattern, constraints.token_texts(tokenizer), tokenizer.eos_token_id)
    vocabulary = model.config.get_text_config().vocab_size
    if vocabulary < len(tokenizer):
        raise PrunelabError(
            f"the model has {vocabulary} entries and its tokenizer {len(tokenizer)}; use one of its own"
        )
    result = places(texts.load(bench.ids["data"], bench.config), settings.after, pattern, settings.samples)
    budget = bench.budget
    rng = torch.Generator().manual_seed(bench.seed)
    runs = []
    with torch.inference_mode():
        for prompt, _ in track(result, "sampling", transient=True):
            behind = Prompt(model, tokens(tokenizer, prompt)[-settings.context :])
            runs.append(
                smc.run(
                    sampler, behind, constraint, budget, settings.particles, settings.threshold, settings.max_tokens,
                    rng,
                )
            )  # fmt: skip
    calls, draws = sum(r.calls for r in runs), sum(r.draws for r in runs)
    per_token = calls / max(draws, 1)
    pairs = list(zip(runs, (answer for _, answer in result), strict=True))
    figures = {
        "accuracy": [weight(r, [text == answer for text in written(constraint, r)]) for r, answer in pairs],
        "valid": [weight(r, r.complete) for r in runs],
        "alive": [100 * float((r.log_weights > -math.inf).double().mean()) for r in runs],
        "log_z": [r.log_z for r in runs if sampler.proper and r.log_z > -math.inf],
        "spread": [s for r in runs if (s := spread(r.log_weights)) is not None],
    }
    return {
        **{name: uncertainty.mean(values) for name, values in figures.items() if values},
        "calls": {"value": round(per_token, 4)},
        "masking_calls": {"value": vocabulary},
        "saving": {"value": round(100 * (1 - per_token / vocabulary), 4)},
        "tokens": {"value": draws},
    }


@dataclass(frozen=True)
class Unconstrained(ConstrainedSampler):
    """The model's own draw, with a dead end where the constraint does not allow it; its weights are proper."""

    name: ClassVar[str] = "unconstrained"

    @property
    def proper(self) -> bool:
        return True

    def sample(
        self, logits: Tensor, allows: Callable[[int], bool], budget: Budget, rng: torch.Generator | None = None
    ) -> tuple[int, float]:
        token = int(torch.multinomial(logits.softmax(-1).cpu(), 1, generator=rng))
        return (token, 0.0) if allows(token) else (-1, -math.inf)


class Prompt:
    """A model of transformers behind a prompt [T]: one cache row a particle."""

    def __init__(self, model: nn.Module, prompt: Sequence[int]) -> None:
        if not prompt:
            raise PrunelabError("the prompt is empty; give the model at least one token to go on from")
        self.model: Any = model
        self.prompt = torch.tensor([list(prompt)], device=next(model.parameters()).device)
        self.cache: Any = None

    def start(self, particles: int) -> Tensor:
        out = self.model(self.prompt, use_cache=True)
        self.cache = out.past_key_values
        self.cache.batch_repeat_interleave(particles)
        return out.logits[:, -1].float().expand(particles, -1)

    def feed(self, parents: Tensor, tokens: Tensor) -> Tensor:
        device = self.prompt.device
        context = self.model.config.max_position_embeddings
        if self.cache.get_seq_length() >= context:
            raise PrunelabError(f"prompt and text exceed the model's context of {context} tokens; shorten the context")
        self.cache.batch_select_indices(parents.to(device))
        out = self.model(tokens.unsqueeze(1).to(device), past_key_values=self.cache, use_cache=True)
        return out.logits[:, -1].float()


def places(documents: Sequence[str], after: str, pattern: str, samples: int) -> list[tuple[str, str]]:
    """Text up to the end of `after`, and the text behind it that the pattern matches, for places spread evenly over
    all there are."""
    finder = re.compile(f"{re.escape(after)}(?P<answer>{pattern})")
    results = [(d[: m.start("answer")], m["answer"]) for d in documents for m in finder.finditer(d)]
    if samples > len(results):
        raise PrunelabError(
            f"the pattern stands behind {after!r} in {len(results)} places, not {samples}; ask for fewer"
        )
    return [results[i * len(results) // samples] for i in range(samples)]


def tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text, the last of them ending where it ends."""
    return tokenizer(text, verbose=False)["input_ids"]


def written(constraint: constraints.Regular, result: smc.Particles) -> list[str]:
    """The texts of all particles."""
    return [constraint.written(particle) for particle in result.tokens]


def weight(result: smc.Particles, where: Sequence[bool]) -> float:
    """Percent of the particles' weight where a condition [P] holds and the text is complete; 0 where all died."""
    held = torch.tensor(where) & torch.tensor(result.complete)
    return 100 * float(result.posterior[held].sum())


def spread(log_weights: Tensor) -> float | None:
    """Standard deviation of the finite ones of log weights [P]; None for fewer than two."""
    finite = log_weights[log_weights > -math.inf]
    return float(finite.std()) if len(finite) > 1 else None
