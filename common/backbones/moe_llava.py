"""MoE-LLaVA (Lin et al., 2024, arXiv 2401.15947), a reconstruction: transformers has no class of its own for it, so it
is built of LLaVA-1.5's modules, with StableLM or Phi as the decoder and a mixture of four MLPs in every second layer.

A token goes to the two experts that its router likes most, by their shares of both. With the released capacity no
expert turns a token away. Names and order follow the authors' code (PKU-YuanGroup/MoE-LLaVA, Apache-2.0) and
DeepSpeed's `top2gating`. Nothing here was compared with the checkpoints' own output: they are too large to fetch where
this was written.
"""

from __future__ import annotations

import re
from base64 import b64decode
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, LlavaProcessor
from transformers.models.llava.configuration_llava import LlavaConfig
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration

from prunelab.common.backbones.checkpoint import fill, read
from prunelab.common.backbones.llava_layout import fitted
from prunelab.common.core.errors import PrunelabError

EXPERTS, CHOSEN = 4, 2
IMAGE = "<image>"
END = "<|endoftext|>"
# assumption: the harness's prompt in the authors' conversation, with the picture in front
TEMPLATE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and"
    " polite answers to the user's questions."
    "{% for message in messages %} {{ 'USER' if message['role'] == 'user' else 'ASSISTANT' }}: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
CUTS = (  # of text into words, before bytes merge
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NAMES = (
    (r"model\.image_tower\.image_tower\.vision_model\.", "model.vision_tower."),
    (r"model\.mm_projector\.image_spatial_proj\.0\.", "model.multi_modal_projector.linear_1."),
    (r"model\.mm_projector\.image_spatial_proj\.2\.", "model.multi_modal_projector.linear_2."),
    (r"model\.", "model.language_model."),
)
INSIDE = ((".deepspeed_moe.gate.wg.", ".gate."), (".deepspeed_moe.experts.deepspeed_experts.", ".experts."))


class MoeLlavaConfig(LlavaConfig):
    """LLaVA's settings under a name of their own, so that a saved model is known again."""

    model_type = "moe_llava"


class Mixture(nn.Module):
    """Copies of an MLP, of which each token runs through the two that its router likes most: [..., D] -> [..., D]."""

    def __init__(self, width: int, made: Any) -> None:
        super().__init__()
        self.gate = nn.Linear(width, EXPERTS, bias=False)
        self.experts = nn.ModuleList(made() for _ in range(EXPERTS))

    def forward(self, hidden: Tensor) -> Tensor:
        tokens = hidden.flatten(0, -2)
        scores = (tokens.float() @ self.gate.weight.float().T).softmax(-1)
        # assumption: the second is the next best; DeepSpeed draws it by noise, also where nothing is trained
        best, chosen = scores.topk(CHOSEN, -1)
        weights = (best / best.sum(-1, keepdim=True)).to(hidden.dtype)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows, place = (chosen == number).nonzero(as_tuple=True)
            if len(rows):
                out.index_add_(0, rows, expert(tokens[rows]) * weights[rows, place].unsqueeze(-1))
        return out.view_as(hidden)


class MoeLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA-1.5 with such a decoder; Phi's head has a bias."""

    config_class = MoeLlavaConfig

    def __init__(self, config: MoeLlavaConfig) -> None:
        super().__init__(config)
        text = config.text_config
        decoder: Any = self.model.language_model
        for layer in decoder.layers[::2]:
            kind = type(layer.mlp)
            layer.mlp = Mixture(text.hidden_size, lambda kind=kind: kind(text))
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=text.model_type == "phi")
        self.post_init()


AutoConfig.register(MoeLlavaConfig.model_type, MoeLlavaConfig, exist_ok=True)
AutoModelForImageTextToText.register(MoeLlavaConfig, MoeLlavaForConditionalGeneration, exist_ok=True)
AutoProcessor.register(MoeLlavaConfig, LlavaProcessor, exist_ok=True)

STABLELM: dict[str, Any] = {
    "model_type": "stablelm", "vocab_size": 100352, "hidden_size": 2048, "intermediate_size": 5632,
    "num_hidden_layers": 24, "num_attention_heads": 32, "num_key_value_heads": 32, "use_qkv_bias": True,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
}  # fmt: skip
PHI: dict[str, Any] = {
    "model_type": "phi", "vocab_size": 51200, "hidden_size": 2560, "intermediate_size": 10240,
    "num_hidden_layers": 32, "num_attention_heads": 32, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.4},
}  # fmt: skip


