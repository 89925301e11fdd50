"""ST-LLM (Liu et al., ECCV 2024, arXiv 2404.00308), a reconstruction: transformers has no class of its own for it, so
it is built of InstructBLIP's encoder and Q-Former and of LLaMA.

The Q-Former reads the question beside each frame, and gives 32 tokens of it; all frames' tokens stand before the text,
whose start mark comes behind them. Of two published models,

- the one of questions has a second branch in the encoder's last three layers, whose tokens attend along time and then
  within their frame (BT-Adapter, Liu et al., CVPR 2024, arXiv 2309.15785); what comes out is the mean of both;
- the one of conversation (`stllm_conversation`) has none. It mixes what it reads: to 16 of its frames, evenly spread,
  it adds what two layers make of the mean over all.

Order, sizes and names of weights follow st_llm.py, eva_vit.py, eva_btadapter.py and conversation.py
(TencentARC/ST-LLM, Apache-2.0, at ae45258). The masking of tokens and its decoder belong to the training. The sentence
that the authors put before a question, and their penalty of repetitions in conversations, are left out, as prompts are
those of the tasks; videos of fewer frames than are mixed, at which their code stops, repeat the last. On random weights
encoder, branch and Q-Former give what the authors' code gives; the checkpoints' own output was not compared: they are
too large to fetch where this was written.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoTokenizer, BatchFeature
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.models.instructblip.configuration_instructblip import InstructBlipConfig, InstructBlipVisionConfig
from transformers.models.instructblip.modeling_instructblip import (
    InstructBlipAttention,
    InstructBlipEncoderLayer,
    InstructBlipPreTrainedModel,
    InstructBlipQFormerModel,
    InstructBlipVisionModel,
)
from transformers.models.instructblipvideo.processing_instructblipvideo import InstructBlipVideoProcessor
from transformers.models.llava_next_video.video_processing_llava_next_video import LlavaNextVideoVideoProcessor

from prunelab.common.backbones.checkpoint import fill, read
from prunelab.common.backbones.llava_layout import fitted
from prunelab.common.core.errors import PrunelabError

BRANCH = 3  # layers of the branch
LONGEST = 64  # frames that the branch numbers
MIXED = 16  # frames that the model of conversation keeps
NORM = 1e-5  # of the norm behind the encoder, which InstructBLIP of transformers has as 1e-6
WORDS = 256  # tokens of a question that the Q-Former reads
VOCABULARY = 32000  # of Vicuna, behind which stands the mark of padding
PADDED = 32064  # with room for the processor's marks
VIDEO = "<video>"
ASKS, ANSWERS = "###Human: ", " ###Assistant: "
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{% if message['content'] is not string %}"
    "{% for part in message['content'] %}{% if part['type'] == 'video' %}<video>{% endif %}{% endfor %}{% endif %}"
    "###Human: {% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% elif message['role'] != 'assistant' %}"
    "{{ raise_exception('ST-LLM has no place for messages of the role ' + message['role']) }}"
    "{% else %} ###Assistant: {{ message['content'] if message['content'] is string else"
    " message['content'][0]['text'] }}{% endif %}{% endfor %}{% if add_generation_prompt %} ###Assistant: {% endif %}"
)
# Where the published files keep each part, and where the class has it; the first that fits counts.
NAMES = (
    ("model.stllm_model.visual_encoder.cls_token", "model.vision_tower.embeddings.class_embedding"),
    ("model.stllm_model.visual_encoder.pos_embed", "model.vision_tower.embeddings.position_embedding"),
    ("model.stllm_model.visual_encoder.patch_embed.proj.", "model.vision_tower.embeddings.patch_embedding."),
    ("model.stllm_model.visual_encoder.blocks.", "model.vision_tower.encoder.layers."),
    ("model.stllm_model.visual_encoder.BTAdapter_cls", "model.vision_tower.branch.class_embedding"),
    ("model.stllm_model.visual_encoder.BTAdapter_position.", "model.vision_tower.branch.time."),
    ("model.stllm_model.visual_encoder.BTAdapter_S.", "model.vision_tower.branch.spatial."),
    ("model.stllm_model.visual_encoder.BTAdapter_T.", "model.vision_tower.branch.temporal."),
    ("model.stllm_model.ln_vision.", "model.vision_tower.post_layernorm."),
    ("model.stllm_model.Qformer.bert.", "model.qformer."),
    ("model.stllm_model.query_tokens", "model.query_tokens"),
    ("model.stllm_model.llama_proj.", "model.multi_modal_projector.linear."),
    ("model.stllm_model.down_proj.", "model.multi_modal_projector.down."),
    ("model.stllm_model.up_proj.", "model.multi_modal_projector.up."),
    ("model.", "model.language_model."),
)
INSIDE = (
    (".attn.", ".self_attn."),
    (".self_attn.proj.", ".self_attn.projection."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".temporal_fc.", ".fc."),
    (".attention.self.", ".attention.attention."),
    (".crossattention.self.", ".crossattention.attention."),
    (".embeddings.LayerNorm.", ".embeddings.layernorm."),
)
# Of the training, told twice, or tables that a model makes for itself.
UNUSED = (
    "model.stllm_model.mvm_decoder.", "model.stllm_model.embed_tokens.", "model.stllm_model.residual_index",
    "model.stllm_model.Qformer.bert.embeddings.position_ids",
)  # fmt: skip


class StllmConfig(InstructBlipConfig):
    """InstructBLIP's settings, with the layers of the encoder's `branch` (0: none), and how many frames are `mixed` (0:
    all stay as they are)."""

    model_type = "stllm"
    video_token_id: int | None = None
    branch: int = BRANCH
    mixed: int = 0


# -- the encoder -------------------------------------------------------------------------------------------------------


class Temporal(nn.Module):
    """Each patch attends to itself in all frames."""

    def __init__(self, config: InstructBlipVisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = InstructBlipAttention(config)
        self.fc = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, patches: Tensor) -> Tensor:
        """Patches [B, T, P, D] with what time adds."""
        rows = patches.transpose(1, 2)
        seen = self.fc(self.self_attn(self.layer_norm1(rows.flatten(0, 1)))[0])
        return patches + seen.unflatten(0, rows.shape[:2]).transpose(1, 2)


class Spatial(InstructBlipEncoderLayer):
    """A layer of the encoder for a class token that all frames share."""

    def forward(self, first: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """The class token [B, 1, D], which each frame attends with and which takes their mean, and patches [B, T, P,
        D]."""
        frames = patches.shape[1]
        both = torch.cat([first.unsqueeze(1).expand(-1, frames, -1, -1), patches], 2)
        seen = self.self_attn(self.layer_norm1(both.flatten(0, 1)))[0].unflatten(0, both.shape[:2])
        first, patches = first + seen[:, :, 0].mean(1, keepdim=True), patches + seen[:, :, 1:]
        return first + self.mlp(self.layer_norm2(first)), patches + self.mlp(self.layer_norm2(patches))


class Branch(nn.Module):
    """BT-Adapter: layers beside the encoder's last ones, whose outputs they read."""

    def __init__(self, config: InstructBlipVisionConfig, depth: int) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.time = nn.Embedding(LONGEST, config.hidden_size)
        self.temporal = nn.ModuleList(Temporal(config) for _ in range(depth))
        self.spatial = nn.ModuleList(Spatial(config) for _ in range(depth))

    def forward(self, layers: Sequence[Tensor], places: Tensor) -> Tensor:
        """What the branch makes [B, T, 1 + P, D] of the outputs of the encoder's last layers, for its embeddings of
        places [1, 1 + P, D]."""
        frames = layers[0].shape[1]
        if frames > LONGEST:
            raise PrunelabError(f"ST-LLM's branch reads {LONGEST} frames, and {frames} came; take fewer")
        first = (layers[0][:, :, 0].mean(1, keepdim=True) + self.class_embedding + places[:, :1]) / 2
        patches = layers[0][:, :, 1:] + places[:, 1:] + self.time.weight[:frames, None]
        for number, (temporal, spatial) in enumerate(zip(self.temporal, self.spatial, strict=True)):
            if number:
                first = first + layers[number][:, :, 0].mean(1, keepdim=True)
                patches = patches + layers[number][:, :, 1:]
            first, patches = spatial(first, temporal(patches))
        return torch.cat([first.unsqueeze(1).expand(-1, frames, -1, -1), patches], 2)


