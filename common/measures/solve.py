"""Problems that a language model, pruned or not, solves in words of its own, which are sampled and graded by rule."""

from __future__ import annotations

import importlib
import random
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import track
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

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
MORE = tuple(f"data_{n}" for n in range(2, 8))
OUTPUT = "```output"  # behind it stands what a program printed


def measure(bench: Bench[Solve.Settings]) -> dict[str, Any]:
    """What the task gives, see `tasks.solve`."""
    settings, ids = bench.settings, bench.ids
    sets = [problems.load(ids[name], bench.config)[: settings.samples] for name in ("data", *MORE) if name in ids]
    exam = [problem for part in sets for problem in part]
    if lacking := sum(not problem.graded for problem in exam):
        raise PrunelabError(f"{lacking} of these problems have no answer to grade by; name another data set")
    if settings.calls or any(problem.tests for problem in exam):
        programs.allow(bench.config)
    model, tokenizer = loading.language(ids["model"], bench.config)
    model = devices.place(model, bench.device, half=True)
    out, method = sizes(model), bench.method()
    if method is not None:
        pruning = importlib.import_module("prunelab.common.weights.pruning")  # by name, see `by_role`
        calibration = None
        if getattr(method, "calibrated", False):
            names = ["calibration", *(name for name in OTHERS if name in ids)]
            count = settings.calibration
            calibration = [s for name in names for s in demonstrations(bench, model, tokenizer, ids[name], count)]
        plan = pruning.prune(method, model, bench.budget, calibration, seed=bench.seed, progress=False)
        out = sizes(model, plan.report)
    right = [0.0] * len(exam)
    lengths: list[int] = []
    for run in range(settings.runs):
        for place, (text, count) in enumerate(answers(bench, model, tokenizer, exam, run)):
            right[place] += 100 * problems.solved(exam[place], text) / settings.runs
            lengths.append(count)
    cut = sum(length >= settings.new * (settings.calls + 1) for length in lengths)
    solved = uncertainty.mean(right)
    if len(sets) > 1:  # each counts alike, whatever its size; the interval is over sets
        ends = list(accumulate(map(len, sets)))
        parts = [right[end - len(part) : end] for end, part in zip(ends, sets, strict=True)]
        solved = uncertainty.mean([sum(part) / len(part) for part in parts])
    return {
        "solved": solved | {"protocol": _protocol(bench)},
        "written": {"value": round(sum(lengths) / len(lengths), 2)},
        "unfinished": {"value": round(100 * cut / len(lengths), 3)},
        **out,
    }


def _protocol(bench: Bench[Solve.Settings]) -> str:
    settings = bench.settings
    sampled = f"temperature {settings.temperature:g}, top-p {settings.top_p:g}" if settings.temperature else "greedy"
    called = f", up to {settings.calls} programs run on the way" if settings.calls else ""
    limit = f"up to {settings.new} tokens{called}"
    return f"{settings.runs} runs, {sampled}, {limit}; graded by the last boxed answer, or by tests"


def demonstrations(
    bench: Bench[Any], model: Any, tokenizer: Any, identity: Mapping[str, Any], count: int
) -> list[Tensor]:
    """So many sequences of token ids to calibrate on, of one data set, as the setting `shown` asks."""
    settings = bench.settings
    if identity["loader"] != "problems":
        drawn = texts.windows(identity, bench.config, tokenizer, settings.length, count, bench.seed)
        return [tokens.to(model.device) for tokens in drawn]
    known = problems.load(identity, bench.config)
    if len(known) < count:
        raise PrunelabError(f"there are {len(known)} problems to calibrate on, not {count}; ask for fewer")
    chosen = random.Random(bench.seed).sample(known, count)
    asks = [prompt(tokenizer, problem, settings.template) for problem in chosen]
    if settings.shown == "problem":
        made: list[list[int]] = [[] for _ in chosen]
    elif settings.shown == "reference":
        made = [tokenizer(problem.answer, add_special_tokens=False)["input_ids"] for problem in chosen]
    else:
        made = written(bench, model, tokenizer, asks, run=-1)
    parts = [([] if settings.shown == "answer" else ask) + answer for ask, answer in zip(asks, made, strict=True)]
    return [torch.tensor(tokens, device=model.device) for tokens in parts]


