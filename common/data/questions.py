"""Questions about pictures and videos of digits (`common.data.pictures`), in a closed vocabulary of whole words.

Every question has five words and an answer of one, so that all prompts of a kind have one length. Its last word, and
so the last token of the prompt, names what is asked for. What can be known
without looking is little: the best guess from a question's words alone (`guess`) is right about one time in five.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import digits
from prunelab.common.data.pictures import (
    FILM,
    FRAME,
    FRAMES,
    LONG_FILM,
    PICTURE,
    Films,
    Pictures,
    Videos,
    displayed,
    films,
    pick,
    pictures,
    videos,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Kind = Literal["picture", "video", "film", "long film"]
Facts = Pictures | Videos | Films

SEED = 1000  # of the samples that methods are measured on
CHUNK = 64  # samples composed at a time
LOADERS: Mapping[str, Kind] = {
    "digit_questions": "picture",
    "digit_videos": "video",
    "digit_films": "film",
    "digit_long_films": "long film",
}
COMPOSERS: Mapping[Kind, Callable[..., Facts]] = {
    "picture": pictures,
    "video": videos,
    "film": films,
    "long film": partial(films, frames=LONG_FILM),
}
LENGTHS: Mapping[Kind, int] = {"video": FRAMES, "film": FILM, "long film": LONG_FILM}  # in frames

# -- words -----------------------------------------------------------------------------------------------------------

PAD, BEGIN, END, IMAGE, VIDEO = "<pad>", "<s>", "</s>", "<image>", "<video>"
DIGITS = [str(digit) for digit in range(10)]
COLOURS = ["red", "green", "blue", "yellow", "cyan", "pink"]  # the rows of pictures.INKS
QUARTERS = ["top-left", "top-right", "bottom-left", "bottom-right"]  # of a film's frame
PLACES = ["top-left", "top", "top-right", "left", "middle", "right", "bottom-left", "bottom", "bottom-right"]
WAYS = ["left", "right", "up", "down"]  # the rows of pictures.WAYS
ENDS = ["first", "last"]
TRUTH = ["no", "yes"]
NOTHING = "nothing"
_PLAIN = ["which", "digit", "is", "at", "painted", "where", "the", "how", "many", "digits", "are", "there", "a", "seen"]
_PLAIN += ["moving", "always"]
WORDS = list(
    dict.fromkeys([PAD, BEGIN, END, IMAGE, VIDEO, *_PLAIN, *DIGITS, *COLOURS, *PLACES, *WAYS, *ENDS, *TRUTH, NOTHING])
)
IDS = {word: number for number, word in enumerate(WORDS)}


def ids(words: Sequence[str]) -> Tensor:
    """The token of each word, int64."""
    return torch.tensor([IDS[word] for word in words])


@cache
def tokenizer() -> Tokenizer:
    """Words between spaces as tokens; those it does not know become `nothing` (`encoded` refuses them)."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(IDS, unk_token=NOTHING))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def encoded(question: str) -> Tensor:
    """The tokens of a question [N]; an error names a word outside the vocabulary."""
    words = question.replace("?", " ").split()
    unknown = [word for word in words if word not in IDS]
    if unknown or not words:
        known = " ".join(word for word in WORDS if not word.startswith("<"))
        what = f"the testbed does not know the word '{unknown[0]}'" if unknown else "the question is empty"
        raise PrunelabError(f"{what}; ask with: {known}")
    return ids(words)


# -- what is asked, and what is true ---------------------------------------------------------------------------------

Asked = tuple[Tensor, Tensor]  # for B samples: the token of the word that fills the gap [B], and that of the answer [B]


def _digit_at(facts: Pictures, lots: torch.Generator) -> Asked:
    zone = pick(facts.digit >= 0, lots)
    return ids(PLACES)[zone], ids(DIGITS)[_of(facts.digit, zone)]


def _digit_in(facts: Pictures, lots: torch.Generator) -> Asked:
    zone = pick(facts.digit >= 0, lots)
    return ids(COLOURS)[_of(facts.ink, zone)], ids(DIGITS)[_of(facts.digit, zone)]


def _place(facts: Pictures, lots: torch.Generator) -> Asked:
    alone = (facts.digit.unsqueeze(2) == facts.digit.unsqueeze(1)).sum(2) == 1
    zone = pick(alone & (facts.digit >= 0), lots)
    return ids(DIGITS)[_of(facts.digit, zone)], ids(PLACES)[zone]


