"""Transformer blocks under a config of transformers: token ids in, and a config that is to describe what is left."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from prunelab.common.core.attention_interface import record
from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights.adapters.base import Shelf
from prunelab.common.weights.adapters.blocks import READS, Blocks
from prunelab.common.weights.adapters.projections import IN, length
from prunelab.common.weights.targets import Decision, Target

QUERIES = 256  # whose attention is at hand together


class Pretrained(Blocks):
    """A model of transformers. inner: the config's name for the width of the MLP; biases: its options that give the
    projections of heads and channels biases."""

    inner: ClassVar[str] = "intermediate_size"
    biases: ClassVar[dict[str, str]] = {"heads": "attention_bias", "channels": "mlp_bias"}

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.reshaped = False  # by a removal or a new bias
        self.options: set[str] = set()  # of the config, for the new biases

    def check_sample(self, sample: Tensor) -> None:
        config = self.model.config
        if sample.dim() != 1 or sample.dtype not in (torch.int64, torch.int32) or len(sample) < 2:
            raise PrunelabError("a calibration sample is a vector of at least two token ids; see weights.windows")
        longest = getattr(config, "max_position_embeddings", None)
        if longest is not None and len(sample) > longest:
            raise PrunelabError(f"calibration sequences of {len(sample)} tokens exceed the model's {longest}")
        if int(sample.min()) < 0 or int(sample.max()) >= config.vocab_size:
            raise PrunelabError(f"calibration tokens lie outside the vocabulary of {config.vocab_size}")

    def embed(self, sample: Tensor) -> Tensor:
        """The last token's state behind the last norm, as decoders are made to embed."""
        body = self.model.base_model
        options = {} if getattr(body.config, "use_cache", None) is None else {"use_cache": False}
        state: Tensor = body(input_ids=sample.unsqueeze(0), **options).last_hidden_state[0, -1]
        return state

    def config(self) -> dict[str, Any]:
        values: dict[str, Any] = json.loads(self.model.config.to_json_string(use_diff=False))
        return values

    def received(self, block: int, run: Callable[[], Any]) -> Tensor:
        if not hasattr(self, "attention"):
            return super().received(block, run)
        recorder, stop = record(self._part(block, self.attention))
        try:
            run()
        finally:
            stop()
        length = recorder.shown().shape[2]
        received = torch.zeros(length, device=recorder.shown().device)
        for rows in torch.arange(length, device=received.device).split(QUERIES):
            received += recorder.weights(rows.unsqueeze(0))[0].float().sum((0, 1))
        return received

    def remove(self, target: Target, kept: Tensor) -> None:
        super().remove(target, kept)
        self.reshaped |= target.unit != "layers"

    def add_bias(self, target: Target, role: str, value: Tensor) -> None:
        super().add_bias(target, role, value)
        self.reshaped = True
        self.options.add(self.biases[target.unit])

    def attempt(self, target: Target, decision: Decision, dense: Shelf | None = None) -> Callable[[], None]:
        flags, back = (self.reshaped, set(self.options)), super().attempt(target, decision, dense)

        def undo() -> None:
            back()
            self.reshaped, self.options = flags

        return undo

    # -- the config --------------------------------------------------------------------------------------------------

    def finish(self) -> bool:
        self._own_config()
        stay = self.drop_layers()
        if stay is not None:
            self.count_layers(self.model.config, stay)
        if not self.reshaped:
            return True
        changes: dict[str, Any] = {option: True for option in self.options if hasattr(self.model.config, option)}
        for unit in (*READS, "experts", "hidden"):
            targets = self.targets(unit)  # type: ignore[arg-type]
            if len({target.shape for target in targets}) > 1:
                return False
            changes |= self.sizes(targets[0]) if targets else {}
        if not self._adopt(_changed(copy.deepcopy(self.model.config), changes)):
            return False
        _changed(self.model.config, changes)
        return True

    def sizes(self, target: Target) -> dict[str, int]:
        """What the config says of the size of a structure like this one."""
        if target.unit == "channels":
            return {self.inner: target.units}
        size = int(getattr(self._part(target.block, self.attention), self.head_size))
        heads = length(self._modules(target.block, self.heads)["o"], IN) // size
        results = {"head_dim": size, "num_attention_heads": heads}
        grouped = hasattr(self.model.config, "num_key_value_heads")
        return {**results, "num_key_value_heads": target.units} if grouped else results

    def count_layers(self, config: Any, stay: list[int]) -> None:
        """Tell the config which layers stayed."""
        config.num_hidden_layers = len(stay)
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[i] for i in stay]

    def _adopt(self, config: Any) -> bool:
        """Whether a model built from this config has the tensors of this one. Biases that it has besides, since a
        config knows all of a part's or none, become zeros here."""
        from huggingface_hub.errors import StrictDataclassError

        try:
            config.validate()
            with torch.device("meta"):
                built = type(self.model)(copy.deepcopy(config))
        except (StrictDataclassError, ValueError):  # Llama's wants its width to divide by its heads
            return False
        wanted = {name: tensor.shape for name, tensor in built.state_dict().items()}
        own = {name: tensor.shape for name, tensor in self.model.state_dict().items()}
        missing = wanted.keys() - own.keys()
        unlike = any(wanted.get(name) != shape for name, shape in own.items())
        if unlike or not all(name.endswith(".bias") for name in missing):
            return False
        for name in missing:
            linear = self.model.get_submodule(name.removesuffix(".bias"))
            linear.bias = nn.Parameter(linear.weight.new_zeros(wanted[name]), linear.weight.requires_grad)
        return True

    def _own_config(self) -> None:
        """A copy of the config, since other models may have been built from the same object."""
        shared, own = self.model.config, copy.deepcopy(self.model.config)
        for module in self.model.modules():
            if getattr(module, "config", None) is shared:
                module.config = own


def _changed(config: Any, changes: Mapping[str, Any]) -> Any:
    for name, value in changes.items():
        setattr(config, name, value)
    return config
