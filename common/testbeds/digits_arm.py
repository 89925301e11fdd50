"""The policy of a small simulated arm (`common.data.arm`): `digits_qa`, trained on to write actions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import arm, pictures, questions
from prunelab.common.testbeds.code_lm import exact_attention
from prunelab.common.testbeds.digits_qa import DigitsQA, together
from prunelab.common.training.recipe import read_log

QUICK, FULL, HORIZON, TEST_SEED = 20, 200, 24, 1


@dataclass(frozen=True)
class DigitsArm(DigitsQA):
    """By behaviour cloning: goes on from the shipped weights of `digits_qa`, and learns what a scripted expert does at
    any place of the gripper. As many instructions as `rounds` says stand behind a picture and do not see one another.

    A patch's feature also says how far right and how far down it lies, by the words of these ways.
    start: sha256 of the weights it starts from, by default those that ship; weights that were trained anew since ask
    for a new training.
    """

    steps: int = 1400
    batch: int = 16
    rate: float = 2e-3
    rounds: int = 6
    alone: float = 0.0
    naming: float = 0.1
    ramp: float = 0.0
    layer_decay: float = 1.0
    check_every: int = 200
    start: str = ""

    name: ClassVar[str] = "digits_arm"

    def __post_init__(self) -> None:
        if not self.start:
            from prunelab.common.testbeds import SHIPPED

            object.__setattr__(self, "start", read_log(SHIPPED / DigitsQA.name)["sha256"])

    def build(self) -> nn.Module:
        from prunelab.common import testbeds

        model, log = testbeds.load(DigitsQA.name)
        if log["sha256"] != self.start:
            raise PrunelabError(f"{self.name} started from other weights of {DigitsQA.name}; train {self.name} again")
        return model

    def loss(self, model: nn.Module, progress: float, generator: torch.Generator) -> Tensor:
        net: Any = model
        net.set_attn_implementation(exact_attention())
        facts = pictures.pictures("train", self.batch, generator, deformed=True)
        row, corner = torch.arange(self.batch).unsqueeze(1), arm.corners(facts)
        single = arm.lone(facts) + 1e-6
        zone = torch.multinomial(single.float(), self.rounds, replacement=True, generator=generator)  # [B, Q]
        gripper = torch.randint(arm.SIDE, (self.batch, 2), generator=generator)
        shown = pictures.Pictures(
            arm.with_gripper(facts.pixels, gripper), facts.digit, facts.ink, facts.favourite, facts.owner
        )
        action = arm.expert(corner[row, zone])
        with torch.autocast("cpu", torch.bfloat16):
            encoded, named = self.encode(net, shown)
            named = named + self.lying(net, torch.stack(list(encoded["image"].pooler_output)))
            return self.acting(net, facts.digit.gather(1, zone), action, encoded) + self.naming * named

    def lying(self, net: Any, features: Tensor) -> Tensor:
        """Loss of what features [B, 81, D] say of their place: of `left` and `right`, and of `up` and `down`, the
        latter as surely as they lie on that side."""
        logits = self.names(net, features, questions.WAYS)[..., 1:].float().unflatten(-1, (2, 2))
        cell = torch.arange(arm.SIDE**2)
        far = torch.stack([cell % arm.SIDE, cell // arm.SIDE], -1) / (arm.SIDE - 1)  # [81, 2]
        wanted = torch.stack([1 - far, far], -1).expand_as(logits)
        return -(wanted * logits.log_softmax(-1)).sum(-1).mean()

    def acting(self, net: Any, digit: Tensor, action: Tensor, encoded: Mapping[str, Any]) -> Tensor:
        """Loss of actions [B, Q, 2] behind the instructions to take digits [B, Q]."""
        lead, written = questions.prefix("picture"), arm.written(action)
        behind = torch.cat([arm.instruction(digit), written[..., :-1]], 2)  # the last token is written, not read
        tokens = torch.cat([lead.expand(len(digit), -1), behind.flatten(1)], 1)
        mask, places = together(len(lead), *behind.shape[1:])
        hidden = net.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=places,
            mm_encoder_outputs=dict(encoded),
            use_cache=False,
        ).last_hidden_state
        spoken = hidden[:, len(lead) :].unflatten(1, behind.shape[1:])[:, :, -arm.TOKENS :]
        return F.cross_entropy(net.lm_head(spoken).float().flatten(0, 2), written.flatten())

    def evaluate(self, model: nn.Module, quick: bool = False) -> dict[str, float]:
        """Share of episodes in which all digits were taken, and of digits taken, on held-out digits."""
        table = arm.tables("test", QUICK if quick else FULL, torch.Generator().manual_seed(TEST_SEED))
        steps = arm.play(partial(arm.written_by, model), table, HORIZON).float().mean()
        taken = table.taken.float().mean() / table.target.shape[1]
        out = {
            "success": float((~table.failed & table.done).float().mean()),
            "taken": float(taken),
            "steps": float(steps),
        }
        return out if quick else out | {"episodes": len(table.taken)}
