"""Problems, how answers to them are graded, and mixtures of experts that are pruned on answers of their own."""

from __future__ import annotations

import base64
import csv
import json
import pickle
import zlib

import pytest
import torch

from prunelab.common.catalogue import lookup
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import problems, programs, prompts, texts
from prunelab.common.data.problems import Problem, boxed, plain, solved
from prunelab.common.experiments import papers
from prunelab.common.measures import solve
from prunelab.common.measures.bench import Bench
from prunelab.common.models import loading
from prunelab.common.rehearsal import datasets as look_alikes
from prunelab.common.tasks import get
from prunelab.common.weights import prune
from prunelab.methods.easy_ep.method import EasyEP
from tests.contract.families import WEIGHT_FAMILIES

WORDS = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(40))]


class Tokenizer:
    eos_token_id, pad_token_id, chat_template = 2, 0, None

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [5 + sum(word.encode()) % 30 for word in text.split()]}

    def decode(self, tokens, skip_special_tokens=True):
        return f"so \\boxed{{{sum(tokens) % 3}}}"


def repository(tmp_path, **files):
    place = tmp_path / "some" / "problems"
    place.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        name, _, kind = name.rpartition("_")
        with (place / f"{name}.{kind}").open("w", newline="") as file:
            if kind == "csv":
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
            else:
                file.write(json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)))
    return {"hub": str(tmp_path)}


def entry(files, **more):
    return {"loader": "problems", "hub": "some/problems", "local": "0", "files": files, "ask": "q", **more}


def test_rows_of_every_kind_of_file_become_problems(tmp_path):
    rows = [{"q": f"q{n}", "a": n, "year": 2020 + n % 2} for n in range(6)]
    config = repository(tmp_path, one_csv=rows[:2], two_json=rows[2:4], two_jsonl=rows[4:])
    found = problems.load(entry("*", answer="a"), config)
    assert [p.text for p in found] == [f"q{n}" for n in range(6)] and [p.answer for p in found] == list("012345")
    assert [p.text for p in problems.load(entry("*", answer="a", where={"year": 2021}), config)] == ["q1", "q3", "q5"]
    some = problems.load(entry("*", answer="a", drawn=3), config)
    assert len(some) == 3 and some == problems.load(entry("*", answer="a", drawn=3), config)
    assert all(not p.answer for p in problems.load(entry("*.csv"), config))
    with pytest.raises(PrunelabError, match="KeyError"):
        problems.load(entry("*", answer="b"), config)
    with pytest.raises(PrunelabError, match="no problem in"):
        problems.load(entry("*.parquet", answer="a"), config)


def test_choices_are_listed_and_a_right_one_that_stands_first_is_moved(tmp_path):
    rows = [{"q": f"q{n}", "A": "x", "B": "y", "right": "good", "wrong": "bad", "key": "B"} for n in range(20)]
    held = [{"q": "q", "key": "B", "options": {"B": "y", "A": "x"}}]
    config = repository(tmp_path, one_csv=rows, held_json=held)
    (listed, *_) = problems.load(entry("one.csv", answer="key", choices=["A", "B"]), config)
    assert listed == Problem("q0\n\nA. x\nB. y", "B", True)
    assert problems.load(entry("held.json", answer="key", choices="options"), config)[0].text.endswith("A. x\nB. y")
    moved = problems.load(entry("one.csv", choices=["right", "wrong"], first="right"), config)
    assert {p.answer for p in moved} == {"A", "B"} and all(f"{p.answer}. good" in p.text for p in moved)
    with pytest.raises(PrunelabError, match="none of 2 choices"):
        problems.load(entry("one.csv", answer="q", choices=["A", "B"]), config)


@pytest.mark.parametrize(
    ("answer", "written", "right"),
    [
        ("073", "thus \\boxed{73}.", True),
        ("73", "first \\boxed{72}, no: \\boxed{73}", True),
        ("73", "73", False),
        ("1/2", "$\\boxed{\\dfrac{1}{2}}$", True),
        ("\\frac{\\sqrt{3}}{2}", "\\boxed{\\frac{\\sqrt{3}}{2}}", True),
        ("1000", "\\boxed{1,000\\text{ ways}}", True),
        ("0.50", "\\boxed{0.5}", True),
        ("3", "\\boxed{30}", False),
        ("3", "\\boxed{3", False),
    ],
)
def test_the_last_boxed_number_or_formula_counts(answer, written, right):
    assert solved(Problem("", answer, False), written) is right


