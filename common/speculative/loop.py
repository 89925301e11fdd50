"""The loop that a `DraftDecoder` runs under: draft, verify in one forward pass, keep what was confirmed, learn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prunelab.common.core import attention_interface as seam
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.hooks import claimed, overridden, runs
from prunelab.common.core.learned import PARTS, fitting
from prunelab.common.speculative.reader import Reader, info
from prunelab.common.speculative.role import DraftDecoder, Step
from prunelab.common.speculative.trees import DraftTree

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
    from transformers.generation import GenerateDecoderOnlyOutput


@dataclass(frozen=True)
class Decoded:
    """What was generated and what it took.

    tokens: [A] behind the prompt. steps: forward passes of the target that gave tokens. seconds: of wall clock, reading
    the prompt included. drafting: seconds of these spent on making drafts and learning; None where that is not known.
    """

    tokens: Tensor
    steps: int
    seconds: float
    drafting: float | None = None

    @property
    def mat(self) -> float:
        """Mean accepted tokens: what a step gave, 1 without drafts."""
        return len(self.tokens) / self.steps if self.steps else 0.0

    @property
    def steps_saved(self) -> float:
        """Percent of the steps that plain decoding takes, one a token."""
        return 100 * (1 - self.steps / len(self.tokens)) if len(self.tokens) else 0.0

    @property
    def tokens_per_second(self) -> float:
        return len(self.tokens) / self.seconds if self.seconds else 0.0


@dataclass
class Session:
    """A method at work: its state lives on from prompt to prompt. drafting: seconds spent in the method so far."""

    method: DraftDecoder
    budget: Budget
    state: Any
    rng: torch.Generator | None = None
    drafting: float = 0.0

    def begin(self, prompt: Tensor) -> None:
        """Let the method see the tokens [N] that the next text begins with."""
        with self._drafting(prompt.device):
            self.method.begin(self.state, prompt)

    def step(
        self,
        reader: Reader,
        tokens: Tensor,
        room: int | None = None,
        process: Callable[[DraftTree, Tensor], Tensor] | None = None,
        alone: bool = False,
    ) -> Step:
        """Draft behind the tokens [N], verify, and keep the entries of what was confirmed.

        room: tokens that may still be emitted. process: from a tree and its logits to the logits to decode by. alone:
        nothing is drafted and the tokens are read by themselves.
        """
        with self._drafting(tokens.device):
            tree = self.method.draft(self.state, tokens, self.budget)
            tree = tree.within(0) if alone else tree if room is None else tree.within(room - 1)
            aside = None if alone else self.method.aside(self.state, tokens)
        count = len(tree.tokens) + 1
        read = reader.read(tokens, tree, aside=aside)
        logits, hidden = read[:count], reader.hidden
        accepted = self.method.accept(tree, logits if process is None else process(tree, logits), self.rng)
        reader.keep(accepted.nodes)
        return Step(tokens[-1:], tree, logits, accepted, read[count:], None if hidden is None else hidden[:count])

    def learn(self, step: Step) -> None:
        """Let the method see what its tree was answered with."""
        with self._drafting(step.logits.device):
            self.method.observe(self.state, step)

    @contextmanager
    def _drafting(self, device: torch.device) -> Iterator[None]:
        start = clock(device)
        yield
        self.drafting += clock(device) - start


def clock(device: torch.device) -> float:
    """Seconds, once the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@dataclass
