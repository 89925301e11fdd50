"""Encoders of transformers: BERT, and CLIP's of texts."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from prunelab.common.weights.adapters.pretrained import Pretrained
from prunelab.common.weights.adapters.projections import OUT, length

_BERT = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


class Bert(Pretrained):
    """BERT with or without a head on top."""

    family = "bert"
    model_classes = tuple(f"transformers.models.bert.modeling_bert.Bert{name}" for name in _BERT)
    shared = (("self.query", "self.key", "self.value"),)
    attention = "attention.self"
    head_size = "attention_head_size"
    heads = {
        "q": "attention.self.query",
        "k": "attention.self.key",
        "v": "attention.self.value",
        "o": "attention.output.dense",
    }
    mlp = {"up": "intermediate.dense", "down": "output.dense"}

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.layers = "bert.encoder.layer" if hasattr(model, "bert") else "encoder.layer"  # type: ignore[misc]

    def run(self, sample: Tensor) -> Any:
        return self.model(input_ids=sample.unsqueeze(0))

    def resize(self, block: int) -> None:
        attention = self._part(block, self.attention)
        attention.all_head_size = length(attention.query, OUT)
        attention.num_attention_heads = attention.all_head_size // attention.attention_head_size


class ClipText(Pretrained):
    """CLIP's text encoder, as Stable Diffusion has it. It attends to what comes before a token alone, and to padding as
    to any other token. A calibration sample is a caption with its padding."""

    family = "clip_text"
    model_classes = tuple(
        f"transformers.models.clip.modeling_clip.CLIPText{name}" for name in ("Model", "ModelWithProjection")
    )
    shared = (("q_proj", "k_proj", "v_proj"),)
    attention = "self_attn"
    heads = {**{role: f"self_attn.{role}_proj" for role in "qkv"}, "o": "self_attn.out_proj"}
    mlp = {"up": "mlp.fc1", "down": "mlp.fc2"}

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        inner = "text_model." if hasattr(model, "text_model") else ""
        self.layers = f"{inner}encoder.layers"  # type: ignore[misc]

    def run(self, sample: Tensor) -> Any:
        return self.model(input_ids=sample.unsqueeze(0))

    def resize(self, block: int) -> None:
        attention = self._part(block, self.attention)
        attention.num_heads = length(attention.q_proj, OUT) // attention.head_dim