@pytest.mark.parametrize(
    ("written", "right"),
    [
        ("\\boxed{B}", True),
        ("\\boxed{\\text{B. yes}}", True),
        ("\\boxed{A}", False),
        ("B", False),
        ("\\boxed{Bad}", False),
    ],
)
def test_of_choices_the_letter_counts(written, right):
    assert solved(Problem("", "B", True), written) is right
    assert boxed("\\boxed{a{b}c}") == "a{b}c" and plain("$ 1{,}0 $") == "1{,}0"


def test_answers_stand_inside_their_columns_and_problems_in_a_folder_of_one_s_own(tmp_path):
    rows = [{"a": "so\n#### 1,234", "b": "thus $\\boxed{\\frac{1}{2}}$.", "c": "9 (apples)", "q": "much", "how": "how"}]
    rows += [{**rows[0], "c": "1; 2"}]
    (tmp_path / "x.json").write_text(json.dumps({str(i): row for i, row in enumerate(rows)}))
    (tmp_path / "y.jsonl").write_text(json.dumps(rows[0]) + "\n")
    config = {"mine": str(tmp_path)}

    def found(**more):
        told = {"loader": "problems", "setting": "mine", "files": ["x.json", "y.jsonl"], "ask": ["how", "q"], **more}
        return problems.load(told, config)

    assert [(p.text, p.answer) for p in found(answer="a", behind="####")] == [("how much", "1,234")] * 3
    assert {p.answer for p in found(answer="b", boxed=True)} == {"\\frac{1}{2}"}
    assert [p.answer for p in found(answer="c", before="(", without=";")] == ["9", "9"]
    with pytest.raises(PrunelabError, match="no boxed part"):
        found(answer="c", boxed=True)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("0.3333", "0.33333", True),
        ("0.33", "0.34", False),
        ("100000", "100001", False),
        ("x", "0.5", False),
        ("x", "x", True),
    ],
)
def test_decimal_fractions_are_compared_as_numbers(one, other, same):
    assert problems.equal(one, other) is same


class Speaker:
    """A tokenizer and a model of characters, which says what is prepared for how many outputs it has seen."""

    eos_token_id, pad_token_id, chat_template = 0, 1, None
    device = torch.device("cpu")

    def __init__(self, *said):
        self.said, self.seen = said, []

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, tokens, skip_special_tokens=True):
        return "".join(chr(t) for t in tokens if t > 1)

    def generate(self, input_ids, max_new_tokens, stopping_criteria, **given):
        rows = []
        for row in input_ids.tolist():
            text = self.decode(row)
            self.seen.append(text)
            answer = self.said[min(text.count(solve.OUTPUT), len(self.said) - 1)]
            written = list(row)
            for letter in [*map(ord, answer), 0][:max_new_tokens]:
                written.append(letter)
                if bool(stopping_criteria(torch.tensor([written]), None)):
                    break
            rows.append(written)
        most = max(map(len, rows))
        return torch.tensor([row + [1] * (most - len(row)) for row in rows])


def spoken(monkeypatch, config, *said, ids=None, **settings):
    speaker = Speaker(*said)
    monkeypatch.setattr(loading, "language", lambda identity, config: (speaker, speaker))
    monkeypatch.setattr(solve, "sizes", lambda model: {})
    monkeypatch.setattr(solve.devices, "place", lambda model, device, half: model)
    told = {"model": {}, "data": entry("one.jsonl", answer="a"), **(ids or {})}
    given = get("solve").read({"new": 200, "temperature": 0.0, "template": "ask {problem} now\n", **settings})
    return get("solve")().measure(Bench("paper", told, given, config, None, {}, None)), speaker


PROGRAM = "I run it.\n```python\nprint({})\n```\n```output and more"


