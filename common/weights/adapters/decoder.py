"""Decoder-only language models of transformers: Llama and the many classes built alike, and what differs in others."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights.adapters.base import Tap, View
from prunelab.common.weights.adapters.mixture import Mixtures
from prunelab.common.weights.adapters.projections import IN, OUT, length
from prunelab.common.weights.adapters.rotation import (
    NORMS,
    check_rotation,
    commutes,
    narrow_stream,
    rotate_stream,
    stream_holders,
    stream_size,
)
from prunelab.common.weights.adapters.slicing import SHORTCUTS, Sliceable, Sublayer, make_sliced, sliceable
from prunelab.common.weights.targets import Decision, Observation, Target


def _classes(**names: str) -> tuple[str, ...]:
    return tuple(f"transformers.models.{m}.modeling_{m}.{c}ForCausalLM" for m, c in names.items())


class Decoder(Mixtures):
    """Llama and its like, dense or with experts."""

    family = "decoder"
    model_classes = _classes(
        llama="Llama",
        mistral="Mistral",
        qwen2="Qwen2",
        qwen3="Qwen3",
        gemma="Gemma",
        mixtral="Mixtral",
        olmoe="Olmoe",
        qwen2_moe="Qwen2Moe",
        qwen3_moe="Qwen3Moe",
    )
    shared = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
    skip = ("shared_expert_gate",)
    layers = "model.layers"
    norm = "model.norm"
    attention = "self_attn"
    sublayers = {"attention": ("self_attn", "input_layernorm"), "mlp": ("mlp", "post_attention_layernorm")}
    heads = {role: f"self_attn.{role}_proj" for role in "qkvo"}
    mlp = {role: f"mlp.{role}_proj" for role in ("gate", "up", "down")}
    # Before attention and MLP, or one before both side by side, where nothing else is on the stream.
    stream_norms: ClassVar[tuple[str, ...]] = NORMS
    embeddings: ClassVar[tuple[str, ...]] = ("model.embed_tokens",)  # of which the first block reads the sum

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.sliced: Sliceable | None = None  # while its stream is being sliced

    def run(self, sample: Tensor) -> Any:
        return self.model(input_ids=sample.unsqueeze(0), use_cache=False)

    def loss(self, sample: Tensor, labels: Tensor | None = None) -> Tensor:
        ids = sample.unsqueeze(0)
        labels = ids if labels is None else labels.unsqueeze(0)
        loss: Tensor = self.model(input_ids=ids, labels=labels, use_cache=False).loss
        return loss

    def widths(self) -> dict[str, int]:
        """The residual stream, and the `values` of a head between its value and output projections."""
        final = self.model.base_model.norm if hasattr(self.model.base_model, "norm") else None
        if final is None or not commutes(list(self.blocks), final):
            return {}
        heads = self.targets("heads")
        sizes = {"residual": int(self.model.get_input_embeddings().weight.shape[1])}
        return {**sizes, "values": self._value_size(heads[0])} if heads else sizes

    def _hidden(self, block: int) -> list[Target]:
        """The channels of the residual stream, where nothing but norms, embeddings and plain projections holds any."""
        final = getattr(self.model.base_model, "norm", None)
        blocks = list(self.blocks)
        mixed = any(self._part(i, self.experts) is not None for i in range(len(blocks)))
        if block or mixed or final is None or not commutes(blocks, final):
            return []
        width = int(self.model.get_input_embeddings().weight.shape[1])
        return [Target("hidden", "hidden", -1, "hidden", (width,), stream_size(self.model, blocks, final))]

    def holders(self, target: Target) -> dict[str, tuple[nn.Parameter, View]]:
        if target.unit != "hidden":
            return super().holders(target)
        return dict(stream_holders(self.model, list(self.blocks), self.model.base_model.norm))

    def weights(self, target: Target) -> dict[str, Tensor]:
        if target.unit != "hidden":
            return super().weights(target)
        return {name: view(parameter.detach()) for name, (parameter, view) in self.holders(target).items()}

    def remove(self, target: Target, kept: Tensor) -> None:
        if target.unit != "hidden":
            super().remove(target, kept)
            return
        self.reshaped = True
        narrow_stream(self.model, list(self.blocks), self.model.base_model.norm, kept)

    # -- a stream with a basis of its own behind every sublayer ----------------------------------------------------

    def _stream(self, block: int) -> list[Target]:
        """Behind the embedding, which counts to the first block, and behind attention and MLP of every block, or once
        where they stand side by side."""
        held = self._sliceable()
        if held is None:
            return []
        head, parts, results = self.model.get_output_embeddings(), held.sublayers, []
        roles = ["input"] if block == 0 else []
        for role in [*roles, *("attention", "mlp")[-len(self.stream_norms) :]]:
            place = self._place(block, role)
            behind = parts[place + 1].readers if place + 1 < len(parts) else (head,)
            before = [e.weight.shape[0] for e in held.embeddings]
            if place >= 0:
                before = [writer.weight.shape[1] + (writer.bias is not None) for writer in parts[place].writers]
            size = sum(before) + sum(reader.weight.shape[0] for reader in behind)
            results.append(Target("stream", f"{self.prefix(block)}.{role}", block, role, (held.width,), size))
        return results

    def _place(self, block: int, role: str) -> int:
        """Of a stream behind the embedding (-1) or a sublayer, among the sublayers of all blocks."""
        count = len(self.stream_norms)
        return -1 if role == "input" else count * block + (role == "mlp") * (count - 1)

    def _sliceable(self) -> Sliceable | None:
        """What holds the residual stream; None where it cannot be sliced, or was."""
        blocks = list(self.blocks)
        holder, _, name = self.norm.rpartition(".")
        names = [*self.stream_norms]
        final = (self.model.get_submodule(holder), name)
        if not names or any(self._part(i, n) is None for i in range(len(blocks)) for n in names):
            return None
        norms = [*(self._part(i, n) for i in range(len(blocks)) for n in names), getattr(*final)]
        others = [n for b in blocks for n, _ in b.named_children() if "norm" in n and n not in names]
        embeddings = tuple(self.model.get_submodule(path) for path in self.embeddings)
        if others or not sliceable(norms) or len({e.weight.shape[1] for e in embeddings}) > 1:
            return None
        results = []
        for i, block in enumerate(blocks):
            attention, mlp = self._modules(i, self.heads), self._modules(i, self.mlp)
            if not attention or not mlp or not getattr(block, "do_layer_norm_before", True):
                return None
            first = tuple(attention[role] for role in "qkv")
            second = tuple(module for role, module in mlp.items() if role != "down")
            writers = attention["o"], mlp["down"]
            if len(names) == 1:
                results.append(Sublayer(block, names[0], SHORTCUTS[1], first + second, writers))
                continue
            results.append(Sublayer(block, names[0], SHORTCUTS[0], first, writers[:1]))
            results.append(Sublayer(block, names[1], SHORTCUTS[1], second, writers[1:]))
        return Sliceable(self.model, embeddings, tuple(results), final)

    def taps(self, target: Target) -> tuple[str, ...]:
        if target.unit != "stream":
            return super().taps(target)
        return (self.stream_norms[1],) if target.role == "attention" else ()

    def observe(
        self, target: Target, seen: Mapping[str, Tap], before: Tensor, after: Tensor, tokens: Tensor
    ) -> Observation:
        if target.unit != "stream":
            return super().observe(target, seen, before, after, tokens)
        states = {"input": before, "mlp": after}
        inputs = states[target.role] if target.role in states else seen[self.stream_norms[1]][0][0]
        inputs, before, after = (x.flatten(0, -2) for x in (inputs, before, after))
        return Observation(inputs, {}, before, after, tokens)

    def write(self, target: Target, decision: Decision) -> None:
        if target.unit != "stream":
            super().write(target, decision)
            return
        with torch.no_grad():
            if target.role == "input":
                self.sliced = self._sliceable()
                if self.sliced is None:
                    raise PrunelabError("this model's residual stream cannot be sliced; give the dense model")
                self._own_config()
                eps = decision.values.get("eps")
                self.sliced.fuse("centre" in decision.values, None if eps is None else float(eps))
                make_sliced(list(self.blocks), self.stream_norms)
            if self.sliced is None:
                raise PrunelabError("the stream is sliced from the embedding on; decide on all of it")
            self.sliced.turn(self._place(target.block, target.role), decision.values.get("basis"), decision.kept)

    def finish(self) -> bool:
        if self.sliced is None:
            return super().finish()
        with torch.no_grad():
            self.sliced.enter()
        self.sliced = None
        return False

    def sizes(self, target: Target) -> dict[str, int]:
        if target.unit != "hidden":
            return super().sizes(target)
        return {"hidden_size": target.units, "head_dim": int(getattr(self._part(0, self.attention), self.head_size))}

    def _value_size(self, target: Target) -> int:
        return self.projections(target)["v"].entries.shape[1]

    def rotate(self, rotations: Mapping[str, Tensor]) -> None:
        widths = self.widths()
        if unknown := rotations.keys() - widths.keys():
            raise PrunelabError(
                f"{self.family}: no rotation of {', '.join(sorted(unknown))} leaves what the model computes as it is"
            )
        for name, rotation in rotations.items():
            check_rotation(rotation, widths[name], name)
        if "residual" in rotations:
            self._own_config()
            rotate_stream(self.model, list(self.blocks), self.model.base_model.norm, rotations["residual"])
        if "values" in rotations:
            for target in self.targets("heads"):
                self._rotate_values(target, rotations["values"].double())

    def _rotate_values(self, target: Target, rotation: Tensor) -> None:
        """v R of every head, and R back in front of the output projection."""
        own = self.weights(target)
        if own["v"].device.type == "meta":
            return
        size = len(rotation)
        for role in ("v", "v.bias"):
            if role in own:
                by_head = own[role].double().unflatten(0, (-1, size))
                turned = torch.einsum("hd...,de->he...", by_head, rotation.to(by_head.device))
                self.assign(target, role, turned.flatten(0, 1))
        by_head = own["o"].double().unflatten(1, (-1, size))
        self.assign(target, "o", (by_head @ rotation.to(by_head.device)).flatten(1))

    def head_entries(self, block: int, modules: Mapping[str, Any]) -> dict[str, Tensor]:
        norm = self._part(block, f"{self.attention}.q_norm")
        if norm is not None and norm.weight.numel() != self._part(block, self.attention).head_dim:
            return {}  # a norm over all heads changes with every head that leaves (OLMoE)
        return super().head_entries(block, modules)


class Gemma2(Decoder):
    """Gemma 2 and 3, which norm what a sublayer reads and what it gives."""

    family = "gemma2"
    stream_norms = ()
    model_classes = _classes(gemma2="Gemma2", gemma3="Gemma3")
    sublayers = {
        "attention": ("self_attn", "input_layernorm", "post_attention_layernorm"),
        "mlp": ("mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    }


class DeepSeek(Decoder):
    """DeepSeek-V2 and V3: keys and values of all heads come from one latent vector. A head is its rows in the
    projections out of the latent vectors; the rotary key that all heads share stays."""

    family = "deepseek"
    stream_norms = ()
    model_classes = _classes(deepseek_v2="DeepseekV2", deepseek_v3="DeepseekV3")
    shared = (("q_a_proj", "q_proj", "kv_a_proj_with_mqa"), ("gate_proj", "up_proj"))
    heads = {"k": "self_attn.kv_b_proj", "v": "self_attn.kv_b_proj", "o": "self_attn.o_proj"}

    def _modules(self, block: int, paths: Mapping[str, str]) -> dict[str, Any]:
        modules = super()._modules(block, paths)
        if "o" in modules:
            attention = self._part(block, self.attention)
            modules["q"] = attention.q_proj if attention.q_b_proj is None else attention.q_b_proj
        return modules

    def head_entries(self, block: int, modules: Mapping[str, Any]) -> dict[str, Tensor]:
        attention = self._part(block, self.attention)
        keys, values = attention.qk_nope_head_dim, attention.v_head_dim
        both = torch.arange(length(modules["k"], OUT)).view(-1, keys + values)
        q, o = torch.arange(length(modules["q"], OUT)), torch.arange(length(modules["o"], IN))
        return {"q": q.view(len(both), -1), "k": both[:, :keys], "v": both[:, keys:], "o": o.view(len(both), -1)}

    def sizes(self, target: Target) -> dict[str, int]:
        if target.unit != "heads":
            return super().sizes(target)
        return dict.fromkeys(("num_attention_heads", "num_key_value_heads"), target.units)

    def count_layers(self, config: Any, stay: list[int]) -> None:
        super().count_layers(config, stay)
        config.first_k_dense_replace = sum(self._part(i, self.experts) is None for i in range(len(stay)))


class Phi(Decoder):
    """Phi-1, 1.5 and 2: attention and an MLP without gate side by side."""

    family = "phi"
    stream_norms = ("input_layernorm",)
    model_classes = _classes(phi="Phi")
    norm = "model.final_layernorm"
    sublayers = {"attention": ("self_attn",), "mlp": ("mlp",)}  # one norm for both, which stays
    heads = {**{role: f"self_attn.{role}_proj" for role in "qkv"}, "o": "self_attn.dense"}
    mlp = {"up": "mlp.fc1", "down": "mlp.fc2"}


class Phi3(Decoder):
    """Phi-3: q k v are one projection, and gate and up another."""

    family = "phi3"
    stream_norms = ()
    model_classes = _classes(phi3="Phi3")
    heads = {**dict.fromkeys("qkv", "self_attn.qkv_proj"), "o": "self_attn.o_proj"}
    mlp = {"gate": "mlp.gate_up_proj", "up": "mlp.gate_up_proj", "down": "mlp.down_proj"}

    def resize(self, block: int) -> None:
        """The attention asks its config how many query heads there are, so that it gets one of its own."""
        attention = self._part(block, self.attention)
        attention.config = copy.copy(attention.config)
        attention.config.num_attention_heads = length(attention.o_proj, IN) // attention.head_dim
        fused = length(attention.qkv_proj, OUT) - length(attention.o_proj, IN)
        attention.num_key_value_heads = fused // 2 // attention.head_dim


class GPTNeoX(Decoder):
    """GPT-NeoX and Pythia: one projection gives q k v head by head."""

    family = "gpt_neox"
    stream_norms = ()
    model_classes = _classes(gpt_neox="GPTNeoX")
    layers = "gpt_neox.layers"
    norm = "gpt_neox.final_layer_norm"
    attention = "attention"
    sublayers = {"attention": ("attention", "input_layernorm"), "mlp": ("mlp", "post_attention_layernorm")}
    head_size = "head_size"
    interleaved = True
    heads = {**dict.fromkeys("qkv", "attention.query_key_value"), "o": "attention.dense"}
    mlp = {"up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"}


class GPT2(Decoder):
    """GPT-2, whose projections store their weights as [in, out]."""

    family = "gpt2"
    stream_norms = ()
    model_classes = ("transformers.models.gpt2.modeling_gpt2.GPT2LMHeadModel",)
    layers = "transformer.h"
    norm = "transformer.ln_f"
    attention = "attn"
    sublayers = {"attention": ("attn", "ln_1"), "mlp": ("mlp", "ln_2")}
    heads = {**dict.fromkeys("qkv", "attn.c_attn"), "o": "attn.c_proj"}
    mlp = {"up": "mlp.c_fc", "down": "mlp.c_proj"}
    inner = "n_inner"

    def resize(self, block: int) -> None:
        attention = self._part(block, self.attention)
        attention.split_size = length(attention.c_proj, IN)
        attention.num_heads = attention.split_size // attention.head_dim

    def _layers(self, block: int) -> list[Target]:
        if self.model.config.scale_attn_by_inverse_layer_idx:
            return []  # what a block computes depends on its place, which would change
        return super()._layers(block)


class OPT(Decoder):
    """OPT, whose MLP is no module of its own but two linears of the block, so that no sublayers can leave."""

    family = "opt"
    stream_norms = ("self_attn_layer_norm", "final_layer_norm")
    embeddings = ("model.decoder.embed_tokens", "model.decoder.embed_positions")
    model_classes = _classes(opt="OPT")
    layers = "model.decoder.layers"
    norm = "model.decoder.final_layer_norm"
    sublayers = {}
    heads = {**{role: f"self_attn.{role}_proj" for role in "qkv"}, "o": "self_attn.out_proj"}
    mlp = {"up": "fc1", "down": "fc2"}
    inner = "ffn_dim"

    def resize(self, block: int) -> None:
        attention = self._part(block, self.attention)
        attention.num_heads = length(attention.out_proj, IN) // attention.head_dim
