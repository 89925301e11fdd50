"""Scores of BLIP, tuned for one task, or of CLIP, its weights pruned or not, and perhaps fine-tuned after that."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from prunelab.common import weights
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.optional import optional
from prunelab.common.data import image_text, images
from prunelab.common.data.image_text import Example
from prunelab.common.measures import image_text_tuning
from prunelab.common.measures.bench import Bench, finite
from prunelab.common.measures.language import sizes
from prunelab.common.metrics import uncertainty
from prunelab.common.models import devices, loading
from prunelab.common.weights.role import WeightPruner

if TYPE_CHECKING:
    from prunelab.common.tasks.image_text import ImageText

Call = Mapping[str, Tensor]
PROMPT = "a picture of "
SMOOTHED = 0.1  # of the labels of captions, as BLIP is trained
TEMPERATURE = 0.07  # with which BLIP's similarities start, which its published weights leave out
LENGTHS: Mapping[str, int] = {"retrieval": 35, "captions": 40}  # tokens of a text
SPICE = "pycocoevalcap.spice"


def measure(bench: Bench[ImageText.Settings]) -> dict[str, Any]:
    """What the task gives, see `tasks.image_text`."""
    settings = bench.settings
    asked = ASKED[image_text.kind(bench.ids["data"])]
    examples = image_text.load(bench.ids["data"], bench.config, "test")[: settings.samples]
    model, processor = loading.image_text(bench.ids["model"], bench.config, bench.ids.get("reader"))
    task = asked(settings, processor, devices.place(model, bench.device), bench.device)
    task.check(examples)
    report, method = None, bench.method(WeightPruner)
    if method is None and settings.epochs:
        raise PrunelabError("the published models are tuned already; fine-tuning (`epochs`) is for pruned ones")
    if method is not None:
        drawn = image_text.drawn(bench.ids["calibration"], bench.config, settings.calibration, bench.seed)
        calls = [task.call(drawn[i : i + settings.together]) for i in range(0, len(drawn), settings.together)]

        def tune(model: nn.Module, number: int) -> None:
            learned = image_text.load(bench.ids["data"], bench.config, "train")
            image_text_tuning.tune(task, learned, settings, bench.seed)

        def objective(model: nn.Module, batch: Sequence[Call]) -> Tensor:
            return torch.stack([task.loss(call) for call in batch]).mean()

        plan = weights.prune(
            method, model, bench.budget, calls, objective=objective, tune=tune if settings.epochs else None,
            seed=bench.seed, progress=False,
        )  # fmt: skip
        report = plan.report
    model.eval()
    return {**task.scores(examples), **sizes(model, report)}


class Asked(ABC):
    """One of the things that such models are asked. model: is read alone, and lies on the device."""

    classes: ClassVar[tuple[str, ...]]  # of models that can answer

    def __init__(self, settings: ImageText.Settings, processor: Any, model: Any, device: torch.device) -> None:
        self.settings, self.model, self.device = settings, model, device
        self.tokenizer, self.pictures = processor.tokenizer, processor.image_processor

    def check(self, examples: Sequence[Example]) -> None:
        """Refuse a model of another kind, before any work."""
        if type(self.model).__name__ not in self.classes:
            raise PrunelabError(
                f"a {type(self.model).__name__} is not asked this; give a {' or a '.join(self.classes)}"
            )

    @abstractmethod
    def call(self, examples: Sequence[Example], augment: Any = None) -> Call:
        """The arguments of the model's forward of training examples. augment: what each picture goes through first."""

    @abstractmethod
    def loss(self, call: Call) -> Tensor:
        """What the model was trained with, of the model's own loss a scalar."""

    @abstractmethod
    def scores(self, examples: Sequence[Example]) -> dict[str, Any]:
        """What the task tells of this kind."""

    # -- shared ------------------------------------------------------------------------------------------------------

    def seen(self, paths: Sequence[Any], augment: Any = None) -> Tensor:
        """Pictures [N, 3, H, W] as the model sees them."""

        def prepared(picture: Any) -> Tensor:
            picture = picture if augment is None else augment(picture)
            result: Tensor = self.pictures(images=picture, return_tensors="pt")["pixel_values"][0]
            return result

        return torch.stack([images.read(path, prepared) for path in paths]).to(self.device)

    def read(self, texts: Sequence[str], **options: Any) -> dict[str, Tensor]:
        """Token ids and mask [N, T]."""
        held = self.tokenizer(list(texts), return_tensors="pt", truncation=True, **options)
        return {name: held[name].to(self.device) for name in ("input_ids", "attention_mask")}

    def parts(self, things: Sequence[Any], what: str) -> Iterator[Sequence[Any]]:
        size = self.settings.batch
        for start in track(range(0, len(things), size), what, transient=True):
            yield things[start : start + size]


