"""MoE-LLaVA on Phi-2; see `moe_llava`."""

from __future__ import annotations

from transformers.models.llava.configuration_llava import LlavaConfig

from prunelab.common.backbones.moe_llava import NAMES as NAMES
from prunelab.common.backbones.moe_llava import PHI, MoeLlavaConfig, with_decoder
from prunelab.common.backbones.moe_llava import load_checkpoint as load_checkpoint
from prunelab.common.backbones.moe_llava import official_name as official_name
from prunelab.common.backbones.moe_llava import processor as processor


def like(config: LlavaConfig) -> MoeLlavaConfig:
    """The settings of a LLaVA-1.5 as MoE-LLaVA's on Phi-2."""
    return with_decoder(config, PHI)