class FrameEncoder(InstructBlipVisionModel):
    """InstructBLIP's encoder of frames, perhaps with a branch that reads them together."""

    def __init__(self, config: InstructBlipVisionConfig, depth: int) -> None:
        super().__init__(config)
        self.post_layernorm.eps = NORM  # as the authors' own
        self.branch = Branch(config, depth) if depth else None

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Features [B, T, 1 + P, D] of videos [B, T, 3, H, W]."""
        hidden = self.embeddings(pixel_values.flatten(0, 1))
        last = deque[Tensor](maxlen=len(self.branch.spatial) if self.branch is not None else 1)
        for layer in self.encoder.layers:
            hidden = layer(hidden)
            last.append(hidden.unflatten(0, pixel_values.shape[:2]))
        result = last[-1]
        if self.branch is not None:
            result = (result + self.branch(last, self.embeddings.position_embedding)) / 2
        normed: Tensor = self.post_layernorm(result)
        return normed


# -- the model ---------------------------------------------------------------------------------------------------------


class Projector(nn.Module):
    """The Q-Former's tokens of frames as the decoder reads them."""

    def __init__(self, config: StllmConfig) -> None:
        super().__init__()
        width = config.text_config.hidden_size
        self.mixed = config.mixed
        self.linear = nn.Linear(config.qformer_config.hidden_size, width)
        if self.mixed:
            self.down, self.up = nn.Linear(width, width // 4), nn.Linear(width // 4, width)

    def frames(self, count: int) -> list[int]:
        """The frames that stay of so many."""
        if not self.mixed:
            return list(range(count))
        step = count / self.mixed
        return [min(int(step / 2 + round(step * i)), count - 1) for i in range(self.mixed)]

    def forward(self, queries: Tensor) -> Tensor:
        """[B * frames, Q, D] of queries [B, T, Q, C]."""
        tokens = self.linear(queries)
        if self.mixed:
            mean = self.up(self.down(tokens.mean(1, keepdim=True)).relu())
            tokens = tokens[:, self.frames(tokens.shape[1])] + mean
        flat: Tensor = tokens.flatten(0, 1)
        return flat


class StllmPreTrainedModel(InstructBlipPreTrainedModel):
    """What both classes share."""

    config_class = StllmConfig
    base_model_prefix = "model"
    input_modalities = ("video", "text")


class StllmModel(StllmPreTrainedModel):
    """Encoder, Q-Former and decoder."""

    def __init__(self, config: StllmConfig) -> None:
        super().__init__(config)
        self.vision_tower = FrameEncoder(config.vision_config, config.branch)
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, config.qformer_config.hidden_size))
        self.qformer = InstructBlipQFormerModel(config.qformer_config)
        self.multi_modal_projector = Projector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def get_video_features(
        self,
        pixel_values_videos: Tensor,
        qformer_input_ids: Tensor,
        qformer_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Tokens [B, frames * Q, D] of videos [B, T, 3, H, W] as `pooler_output`, for questions [B, W] about them."""
        batch, frames = pixel_values_videos.shape[:2]
        if len(qformer_input_ids) != batch:
            raise PrunelabError(f"{batch} videos came with {len(qformer_input_ids)} questions; give one for each")
        features = self.vision_tower(pixel_values_videos)
        queries = self.query_tokens.expand(batch * frames, -1, -1)
        seen = None
        if qformer_attention_mask is not None:
            ones = qformer_attention_mask.new_ones(batch, queries.shape[1])
            seen = torch.cat([ones, qformer_attention_mask], 1).repeat_interleave(frames, 0)
        asked = self.qformer(
            input_ids=qformer_input_ids.repeat_interleave(frames, 0),
            attention_mask=seen,
            query_embeds=queries,
            encoder_hidden_states=features.flatten(0, 1),
        ).last_hidden_state[:, : queries.shape[1]]
        tokens = self.multi_modal_projector(asked.unflatten(0, (batch, frames)))
        return BaseModelOutputWithPooling(features, tokens.unflatten(0, (batch, -1)).flatten(1, 2))

    def get_placeholder_mask(self, input_ids: Tensor, inputs_embeds: Tensor, video_features: Tensor) -> Tensor:
        """Where in the prompts [B, N, D] the video's tokens go, one placeholder each."""
        mask = (input_ids == self.config.video_token_id).unsqueeze(-1)
        if input_ids.device.type != "meta" and int(mask.sum()) != video_features.shape[:-1].numel():
            raise ValueError("as many placeholders as tokens of videos are wanted")
        return mask.expand_as(inputs_embeds)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The decoder's last layer, for videos and the prompts that hold their placeholders."""
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values_videos is not None:
            if input_ids is None or qformer_input_ids is None:
                raise PrunelabError(
                    "videos go with input_ids, and with a question for the Q-Former (qformer_input_ids)"
                )
            asked = self.get_video_features(pixel_values_videos, qformer_input_ids, qformer_attention_mask)
            tokens = asked.pooler_output.to(inputs_embeds)
            mask = self.get_placeholder_mask(input_ids, inputs_embeds=inputs_embeds, video_features=tokens)
            inputs_embeds = inputs_embeds.masked_scatter(mask, tokens)
        return self.language_model(inputs_embeds=inputs_embeds, **kwargs)


class StllmForConditionalGeneration(StllmPreTrainedModel, GenerationMixin):
    """ST-LLM with its output layer."""

    def __init__(self, config: StllmConfig) -> None:
        super().__init__(config)
        self.model = StllmModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, N, V], of the last tokens alone where `logits_to_keep` says so."""
        outputs = self.model(
            input_ids=input_ids,
            pixel_values_videos=pixel_values_videos,
            qformer_input_ids=qformer_input_ids,
            qformer_attention_mask=qformer_attention_mask,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None if labels is None else self.loss_function(logits, labels, self.config.text_config.vocab_size)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )  # fmt: skip


# -- the processor -----------------------------------------------------------------------------------------------------


class StllmProcessor(InstructBlipVideoProcessor):
    """Videos, with their placeholders before the text, and the questions about them for the Q-Former. mixed: see
    `StllmConfig`."""

    def __init__(
        self, video_processor: Any, tokenizer: Any, qformer_tokenizer: Any, num_query_tokens: int = 32, mixed: int = 0
    ) -> None:
        super().__init__(video_processor, tokenizer, qformer_tokenizer, num_query_tokens)
        self.mixed, self.chat_template = mixed, TEMPLATE
        self.video_token_id: int = tokenizer.convert_tokens_to_ids(VIDEO)

    def __call__(self, text: str | Sequence[str], videos: Any = None, **kwargs: Any) -> BatchFeature:
        """What the model reads of prompts, each of which may hold the mark of one video."""
        prompts = [text] if isinstance(text, str) else list(text)
        films, shown = list(videos or ()), [prompt.count(VIDEO) for prompt in prompts]
        if sum(shown) != len(films) or any(count > 1 for count in shown):
            raise PrunelabError(f"{len(films)} videos came with {sum(shown)} marks; give each prompt one video at most")
        words = self.tokenizer([prompt.replace(VIDEO, "") for prompt in prompts])["input_ids"]
        left = iter(films)
        tokens = [
            [self.video_token_id] * ((self.mixed or len(next(left))) * self.num_query_tokens) if count else []
            for count in shown
        ]
        ids = [before + own for before, own in zip(tokens, words, strict=True)]
        results = dict(self.tokenizer.pad({"input_ids": ids}, padding=True, return_tensors="pt"))
        if films:
            asked = [question(prompt) for prompt, count in zip(prompts, shown, strict=True) if count]
            read = self.qformer_tokenizer(
                asked, padding=True, truncation=True, max_length=WORDS, return_tensors="pt", return_token_type_ids=False
            )
            results |= {f"qformer_{name}": value for name, value in read.items()}
            results |= dict(self.video_processor(videos=films, do_sample_frames=False, return_tensors="pt"))
        return BatchFeature(results)


def question(prompt: str) -> str:
    """What a prompt asks last, without what stands around it."""
    return prompt.replace(VIDEO, "").split(ASKS)[-1].split(ANSWERS.rstrip())[0]


def processor(folder: Path, source: Path, mixed: int = 0) -> StllmProcessor:
    """The processor of the model in `folder`, of the tokenizers of InstructBLIP in the folder `source`: the short side
    of frames is brought to 224 pixels, of which the middle is seen."""
    tokenizer, asks = (
        AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)
        for place in (source, source / "qformer_tokenizer")
    )
    asks.truncation_side = "left"
    frames = LlavaNextVideoVideoProcessor(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224})
    return StllmProcessor(frames, tokenizer, asks, mixed=mixed)


# -- settings and weights ----------------------------------------------------------------------------------------------

AutoConfig.register(StllmConfig.model_type, StllmConfig, exist_ok=True)
AutoModelForImageTextToText.register(StllmConfig, StllmForConditionalGeneration, exist_ok=True)


def like(config: InstructBlipConfig, branch: int = BRANCH, mixed: int = 0) -> StllmConfig:
    """The settings of an InstructBLIP on Vicuna as ST-LLM's."""
    given = {key: value for key, value in config.to_dict().items() if key != "model_type"}
    text = given["text_config"]
    if text["vocab_size"] > VOCABULARY:  # its tokenizer has one mark for start, end and unknown words
        text |= {"vocab_size": PADDED, "pad_token_id": VOCABULARY, "bos_token_id": 2, "eos_token_id": 2}
    return StllmConfig(**given | {"branch": branch, "mixed": mixed})