class Captions(Asked):
    """Texts that the model writes."""

    classes = ("BlipForConditionalGeneration",)

    def call(self, examples: Sequence[Example], augment: Any = None) -> Call:
        texts = [PROMPT + image_text.plain(e.texts[0], image_text.WORDS["captions"]) for e in examples]
        read = self.read(texts, padding=True, max_length=LENGTHS["captions"])
        read["input_ids"][:, 0] = self.model.config.text_config.bos_token_id
        labels = read["input_ids"].masked_fill(read["attention_mask"] == 0, -100)
        labels[:, : len(self.tokenizer(PROMPT)["input_ids"]) - 1] = -100  # the prompt is given
        return {"pixel_values": self.seen([e.pictures[0] for e in examples], augment), **read, "labels": labels}

    def loss(self, call: Call) -> Tensor:
        logits = self.model(**call).logits[:, :-1].float()
        return F.cross_entropy(logits.flatten(0, 1), call["labels"][:, 1:].flatten(), label_smoothing=SMOOTHED)

    def check(self, examples: Sequence[Example]) -> None:
        super().check(examples)
        optional("pycocoevalcap", "the score of captions")
        if shutil.which("java") is None:
            raise PrunelabError("pycocoevalcap splits captions into words by a program in Java; install a Java runtime")
        if self.settings.spice:
            spice()

    @torch.inference_mode()
    def written(self, examples: Sequence[Example]) -> list[str]:
        """A caption of each picture."""
        settings, results = self.settings, list[str]()
        for part in self.parts(examples, "writing captions"):
            prompt = self.read([PROMPT.strip()] * len(part))
            ids = self.model.generate(
                pixel_values=self.seen([e.pictures[0] for e in part]), **prompt, num_beams=settings.beams,
                max_length=settings.longest, min_length=settings.shortest, do_sample=False,
            )  # fmt: skip
            texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
            results += [text.removeprefix(PROMPT.strip()).strip() for text in texts]
        return results

    def scores(self, examples: Sequence[Example]) -> dict[str, Any]:
        return caption_scores(self.written(examples), [e.texts for e in examples], self.settings.spice)


def caption_scores(written: Sequence[str], references: Sequence[Sequence[str]], with_spice: bool) -> dict[str, Any]:
    """CIDEr, BLEU-4 and perhaps SPICE, a hundredfold, as pycocoevalcap tells them."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    split = PTBTokenizer()
    wanted = split.tokenize({i: [{"caption": text} for text in texts] for i, texts in enumerate(references)})
    given = split.tokenize({i: [{"caption": text}] for i, text in enumerate(written)})
    cider, each = Cider().compute_score(wanted, given)
    bleu, _ = Bleu(4).compute_score(wanted, given, verbose=0)
    results: dict[str, Any] = {"cider": uncertainty.mean([100 * float(score) for score in each])}
    results["cider"]["value"] = round(100 * float(cider), 4)
    results["bleu4"] = {"value": round(100 * float(bleu[3]), 4)}
    if with_spice:
        results["spice"] = {"value": round(100 * float(spice().compute_score(wanted, given)[0]), 4)}
    return results


def spice() -> Any:
    """SPICE's scorer, which has its parser at hand."""
    from pycocoevalcap.spice.spice import Spice

    try:
        return Spice()
    except Exception as error:  # no parser that the library could fetch
        raise PrunelabError(
            f"SPICE needs Java and Stanford CoreNLP, which {SPICE} fetches when it is first made"
            f" ({type(error).__name__}); run `from {SPICE}.spice import Spice; Spice()` where there is a network"
        ) from None


