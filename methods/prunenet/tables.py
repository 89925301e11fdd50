"""The policy's share of the model's parameters, which follows from shapes."""

from __future__ import annotations

LLAMA_2_7B = 6_738_415_616
WIDTH, INNER = 4096, 11_008


def policy_size() -> dict[str, dict[str, float]]:
    """A [I, H], b [I] and s [I] over the parameters of Llama-2-7B, in percent."""
    share = 100 * (INNER * WIDTH + 2 * INNER) / LLAMA_2_7B
    return {"policy size/LLaMA-2-7B/share of parameters": {"value": round(share, 4)}}