def test_programs_run_on_the_way_to_an_answer(monkeypatch, tmp_path):
    rows = [{"q": f"sum {i}", "a": "7"} for i in range(3)]
    config = repository(tmp_path, one_jsonl=rows) | {"programs": "yes"}
    result, speaker = spoken(monkeypatch, config, PROGRAM.format("3 + 4"), "so \\boxed{7}", calls=2)
    assert result["solved"]["value"] == 100 and "2 programs run on the way" in result["solved"]["protocol"]
    assert speaker.seen[0] == "ask sum 0 now\n"
    assert speaker.seen[3] == "ask sum 0 now\nI run it.\n```python\nprint(3 + 4)\n```\n```output\n7\n```\n"
    never, speaker = spoken(monkeypatch, config, PROGRAM.format("1"), calls=2, samples=1)
    assert never["solved"]["value"] == 0 and len(speaker.seen) == 3, "two calls, and what follows the second"
    _, speaker = spoken(monkeypatch, config, PROGRAM.format("1 / 0"), "\\boxed{7}", calls=1, samples=1)
    assert "```output\nZeroDivisionError: division by zero\n```" in speaker.seen[-1]
    _, speaker = spoken(
        monkeypatch, config, PROGRAM.format("'x' * 300"), "\\boxed{7}", calls=1, samples=1, shown_most=8
    )
    assert speaker.seen[-1].endswith("```output\nxxxx...xxxx\n```\n")
    with pytest.raises(PrunelabError, match="programs=yes"):
        spoken(monkeypatch, {**config, "programs": ""}, "\\boxed{7}", calls=1)


def test_sets_of_problems_count_alike_whatever_their_size(monkeypatch, tmp_path):
    config = repository(tmp_path, one_jsonl=[{"q": "x", "a": "7"}] * 3, two_jsonl=[{"q": "x", "a": "8"}])
    result, _ = spoken(monkeypatch, config, "\\boxed{7}", ids={"data_2": entry("two.jsonl", answer="a")})
    assert result["solved"]["value"] == 50 and result["solved"]["n"] == 2


def run(monkeypatch, config, family, method=None, budget=None, options=None, ids=None, **settings):
    model = WEIGHT_FAMILIES[family]()
    model.generation_config.eos_token_id = 2
    monkeypatch.setattr(loading, "language", lambda identity, config: (model, Tokenizer()))
    told = {"data": entry("one.jsonl", answer="a"), "calibration": entry("two.jsonl", answer="a")}
    ids = {"model": {}, **told, **(ids or {})}
    given = get("solve").read({"new": 6, "calibration": 3, "batch": 2, **settings})
    return get("solve")().measure(Bench("paper", ids, given, config, method, options or {}, budget))


@pytest.fixture
def config(tmp_path):
    rows = [{"q": f"how many {'w ' * (n % 3)}", "a": str(n % 3)} for n in range(8)]
    return repository(tmp_path, one_jsonl=rows[:5], two_jsonl=rows[4:])


def test_answers_are_sampled_run_by_run_and_come_again_with_the_seed(monkeypatch, config):
    twice = [run(monkeypatch, config, "qwen3_moe_mixed", runs=3) for _ in range(2)]
    assert twice[0] == twice[1] != run(monkeypatch, config, "qwen3_moe_mixed", runs=3, seed=1)
    assert twice[0]["solved"]["n"] == 5 and 0 < twice[0]["written"]["value"] <= 6
    assert 0 <= twice[0]["unfinished"]["value"] <= 100 and "3 runs, temperature 0.6" in twice[0]["solved"]["protocol"]
    greedy = run(monkeypatch, config, "qwen3_moe_mixed", runs=2, temperature=0.0)
    assert set(greedy["solved"]["samples"]) <= {0, 100}, "all runs are one"


CHOSEN = ("easy_ep", "without_tokens", "without_norm", "gating", "frequency", "random", "m_smoe", "no reroute",
          "problems alone", "answers alone", "with references")  # fmt: skip


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe_mixed"])
@pytest.mark.parametrize("row", CHOSEN)
def test_every_row_of_easy_ep_prunes_a_mixture_and_lets_it_answer(monkeypatch, config, family, row):
    chosen = papers.load("easy_ep").configurations[row]
    settings = {key: value for key, value in chosen.settings.items() if key != "calibration_data"}
    found = run(monkeypatch, config, family, chosen.method, "2count", chosen.options, **settings)
    assert found["solved"]["n"] == 5
    assert found["saving"]["value"] > 0