class Retrieval(Asked):
    """Texts found by pictures, and pictures by texts: the nearest by their features first, of which each is then
    compared with what was sought."""

    classes = ("BlipForImageTextRetrieval",)

    def texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Token ids and mask [N, T] as the encoder of texts alone reads them."""
        plain = [image_text.plain(text, image_text.WORDS["retrieval"]) for text in texts]
        return self.read(plain, padding="max_length", max_length=LENGTHS["retrieval"])

    def marked(self, read: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same as it is read with a picture: the first token is the encoder's own, the vocabulary's last."""
        ids = read["input_ids"].clone()
        ids[:, 0] = self.model.config.text_config.vocab_size - 1
        return {**read, "input_ids": ids}

    def call(self, examples: Sequence[Example], augment: Any = None) -> Call:
        read = self.marked(self.texts([e.texts[0] for e in examples]))
        return {"pixel_values": self.seen([e.pictures[0] for e in examples], augment), **read}

    def feature(self, read: Mapping[str, Tensor]) -> Tensor:
        """Of texts [N, D], of length 1."""
        first = self.model.text_encoder(**read).last_hidden_state[:, 0]
        return F.normalize(self.model.text_proj(first), dim=-1)

    def matching(self, read: Mapping[str, Tensor], seen: Tensor) -> Tensor:
        """Logits [N, 2] of marked texts and features of pictures [N, S, D]: no match, and match."""
        state = self.model.text_encoder(**read, encoder_hidden_states=seen).last_hidden_state
        logits: Tensor = self.model.itm_head(state[:, 0])
        return logits

    def loss(self, call: Call) -> Tensor:
        """The matching loss of a call's pairs, and of a negative picture and text of each: drawn by their likeness,
        with the same draws in every call, as the perturbed losses are compared. One pair by itself has no negatives."""
        seen = self.model.vision_model(pixel_values=call["pixel_values"]).last_hidden_state
        read = {name: call[name] for name in ("input_ids", "attention_mask")}
        alone = read["input_ids"].clone()
        if self.tokenizer.cls_token_id is not None:
            alone[:, 0] = self.tokenizer.cls_token_id
        images_of = F.normalize(self.model.vision_proj(seen[:, 0]), dim=-1)
        texts_of = self.feature({**read, "input_ids": alone})
        same = torch.eye(len(seen), dtype=torch.bool, device=seen.device)
        generator = torch.Generator().manual_seed(0)
        return self.told_apart(read, seen, images_of @ texts_of.T / TEMPERATURE, same, generator)

    def told_apart(
        self, read: Mapping[str, Tensor], seen: Tensor, likeness: Tensor, same: Tensor, generator: torch.Generator
    ) -> Tensor:
        """The matching loss of pairs, and of a negative text to each picture and picture to each text, drawn by the
        likeness [N, N] among those that are not of the `same` picture."""
        count = len(seen)
        texts = [torch.arange(count)]
        pictures = [torch.arange(count)]
        if not bool(same.all()):
            away = [F.softmax(rows.detach().float(), 1).masked_fill(same, 0).cpu() for rows in (likeness, likeness.T)]
            picked = [torch.multinomial(rows + 1e-12 * ~same.cpu(), 1, generator=generator)[:, 0] for rows in away]
            texts += [torch.arange(count), picked[0]]
            pictures += [picked[1], torch.arange(count)]
        chosen, shown = torch.cat(texts).to(seen.device), torch.cat(pictures).to(seen.device)
        logits = self.matching({name: value[chosen] for name, value in read.items()}, seen[shown])
        labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        labels[:count] = 1
        return F.cross_entropy(logits.float(), labels)

    @torch.inference_mode()
    def scores(self, examples: Sequence[Example]) -> dict[str, Any]:
        texts = [text for e in examples for text in e.texts]
        owner = torch.tensor([i for i, e in enumerate(examples) for _ in e.texts])
        states, features = [], []
        for part in self.parts(examples, "seeing"):
            state = self.model.vision_model(pixel_values=self.seen([e.pictures[0] for e in part])).last_hidden_state
            states.append(finite(state, "its weights and the budget").cpu())
            features.append(F.normalize(self.model.vision_proj(state[:, 0]), dim=-1))
        read = [self.texts(part) for part in self.parts(texts, "reading")]
        whole = {name: torch.cat([part[name] for part in read]) for name in read[0]}
        likeness = torch.cat(features) @ torch.cat([self.feature(part) for part in read]).T  # [pictures, texts]
        marked, seen = self.marked(whole), torch.cat(states)
        found: dict[str, Any] = {}
        for what, rows in (("text", likeness), ("image", likeness.T)):
            result = self._ranked(rows, marked, seen, texts_sought=what == "text")
            own = owner[result] == torch.arange(len(rows))[:, None] if what == "text" else result == owner[:, None]
            found |= {f"{what}_recall_{n}": uncertainty.share(own[:, :n].any(1)) for n in (1, 5, 10)}
        return found

    def _ranked(self, likeness: Tensor, marked: Mapping[str, Tensor], seen: Tensor, *, texts_sought: bool) -> Tensor:
        """Numbers [n, 10] of what was found for each row, best first."""
        results = []
        for i in track(range(len(likeness)), "comparing", transient=True):
            near, places = likeness[i].topk(min(self.settings.shortlist, likeness.shape[1]))
            chosen = places if texts_sought else torch.full_like(places, i)
            shown = torch.full_like(places, i) if texts_sought else places
            scores = [
                self.matching({n: v[c] for n, v in marked.items()}, seen[s.cpu()].to(self.device))[:, 1]
                for c, s in zip(chosen.split(self.settings.batch), shown.split(self.settings.batch), strict=True)
            ]
            order = finite(torch.cat(scores), "its weights and the budget") + near
            best = places[order.argsort(descending=True, stable=True)][:10].cpu()
            results.append(F.pad(best, (0, 10 - len(best)), value=int(best[-1])))
        return torch.stack(results)