class DecodingHandle:
    """A method applied to a model; `runs` holds what every call of `generate` gave."""

    model: PreTrainedModel
    session: Session
    seed: int
    plain: Callable[..., Any]  # the model's `generate` as it was
    runs: list[Decoded] = field(default_factory=list)
    _steps: int = 0
    _prompt: int = 0

    def report(self) -> Decoded:
        """All runs together."""
        if not self.runs:
            raise PrunelabError("nothing was generated yet; call model.generate inside the `with` block")
        return Decoded(
            torch.cat([run.tokens for run in self.runs]),
            sum(run.steps for run in self.runs),
            sum(run.seconds for run in self.runs),
            sum(run.drafting or 0.0 for run in self.runs),
        )

    def generate(self, *args: Any, **options: Any) -> Any:
        """The model's own `generate`, with the loop below in the place of its decoding."""
        if options.get("custom_generate") is not None or options.get("assistant_model") is not None:
            raise PrunelabError(
                f"{self.session.method.name} decodes by itself; leave custom_generate and assistants out"
            )
        self._steps, before, start = 0, self.session.drafting, clock(self.model.device)
        out = self.plain(*args, custom_generate=self.decode, **options)
        seconds = clock(self.model.device) - start
        sequence = out if isinstance(out, Tensor) else out.sequences
        tokens = sequence[0, self._prompt :]
        self.runs.append(Decoded(tokens, self._steps, seconds, self.session.drafting - before))
        return out

    def decode(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """What `generate` calls with everything prepared. It ends where plain decoding does: at the exact length, and
        at the first token that a stopping criterion wants, also inside a draft."""
        tokens = self._own(model, input_ids, generation_config, model_kwargs.get("attention_mask"))
        reader = self._reader(model, tokens, model_kwargs)
        sampling = generation_config.do_sample
        session = self.session
        session.rng = (session.rng or torch.Generator(model.device).manual_seed(self.seed)) if sampling else None
        sequence, done = input_ids, False
        session.begin(tokens)

        def process(tree: DraftTree, logits: Tensor) -> Tensor:
            return processed(logits_processor, sequence, tree, logits) if logits_processor else logits

        while not done:
            room = int(generation_config.max_length) - sequence.shape[1]
            step = session.step(reader, tokens, room, process, reader.prompting)
            emitted, done = until_stop(stopping_criteria, sequence, step.accepted.tokens)
            self._steps += 1
            sequence = torch.cat([sequence, emitted.unsqueeze(0)], 1)
            tokens = torch.cat([tokens, emitted])
            # As the authors of Token Recycling have it, a step that ended inside its draft is not learned from.
            if not done or len(emitted) == len(step.accepted.tokens):
                session.learn(step)
        reader.crop(len(tokens) - 1)
        if not generation_config.return_dict_in_generate:
            return sequence
        from transformers.generation import GenerateDecoderOnlyOutput

        return GenerateDecoderOnlyOutput(sequences=sequence, **seam.with_cache({}, reader.cache))

    def _own(self, model: PreTrainedModel, input_ids: Tensor, config: GenerationConfig, mask: Tensor | None) -> Tensor:
        """The prompt's own tokens [N], without padding on the left."""
        self._prompt = input_ids.shape[1]
        if len(input_ids) != 1 or config.num_beams != 1:
            raise PrunelabError("a draft is verified for one sequence; generate prompts one by one, without beams")
        refuse_prompt(model, input_ids)
        return input_ids[0] if mask is None else input_ids[0][mask[0].bool()]

    def _reader(self, model: PreTrainedModel, tokens: Tensor, given: Mapping[str, Any]) -> Reader:
        cache = seam.cache_in(given)
        if cache is None or not given.get("use_cache", True):
            raise PrunelabError("a draft is verified with the help of a cache; leave use_cache on")
        whole = runs(model, "cache_pruner")
        return Reader(model, cache, tokens[: cache.get_seq_length()], self.session.method.reads_hidden, whole)


def refuse_prompt(model: PreTrainedModel, input_ids: Tensor) -> None:
    """Refuse a prompt that is empty or leaves no room in the model's context."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if input_ids.shape[-1] == 0:
        raise PrunelabError("the prompt is empty; give at least one token")
    if context is not None and input_ids.shape[-1] >= context:
        raise PrunelabError(
            f"the prompt has {input_ids.shape[-1]} tokens, which leaves no room in the model's context of {context};"
            " shorten it"
        )


def until_stop(criteria: StoppingCriteriaList, sequence: Tensor, tokens: Tensor) -> tuple[Tensor, bool]:
    """The tokens [A] up to the first behind which the sequence [1, N] stops, and whether it stops at all."""
    longer = torch.cat([sequence, tokens.unsqueeze(0)], 1)
    for count in range(1, len(tokens) + 1):  # as plain decoding asks, after each token
        if bool(criteria(longer[:, : sequence.shape[1] + count], None).all()):
            return tokens[:count], True
    return tokens, False


def processed(processors: LogitsProcessorList, sequence: Tensor, tree: DraftTree, logits: Tensor) -> Tensor:
    """The logits [T + 1, V] as the processors change them, each in sight of the sequence [1, N] and the node's path."""
    out = torch.empty_like(logits, dtype=torch.float32)
    out[:1] = processors(sequence, logits[:1].float())
    for depth in range(1, tree.paths.shape[1] + 1):  # sequences of one length go together
        level = (tree.depths == depth).nonzero().squeeze(1)
        before = torch.cat([sequence.expand(len(level), -1), tree.paths[level, :depth]], 1)
        out[level + 1] = processors(before, logits[level + 1].float())
    return out


def check(method: DraftDecoder, model: nn.Module) -> Reader:
    """A reader of the model. Raises PrunelabError where the method cannot decode with it."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise PrunelabError(f"{method.name} decodes with a causal language model of transformers; load one")
    return Reader(model)


@contextmanager
def applied(
    method: DraftDecoder,
    model: nn.Module,
    budget: Budget | float = 1.0,
    *,
    services: Mapping[str, Any] | None = None,
    parts: nn.Module | None = None,
    seed: int = 0,
    state: Any = None,
) -> Iterator[DecodingHandle]:
    """Let `model.generate` decode by the method inside the `with` block, with all of its options and one prompt a call.

    budget: nodes of a draft tree, in number or as a share of the method's own. services: what the method needs by name;
    a draft model among them is any causal language model with the target's vocabulary. parts: the method's learned
    parts, as `method.build` makes them; a model that carries some needs none. seed: of the draws where `do_sample` is
    on. state: one that `method.start` or an earlier handle gave (`handle.session.state`), to go on from.
    Nothing of the model changes but the attribute `generate`, for the length of the block.
    """
    with claimed(method, model, services):
        reader = check(method, model)
        vocabulary = reader.vocabulary
        given = {name: _service(name, value, vocabulary) for name, value in (services or {}).items()}
        if state is None:
            learned = fitting(method, info(model), parts, getattr(model, PARTS, None))
            given |= {} if learned is None else {"parts": learned}
            given |= {"output": reader.model.get_output_embeddings()} if method.reads_hidden else {}
            with torch.inference_mode(False), torch.device(reader.model.device):  # a state may be gone on from anywhere
                state = method.start(vocabulary, **given)
        budget = budget if isinstance(budget, Budget) else Budget(budget)
        handle = DecodingHandle(reader.model, Session(method, budget, state), seed, reader.model.generate)
        with overridden(model, "generate", handle.generate):
            yield handle


def _service(name: str, value: Any, vocabulary: int) -> Any:
    """A service as methods see it: a language model becomes its reader, which must speak the target's tokens."""
    value = Reader(value) if isinstance(value, nn.Module) else value
    other = getattr(value, "vocabulary", vocabulary)
    if other != vocabulary:
        raise PrunelabError(
            f"the {name} model has {other} tokens and the target {vocabulary}; take one with the target's tokenizer"
        )
    return value


def generate(
    method: DraftDecoder,
    model: nn.Module,
    ids: Tensor,
    *,
    max_new_tokens: int,
    budget: Budget | float = 1.0,
    services: Mapping[str, Any] | None = None,
    parts: nn.Module | None = None,
    seed: int = 0,
    state: Any = None,
    **options: Any,
) -> Decoded:
    """Continue the prompt ids [N] (or [1, N]) by at most `max_new_tokens`; see `applied`. `options` are those of
    transformers' `generate` (`do_sample`, `temperature`, `eos_token_id`, ...). Greedy unless they ask for sampling."""
    with applied(method, model, budget, services=services, parts=parts, seed=seed, state=state) as handle:
        ids = prompt(handle.model, ids)
        handle.model.generate(ids, max_new_tokens=max_new_tokens, **{"do_sample": False, **options})
    return handle.runs[-1]


def prompt(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Prompt ids [N] or [1, N] as [1, N] on the model's device, refused where they cannot be continued."""
    ids = torch.as_tensor(ids, device=model.device).reshape(1, -1) if ids.dim() < 2 else ids.to(model.device)
    refuse_prompt(model, ids)
    return ids
