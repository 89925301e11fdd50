"""`digits_qa`, fine-tuned together with ATP-LLaVA's modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prunelab.common.testbeds.digits_qa import DigitsQA
from prunelab.common.testbeds.digits_qa_tuned import DigitsQATuned

METHOD = "atp_llava"


@dataclass(frozen=True)
class DigitsQAATP(DigitsQATuned):
    """By ATP-LLaVA's rule: soft masks weigh attention, the whole model and the modules learn, and the target is a
    quarter of the tokens, as the paper's 144 of 576.

    Here half a mean attention logit is 2, and thresholds below 1 would keep all; so importances count as they stand out
    of their sample. Masks are three times as steep: at the paper's temperature all tokens stayed by a quarter while
    training, and in use none did. Modules stand before the last three of five layers, as the first one's attention
    tells little, and sampling is as sparse as a deep module's: every second cell was all that the target left, and
    training ended there. Answers are not in the text that the modules read.
    """

    steps: int = 240
    rate: float = 6e-4
    check_every: int = 80
    method: str = f"{METHOD}(layers=(2, 3, 4), scale='standard', rates=(0.0625,), temperature=30.0)"
    budget: str = "0.25"

    name: ClassVar[str] = "digits_qa_atp"
    ends: ClassVar[bool] = False

    def base(self) -> DigitsQA:
        return DigitsQA()