class Pairs(Asked):
    """Whether sentences are true of two pictures."""

    classes = ("BlipNlvr",)

    def call(self, examples: Sequence[Example], augment: Any = None) -> Call:
        seen = self.seen([path for e in examples for path in e.pictures], augment).unflatten(0, (-1, 2))
        read = self.read([image_text.plain(e.texts[0], image_text.WORDS["pairs"]) for e in examples], padding=True)
        read["input_ids"][:, 0] = self.model.text_encoder.config.vocab_size - 1
        labels = torch.tensor([e.label for e in examples], device=self.device)
        return {"pixel_values": seen, **read, "labels": labels}

    def loss(self, call: Call) -> Tensor:
        loss: Tensor = self.model(**call).loss
        return loss

    @torch.inference_mode()
    def scores(self, examples: Sequence[Example]) -> dict[str, Any]:
        right = []
        for part in self.parts(examples, "judging"):
            call = self.call(part)
            logits = finite(self.model(**call).logits, "its weights and the budget")
            right.append((logits.argmax(-1) == call["labels"]).cpu())
        return {"accuracy": uncertainty.share(torch.cat(right))}


class Classes(Asked):
    """Classes named by the nearest of their prompts' mean features."""

    classes = ("CLIPModel",)

    def check(self, examples: Sequence[Example]) -> None:
        super().check(examples)
        if self.settings.epochs:
            raise PrunelabError("classes have no texts to fine-tune with; leave `epochs` out")
        if self.settings.templates > len(image_text.PROMPTS):
            raise PrunelabError(
                f"there are {len(image_text.PROMPTS)} prompts, not {self.settings.templates}; ask for fewer"
            )

    def call(self, examples: Sequence[Example], augment: Any = None) -> Call:
        read = self.read([e.texts[0] for e in examples], padding="max_length", max_length=self._longest())
        return {"pixel_values": self.seen([e.pictures[0] for e in examples], augment), **read}

    def _longest(self) -> int:
        return int(self.model.config.text_config.max_position_embeddings)

    def loss(self, call: Call) -> Tensor:
        """The contrastive loss of a call's pairs, of which there must be several for it to tell anything."""
        loss: Tensor = self.model(**call, return_loss=True).loss
        return loss

    @torch.inference_mode()
    def heads(self) -> Tensor:
        """Features [C, D] of the classes, of length 1."""
        results = []
        for part in self.parts(image_text.class_names(), "reading names"):
            texts = [prompt.format(name) for name in part for prompt in image_text.PROMPTS[: self.settings.templates]]
            read = self.read(texts, padding="max_length", max_length=self._longest())
            each = F.normalize(self._feature(self.model.get_text_features(**read)), dim=-1)
            results.append(F.normalize(each.unflatten(0, (len(part), -1)).mean(1), dim=-1))
        return torch.cat(results)

    @staticmethod
    def _feature(found: Any) -> Tensor:
        features: Tensor = found if isinstance(found, Tensor) else found.pooler_output
        return features

    @torch.inference_mode()
    def scores(self, examples: Sequence[Example]) -> dict[str, Any]:
        heads, right = self.heads(), []
        for part in self.parts(examples, "classifying"):
            seen = self._feature(self.model.get_image_features(pixel_values=self.seen([e.pictures[0] for e in part])))
            named = (finite(seen, "its weights and the budget") @ heads.T).argmax(-1).cpu()
            right.append(named == torch.tensor([e.label for e in part]))
        return {"top1": uncertainty.share(torch.cat(right))}


ASKED: Mapping[str, type[Asked]] = {
    "retrieval": Retrieval, "captions": Captions, "pairs": Pairs, "classes": Classes,
}  # fmt: skip
