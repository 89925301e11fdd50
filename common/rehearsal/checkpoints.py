"""Look-alikes of checkpoints: the same class and depth, as many heads (but in models that see) and the same places of
pictures, but narrow, with random weights; with tokenizer and processor files of the same classes."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.optional import optional
from prunelab.common.models import loading

VOCABULARY = 512
HEAD = 4  # channels of a head
SEEING = 2  # heads of an image encoder
ANSWER = 3  # tokens, behind which the end is likely
MARKS = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<video>", "<begin>", "<end>")
HEADS = ("num_attention_heads", "num_heads", "n_head")
WIDTHS = ("hidden_size", "n_embd", "embed_dim", "d_model", "projection_dim")
LATENT = ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")  # DeepSeek's attention
EXPERTS = ("n_routed_experts", "num_experts")
MANY = 64  # experts, from which on each is as narrow as a head
INNER = ("intermediate_size", "ffn_dim", "n_inner", "moe_intermediate_size", "shared_expert_intermediate_size")
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}<{{ part['type'] }}>\n{% endif %}{% endfor %}{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def narrow(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration's arguments with as many layers, few channels, and as many heads; of models that see, whose
    attention is nearly all that a rehearsal costs, an encoder with few heads and a decoder with a share of its own."""
    results: dict[str, Any] = {
        key: narrow(fewer(key, value) if "vision_config" in arguments else value) if key.endswith("_config") else value
        for key, value in arguments.items()
    }
    heads: Any = next((results[key] for key in HEADS if key in results), None)
    head = 2 * HEAD if "mrope_section" in results.get("rope_parameters", {}) else HEAD
    if heads is not None:
        width = heads * head
        results |= {key: width for key in WIDTHS if key in results}
        results |= {key: 2 * width for key in INNER if key in results}
        results |= {key: head for key in LATENT if key in results}
        if any(int(arguments.get(key, 0)) >= MANY for key in EXPERTS):
            results |= {key: head for key in ("moe_intermediate_size",) if key in results}
        results |= {"head_dim": head} if "head_dim" in results else {}
        results |= {"rotary_dim": head} if "rotary_dim" in results else {}
        if "ffn_dim" in results:  # OPT, whose embeddings may be narrower
            results["word_embed_proj_dim"] = width // 2 if "word_embed_proj_dim" in results else width
        if "mrope_section" in results.get("rope_parameters", {}):
            results["rope_parameters"] = {**results["rope_parameters"], "mrope_section": [1, 1, 2]}
        if "partial_rotary_factor" in results:
            results["partial_rotary_factor"] = 0.5
    if "vocab_size" in results:
        marks = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        results |= {"vocab_size": VOCABULARY, **marks}
    return results


