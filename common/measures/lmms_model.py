"""A vision-language model of ours as lmms-eval asks it (the extra `evaluation`): one wrapper, pruned or not.

The library makes the messages (its chat protocol) and scores the answers; in between a batch of messages becomes one
call of `generate`. An answer that fails is an error here, where the library's own wrappers count it as an empty one.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from PIL import Image
from rich.progress import track
from torch import Tensor

from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import videos
from prunelab.common.data.images import rgb
from prunelab.common.measures.examples import Examples

UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")  # worksheets refuse it, to which some tasks write answers
WORDS = 1024  # new tokens where a task sets no limit, as in the library's wrappers of LLaVA
Request = tuple[Any, Callable[[Any], list[dict[str, Any]]], dict[str, Any], int, str, str]


@dataclass
class Kept:
    """Visual tokens of the questions asked so far, and those that a layer saw, in the mean over the layers."""

    questions: int = 0
    visual: float = 0.0
    seen: float = 0.0

    def add(self, trace: Any, tokens: int) -> None:
        """What a token pruner's trace counted of a batch whose prompts have so many tokens together."""
        self.questions += trace.samples
        self.visual += tokens - trace.texts
        self.seen += sum(trace.attention) / len(trace.attention) - trace.texts

    @property
    def share(self) -> float:
        """In percent."""
        return 100 * self.seen / self.visual if self.visual else 100.0

    def __str__(self) -> str:
        seen, visual = (round(count / max(1, self.questions), 1) for count in (self.seen, self.visual))
        return f"a layer sees {seen:g} of a question's {visual:g} visual tokens ({self.share:.1f} %), in the mean"