def with_decoder(config: LlavaConfig, text: dict[str, Any]) -> MoeLlavaConfig:
    """A LLaVA-1.5's settings with another decoder, as narrow as a look-alike's where the LLaVA is one."""
    given = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "text_config")}
    if config.text_config.hidden_size < text["hidden_size"]:
        narrow = text["num_attention_heads"] * (
            config.text_config.hidden_size // config.text_config.num_attention_heads
        )
        text = text | {
            "hidden_size": narrow,
            "intermediate_size": 2 * narrow,
            "vocab_size": config.text_config.vocab_size,
        }
        text["rope_parameters"] = text["rope_parameters"] | {"partial_rotary_factor": 0.5}
    return MoeLlavaConfig(**given, text_config=text)


def like(config: LlavaConfig) -> MoeLlavaConfig:
    """The settings of a LLaVA-1.5 as MoE-LLaVA's on StableLM 2 of 1.6 billion parameters."""
    return with_decoder(config, STABLELM)


def ranked(path: Path) -> Any:
    """Byte-pair encoding of a file of words, base64 and by rank, with GPT-4's way of cutting text, which StableLM 2
    took over. A pair merges where it makes a word, the word of lowest rank first."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    lines = (line.split() for line in path.read_text(encoding="ascii").splitlines() if line)
    ranks = {"".join(letters[byte] for byte in b64decode(word)): int(rank) for word, rank in lines}
    merges = [
        (word[:cut], word[cut:])
        for word in sorted(ranks, key=lambda word: ranks[word])
        for cut in sorted(range(1, len(word)), key=lambda at: (ranks.get(word[:at], 0), ranks.get(word[at:], 0)))
        if word[:cut] in ranks and word[cut:] in ranks
    ]
    result = Tokenizer(models.BPE(ranks, merges, ignore_merges=True))
    result.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CUTS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    result.decoder = decoders.ByteLevel()
    return result


def processor(folder: Path, source: Path) -> Any:
    """LLaVA-1.5's processor of the folder `source` with the tokenizer of the checkpoint's own: a file of the library's
    form, or StableLM's `arcade100k.tiktoken`, whose code is not run."""
    from transformers import PreTrainedTokenizerFast

    made: Any = LlavaProcessor.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    if (folder / "tokenizer.json").is_file():
        words: Any = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    elif (folder / "arcade100k.tiktoken").is_file():
        words = PreTrainedTokenizerFast(tokenizer_object=ranked(folder / "arcade100k.tiktoken"))
    elif (folder / "vocab.json").is_file():
        from transformers import GPT2Tokenizer

        words = GPT2Tokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    else:
        raise PrunelabError(f"{folder} holds no tokenizer that is read here; download it again")
    words.add_special_tokens({"eos_token": END, "pad_token": END, "additional_special_tokens": [IMAGE]})
    made.tokenizer, made.image_token, made.chat_template = words, IMAGE, TEMPLATE
    made.image_token_id = words.convert_tokens_to_ids(IMAGE)
    words.chat_template = TEMPLATE
    return made


def official_name(name: str) -> str:
    """The name in our class of a weight of the published files."""
    for there, here in INSIDE:
        name = name.replace(there, here)
    for pattern, begin in NAMES:
        if re.match(pattern, name):
            return re.sub(f"^{pattern}", begin, name)
    return name


def load_checkpoint(model: nn.Module, path: Path | str) -> None:
    """Load the published files of a folder, .safetensors or pickled tensors, with every name checked."""
    path = Path(path)
    files = sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
    if not files:
        raise PrunelabError(f"{path} holds no weights; give the folder of the official checkpoint")
    weights = {official_name(name): weight for file in files for name, weight in read(file).items()}
    fill(model, fitted(model, weights), path)


def moe_llava(text: dict[str, Any], **settings: Any) -> MoeLlavaForConditionalGeneration:
    """The model on a decoder of such settings, at random."""
    return MoeLlavaForConditionalGeneration(with_decoder(LlavaConfig(**settings), text))


def stablelm() -> MoeLlavaForConditionalGeneration:
    """MoE-LLaVA-StableLM-1.6Bx4."""
    return moe_llava(STABLELM)


def phi() -> MoeLlavaForConditionalGeneration:
    """MoE-LLaVA-Phi2-2.7Bx4."""
    return moe_llava(PHI)