def prompt(tokenizer: Any, problem: Problem, template: str = "") -> list[int]:
    """Token ids of the question, as `asked` has it, else as the model's own template does, or as plain text where it
    has none; problems without an answer are asked as they stand."""
    if template:
        return list(tokenizer(template.replace("{problem}", problem.text))["input_ids"])
    how = (METHOD if problem.function else PROGRAM) if problem.tests else CHOICE if problem.choice else VALUE
    text = f"{problem.text}\n\n{how}" if problem.graded else problem.text
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return list(tokenizer(text)["input_ids"])


def answers(
    bench: Bench[Solve.Settings], model: Any, tokenizer: Any, exam: Sequence[Problem], run: int
) -> list[tuple[str, int]]:
    """The model's answers in words, what their programs printed included, and how many tokens of each it wrote."""
    settings = bench.settings
    prompts = [prompt(tokenizer, problem, settings.template) for problem in exam]
    texts, counts = [""] * len(exam), [0] * len(exam)
    left = list(range(len(exam)))
    for turn in range(settings.calls + 1):
        made = written(bench, model, tokenizer, [prompts[i] for i in left], run, stopping=settings.calls > 0)
        going = []
        for i, tokens in zip(left, made, strict=True):
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            counts[i] += len(tokens)
            text, stopped, _ = text.partition(OUTPUT) if settings.calls else (text, "", "")
            texts[i] += text
            program = programs.written(text)
            if turn < settings.calls and program is not None and (stopped or text.rstrip().endswith("```")):
                if problems.boxed(text) is not None:
                    continue
                printed = f"{OUTPUT}\n{_shown(*programs.outcome(program), settings.shown_most)}\n```\n"
                texts[i] = f"{texts[i].rstrip()}\n{printed}"
                more = f"{text.rstrip()}\n{printed}"
                prompts[i] = [*prompts[i], *tokenizer(more, add_special_tokens=False)["input_ids"]]
                going.append(i)
        left = going
        if not left:
            break
    return list(zip(texts, counts, strict=True))


def _shown(printed: str, failed: str, most: int) -> str:
    """What is told of a program: what it printed, or why it failed, with its middle left out where it is long."""
    text = printed.strip() or failed
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-(most // 2) :]}"


class _AtOutput(StoppingCriteria):
    """Stops rows where they write that a program's output follows."""

    def __init__(self, tokenizer: Any, start: int) -> None:
        self.tokenizer, self.start = tokenizer, start

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        last = input_ids[:, max(self.start, input_ids.shape[1] - len(OUTPUT) - 1) :].tolist()
        return torch.tensor([OUTPUT in self.tokenizer.decode(row) for row in last], device=input_ids.device)


@torch.inference_mode()
def written(
    bench: Bench[Any], model: Any, tokenizer: Any, prompts: Sequence[list[int]], run: int,
    stopping: bool = False,
) -> list[list[int]]:  # fmt: skip
    """What the model writes behind prompts as token ids, without what follows its end, or, with `stopping`, the place
    where a program's output is to stand. Prompts of one length are gone on with together, so that none is padded in
    front; draws are those of the seed and the run."""
    settings = bench.settings
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
    results: list[list[int]] = [[] for _ in prompts]
    with torch.random.fork_rng(devices=[bench.device] if bench.device.type == "cuda" else []):
        torch.manual_seed((bench.seed << 8) + run + 1)
        for places in track(batches, "solving", transient=True):
            ids = torch.tensor([prompts[place] for place in places], device=model.device)
            criteria = [_AtOutput(tokenizer, ids.shape[1])] if stopping else []
            made = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=settings.temperature > 0,
                max_new_tokens=settings.new, pad_token_id=tokenizer.pad_token_id or end,
                stopping_criteria=StoppingCriteriaList(criteria), **sampling,
            )  # fmt: skip
            for place, row in zip(places, made[:, ids.shape[1] :].tolist(), strict=True):
                row = row[: row.index(end) + 1] if end in row else row
                while stopping and row and row[-1] == (tokenizer.pad_token_id or end) != end:
                    row.pop()  # padding behind what stopped sooner than the others
                results[place] = row
    return results
