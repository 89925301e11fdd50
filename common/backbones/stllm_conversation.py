"""ST-LLM's model of conversation; see `stllm`."""

from __future__ import annotations

from pathlib import Path

from transformers.models.instructblip.configuration_instructblip import InstructBlipConfig

from prunelab.common.backbones import stllm
from prunelab.common.backbones.stllm import load_checkpoint as load_checkpoint
from prunelab.common.backbones.stllm import published as published


def like(config: InstructBlipConfig) -> stllm.StllmConfig:
    """The settings of an InstructBLIP on Vicuna as this model's."""
    return stllm.like(config, branch=0, mixed=stllm.MIXED)


def processor(folder: Path, source: Path) -> stllm.StllmProcessor:
    """See `stllm.processor`."""
    return stllm.processor(folder, source, stllm.MIXED)
