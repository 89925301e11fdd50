"""A tiny CLIP checkpoint with its processor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def tiny_clip(folder: Path, vocabulary: Sequence[str], width: int = 16) -> tuple[Any, Any]:
    """Write one whose encoder of images is `width` wide; its tokenizer and its processor."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(("<pad>", "<start>", "<end>", *vocabulary))}
    plain = Tokenizer(models.WordLevel(words, "<pad>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<end>", model_max_length=8
    )
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**sizes, "vocab_size": len(words), "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0},
        vision_config={**sizes, "hidden_size": width, "image_size": 16, "patch_size": 8}, projection_dim=8,
    )  # fmt: skip
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return tokenizer, CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16), tokenizer)
