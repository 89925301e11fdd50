"""How relevant each frame of a video is to a question, asked of any image language model.

Two steps of the paper, both outside the video model's forward: its own language model may first turn the question into
a list of things to look for (`decouple`), then a small image model looks at each frame alone (`FrameScorer`). The
prompts are our own; what they ask for and how answers are read is the paper's.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunelab.common.core.errors import PrunelabError

# -- from a question to things to look for -----------------------------------------------------------------------------

DECOUPLE = """You are given a multiple-choice question about a video. Work out what should be visible in a frame that \
helps to answer it. Reply with exactly three lines:
Step 1: yes or no. Does the question call for finding physical things in the video?
Step 2: a Python list of short names of everything to look for.
Step 3: the same list with only what a camera can see, or null if nothing is left.

Question: Which animal crosses the road after the bus has left?
A. A dog  B. A deer  C. A goose  D. A cat
Step 1: yes
Step 2: ["animal", "road", "bus", "dog", "deer", "goose", "cat"]
Step 3: ["animal", "road", "bus", "dog", "deer", "goose", "cat"]

Question: What does the cook put into the pan before the onions, and how does she feel about it?
A. Butter, proud  B. Oil, nervous  C. Garlic, calm  D. Salt, bored
Step 1: yes
Step 2: ["cook", "pan", "onions", "butter", "oil", "garlic", "salt", "feeling"]
Step 3: ["cook", "pan", "onions", "butter", "oil", "garlic", "salt"]

Question: What is the main message of the talk?
A. Patience pays  B. Trust nobody  C. Time is short  D. Work less
Step 1: no
Step 2: ["message", "patience", "trust", "time", "work"]
Step 3: null

Question: {question}
"""


def parse(answer: str) -> tuple[str, ...]:
    """The things to look for in an answer to `DECOUPLE`, in lower case and without repeats; empty where there are none.

    Read are the first `yes` or `no` behind `step 1` and the first bracketed list behind the last `step 3`; the list
    counts only with a yes. Its entries are those of a Python list, or, where it is none, what stands between commas.
    Text around the steps, other cases and missing steps do no harm: what cannot be read gives no list.
    """
    text = answer.lower()
    wanted = re.search(r"step\s*1\W.*?\b(yes|no)\b", text, re.DOTALL)
    listed = re.search(r"\[[^\]]*\]", re.split(r"step\s*3\b", text)[-1]) if re.search(r"step\s*3\b", text) else None
    if wanted is None or wanted[1] == "no" or listed is None:
        return ()
    try:
        entries = [str(entry) for entry in ast.literal_eval(listed[0])]
    except (ValueError, SyntaxError):  # names without quotes
        entries = listed[0][1:-1].split(",")
    return tuple(dict.fromkeys(entry.strip(" \t\n\"'") for entry in entries if entry.strip(" \t\n\"'")))


def decouple(question: str, answer: Callable[[str], str]) -> tuple[str, ...]:
    """Things to look for in a video that is asked this question. answer: a language model, see `speaker`."""
    return parse(answer(DECOUPLE.format(question=question.strip())))


def speaker(model: Any, processor: Any, words: int = 4096) -> Callable[[str], str]:
    """A language model of transformers, image models included, as a function from a prompt to its greedy answer."""

    def answer(prompt: str) -> str:
        turn = [{"role": "user", "content": [{"type": "text", "text": prompt}]}]
        text = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        given = processor(text=[text], return_tensors="pt").to(model.device)
        with torch.no_grad():
            made = model.generate(**given, max_new_tokens=words, do_sample=False)
        result: str = processor.batch_decode(made[:, given["input_ids"].shape[1] :], skip_special_tokens=True)[0]
        return result

    return answer


# -- from a frame to its score -----------------------------------------------------------------------------------------

OPTIONS = "\nA. yes\nB. no\nAnswer with the letter of the option alone."


def frame_prompt(question: str, things: Sequence[str] = ()) -> str:
    """What the scorer is asked of each frame: does it show one of the things, or, without any, does it tell enough to
    answer the question?"""
    if things:
        return f"Can any of these be seen in the image: {', '.join(things)}?{OPTIONS}"
    return f"Question: {question.strip()}\nDoes the image tell enough to answer this question?{OPTIONS}"


@dataclass
class FrameScorer:
    """An image language model of transformers and its processor as the judge of frames; the paper's is Qwen2-VL-2B.

    The score of a frame is the probability, among the whole vocabulary, that the answer begins with `letter`.
    batch: frames looked at together.
    """

    model: Any
    processor: Any
    batch: int = 64
    letter: str = "A"

    def token(self) -> int:
        """The number of the token that says yes."""
        ids = self.processor.tokenizer.encode(self.letter, add_special_tokens=False)
        if len(ids) != 1:
            raise PrunelabError(f"'{self.letter}' is {len(ids)} tokens to this scorer; choose a letter that is one")
        return int(ids[0])

    @torch.no_grad()
    def __call__(self, frames: Sequence[Any], question: str, things: Sequence[str] = ()) -> Tensor:
        """Scores [T] in float64 of the frames of one video, images as the processor takes them."""
        if len(frames) == 0:
            raise PrunelabError("there are no frames to score; decode the video first")
        yes, content = self.token(), [{"type": "image"}, {"type": "text", "text": frame_prompt(question, things)}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        results = []
        for start in range(0, len(frames), self.batch):
            part = list(frames[start : start + self.batch])
            given = self.processor(
                text=[text] * len(part), images=part, return_tensors="pt", padding=True, padding_side="left"
            )
            logits = self.model(**given.to(self.model.device), logits_to_keep=1).logits[:, -1]  # [b, V]
            results.append(logits.double().softmax(-1)[:, yes].cpu())
        return torch.cat(results)


def timing(seconds: float, places: Sequence[float]) -> str:
    """The sentence that tells the video model what it sees: the video's length and the moments, in seconds, of all
    sampled frames, those without a token included."""
    moments = ", ".join(f"{place:.2f}s" for place in places)
    return f"The video is {seconds:.2f} seconds long. {len(places)} of its frames are shown, taken at {moments}."
