"""One tiny random model of every family that token pruning is applied to, under one small interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.common.apply import apply
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.plan import ModelInfo
from prunelab.common.tokens.adapters import adapter_for
from prunelab.common.tokens.role import TokenPruner
from tests.contract import vlms
from tests.contract.references import VITS, token_ids, vit


def _sharpened(model: nn.Module) -> nn.Module:
    """Larger weights, so that what a token says depends on the others."""
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(1.5)
    return model.eval()


def _vim() -> nn.Module:
    from prunelab.common.backbones.vim import Vim

    torch.manual_seed(0)
    return _sharpened(Vim(size=32, patch=8, width=24, depth=16, states=4, classes=7))


def _plain_mamba() -> nn.Module:
    from prunelab.common.backbones.plain_mamba import PlainMambaClassifier

    torch.manual_seed(0)
    return _sharpened(PlainMambaClassifier(7, size=32, patch=8, width=24, depth=16, states=4, convolutions=1))


def _segmenter() -> nn.Module:
    from prunelab.common.backbones.segvit import segmenter

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"window": 32, "patch": 4, "width": 24, "depth": 12, "heads": 3, "stages": (5, 7, 11)}
    model = _sharpened(segmenter(classes=5, head_width=12, head_heads=2, head_layers=1, **sizes))
    with torch.no_grad():
        for head in model.heads:  # sure of something
            for p in head.parameters():
                p.mul_(20.0 if p.dim() > 1 else 1.0)
    return model


def _dino() -> nn.Module:
    from prunelab.common.backbones.dino import dino_small

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"width": 32, "heads": 4, "feedforward": 48, "encoder_layers": 6, "decoder_layers": 2}
    return _sharpened(dino_small(7, 3, levels=3, queries=5, groups=4, image_size=(32, 32), **sizes))


def _deformable_detr() -> nn.Module:
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection

    torch.manual_seed(0)
    config = DeformableDetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=_resnet(),
        d_model=32,
        encoder_layers=6,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_queries=5,
        two_stage_num_proposals=5,
        two_stage=True,
        with_box_refine=True,
        num_labels=7,
        dropout=0.0,
    )
    return _sharpened(DeformableDetrForObjectDetection(config))


def _resnet() -> Any:
    from transformers import ResNetConfig

    stages = ["stage2", "stage3", "stage4"]
    return ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, out_features=stages)


def _causal_lm() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {**_LM, "num_hidden_layers": 6, "num_key_value_heads": 2, "max_position_embeddings": 24}
    return _lively(LlamaForCausalLM(LlamaConfig(**sizes)))


FAMILIES: Mapping[str, Callable[[], nn.Module]] = {
    **{name: partial(vit, name) for name in VITS},
    "vim": _vim,
    "plain_mamba": _plain_mamba,
    "segmenter": _segmenter,
    "dino": _dino,
    "deformable_detr": _deformable_detr,
    **{name: partial(vlms.vlm, name, tower=12) for name in vlms.VLMS},  # methods read its ninth and its last layers
    "llava": partial(vlms.vlm, "llava", tower=12, num_hidden_layers=16),  # and some the sixteenth of the decoder
    "causal_lm": _causal_lm,
}


def images(family: str, batch: int = 3) -> Tensor:
    """Images of the size that the family's tiny model takes."""
    if family in vlms.VLMS:
        return vlms.images(family, batch)
    side = 96 if family == "deformable_detr" else 32
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


@cache
def info(family: str) -> ModelInfo:
    return adapter_for(FAMILIES[family]()).info


# What methods may ask for besides the model, in its simplest form.
SERVICES: Mapping[str, Any] = {
    "frame_scores": torch.ones,
    "text_similarity": lambda hidden, normed=False: hidden.float().amax(-1),
}


@cache
def _adapter(family: str) -> Any:
    return adapter_for(FAMILIES[family]())


def reason(method: TokenPruner, family: str) -> str | None:
    """Why a family cannot give the method's sites, their signals and its `rest`; None where it can."""
    try:
        _adapter(family).check(method, method.sites(info(family)))
    except PrunelabError as error:
        return str(error)
    return None


def usable(method: TokenPruner, family: str) -> bool:
    """Whether the family gives all that the method asks for."""
    return reason(method, family) is None


def applied(method: TokenPruner, model: nn.Module, budget: Budget | float, **options: Any) -> Any:
    """`apply`, with learned parts drawn at random where the method has some, and with services."""
    torch.manual_seed(1)
    parts = method.build(adapter_for(model).info)
    return apply(method, model, budget, parts=None if parts is None else parts.eval(), services=SERVICES, **options)


