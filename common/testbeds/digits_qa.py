"""The image language model that answers questions about pictures of digits (`common.data.questions`): LLaVA-1.5's
parts at a small size, a CLIP tower with class token, a projector of two layers and a Llama decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunelab.common.data import pictures, questions
from prunelab.common.data.pictures import CELL, PICTURE
from prunelab.common.data.questions import IDS
from prunelab.common.testbeds.base import Testbed
from prunelab.common.testbeds.code_lm import exact_attention

QUICK, FULL, BATCH, TEST_SEED = 250, 2000, 50, 1
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class DigitsQA(Testbed):
    """Tower, projector and decoder learn with no weights to start from.

    Questions end in the word that names what is asked for. With a word of the chat behind it, as in larger models, the
    decoder's last token has to fetch it first, and short trials did not get beyond naming any digit of the picture.

    rounds: each picture of a batch is asked every form of question so many times. All its questions stand behind it in
    one sequence and do not see one another, so that it is encoded once.

    alone: share of the training that goes by before questions are asked. Until then, and beside the questions, tower
    and projector learn to name: a patch's feature, times the decoder's embeddings of words, gives the digit that the
    patch belongs to, its place and its colour, or `nothing`; a picture's class token, taken the same way behind the
    tower's last layer, says which digits there are, much as CLIP's knows the words of a caption, so that it looks at
    them. No parameters are added for it. naming: its weight in the loss beside the questions.

    layer_decay: learning rate of a decoder layer, and the weight of what it starts with, as a share of the next one's.
    It decides where the decoder looks. With equal layers it has read most answers off the picture in its first two, and
    keeping a quarter of the tokens at random from the third on cost 6 points where it costs over 20 with slow early
    layers (one training each).

    ramp: share of the training over which clutter grows from none to full contrast, so that digits are found early.
    """

    steps: int = 3400
    batch: int = 16
    rate: float = 2e-3
    warmup: float = 0.03
    check_every: int = 200
    rounds: int = 2
    alone: float = 0.3
    naming: float = 0.3
    ramp: float = 0.3
    tower_width: int = 48
    tower_depth: int = 4
    tower_heads: int = 4
    width: int = 64
    depth: int = 5
    heads: int = 4
    inner: int = 160
    theta: float = 1e5
    layer_decay: float = 0.5

    name: ClassVar[str] = "digits_qa"
    needs: ClassVar[tuple[str, ...]] = ("torch", "transformers", "tokenizers", "scikit-learn")
    kind: ClassVar[questions.Kind] = "picture"

    def build(self) -> nn.Module:
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

        config = LlavaConfig(
            vision_config=CLIPVisionConfig(**self.tower(PICTURE * CELL), attention_dropout=0.0),
            text_config=LlamaConfig(**self.decoder(), attention_bias=True),
            image_token_id=IDS[questions.IMAGE], image_seq_length=PICTURE**2, tie_word_embeddings=False,
        )  # fmt: skip
        return self.started(LlavaForConditionalGeneration(config))

    def tower(self, side: int) -> dict[str, Any]:
        """Sizes of the image encoder, for pictures of `side` pixels."""
        return {
            "hidden_size": self.tower_width, "intermediate_size": 2 * self.tower_width,
            "num_hidden_layers": self.tower_depth, "num_attention_heads": self.tower_heads,
            "image_size": side, "patch_size": CELL,
        }  # fmt: skip

    def decoder(self) -> dict[str, Any]:
        """Sizes of the decoder."""
        return {
            "vocab_size": len(questions.WORDS), "hidden_size": self.width, "intermediate_size": self.inner,
            "num_hidden_layers": self.depth, "num_attention_heads": self.heads, "num_key_value_heads": self.heads,
            "max_position_embeddings": 512, "rope_parameters": {"rope_type": "default", "rope_theta": self.theta},
            "bos_token_id": IDS[questions.BEGIN], "eos_token_id": IDS[questions.END],
            "pad_token_id": IDS[questions.PAD], "tie_word_embeddings": False,
        }  # fmt: skip

    def started(self, model: Any) -> nn.Module:
        """The model with weights to start from under which looking things up is found early.

        Half of the heads start by looking at what is near, through equal biases of queries and keys, half at what is
        alike, as queries are keys. What heads bring starts as a copy of what they saw, and outputs as the tokens
        themselves.
        """
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() > 1:
                    nn.init.xavier_uniform_(weight.flatten(1))
                if "position_embedding" in name:
                    weight.normal_(0, 0.5)
                if name.endswith("down_proj.weight"):
                    weight.mul_(0.3)
            near = torch.arange(self.width) < self.width // 2
            for number, layer in enumerate(model.model.language_model.layers):
                attend = layer.self_attn
                nn.init.orthogonal_(attend.q_proj.weight, 1.5)
                attend.q_proj.weight[near] *= 0.1
                attend.q_proj.bias.copy_(1.4 * near)
                attend.k_proj.load_state_dict(attend.q_proj.state_dict())
                nn.init.orthogonal_(attend.v_proj.weight)
                attend.o_proj.weight.copy_(0.5 * self.pace(number) * attend.v_proj.weight.T)
            words = model.get_input_embeddings().weight.normal_(0, 0.5)
            model.lm_head.weight.copy_(0.2 * words)
        return model

    def pace(self, layer: int) -> float:
        """Learning rate of a decoder layer, and weight of what it starts with, as a share of the last one's."""
        return self.layer_decay ** (self.depth - 1 - layer)

    def scale(self, parameter: str) -> float:
        _, inside, rest = parameter.partition("language_model.layers.")
        return self.pace(int(rest.split(".")[0])) if inside else 1.0

    def loss(self, model: nn.Module, progress: float, generator: torch.Generator) -> Tensor:
        net: Any = model
        net.set_attn_implementation(exact_attention())
        clutter = min(1.0, progress / self.ramp) if self.ramp else 1.0
        facts = self.compose(generator, clutter)
        with torch.autocast("cpu", torch.bfloat16):
            encoded, named = self.encode(net, facts)
            if progress < self.alone:
                return named
            return self.answering(net, facts, encoded, generator) + self.naming * named

    def compose(self, generator: torch.Generator, clutter: float) -> questions.Facts:
        return pictures.pictures("train", self.batch, generator, clutter, deformed=True)

    def encode(self, net: Any, facts: Any) -> tuple[Mapping[str, Any], Tensor]:
        """What the decoder reads of the pictures, and the loss of naming what they show."""
        seen = net.model.get_image_features(facts.pixels, return_dict=True, output_hidden_states=True)
        features = torch.stack(list(seen.pooler_output))
        cls = net.model.multi_modal_projector(seen.last_hidden_state[:, :1])[:, 0]
        there = (facts.digit.unsqueeze(2) == torch.arange(10)).any(1)  # [B, 10]
        whole = F.binary_cross_entropy_with_logits(self.names(net, cls, questions.DIGITS)[:, 1:].float(), there.float())
        zones = torch.arange(len(questions.PLACES)).expand_as(facts.digit)
        known = ((questions.DIGITS, facts.digit), (questions.PLACES, zones), (questions.COLOURS, facts.ink))
        patches = [self.patchwise(net, features, words, facts.cells(values)) for words, values in known]
        return {"image": seen}, torch.stack(patches).sum() + whole

    def patchwise(self, net: Any, features: Tensor, words: Sequence[str], cells: Tensor) -> Tensor:
        """Loss of features [..., N, D] that should name the word, by its place in `words`, of their cells [..., N], or
        `nothing` (-1)."""
        return F.cross_entropy(self.names(net, features, words).flatten(0, -2).float(), cells.flatten() + 1)

    def names(self, net: Any, features: Tensor, words: Sequence[str]) -> Tensor:
        """Logits [..., 1 + W] of `nothing` and of W words for features [..., D], by the decoder's own embeddings."""
        known = net.get_input_embeddings()(questions.ids([questions.NOTHING, *words]))
        return features @ known.T / self.width**0.5

    def answering(self, net: Any, facts: Any, encoded: Mapping[str, Any], generator: torch.Generator) -> Tensor:
        """Loss of the answer, and of the end behind it, to every form of question."""
        drawn = [
            questions.ask(self.kind, form, facts, generator)
            for form in questions.FORMS[self.kind]
            for _ in range(self.rounds)
        ]
        lead = questions.prefix(self.kind)
        words = torch.stack([question for question, _ in drawn], 1)  # [B, Q, 5]
        answer = torch.stack([answer for _, answer in drawn], 1)  # [B, Q]
        asking = torch.cat([words, answer.unsqueeze(2)], 2)  # [B, Q, 6]
        tokens = torch.cat([lead.expand(len(answer), -1), asking.flatten(1)], 1)
        mask, places = together(len(lead), *asking.shape[1:])
        hidden = net.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=places,
            mm_encoder_outputs=dict(encoded),
            use_cache=False,
        ).last_hidden_state
        spoken = hidden[:, len(lead) :].unflatten(1, asking.shape[1:])[:, :, -2:]  # at the last word and at the answer
        targets = torch.stack([answer, torch.full_like(answer, IDS[questions.END])], 2)
        nll = F.cross_entropy(net.lm_head(spoken).float().flatten(0, 2), targets.flatten(), reduction="none")
        first, end = nll.view(-1, 2).mean(0)
        return first + 0.1 * end

    def evaluate(self, model: nn.Module, quick: bool = False) -> dict[str, float]:
        """Accuracy on held-out digits, over all questions and by form; at the end also what the words of questions
        alone achieve (`questions.blind`)."""
        count = QUICK if quick else FULL
        batch = questions.draw(self.kind, "test", count, TEST_SEED)
        right = torch.tensor([given == sample.answer for given, sample in zip(answers(model, batch), batch)]).float()
        forms = list(questions.FORMS[self.kind])
        out = {"accuracy": float(right.mean())}
        out |= {form: float(right[i :: len(forms)].mean()) for i, form in enumerate(forms)}
        return out if quick else out | {"blind": questions.blind(batch), "questions": count}

    def extras(self) -> Mapping[str, str]:
        return {TOKENIZER: questions.tokenizer().to_str(pretty=False)}


def answers(model: Any, samples: Sequence[questions.Sample]) -> list[int]:
    """The token that the model finds likeliest behind each prompt."""
    results: list[int] = []
    for start in range(0, len(samples), BATCH):
        given = questions.inputs(samples[start : start + BATCH])
        results += model(**given, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(-1).tolist()
    return results


@cache
def together(lead: int, count: int, length: int) -> tuple[Tensor, Tensor]:
    """Mask [1, 1, N, N] (True: sees) and positions [1, N] of `count` questions behind a picture of `lead` tokens, as
    if each were the only one."""
    own = torch.arange(count).repeat_interleave(length)
    group = torch.cat([torch.full((lead,), -1), own])
    causal = torch.ones(len(group), len(group), dtype=torch.bool).tril()
    mask = causal & ((group == -1) | (group.unsqueeze(1) == group))
    indices = torch.cat([torch.arange(lead), lead + torch.arange(length).repeat(count)])
    return mask[None, None], indices.unsqueeze(0)
