"""The language model of Python source (`common.data.code`): a small Llama with grouped queries and 1024 tokens of
context, which also finds constants again that were defined anywhere in them."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunelab.common.data import code
from prunelab.common.testbeds.base import Testbed

if TYPE_CHECKING:
    from transformers import PretrainedConfig

QUICK, FULL, TEST_SEED = 8, 64, 1
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class CodeLM(Testbed):
    """batch counts sequences of full context; shorter ones come in greater number, the same tokens a step.

    lengths: of the sequences, one stage of the training after another. stages: progress at which each next one begins.
    vocabulary: tokens. width, depth, heads, kv_heads, head_dim, inner: of the transformer.

    recall: share of the sequences that ask for definitions, `pairs` of them each; their answers count as much in the
    loss as all other tokens together. Where sequences are too short for that, the share `copying` of them repeats
    stretches of random tokens: copying is what recall grows from. Started with definitions, the model could not tell
    two constants apart after 1000 steps, and a quarter of repeats was too few.
    """

    steps: int = 2400
    batch: int = 4
    rate: float = 3e-3
    warmup: float = 0.02
    decay: float = 0.1
    context: int = 1024
    lengths: tuple[int, ...] = (32, 64, 128, 256, 512, 1024)
    stages: tuple[float, ...] = (0.2, 0.28, 0.44, 0.7, 0.86)
    vocabulary: int = 2048
    width: int = 128
    depth: int = 6
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 16
    inner: int = 352
    recall: float = 0.25
    copying: float = 0.5
    pairs: int = 4

    name: ClassVar[str] = "code_lm"
    needs: ClassVar[tuple[str, ...]] = ("torch", "transformers", "tokenizers", *code.DISTRIBUTIONS)

    def config(self) -> PretrainedConfig:
        """The model's configuration in transformers."""
        from transformers import LlamaConfig

        return LlamaConfig(**self.sizes(), intermediate_size=self.inner)

    def sizes(self) -> dict[str, Any]:
        """What the configurations of all decoders of transformers share."""
        return {
            "vocab_size": self.vocabulary, "hidden_size": self.width, "num_hidden_layers": self.depth,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim,
            "max_position_embeddings": self.context, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
            "tie_word_embeddings": False, "initializer_range": 0.05,
        }  # fmt: skip

    def build(self) -> nn.Module:
        """The model as its library makes it, with weights to start from under which copying is found early.

        Tokens are large beside what blocks add, and outputs start as the tokens themselves, so that to attend is to
        copy. All tokens share a direction, from which heads learn where to look apart from what they look for.
        """
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(self.config())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
                    parameter.mul_(0.3)
            tokens = model.get_input_embeddings().weight.normal_(0, 0.5)
            model.get_output_embeddings().weight.copy_(0.1 * tokens)
            tokens.add_(0.5 * torch.randn(self.width))
        return model

    def loss(self, model: nn.Module, progress: float, generator: torch.Generator) -> Tensor:
        length = self.lengths[bisect(self.stages, progress)]
        count = self.batch * self.context // length
        copying = length < self.recalls.shortest(self.pairs)
        asking = round((self.copying if copying and self.recall else self.recall) * count)
        train = code.stream("train", self.vocabulary)
        tokens = code.windows(train, count - asking, length, generator)
        if not asking:
            return self.surprise(model, tokens).mean()
        if copying:
            repeats, known = code.repeats(self.recalls.words, asking, length, generator)
            nll, copied = self.surprise(model, torch.cat([tokens, repeats])).tensor_split([count - asking])
            return nll.mean() + copied[known[:, 1:]].mean()
        queries = self.recalls.draw(train, asking, length, self.pairs, generator)
        nll = self.surprise(model, torch.cat([tokens, queries.tokens]))
        return nll.mean() + nll[-asking:, queries.answers - 1].mean()

    def surprise(self, model: nn.Module, tokens: Tensor) -> Tensor:
        """Negative log likelihood [B, T - 1] in nats of every token [B, T] behind the first; products in bfloat16."""
        model.set_attn_implementation(exact_attention())  # type: ignore[operator]
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(tokens, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].float().transpose(1, 2), tokens[:, 1:], reduction="none")

    def evaluate(self, model: nn.Module, quick: bool = False) -> dict[str, float]:
        """Perplexity and share of next tokens right on held-out code, share of definitions recalled, all at full
        context; at the end also what counting pairs of tokens achieves."""
        held_out = code.stream("held_out", self.vocabulary)
        tokens = code.windows(held_out, QUICK if quick else FULL, self.context)
        nll, right = [], []
        for row in tokens.split(1):
            logits = model(row, use_cache=False).logits[0, :-1]
            nll.append(F.cross_entropy(logits, row[0, 1:]))
            right.append((logits.argmax(-1) == row[0, 1:]).float().mean())
        out = {"perplexity": float(torch.stack(nll).mean().exp()), "accuracy": float(torch.stack(right).mean())}
        if self.recall:
            out["recall"] = self.recalled(model, len(tokens))
        if not quick:
            train = code.stream("train", self.vocabulary)
            out |= {"tokens": tokens[:, 1:].numel()} | code.count_models(train, tokens, self.vocabulary)
        return out

    def recalled(self, model: nn.Module, count: int) -> float:
        """Share of definitions that the model's likeliest token gives back, in held-out code at full context."""
        draws = torch.Generator().manual_seed(TEST_SEED)
        queries = self.recalls.draw(code.stream("held_out", self.vocabulary), count, self.context, self.pairs, draws)
        rows = [
            model(row, use_cache=False).logits[0, queries.answers - 1].argmax(-1) for row in queries.tokens.split(1)
        ]
        return float((torch.stack(rows) == queries.tokens[:, queries.answers]).float().mean())

    def extras(self) -> Mapping[str, str]:
        return {TOKENIZER: code.tokenizer(self.vocabulary).to_str(pretty=False)}

    @cached_property
    def recalls(self) -> code.Recalls:
        """Draws recall sequences in the tokens of the training files' tokenizer."""
        return code.Recalls.of(code.tokenizer(self.vocabulary))


@cache
def exact_attention() -> str:
    """The name, in transformers, of its attention kept at float32 under autocast: on the CPU the backward pass of
    attention takes five times as long in bfloat16, and that of everything else half as long."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **rest: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask, **rest)

    name = "sdpa_float32"
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name
