"""Problems that a language model, pruned or not, solves in words of its own, which are sampled and graded by rule."""

from __future__ import annotations

import importlib
import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import track
from torch import Tensor

from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import problems, programs, texts
from prunelab.common.data.problems import Problem
from prunelab.common.measures.bench import Bench
from prunelab.common.measures.language import sizes
from prunelab.common.metrics import uncertainty
from prunelab.common.models import devices, loading

if TYPE_CHECKING:
    from prunelab.common.tasks.solve import Solve

# As the cards of reasoning models recommend.
VALUE = "Please reason step by step, and put your final answer within \\boxed{}."
CHOICE = "Please reason step by step, and put the letter of your choice within \\boxed{}."
METHOD = "Please complete the class above in Python, and put the whole program between ```python and ```."
PROGRAM = "Please write a Python program that reads the input and prints the answer, between ```python and ```."
OTHERS = ("calibration_2", "calibration_3", "calibration_4", "calibration_5")


def measure(bench: Bench[Solve.Settings]) -> dict[str, Any]:
    """What the task gives, see `tasks.solve`."""
    settings, ids = bench.settings, bench.ids
    exam = problems.load(ids["data"], bench.config)[: settings.samples]
    if lacking := sum(not problem.graded for problem in exam):
        raise PrunelabError(f"{lacking} of these problems have no answer to grade by; name another data set")
    if any(problem.tests for problem in exam):
        programs.allow(bench.config)
    model, tokenizer = loading.language(ids["model"], bench.config)
    model = devices.place(model, bench.device, half=True)
    out, method = sizes(model), bench.method()
    if method is not None:
        pruning = importlib.import_module("prunelab.common.weights.pruning")  # by name, see `by_role`
        calibration = None
        if getattr(method, "calibrated", False):
            names = ["calibration", *(name for name in OTHERS if name in ids)]
            calibration = [s for name in names for s in _calibration(bench, model, tokenizer, ids[name])]
        plan = pruning.prune(method, model, bench.budget, calibration, seed=bench.seed, progress=False)
        out = sizes(model, plan.report)
    right = [0.0] * len(exam)
    lengths: list[int] = []
    for run in range(settings.runs):
        for place, tokens in enumerate(written(bench, model, tokenizer, exam, run)):
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            right[place] += 100 * problems.solved(exam[place], text) / settings.runs
            lengths.append(len(tokens))
    cut = sum(length >= settings.new for length in lengths)
    return {
        "solved": uncertainty.mean(right) | {"protocol": _protocol(bench)},
        "written": {"value": round(sum(lengths) / len(lengths), 2)},
        "unfinished": {"value": round(100 * cut / len(lengths), 3)},
        **out,
    }


def _protocol(bench: Bench[Solve.Settings]) -> str:
    settings = bench.settings
    sampled = f"temperature {settings.temperature:g}, top-p {settings.top_p:g}" if settings.temperature else "greedy"
    return f"{settings.runs} runs, {sampled}, up to {settings.new} tokens; graded by the last boxed answer, or by tests"


def _calibration(bench: Bench[Solve.Settings], model: Any, tokenizer: Any, identity: Mapping[str, Any]) -> list[Tensor]:
    """Sequences of token ids to calibrate on, of one data set, as the setting `shown` asks."""
    settings = bench.settings
    if identity["loader"] != "problems":
        drawn = texts.windows(identity, bench.config, tokenizer, settings.length, settings.calibration, bench.seed)
        return [tokens.to(model.device) for tokens in drawn]
    known = problems.load(identity, bench.config)
    if len(known) < settings.calibration:
        raise PrunelabError(
            f"there are {len(known)} problems to calibrate on, not {settings.calibration}; ask for fewer"
        )
    chosen = random.Random(bench.seed).sample(known, settings.calibration)
    asks = [prompt(tokenizer, problem) for problem in chosen]
    if settings.shown == "problem":
        made: list[list[int]] = [[] for _ in chosen]
    elif settings.shown == "reference":
        made = [tokenizer(problem.answer, add_special_tokens=False)["input_ids"] for problem in chosen]
    else:
        made = written(bench, model, tokenizer, chosen, run=-1)
    parts = [([] if settings.shown == "answer" else ask) + answer for ask, answer in zip(asks, made, strict=True)]
    return [torch.tensor(tokens, device=model.device) for tokens in parts]


def prompt(tokenizer: Any, problem: Problem) -> list[int]:
    """Token ids of the question, as the model's own template has it, or as plain text where it has none; problems
    without an answer are asked as they stand."""
    how = (METHOD if problem.function else PROGRAM) if problem.tests else CHOICE if problem.choice else VALUE
    text = f"{problem.text}\n\n{how}" if problem.graded else problem.text
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return list(tokenizer(text)["input_ids"])


@torch.inference_mode()
def written(
    bench: Bench[Solve.Settings], model: Any, tokenizer: Any, exam: Sequence[Problem], run: int
) -> list[list[int]]:
    """The model's answers as token ids, without what follows their end. Those of one length are written together, so
    that none is padded in front; draws are those of the seed and the run."""
    settings = bench.settings
    prompts = [prompt(tokenizer, problem) for problem in exam]
    groups: dict[int, list[int]] = {}
    for place, tokens in enumerate(prompts):
        groups.setdefault(len(tokens), []).append(place)
    batches = [
        places[start : start + settings.batch]
        for places in groups.values()
        for start in range(0, len(places), settings.batch)
    ]
    end = tokenizer.eos_token_id
    sampling: dict[str, Any] = {"temperature": None, "top_p": None, "top_k": None}
    if settings.temperature > 0:
        sampling = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
    results: list[list[int]] = [[] for _ in exam]
    with torch.random.fork_rng(devices=[bench.device] if bench.device.type == "cuda" else []):
        torch.manual_seed((bench.seed << 8) + run + 1)
        for places in track(batches, "solving", transient=True):
            ids = torch.tensor([prompts[place] for place in places], device=model.device)
            made = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=settings.temperature > 0,
                max_new_tokens=settings.new, pad_token_id=tokenizer.pad_token_id or end, **sampling,
            )  # fmt: skip
            for place, row in zip(places, made[:, ids.shape[1] :].tolist(), strict=True):
                results[place] = row[: row.index(end) + 1] if end in row else row
    return results