def test_what_a_method_calibrates_on_is_what_the_setting_says(monkeypatch, config):
    model, tokenizer = WEIGHT_FAMILIES["qwen3_moe_mixed"](), Tokenizer()

    def seen(identity=None, **settings):
        given = get("solve").read({"new": 4, "calibration": 3, **settings})
        asked = identity or entry("two.jsonl", answer="a")
        bench = Bench("paper", {}, given, config)
        return [len(t) for t in solve.demonstrations(bench, model, tokenizer, asked, given.calibration)]

    alone, both = seen(shown="problem"), seen()
    assert [a + b for a, b in zip(alone, seen(shown="answer"), strict=True)] == both
    assert [a + 1 for a in alone] == seen(shown="reference")
    with pytest.raises(PrunelabError, match="there are 4 problems"):
        seen(calibration=9)
    monkeypatch.setattr(texts, "windows", lambda *arguments: [torch.arange(5, 12)] * 3)
    assert seen({"loader": "c4"}) == [7] * 3


def test_demonstrations_of_several_domains_are_scored_apart(monkeypatch, config):
    more = {f"calibration_{n}": entry("two.jsonl", answer="a") for n in (2, 3)}
    options = {"domains": (3, 3, 3)}
    assert run(monkeypatch, config, "deepseek_v3", "easy_ep", "2count", options, ids=more)["saving"]["value"] > 0
    with pytest.raises(PrunelabError, match="9 demonstrations"):
        run(monkeypatch, config, "deepseek_v3", "easy_ep", "2count", options)


def test_what_few_and_many_demonstrations_keep_is_compared(monkeypatch, config):
    made = []
    monkeypatch.setattr(
        loading, "language", lambda *_: (made.append(WEIGHT_FAMILIES["deepseek_v3"]()) or made[-1], Tokenizer())
    )
    task, ids = get("agreement"), {"model": {"testbed": "tiny"}, "calibration": entry("two.jsonl", answer="a")}

    def compared(few, many, method="easy_ep", budget="2count"):
        given = task.read({"calibration": few, "many": many, "new": 4, "length": 16})
        return task().measure(Bench("paper", ids, given, config, method, {}, budget))

    found = compared(1, 4)
    assert len(made) == 2, "the second is unpruned"
    targets = int(found["overlap"]["n"])
    kept = {name: [WEIGHT_FAMILIES["deepseek_v3"](), count] for name, count in (("few", 1), ("many", 4))}
    masks = {}
    for name, (model, count) in kept.items():
        given = task.read({"calibration": 4, "many": 4, "new": 4})
        shown = solve.demonstrations(Bench("paper", {}, given, config), model, Tokenizer(), ids["calibration"], 4)
        plan = prune(EasyEP(), model, Budget(2, "count"), shown[:count], progress=False)
        masks[name] = [decision.mask for _, decision in plan.decisions()]
    shares = [100 * float((a & b).sum()) / 2 for a, b in zip(masks["few"], masks["many"], strict=True)]
    assert len(shares) == targets and found["overlap"]["value"] == pytest.approx(sum(shares) / targets)
    assert found["least"]["value"] == min(shares) and compared(4, 4)["overlap"]["value"] == 100
    for given, message in (
        ((4, 1), "some of 1"),
        ((1, 4, None, None), "is not calibrated"),
        ((1, 4, "wanda", "0.5"), "single"),
    ):
        with pytest.raises(PrunelabError, match=message):
            compared(*given)


def test_problems_without_answers_are_not_graded(monkeypatch, config, tmp_path):
    repository(tmp_path, one_jsonl=[{"q": "q", "a": ""}])
    with pytest.raises(PrunelabError, match="have no answer"):
        run(monkeypatch, config, "qwen3_moe_mixed")


ADD = "```python\nprint(sum(map(int, input().split())))\n```"
METHOD = "```python\nclass Solution:\n    def add(self, a: List[int], b: int) -> int:\n        return sum(a) + b\n```"