def output(model: nn.Module, x: Tensor) -> Tensor:
    """What a model says of images, as one tensor [B, ...]; of a language model, the next word behind a question."""
    family = getattr(getattr(model, "config", None), "model_type", None)
    if family in vlms.VLMS:
        return model(**vlms.typed(model, vlms.prompt(family, x))).logits[:, -1]
    if family == "llama" and x.is_floating_point():  # the first 24 numbers of an image, read as words
        words = (x.float().flatten(1)[:, :24].abs() * 997).long() % model.config.vocab_size
        return model(words).logits[:, -1]
    found = model(x)
    if isinstance(found, Tensor):
        return found
    values = [v for k, v in found.items() if k in ("logits", "boxes", "pred_boxes")]
    return torch.cat([v.flatten(1) for v in values], 1)


# -- families that weights are pruned in, beside the language models of `references` -----------------------------------

_TOKENS = {"vocab_size": 61, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SIZES = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4}
_LM = {**_TOKENS, **_SIZES, "max_position_embeddings": 64}
_GPT2 = {"n_embd": 32, "n_inner": 40, "n_layer": 3, "n_head": 4, "n_positions": 64, "tie_word_embeddings": False}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
_MIXTURE = {"n_routed_experts": 6, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_DEEPSEEK = {**_LM, **_LATENT, **_MIXTURE, "first_k_dense_replace": 1}
_QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16}
_T5 = {**_TOKENS, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}

TRANSFORMERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "phi": ("PhiForCausalLM", {**_LM, "num_key_value_heads": 2}),
    "phi3": ("Phi3ForCausalLM", {**_LM, "num_key_value_heads": 2}),
    "gpt_neox": ("GPTNeoXForCausalLM", _LM),
    "gpt2": ("GPT2LMHeadModel", {**_TOKENS, **_GPT2}),
    "gemma": ("GemmaForCausalLM", {**_LM, "num_key_value_heads": 2, "head_dim": 8}),
    "gemma2": ("Gemma2ForCausalLM", {**_LM, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8}),
    "gemma3": ("Gemma3ForCausalLM", {**_LM, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8}),
    "deepseek_v2": ("DeepseekV2ForCausalLM", {**_DEEPSEEK, "q_lora_rank": None}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", {**_DEEPSEEK, "n_group": 2, "topk_group": 1, "num_mtp_layers": 0}),
    "qwen3_moe_mixed": ("Qwen3MoeForCausalLM", {**_LM, **_QWEN, "num_key_value_heads": 2, "mlp_only_layers": [1]}),
    "opt": ("OPTForCausalLM", {**_LM, "ffn_dim": 40, "word_embed_proj_dim": 32}),
    "bert": ("BertForMaskedLM", _LM),
    "t5": ("T5ForConditionalGeneration", _T5),
    "t5_gated": ("T5ForConditionalGeneration", {**_T5, "feed_forward_proj": "gated-gelu"}),
}


def _pretrained(family: str) -> nn.Module:
    import transformers

    name, values = TRANSFORMERS[family]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    model: nn.Module = cls(cls.config_class(**values)).eval()
    return _lively(model)


def _lively(model: nn.Module) -> nn.Module:
    """Weights large enough for activations to differ, and norms and biases that are not their start values."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape) * 0.2 + (p if p.dim() == 1 and "bias" not in name else 0))
        for name, buffer in model.named_buffers():
            if "running" in name or "correction" in name:
                buffer.uniform_(0.5, 1.5)
    return model.eval()


def _resnet18() -> nn.Module:
    import timm

    torch.manual_seed(0)
    return _lively(timm.create_model("test_resnet", num_classes=7))


def _vgg() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 8), (8, 12)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
    return _lively(nn.Sequential(*layers, nn.Flatten(), nn.Linear(12 * 64, 20), nn.ReLU(), nn.Linear(20, 7)))


def _mobilenet() -> nn.Module:
    import timm

    torch.manual_seed(0)
    return _lively(timm.create_model("test_efficientnet", num_classes=7))


WEIGHT_FAMILIES: Mapping[str, Callable[[], nn.Module]] = {
    **{name: partial(_pretrained, name) for name in TRANSFORMERS},
    **{f"vit_{name}": partial(vit, name) for name in ("plain", "dinov2", "qk_norm")},
    "resnet": _resnet18,
    "vgg": _vgg,
    "efficientnet": _mobilenet,
}


def calibration(family: str) -> Tensor:
    """What a weight family is calibrated on: token ids [4, 12] or images [3, 3, 32, 32]."""
    return token_ids() if family in TRANSFORMERS else images(family)


@torch.no_grad()
def answer(model: nn.Module, family: str) -> Tensor:
    """What a model of a weight family says of inputs it was not calibrated on."""
    ids = token_ids(2, seed=9)
    if family.startswith("t5"):
        logits: Tensor = model(input_ids=ids[:, :6], decoder_input_ids=ids[:, 6:]).logits
        return logits
    return output(model, ids if family in TRANSFORMERS else images(family, 2))


__all__ = [
    "FAMILIES",
    "TRANSFORMERS",
    "WEIGHT_FAMILIES",
    "answer",
    "applied",
    "calibration",
    "images",
    "info",
    "output",
    "reason",
    "usable",
]