class VisualModel(lmms):
    """A model and processor of transformers behind lmms-eval's interface.

    batch: questions of one `generate`. frames: taken of every video, evenly. shown: examples before a question.
    hourly: frames more for every hour of a video. scorer: gives scores [T] of the frames of a video for the question
    about it; what those of the last batch are, `frame_scores` says to a method that asks for that service. tower: makes
    of the questions about the pictures of a batch, one each, the service `text_similarity` for that batch.
    pruned: opens the `with` block around each `generate`, such as `lambda: apply(method, model, budget)`; questions
    without image or video are asked outside it, as they hold nothing to prune. kept: counts what a token pruner leaves.
    `seconds` is what answering took, pictures read and answers written.
    """

    is_simple = False  # tasks hand over messages with their images and videos in place

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        batch: int = 1,
        frames: int = 32,
        hourly: float = 0,
        scorer: Callable[[Any, str], Tensor] | None = None,
        tower: Callable[[Sequence[str]], Callable[[Tensor], Tensor]] | None = None,
        shown: Examples | None = None,
        pruned: Callable[[], AbstractContextManager[Any]] = nullcontext,
        kept: Kept | None = None,
    ) -> None:
        super().__init__()
        if getattr(processor, "chat_template", None) is None:
            raise PrunelabError("the processor has no chat template; use a checkpoint that ships one")
        self.model, self.processor = model, processor
        self.batch, self.frames, self.pruned = batch, frames, pruned
        self.hourly, self.scorer, self.scores = hourly, scorer, list[Tensor]()
        self.tower = tower
        self.likeness: Callable[[Tensor], Tensor] | None = None
        self.shown = shown or Examples()
        self.seconds, self.kept = 0.0, kept
        processor.tokenizer.padding_side = "left"  # answers begin where prompts end

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answers to requests, in their order. As in the library's wrappers of these models only the end token and
        the limit of new tokens end an answer, not the task's `until`."""
        arguments: list[Request] = [request.args for request in requests]
        answers, start = [""] * len(arguments), time.perf_counter()
        for places in track(list(self._batches(arguments)), "asking", transient=True):
            for place, answer in self._answers({place: arguments[place] for place in places}):
                answers[place] = answer
        self.seconds += time.perf_counter() - start
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise PrunelabError("this task compares likelihoods; name one of lmms-eval's tasks that generates answers")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise PrunelabError("this task takes several rounds; name one of lmms-eval's tasks that asks once")

    def _batches(self, arguments: Sequence[Request]) -> Iterator[list[int]]:
        """Places of requests with equal settings, as many as are asked together."""
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(arguments):
            groups.setdefault(repr(sorted(request[2].items())), []).append(place)
        for places in groups.values():
            yield from (places[start : start + self.batch] for start in range(0, len(places), self.batch))

    def _answers(self, arguments: Mapping[int, Request]) -> Iterator[tuple[int, str]]:
        """The answers of one batch by place: questions with something to see, then those without."""
        results: dict[bool, dict[int, ChatMessages]] = {}
        for place, (_, messages, _, document, task, split) in arguments.items():
            documents = self.task_dict[task][split]
            before = self.shown.before(messages, task, documents, document)
            turn = ChatMessages(messages=[*before, *messages(documents[document])])
            shown, filmed, heard = turn.extract_media()
            if heard:
                raise PrunelabError(f"the task {task} plays sounds, which these models do not hear")
            results.setdefault(bool(shown or filmed), {})[place] = turn
        settings = next(iter(arguments.values()))[2]
        for sees, turns in sorted(results.items(), reverse=True):
            given = self._inputs(list(turns.values()))
            with self.pruned() if sees else nullcontext() as handle:
                written = self._generate(given, settings)
            if handle is not None and self.kept is not None:
                self.kept.add(handle.application.trace, int(given["attention_mask"].sum()))
            yield from zip(turns, written, strict=True)

    def frame_scores(self, videos: int, frames: int) -> list[Tensor]:
        """The service of this name: scores [T] of the frames of each video that is being asked about."""
        return self.scores

    def text_similarity(self, hidden: Tensor, **options: Any) -> Tensor:
        """The service of this name, for the pictures that are being asked about."""
        assert self.likeness is not None
        return self.likeness(hidden, **options)

    @torch.inference_mode()
    def _generate(self, inputs: Any, settings: Mapping[str, Any]) -> list[str]:
        """The model's answers to inputs, decoded as the task sets: greedily unless it gives a temperature."""
        given = inputs.to(self.model.device, self.model.dtype)
        temperature = float(settings.get("temperature") or 0)
        # A checkpoint's own settings of sampling would only be warned about.
        sampling: dict[str, Any] = {"temperature": None, "top_p": None, "top_k": None}
        if temperature > 0:
            sampling = {"temperature": temperature, "top_p": settings.get("top_p"), "top_k": settings.get("top_k")}
        made = self.model.generate(
            **given,
            do_sample=temperature > 0,
            num_beams=int(settings.get("num_beams") or 1),
            max_new_tokens=int(settings.get("max_new_tokens") or WORDS),
            pad_token_id=self.processor.tokenizer.pad_token_id or self.processor.tokenizer.eos_token_id,
            **sampling,
        )
        behind = made[:, given["input_ids"].shape[1] :]
        answers = self.processor.tokenizer.batch_decode(behind, skip_special_tokens=True)
        return [UNPRINTABLE.sub("", answer) for answer in answers]

    def _inputs(self, turns: Sequence[ChatMessages]) -> Any:
        """What the processor makes of messages: token ids, padded on the left, and pixels."""
        text = [
            self.processor.apply_chat_template(turn.to_hf_messages(), tokenize=False, add_generation_prompt=True)
            for turn in turns
        ]
        seen = [turn.extract_media() for turn in turns]
        pictures = [_picture(image) for shown, _, _ in seen for image in shown]
        shots = [(_path(film), turn) for turn, (_, filmed, _) in zip(turns, seen, strict=True) for film in filmed]
        films = [videos.frames(path, self._count(path)) for path, _ in shots]
        if self.scorer is not None:
            self.scores = [self.scorer(film, _question(turn)) for film, (_, turn) in zip(films, shots, strict=True)]
        if self.tower is not None and pictures:
            pairs = zip(turns, seen, strict=True)
            self.likeness = self.tower([_question(turn) for turn, (shown, _, _) in pairs for _ in shown])
        media: dict[str, Any] = {"images": pictures} if pictures else {}
        if films:
            if not hasattr(self.processor, "video_processor"):
                raise PrunelabError(f"{type(self.model).__name__} takes images only; choose a model that takes videos")
            media |= {"videos": films, "do_sample_frames": False}  # they are sampled already
        return self.processor(text=text, padding=True, return_tensors="pt", **media)

    def _count(self, path: Path) -> int:
        """Frames that are taken of a video."""
        return self.frames + (int(videos.seconds(path) / 3600 * self.hourly) if self.hourly else 0)


def _question(turn: ChatMessages) -> str:
    """The words of the last message."""
    parts = turn.to_hf_messages()[-1]["content"]
    return "\n".join(part["text"] for part in parts if part["type"] == "text")


def _picture(image: Any) -> Image.Image:
    """As tasks hand it over, or read from its file; greys of 16 bits are scaled."""
    if isinstance(image, Image.Image):
        return rgb(image) if image.mode.startswith(("I", "F")) else image
    with Image.open(image) as picture:
        return rgb(picture)


def _path(film: Any) -> Path:
    """The file of a video as a task names it."""
    if isinstance(film, str | Path):
        return Path(film)
    raise PrunelabError(f"the task gives a {type(film).__name__} for a video; only whole video files are read")
