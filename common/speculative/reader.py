"""A causal language model together with its cache, which reads a sequence and a tree behind it in one forward pass."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prunelab.common.core import attention_interface as seam
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.plan import ModelInfo
from prunelab.common.speculative.trees import DraftTree

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

_APART = 32  # unread tokens from which on reading them first, causally, is cheaper than a mask row for each


class Reader:
    """Reads tokens and trees, keeps what was accepted, and forgets the rest.

    The cache holds the entries of the sequence `held` [n] and, until the next call, of the tree read last. Tree entries
    are told apart by a 4-D attention mask and by position ids, which transformers passes on to any model. `cache` may
    hold the first tokens already, `held` says which. With `watch` the last read leaves in `hidden` [rows, D] what the
    model's output layer made its logits of, and in `earlier` [M, D] the like of the tokens that it read before those.
    With `whole` a prompt is read in one pass and by itself, for models that prune what it leaves.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: Cache | None = None,
        held: Tensor | None = None,
        watch: bool = False,
        whole: bool = False,
    ) -> None:
        from transformers import DynamicCache

        self.model = model
        self.cache = DynamicCache(config=model.config) if cache is None else cache
        self.device = working_device(model)
        self.held = torch.empty(0, dtype=torch.long, device=self.device) if held is None else held
        self.hidden: Tensor | None = None
        self.earlier: Tensor | None = None
        self._watch, self._context = watch, getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._whole = whole
        self._tree: DraftTree | None = None
        self._brief = "logits_to_keep" in inspect.signature(model.forward).parameters
        _check(model, self.cache)

    @property
    def context(self) -> int | None:
        """Tokens that the model has positions for, where that is known."""
        return self._context

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the model gives logits for."""
        return vocabulary(self.model)

    @property
    def prompting(self) -> bool:
        """Whether the next thing read is a prompt that is read by itself, with an empty tree."""
        return self._whole and not len(self.held)

    def read(self, tokens: Tensor, tree: DraftTree, known: int = 0, aside: DraftTree | None = None) -> Tensor:
        """Logits [T + 1, V] behind the sequence [N] (row 0) and behind every node of the tree.

        With `known` > 0 the call before was about the same sequence and the first so many nodes of this tree; they are
        not read again, and the logits are those of the other nodes [T - known, V]. `aside`: S tokens more, which share
        the pass alone; their logits follow, and where the context ends they take its last place.
        """
        self.earlier = None
        if self.prompting:
            self.held, self._tree = tokens, tree
            return self._forward(tokens, None, 0, 1)
        drafts, tree = len(tree.tokens), tree if aside is None else tree.beside(aside)
        if known:
            unread = tokens[:0]
        else:
            self._return_to(tokens[:-1])
            if len(tokens) - 1 - len(self.held) >= _APART:
                self._forward(tokens[len(self.held) : -1], None, len(self.held), 1)
                self.held = tokens[:-1]
            unread = tokens[len(self.held) :]
        count, new = len(tree.tokens), len(tree.tokens) - known
        fed = torch.cat([unread, tree.tokens[known:]])
        seen = torch.zeros(len(fed), len(tokens) + count, dtype=torch.bool, device=fed.device)
        start = len(tokens) - len(unread)
        seen[:, :start] = True
        seen[: len(unread), start : len(tokens)] = seen.new_ones(len(unread), len(unread)).tril()
        seen[len(unread) :, start : len(tokens)] = True
        seen[len(unread) :, len(tokens) :] = tree.ancestors[known:]
        indices = torch.arange(start, len(tokens), device=fed.device)
        behind = len(tokens) - 1 + tree.depths
        if aside is not None and self._context is not None:
            behind[drafts:].clamp_(max=self._context - 1)
        positions = torch.cat([indices, behind[known:]])
        if self._context is not None:  # what a draft model guesses of tokens behind its context comes to nothing
            positions.clamp_(max=self._context - 1)
        self.held, self._tree = tokens, tree
        return self._forward(fed, seen, positions, new + (not known))

    def keep(self, nodes: Tensor) -> None:
        """Of the tree read last keep the path of nodes [A], as part of the sequence. Caches shrink in place."""
        assert self._tree is not None
        start, count = len(self.held), len(nodes)
        for layer in self.cache.layers:
            if hasattr(layer, "keep_path"):  # a layer that holds fewer entries than it has seen tokens
                layer.keep_path(nodes, len(self._tree.tokens))
                continue
            for name in ("keys", "values"):
                entries = getattr(layer, name)
                moved = entries.index_select(-2, start + nodes.to(entries.device))  # source and target overlap
                entries[..., start : start + count, :] = moved
                setattr(layer, name, entries[..., : start + count, :])
        self.held, self._tree = torch.cat([self.held, self._tree.tokens[nodes]]), None

    def crop(self, length: int) -> None:
        """Forget the tree and what lies behind the first `length` tokens."""
        loose = 0 if self._tree is None else len(self._tree.tokens)
        removed = len(self.held) - length + loose
        if removed:
            self.cache.crop(-removed)
        self.held, self._tree = self.held[:length], None

    def _return_to(self, tokens: Tensor) -> None:
        """Forget everything behind the longest beginning shared with these tokens."""
        short = min(len(tokens), len(self.held))
        self.crop(int((tokens[:short] == self.held[:short]).long().cumprod(0).sum()))

    def _forward(self, fed: Tensor, seen: Tensor | None, positions: Tensor | int, keep: int) -> Tensor:
        """Logits [keep, V] of the last tokens fed [M]; seen: [M, N] bool of the entries each may attend to."""
        mask = None
        if seen is not None:  # additive: the one form that both sdpa and eager attention take
            mask = torch.zeros(seen.shape, dtype=self.model.dtype, device=seen.device)
            mask = mask.masked_fill_(~seen, torch.finfo(mask.dtype).min)[None, None]
        if isinstance(positions, int):
            positions = torch.arange(positions, positions + len(fed), device=fed.device)
        options: dict[str, Any] = {"logits_to_keep": keep} if self._brief else {}
        out = self.model(
            input_ids=fed.unsqueeze(0),
            attention_mask=mask,
            position_ids=positions.unsqueeze(0),
            output_hidden_states=self._watch,
            **seam.with_cache({"use_cache": True}, self.cache),
            **options,
        )
        if self._watch:
            states = out.hidden_states[-1][0]
            held = [] if self.earlier is None or self.hidden is None else [self.earlier, self.hidden]
            self.hidden, self.earlier = states[-keep:], torch.cat([*held, states[:-keep]])
        return out.logits[0, -keep:]


def info(model: PreTrainedModel) -> ModelInfo:
    """What a method may know of a language model."""
    config = model.config.get_text_config()
    return ModelInfo(
        family=config.model_type,
        depth=config.num_hidden_layers,
        heads=config.num_attention_heads,
        width=config.hidden_size,
        tokens=getattr(config, "max_position_embeddings", 0),
        vocabulary=vocabulary(model),
    )


def working_device(model: PreTrainedModel) -> torch.device:
    """Where the model computes, also while its weights are offloaded and stand on the meta device."""
    if model.device.type != "meta":
        return model.device
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return torch.device(next((device for device in devices if device is not None), "meta"))


def vocabulary(model: PreTrainedModel) -> int:
    """Number of tokens that a model gives logits for."""
    head = model.get_output_embeddings()
    return int(model.config.get_text_config().vocab_size if head is None else head.weight.shape[0])


def _check(model: PreTrainedModel, cache: Cache) -> None:
    """Refuse models and caches in which entries of single tokens cannot be moved or masked."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    if model.config.is_encoder_decoder:
        raise PrunelabError("speculative decoding runs on decoder-only language models; this one has an encoder")
    attention = seam.implementation(model.config)
    if attention not in ("sdpa", "eager"):
        raise PrunelabError(
            f"a tree needs an attention mask, which {attention} does not take;"
            ' call model.set_attn_implementation("sdpa")'
        )
    config = model.config
    if seam.windowed(config.get_text_config()) or "local" in getattr(config, "attention_layers", ()):
        raise PrunelabError(
            "a draft may stand anywhere in the cache, which a sliding window does not see through;"
            " use a model of full attention"
        )
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        raise PrunelabError(
            f"a {config.model_type} tells tokens apart by their order in the cache, in which a draft's"
            " branches stand one behind the other; use a model with rotary or learned positions"
        )
    for layers in (cache.layers, DynamicCache(config=model.config).layers):
        plain = [type(layer) is DynamicLayer or hasattr(layer, "keep_path") for layer in layers]
        odd = {type(layer).__name__ for layer, known in zip(layers, plain, strict=True) if not known}
        if odd:
            raise PrunelabError(
                f"the cache has {', '.join(sorted(odd))}, whose entries cannot be moved one by one;"
                " use a model without sliding window and a DynamicCache"
            )
    if not cache.layers and getattr(cache, "layer_class_to_replicate", None) is not DynamicLayer:
        raise PrunelabError(f"{type(cache).__name__} has no entries by token; use a DynamicCache")
    if getattr(cache, "offloading", False):
        raise PrunelabError("an offloaded cache cannot be moved about; use a DynamicCache without offloading")
