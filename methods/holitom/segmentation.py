"""HoliTom's first step: frames are cut into segments such that as many tokens as possible repeat within them.

What a cut saves is counted from the lengths of runs of like tokens, so that the table of all segments' gains takes
one histogram a frame in place of a loop over places and windows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

Segment = tuple[int, int]  # first and last frame, both inside


def frame_similarity(tokens: Tensor) -> Tensor:
    """Cosine [T - 1, N] of the tokens [T, N, D] that stand at one place in a frame and in the next."""
    unit = nn.functional.normalize(tokens, dim=-1)
    return (unit[:-1] * unit[1:]).sum(-1)


def run_lengths(similar: Tensor) -> Tensor:
    """For similar [T - 1, N] (bool: a frame's token is like the next frame's), the number of frames [T, N] through
    which each token goes on unbroken."""
    frames = len(similar) + 1
    index = torch.arange(frames, device=similar.device).unsqueeze(1)
    broken = nn.functional.pad(~similar, (0, 0, 0, 1), value=True)
    return torch.where(broken, index, frames).flip(0).cummin(0).values.flip(0) - index


def gain_table(runs: Tensor) -> Tensor:
    """[T, T]: entry (b, l) is what one segment of the frames b to b + l saves: l tokens at each of the places whose run
    from b lasts that long. Runs [T, N] are counted by length, and the counts summed from the longest down."""
    frames = len(runs)
    lengths = torch.zeros(frames, frames, dtype=torch.long, device=runs.device)
    lengths = lengths.scatter_add(1, runs, torch.ones_like(runs))
    lasting = lengths.flip(1).cumsum(1).flip(1)
    return lasting * torch.arange(frames, device=runs.device)


def segment(runs: Tensor, window: int = 1024) -> tuple[list[Segment], int]:
    """The segments of at most `window` frames that save most tokens together, and that number.

    Dynamic programme over the last frame of a segment; of equal cuts the one with the shorter last segment.
    """
    gain, frames = gain_table(runs).cpu(), len(runs)
    best = torch.zeros(frames + 1, dtype=torch.long)  # of the first so many frames
    first = []
    for last in range(frames):
        starts = torch.arange(last, max(-1, last - window), -1)  # shortest segment first; argmax takes the first best
        total = best[starts] + gain[starts, last - starts]
        choice = int(total.argmax())
        best[last + 1] = total[choice]
        first.append(last - choice)
    cuts, end = [], frames - 1
    while end >= 0:
        cuts.append((first[end], end))
        end = first[end] - 1
    return cuts[::-1], int(best[-1])


def split(runs: Tensor, part: Segment) -> tuple[Tensor, Tensor]:
    """Places of a frame that repeat through a segment, and the others. A single frame repeats nothing."""
    first, last = part
    if first == last:
        every = torch.arange(runs.shape[1], device=runs.device)
        return every[:0], every
    static = runs[first] >= last - first
    return static.nonzero().squeeze(1), (~static).nonzero().squeeze(1)