def _copies(facts: Pictures, lots: torch.Generator) -> Asked:
    number = (facts.digit == facts.favourite.unsqueeze(1)).sum(1)
    return ids(DIGITS)[facts.favourite], ids(DIGITS)[number]


def _shown(facts: Facts, lots: torch.Generator) -> Asked:
    shown = facts.digit
    if isinstance(facts, Videos):
        shown = torch.cat([shown, facts.resting.unsqueeze(1)], 1)
    there = (shown.unsqueeze(2) == torch.arange(10)).any(1)  # [B, 10]
    truth = torch.randint(2, (len(there),), generator=lots)
    return ids(DIGITS)[pick(there == truth.bool().unsqueeze(1), lots)], ids(TRUTH)[truth]


def _digit_in_quarter(facts: Films, lots: torch.Generator) -> Asked:
    moment = pick(facts.digit >= 0, lots)
    return ids(QUARTERS)[_of(facts.quarter, moment)], ids(DIGITS)[_of(facts.digit, moment)]


def _quarter(facts: Films, lots: torch.Generator) -> Asked:
    moment = pick(facts.digit >= 0, lots)
    return ids(DIGITS)[_of(facts.digit, moment)], ids(QUARTERS)[_of(facts.quarter, moment)]


def _order(facts: Videos | Films, lots: torch.Generator) -> Asked:
    end = torch.randint(2, (len(facts.digit),), generator=lots)
    crossing = (facts.digit >= 0).int()
    first, last = crossing.argmax(1), facts.digit.shape[1] - 1 - crossing.flip(1).argmax(1)
    return ids(ENDS)[end], ids(DIGITS)[_of(facts.digit, torch.where(end == 0, first, last))]


def _mover(facts: Videos, lots: torch.Generator) -> Asked:
    slot = pick(facts.digit >= 0, lots)
    return ids(WAYS)[_of(facts.way, slot)], ids(DIGITS)[_of(facts.digit, slot)]


def _rest(facts: Videos, lots: torch.Generator) -> Asked:
    return ids(["there"])[torch.zeros_like(facts.resting)], ids(DIGITS)[facts.resting]


def _movers(facts: Videos, lots: torch.Generator) -> Asked:
    number = (facts.digit >= 0).sum(1)
    return ids(["moving"])[torch.zeros_like(number)], ids(DIGITS)[number]


def _of(values: Tensor, place: Tensor) -> Tensor:
    """The value [B] at one place of each row of values [B, N]."""
    return values.gather(1, place.unsqueeze(1)).squeeze(1)


Form = tuple[str, Callable[[Any, torch.Generator], Asked]]  # the question with a gap, and what fills and answers it

_OF_FILMS: Mapping[str, Form] = {
    "order": ("which digit is seen {}", _order),
    "place": ("which digit is at {}", _digit_in_quarter),
    "where": ("where is the digit {}", _quarter),
    "exists": ("is there a digit {}", _shown),
}
FORMS: Mapping[Kind, Mapping[str, Form]] = {
    "picture": {
        "place": ("which digit is at {}", _digit_at),
        "colour": ("which digit is painted {}", _digit_in),
        "where": ("where is the digit {}", _place),
        "count": ("how many digits are {}", _copies),
        "exists": ("is there a digit {}", _shown),
    },
    "video": {
        "order": ("which digit is seen {}", _order),
        "motion": ("which digit is moving {}", _mover),
        "rest": ("which digit is always {}", _rest),
        "count": ("how many digits are {}", _movers),
        "exists": ("is there a digit {}", _shown),
    },
    "film": _OF_FILMS,
    "long film": _OF_FILMS,
}


def ask(kind: Kind, form: str, facts: Facts, lots: torch.Generator) -> tuple[Tensor, Tensor]:
    """A question of that form about each sample: tokens [B, 5], and those of the answers [B]."""
    text, fill = FORMS[kind][form]
    gap, answer = fill(facts, lots)
    words = ids(text.format(PAD).split()).repeat(len(gap), 1)
    words[words == IDS[PAD]] = gap
    return words, answer


