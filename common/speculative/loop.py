"""The loop that a `DraftDecoder` runs under: draft, verify in one forward pass, keep what was confirmed, learn."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prunelab.common.core import attention_interface as seam
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.hooks import claimed, replaced, runs
from prunelab.common.core.learned import PARTS, fitting
from prunelab.common.speculative.reader import Reader, info, working_device
from prunelab.common.speculative.role import DraftDecoder, Step
from prunelab.common.speculative.trees import DraftTree

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
    from transformers.generation import BaseStreamer, GenerateDecoderOnlyOutput

# What `generate` hands to its decoding that drafts know of; anything else would be left unread.
KNOWN = frozenset({"attention_mask", "position_ids", "use_cache", "cache", "past_key_values", "logits_to_keep",
                   "token_type_ids", "next_sequence_length", "output_attentions", "output_hidden_states"})  # fmt: skip
# Processors that read the model or remember what they were asked, so that asking about drafts changes the text.
STATEFUL = frozenset({"UnbatchedClassifierFreeGuidanceLogitsProcessor", "SynthIDTextWatermarkLogitsProcessor"})


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
        hidden = None if hidden is None else hidden[:count]
        return Step(tokens[-1:], tree, logits, accepted, read[count:], hidden, reader.earlier)

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
    """A method applied to a model; `runs` holds what every call of `generate` gave. Threads take turns, since a method
    learns from one text for the next."""

    model: PreTrainedModel
    session: Session
    seed: int
    plain: Callable[..., Any]  # the model's `generate` as it was
    drafts: Mapping[str, Reader] = field(default_factory=dict)  # models among the services
    runs: list[Decoded] = field(default_factory=list)
    _steps: int = 0
    _prompt: int = 0
    _streamer: BaseStreamer | None = None
    _turn: threading.RLock = field(default_factory=threading.RLock)

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
        with self._turn:
            return self._generate(*args, **options)

    def _generate(self, *args: Any, **options: Any) -> Any:
        device = working_device(self.model)
        self._steps, before, start = 0, self.session.drafting, clock(device)
        self._streamer = options.get("streamer")
        out = self.plain(*args, custom_generate=self.decode, **stopped_by_words(self.model, options))
        seconds = clock(device) - start
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
        self._refuse(generation_config, logits_processor, model_kwargs)
        tokens = self._own(model, input_ids, generation_config, model_kwargs.get("attention_mask"))
        reader = self._reader(model, tokens, model_kwargs)
        sampling = generation_config.do_sample
        session = self.session
        session.rng = (session.rng or torch.Generator(tokens.device).manual_seed(self.seed)) if sampling else None
        sequence, done = input_ids, False
        outputs = {name: getattr(generation_config, f"output_{name}") for name in ("scores", "logits")}
        rows: dict[str, list[Tensor]] = {"scores": [], "logits": []}
        scores = torch.empty(0)
        session.begin(tokens)

        def process(tree: DraftTree, logits: Tensor) -> Tensor:
            nonlocal scores
            kept = [dict(vars(p)) for p in logits_processor]
            scores = processed(logits_processor, sequence, tree, logits) if logits_processor else logits
            refuse_memory(self.session.method.name, logits_processor, kept)
            return scores

        while not done:
            room = int(generation_config.max_length) - sequence.shape[1]
            step = session.step(reader, tokens, room, process, reader.prompting)
            emitted, done = until_stop(stopping_criteria, sequence, step.accepted.tokens)
            self._steps += 1
            before = torch.cat([step.accepted.nodes.new_zeros(1), step.accepted.nodes + 1])[: len(emitted)]
            for name, result in (("scores", scores.float()), ("logits", step.logits.float())):
                rows[name] += result[before].split(1) if outputs[name] else ()
            if self._streamer is not None:
                for token in emitted.cpu().split(1):
                    self._streamer.put(token)
            sequence = torch.cat([sequence, emitted.unsqueeze(0)], 1)
            tokens = torch.cat([tokens, emitted])
            # As the authors of Token Recycling have it, a step that ended inside its draft is not learned from.
            if not done or len(emitted) == len(step.accepted.tokens):
                session.learn(step)
        reader.crop(len(tokens) - 1)
        if self._streamer is not None:
            self._streamer.end()
        if not generation_config.return_dict_in_generate:
            return sequence
        from transformers.generation import GenerateDecoderOnlyOutput

        returned = {name: tuple(rows[name]) for name in rows if outputs[name]}
        return GenerateDecoderOnlyOutput(sequences=sequence, **returned, **seam.with_cache({}, reader.cache))

    def _refuse(self, config: GenerationConfig, processors: LogitsProcessorList, given: Mapping[str, Any]) -> None:
        """Refuse, before work, what would not be as without drafts."""
        name = self.session.method.name
        for output in ("attentions", "hidden_states"):
            if config.return_dict_in_generate and getattr(config, f"output_{output}"):
                raise PrunelabError(f"{name} reads many tokens a pass; generate without output_{output}")
        if stateful := [type(p).__name__ for p in processors if type(p).__name__ in STATEFUL]:
            raise PrunelabError(
                f"{name} asks for the scores behind drafts that come to nothing, and {', '.join(stateful)} remembers"
                " each; generate without it"
            )
        others = {key for key, value in given.items() if value is not None} - KNOWN
        if others:
            raise PrunelabError(f"{name} reads token ids alone, not {', '.join(sorted(others))}; generate without them")
        for service, draft in self.drafts.items():
            if draft.context is not None and draft.context < int(config.max_length):
                raise PrunelabError(
                    f"the {service} model has a context of {draft.context} tokens and the text may have"
                    f" {config.max_length}; take a longer one, or generate less"
                )

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


def stopped_by_words(model: PreTrainedModel, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `generate` with its stop strings as a criterion, since it keeps the tokenizer they need to
    itself when decoding is another's."""
    from transformers.generation import StoppingCriteriaList, StopStringCriteria

    given = dict(options)
    config, tokenizer = given.get("generation_config") or model.generation_config, given.pop("tokenizer", None)
    words = given.pop("stop_strings", None) or config.stop_strings
    if not words:
        return given
    if tokenizer is None:
        raise PrunelabError("stop strings are found by the model's tokenizer; give tokenizer=... along with them")
    given["generation_config"] = copy.deepcopy(config)
    given["generation_config"].stop_strings = None
    criterion = StopStringCriteria(tokenizer=tokenizer, stop_strings=words)
    return given | {"stopping_criteria": StoppingCriteriaList([*(given.get("stopping_criteria") or ()), criterion])}


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