def fewer(part: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A part of a model that sees with fewer heads, whose ratio to those of keys and values stays."""
    found = {key: int(arguments[key]) for key in (*HEADS, "num_key_value_heads") if arguments.get(key)}
    if part == "vision_config":
        return {**arguments, **{key: min(SEEING, count) for key, count in found.items()}}
    share = next(n for n in (4, 2, 1) if not any(count % n for count in found.values()))
    return {**arguments, **{key: count // share for key, count in found.items()}}


def tokenizer(name: str) -> Any:
    """Of a class of models. Whole words, most of which are unknown; for Qwen's, whose tokenizers read bytes whatever
    their files say, and GPT-2's, of which others are made, single bytes."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = [*MARKS, "A", "B", "C", "D", "Yes", "No", "yes", "no", *map(str, range(10))]
    if "Qwen" in name or "GPT2" in name:
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        known = {word: i for i, word in enumerate([*MARKS, *letters])}
        backend = Tokenizer(models.BPE(known, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    else:
        known = {word: i for i, word in enumerate(words)}
        known |= {f"w{i}": i for i in range(len(known), VOCABULARY)}
        backend = Tokenizer(models.WordLevel(known, "<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    seen = {"image_token": "<image>", "video_token": "<video>", "context_image_token": "<image>"}
    seen |= {"start_image_token": "<begin>", "end_image_token": "<end>"}
    seen |= {"vision_bos_token": "<begin>", "vision_eos_token": "<end>"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        extra_special_tokens=seen, chat_template=TEMPLATE, model_max_length=4096,
    )  # fmt: skip


def _square(side: int) -> dict[str, Any]:
    return {"size": {"height": side, "width": side}}


def _clip(t: Any, side: int) -> Any:
    return t.CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def processor(name: str, config: Any) -> Any:
    """The processor of a class of image and video language models. Raises PrunelabError for an unknown class."""
    import transformers as t

    words, vision = tokenizer(name), config.vision_config
    common: dict[str, Any] = {"chat_template": TEMPLATE}
    llava = {"patch_size": getattr(vision, "patch_size", 14), "num_additional_image_tokens": 1}
    llava |= {"vision_feature_select_strategy": "default", **common}
    if name == "LlavaForConditionalGeneration":
        return t.LlavaProcessor(_clip(t, vision.image_size), words, **llava)
    if name == "LlavaNextForConditionalGeneration":
        sizes = {
            "size": {"shortest_edge": vision.image_size},
            "crop_size": {"height": vision.image_size, "width": vision.image_size},
        }
        images = t.LlavaNextImageProcessor(**sizes, image_grid_pinpoints=config.image_grid_pinpoints)
        return t.LlavaNextProcessor(images, words, **llava)
    if name == "LlavaOnevisionForConditionalGeneration":
        sizes = _square(vision.image_size)
        images = t.LlavaOnevisionImageProcessor(**sizes, image_grid_pinpoints=config.image_grid_pinpoints)
        patches = (vision.image_size // vision.patch_size) ** 2
        return t.LlavaOnevisionProcessor(
            images, words, t.LlavaOnevisionVideoProcessor(**sizes), num_image_tokens=patches,
            vision_feature_select_strategy="full", **common,
        )  # fmt: skip
    if name == "LlavaNextVideoForConditionalGeneration":
        crops = {"height": vision.image_size, "width": vision.image_size}
        sizes = {"size": {"shortest_edge": vision.image_size}, "crop_size": crops}
        images = t.LlavaNextImageProcessor(**sizes, image_grid_pinpoints=config.image_grid_pinpoints)
        return t.LlavaNextVideoProcessor(t.LlavaNextVideoVideoProcessor(**sizes), images, words, **llava)
    if name == "InternVLForConditionalGeneration":
        sizes = _square(vision.image_size[0])
        images = t.GotOcr2ImageProcessor(**sizes, crop_to_patches=True, min_patches=1, max_patches=12)
        return t.InternVLProcessor(
            images, words, t.InternVLVideoProcessor(**sizes), image_seq_length=config.image_seq_length, **common
        )
    if name in ("Qwen2_5_VLForConditionalGeneration", "Qwen2VLForConditionalGeneration"):
        pixels = {"patch_size": 14, "merge_size": 2, "size": {"shortest_edge": 56 * 56, "longest_edge": 448 * 448}}
        cls = t.Qwen2_5_VLProcessor if "2_5" in name else t.Qwen2VLProcessor
        return cls(t.Qwen2VLImageProcessor(**pixels), words, t.Qwen2VLVideoProcessor(**pixels), **common)
    if name == "VideoLlavaForConditionalGeneration":
        sizes = {"size": {"shortest_edge": vision.image_size}}
        sizes["crop_size"] = {"height": vision.image_size, "width": vision.image_size}
        films = t.VideoLlavaVideoProcessor(**sizes)
        return t.VideoLlavaProcessor(t.VideoLlavaImageProcessor(**sizes), films, words, **llava)
    if name == "InstructBlipForConditionalGeneration":
        asks, count = tokenizer(name), config.num_query_tokens
        return t.InstructBlipProcessor(t.BlipImageProcessor(**_square(vision.image_size)), words, asks, count)
    if name == "SiglipModel":
        return t.SiglipProcessor(t.SiglipImageProcessor(**_square(vision.image_size)), words)
    if name.startswith("BlipFor"):
        return t.BlipProcessor(t.BlipImageProcessor(size=_square(vision.image_size)["size"]), words)
    if name == "CLIPModel":
        words.model_max_length = config.text_config.max_position_embeddings
        return t.CLIPProcessor(_clip(t, vision.image_size), words)
    raise PrunelabError(f"there is no look-alike of the processor of {name}")


def transformers_model(architecture: Mapping[str, Any], folder: Path, *, seen: bool) -> None:
    """A checkpoint of a class of transformers. seen: whether it reads images, and so has a processor."""
    import transformers

    torch.manual_seed(0)
    arguments = narrow(architecture["arguments"])
    if seen:
        marks = {mark: MARKS.index(f"<{mark}>") for mark in ("image", "video")}
        arguments |= {f"{mark}_token_id": i for mark, i in marks.items()}
        arguments |= {"vision_start_token_id": MARKS.index("<begin>"), "vision_end_token_id": MARKS.index("<end>")}
        _join(arguments)
    cls = getattr(transformers, architecture["name"])
    _save(cls(cls.config_class(**arguments)), folder)
    own = processor(architecture["name"], cls.config_class(**arguments)) if seen else tokenizer(architecture["name"])
    own.save_pretrained(folder)


def own_model(architecture: Mapping[str, Any], folder: Path) -> None:
    """A checkpoint of a language model of transformers' kind that one of our own backbones builds."""
    torch.manual_seed(0)
    whole: Any = loading.architecture(architecture)
    _save(type(whole)(type(whole.config)(**narrow(whole.config.to_dict()))), folder)
    tokenizer(architecture["name"]).save_pretrained(folder)


def _save(model: Any, folder: Path) -> None:
    """A model with random weights, as transformers keeps it."""
    model.eval()
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.2)
    if model.can_generate():  # an encoder does not
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
        model.generation_config.exponential_decay_length_penalty = (ANSWER, 1e4)  # answers end soon
    model.save_pretrained(folder)


def learned_parts(method: Any, like: Path, path: Path) -> None:
    """The file of a decoding method's learned parts for a language model like the one in the folder `like`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(loading.pretrained(AutoConfig, like))
    parts = method.build(importlib.import_module("prunelab.common.speculative.reader").info(model))
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(parts.state_dict(), path)


def of_layout(layout: str, like: Path, folder: Path) -> None:
    """A checkpoint whose weights have the names that the module `layout` of common/backbones reads, of the class that
    it is read into, after the configuration of the look-alike in the folder `like`."""
    import safetensors.torch
    import transformers as t

    module = importlib.import_module(f"prunelab.common.backbones.{layout}")
    config = loading.pretrained(t.AutoConfig, like)
    torch.manual_seed(0)
    model = t.AutoModelForImageTextToText.from_config(module.like(config) if hasattr(module, "like") else config)
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.2)
    state = model.state_dict()
    if hasattr(module, "published"):  # where more than beginnings of names differ
        told = module.published(state)
    else:
        told = {published(name, module.NAMES): weight for name, weight in state.items()}
    named = {name: weight.contiguous().clone() for name, weight in told.items()}
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(named, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": layout}), encoding="utf-8")
    if hasattr(module, "processor"):  # which reads a tokenizer of the checkpoint's own
        shutil.copy(like / "tokenizer.json", folder)


def published(name: str, names: Iterable[tuple[str, str]]) -> str:
    """The published name of a weight, of pairs of patterns of such names, and of what stands here in their place."""
    for pattern, here in sorted(names, key=lambda pair: -len(pair[1])):
        if name.startswith(here):
            plain = re.sub(r"\(\?(=.*?\)|:.*?\)\?)", "", pattern)  # what lies ahead, and what may be left out
            return plain.replace("\\", "") + name.removeprefix(here)
    return name


def _join(arguments: dict[str, Any]) -> None:
    """Encoders that end as wide as the decoder."""
    vision, width = arguments["vision_config"], arguments["text_config"]["hidden_size"]
    if "out_hidden_size" in vision:
        vision["out_hidden_size"] = width
    elif "embed_dim" in vision:  # of Qwen2-VL, whose hidden_size is what comes out
        vision["hidden_size"] = width


def timm_model(name: str, architecture: Mapping[str, Any], folder: Path) -> None:
    """A checkpoint of timm, narrow, in its layout on the hub."""
    import safetensors.torch
    import timm

    whole = timm.create_model(name, pretrained=False, **architecture.get("arguments", {}))
    heads = whole.blocks[0].attn.num_heads
    arguments = {**architecture.get("arguments", {}), "embed_dim": 8 * heads}
    model = timm.create_model(name, pretrained=False, **arguments)
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
    config = {
        "architecture": name,
        "num_classes": 1000,
        "model_args": arguments,
        "pretrained_cfg": model.pretrained_cfg,
    }
    (folder / "config.json").write_text(json.dumps(config, default=str), encoding="utf-8")


def _segmenter(module: Any, model: Any) -> dict[str, Any]:
    """The weights under their authors' names, who keep a class token and its place."""
    state = {module.official_name(name, len(model.heads)): weight for name, weight in model.state_dict().items()}
    place = state["backbone.pos_embed"]
    state["backbone.cls_token"] = torch.zeros_like(place[:, :1])
    state["backbone.pos_embed"] = torch.cat([state["backbone.cls_token"], place], 1)
    return state


def small(identity: Any) -> Any:
    """An identity whose look-alike is narrow: of a backbone that says, as `NARROW`, which arguments make it so."""
    built = identity.get("architecture", {}) if isinstance(identity, Mapping) else {}
    if built.get("library") != "backbones":
        return identity
    module = importlib.import_module(f"prunelab.common.backbones.{built['name'].partition(':')[0]}")
    narrowed = {**built.get("arguments", {}), **getattr(module, "NARROW", {})}
    return {**identity, "architecture": {**built, "arguments": narrowed}} if hasattr(module, "NARROW") else identity


def official(identity: Mapping[str, Any], path: Path) -> None:
    """A file of one of our own backbones, random, in its real size (but see `small`), with a method's learned parts
    where it has some. Raises PrunelabError for those whose authors name weights in another way than it does."""
    import safetensors.torch

    torch.manual_seed(0)
    model = loading._create(identity["architecture"])
    if "parts" in identity:
        importlib.import_module("prunelab.common.tokens.parts").add(model, identity["parts"])
    path.parent.mkdir(parents=True, exist_ok=True)
    module = importlib.import_module(f"prunelab.common.backbones.{identity['architecture']['name'].partition(':')[0]}")
    state = _segmenter(module, model) if hasattr(module, "Segmenter") else model.state_dict()
    if path.suffix == ".safetensors":
        safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, path)
    else:
        torch.save({"model": state}, path)
    try:
        module.load_checkpoint(model, path)
    except PrunelabError:
        path.unlink()
        raise PrunelabError(f"no look-alike is made of {path.name}, whose authors name its weights otherwise") from None


def inception(path: Path) -> None:
    """Inception v3 with the 1,008 classes of the network that Fréchet distances are told by, in its real size."""
    from torchvision.models import inception_v3

    torch.manual_seed(0)
    model = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)


def stable_diffusion(folder: Path) -> None:
    """A pipeline of the parts of Stable Diffusion 2: few channels, two levels, pictures of 64 pixels."""
    import transformers as t

    library = optional("diffusers", "a text-to-image pipeline")
    torch.manual_seed(0)
    text = t.CLIPTextConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=77, hidden_act="gelu", projection_dim=32, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    levels = {"block_out_channels": (32, 64), "norm_num_groups": 8}
    network = library.UNet2DConditionModel(
        sample_size=32, in_channels=4, out_channels=4, layers_per_block=1, cross_attention_dim=32,
        attention_head_dim=(2, 4), use_linear_projection=True,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **levels,
    )  # fmt: skip
    pictures = library.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4,
        sample_size=64, **levels,
    )  # fmt: skip
    words = tokenizer("CLIPModel")
    words.model_max_length = 77
    sampler = library.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type="v_prediction",
    )  # fmt: skip
    library.StableDiffusionPipeline(
        vae=pictures, text_encoder=t.CLIPTextModel(text), tokenizer=words, unet=network, scheduler=sampler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


# Of those whose architecture configs/models.yaml does not tell.
WITHOUT_ARCHITECTURE: Mapping[str, Callable[[Path], None]] = {
    "inception_fid": inception, "stable_diffusion_2": stable_diffusion,
}  # fmt: skip