def test_programs_are_run_against_their_tests():
    tests = (("1 2\n", "3\n"), ("4 5", " 9 "))
    assert programs.passes(programs.written(f"so\n{ADD}\ndone"), tests)
    assert not programs.passes(programs.written(ADD), (*tests, ("1 1", "3")))
    assert not programs.passes("raise SystemExit(1)", tests) and programs.written("no program") is None
    assert not programs.passes("while True: pass", tests[:1], seconds=0.5)
    calls = (("[1, 2]\n3", "6"), ("[]\n0", "0"))
    assert programs.passes(programs.written(METHOD), calls, "add")
    assert not programs.passes(programs.written(METHOD), (("[1]\n1", "3"),), "add")
    assert solved(Problem("", "", False, tests), f"first ```python\nprint(0)\n``` then {ADD}")
    assert not solved(Problem("", "", False, tests), "\\boxed{3}")


def test_a_program_is_given_no_environment_and_no_more_memory_than_allowed(monkeypatch):
    monkeypatch.setenv("SECRET", "1")
    assert programs.run("import os; print(os.environ.get('SECRET'))", "").strip() == "None"
    assert programs.run("b = bytearray(6 << 30); print(len(b))", "") is None


def packed(tests):
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


def test_problems_with_tests_are_programs_and_run_where_that_is_allowed(monkeypatch, tmp_path):
    public, private = [{"input": "1", "output": "1"}], [{"input": "[2]\n3", "output": "5"}]
    rows = [
        {"q": "add", "public_test_cases": json.dumps(public), "private_test_cases": packed(private),
         "metadata": json.dumps({"func_name": "add"}), "starter_code": "class Solution:"},
        {"q": "print", "public_test_cases": json.dumps(public), "private_test_cases": "[]", "metadata": "{}"},
    ]  # fmt: skip
    config = repository(tmp_path, one_jsonl=rows, two_jsonl=rows)
    coding = entry("one.jsonl", tests="livecodebench")
    first, second = problems.load(coding, config)
    assert first.function == "add" and first.tests == (("1", "1"), ("[2]\n3", "5")) and "class Solution:" in first.text
    assert second.tests == (("1", "1"),) and not second.function and second.graded
    asked = [
        Tokenizer()(f"{p.text}\n\n{how}")["input_ids"] for p, how in ((first, solve.METHOD), (second, solve.PROGRAM))
    ]
    assert [solve.prompt(Tokenizer(), p) for p in (first, second)] == asked
    with pytest.raises(PrunelabError, match="programs=yes"):
        run(monkeypatch, config, "qwen3_moe_mixed", ids={"data": coding})
    monkeypatch.setattr(Tokenizer, "decode", lambda self, tokens, skip_special_tokens=True: "```\nprint(input())\n```")
    found = run(monkeypatch, config | {"programs": "yes"}, "qwen3_moe_mixed", ids={"data": coding})
    assert found["solved"]["samples"] == [0, 100]
    bad = base64.b64encode(zlib.compress(pickle.dumps(Problem))).decode()
    repository(tmp_path, one_jsonl=[{**rows[0], "private_test_cases": bad}])
    with pytest.raises(PrunelabError, match="tests ask for"):
        problems.load(coding, config)


def test_problems_are_gone_on_from_as_they_stand(tmp_path):
    config = repository(tmp_path, one_jsonl=[{"q": f"w{n} " * 5} for n in range(6)])
    found = prompts.load(entry("one.jsonl"), config, Tokenizer(), 3, samples=2)
    whole = prompts.load(entry("one.jsonl"), config, Tokenizer(), 99)
    assert [len(p.ids(())) for p in found] == [3, 3] and [len(p.ids(())) for p in whole] == [5] * 6
    assert found[1].ids(()).tolist() == whole[3].ids(()).tolist()[:3]


def test_look_alikes_of_problems_are_read_as_the_catalogue_tells(tmp_path):
    for name, data in lookup.datasets().items():
        told = data.get("paper", {})
        if told.get("loader") == "problems" and not str(told["files"]).endswith(".parquet"):
            place = tmp_path / "hub" / told["hub"] if "hub" in told else tmp_path / name
            look_alikes.problems(place, told)
            found = problems.load({**told, "local": "0"}, {"hub": str(tmp_path / "hub"), "word_problems": str(place)})
            count = 1 if isinstance(told["files"], str) else len(told["files"])
            assert len(found) == look_alikes.ROWS * count and all(
                p.graded == ("answer" in told or "choices" in told or "tests" in told) for p in found
            ), name