def refuse_memory(method: str, processors: LogitsProcessorList, before: Sequence[Mapping[str, Any]]) -> None:
    """Refuse processors of one's own that changed while they were asked about drafts."""
    for processor, known in zip(processors, before, strict=True):
        own = not type(processor).__module__.startswith("transformers.")
        if own and any(vars(processor)[name] is not value for name, value in known.items() if name in vars(processor)):
            raise PrunelabError(
                f"{method} asks {type(processor).__name__} for the scores behind drafts that come to nothing, and it"
                " remembers each; write it as a function of the tokens and scores it is given"
            )


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
            with torch.inference_mode(False), torch.device(reader.device):  # a state may be gone on from anywhere
                state = method.start(vocabulary, **given)
        budget = budget if isinstance(budget, Budget) else Budget(budget)
        drafts = {name: service for name, service in given.items() if isinstance(service, Reader)}
        handle = DecodingHandle(reader.model, Session(method, budget, state), seed, reader.model.generate, drafts)
        restore = replaced(model, "generate", handle.generate)
        try:
            yield handle
        finally:
            restore()


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
    ids = torch.as_tensor(ids, device=working_device(model))
    ids = ids.reshape(1, -1) if ids.dim() < 2 else ids
    refuse_prompt(model, ids)
    return ids