# -- samples ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One question about one picture or video.

    pixels: [3, 36, 36] or [T, 3, 32, 32] float32, as the testbed's encoder reads them. prompt: tokens [N] int64 up to
    the answer, placeholders of visual tokens included. answer: its token. form: what kind of question, a key of FORMS.
    """

    kind: Kind
    form: str
    question: str
    pixels: Tensor
    prompt: Tensor
    answer: int

    @property
    def shown(self) -> Tensor:
        """The picture, or the video's frames, for the eye: [T, H, W, 3] uint8."""
        frames = displayed(self.pixels)
        return frames.unsqueeze(0) if self.kind == "picture" else frames

    @property
    def word(self) -> str:
        """The answer."""
        return WORDS[self.answer]


def visual_tokens(kind: Kind) -> int:
    """Placeholders of a prompt: a picture's patches, or a video's, pooled two by two, and a newline token."""
    if kind == "picture":
        return PICTURE**2
    return LENGTHS[kind] * (FRAME // 2) ** 2 + 1


def prefix(kind: Kind) -> Tensor:
    """The tokens of a prompt in front of its question [P]: what the model reads alike whatever is asked."""
    holder = IMAGE if kind == "picture" else VIDEO
    return ids([BEGIN] + [holder] * visual_tokens(kind))


def prompt(kind: Kind, question: Tensor) -> Tensor:
    """The prompt [..., N] with the tokens of a question [..., W]."""
    return torch.cat([prefix(kind).expand(*question.shape[:-1], -1), question], -1)


def draw(kind: Kind, split: digits.Split, count: int, seed: int) -> list[Sample]:
    """Questions of all forms in turn, each about a picture or video of its own. The same for the same arguments, and
    the first ones do not depend on how many follow."""
    generator, made = torch.Generator().manual_seed(seed), list[Sample]()
    names = list(FORMS[kind])
    while len(made) < count:
        facts = COMPOSERS[kind](split, CHUNK, generator)
        drafted = {form: ask(kind, form, facts, generator) for form in names}
        for row in range(CHUNK):
            form = names[len(made) % len(names)]
            words, answer = (part[row] for part in drafted[form])
            question = " ".join(WORDS[token] for token in words.tolist())
            pixels = facts.pixels[row].clone()
            made.append(Sample(kind, form, question, pixels, prompt(kind, words), int(answer)))
    return made[:count]


def samples(identity: Mapping[str, Any], count: int) -> list[Sample]:
    """The first `count` samples of a catalogue entry, whose loader is one of LOADERS: held-out digits."""
    return draw(LOADERS[identity["loader"]], "test", count, SEED)


def inputs(batch: Sequence[Sample]) -> dict[str, Tensor]:
    """Arguments of a model's forward or `generate` for samples of one kind: `input_ids` and `attention_mask` [B, N],
    all of one length, and `pixel_values` [B, 3, 36, 36] or `pixel_values_videos` [B, T, 3, 32, 32]."""
    if not batch or len({sample.kind for sample in batch}) > 1:
        raise PrunelabError("a batch of questions needs samples, all about pictures or all about videos")
    tokens = torch.stack([sample.prompt for sample in batch])
    name = "pixel_values" if batch[0].kind == "picture" else "pixel_values_videos"
    pixels = torch.stack([sample.pixels for sample in batch])
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), name: pixels}


def guess(kind: Kind, count: int = 20000) -> dict[str, int]:
    """For each question the answer that is most often right, whatever is shown: what text alone can achieve. Learned
    from about `count` questions on training digits."""
    seen: defaultdict[str, Counter[int]] = defaultdict(Counter)
    generator = torch.Generator().manual_seed(SEED + 1)
    for _ in range(0, count, CHUNK * len(FORMS[kind])):
        facts = COMPOSERS[kind]("train", CHUNK, generator)
        for form in FORMS[kind]:
            words, answers = ask(kind, form, facts, generator)
            for row, answer in zip(words.tolist(), answers.tolist(), strict=True):
                seen[" ".join(WORDS[token] for token in row)][answer] += 1
    return {question: answers.most_common(1)[0][0] for question, answers in seen.items()}


def blind(batch: Sequence[Sample]) -> float:
    """Accuracy, as a share, of the best guess from the words of each question alone (`guess`)."""
    known = guess(batch[0].kind)
    return sum(known.get(sample.question) == sample.answer for sample in batch) / len(batch)