def stllm(**settings: Any) -> StllmForConditionalGeneration:
    """The model of the given settings of `StllmConfig`, at random."""
    return StllmForConditionalGeneration(StllmConfig(**settings))


def vicuna_7b() -> dict[str, Any]:
    """The settings of its decoder."""
    return {
        "model_type": "llama", "vocab_size": PADDED, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
        "pad_token_id": VOCABULARY, "bos_token_id": 2, "eos_token_id": 2,
    }  # fmt: skip


def questions_7b() -> StllmForConditionalGeneration:
    """The model of questions: EVA-CLIP's ViT-g with the branch, Vicuna-7B."""
    return stllm(text_config=vicuna_7b(), qformer_config={"vocab_size": 30523})


def conversation_7b() -> StllmForConditionalGeneration:
    """The model of conversation, without the branch, with mixed frames."""
    return stllm(text_config=vicuna_7b(), qformer_config={"vocab_size": 30523}, branch=0, mixed=MIXED)


def official_name(name: str) -> str:
    """The name in our class of a weight of the published files."""
    there, here = next(((a, b) for a, b in NAMES if name.startswith(a)), ("", ""))
    name = here + name.removeprefix(there)
    for there, here in INSIDE:
        name = name.replace(there, here)
    return name


def published(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by our names as the published files have them, where queries and values have biases of their own."""
    results = {}
    for name, weight in weights.items():
        there, here = next(((a, b) for a, b in NAMES if name.startswith(b)), ("", ""))
        if name.startswith("model.language_model."):
            there, here = NAMES[-1]
        told = there + name.removeprefix(here)
        for inside, own in reversed(INSIDE):
            told = told if "language_model" in name else told.replace(own, inside)
        if told.endswith(".attn.qkv.bias"):
            queries, _, values = weight.chunk(3)
            results[told.replace("qkv.bias", "q_bias")] = queries
            results[told.replace("qkv.bias", "v_bias")] = values
        else:
            results[told] = weight
    return results


def with_biases(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Biases of queries and values as one, which has none of keys."""
    results = {name: weight for name, weight in weights.items() if not name.endswith((".q_bias", ".v_bias"))}
    for name, queries in weights.items():
        if name.endswith(".q_bias"):
            values = weights.get(name.replace(".q_bias", ".v_bias"))
            if values is None:
                raise PrunelabError(f"the bias {name} lacks that of values; download the checkpoint again")
            results[name.replace(".q_bias", ".qkv.bias")] = torch.cat([queries, torch.zeros_like(queries), values])
    return results


def load_checkpoint(model: nn.Module, path: Path | str) -> None:
    """Load the published files of a folder, .safetensors or pickled tensors, with every name checked."""
    path = Path(path)
    files = sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
    if not files:
        raise PrunelabError(f"{path} holds no weights; give the folder of the official checkpoint")
    weights = {name: weight for file in files for name, weight in read(file).items() if not name.startswith(UNUSED)}
    fill(model, fitted(model, with_biases({official_name(name): weight for name, weight in weights.items()})), path)
