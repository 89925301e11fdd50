"""environment.yml, pyproject.toml and requirements.lock say the same, and what they install imports."""

from __future__ import annotations

import importlib
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def lock() -> dict[str, Requirement]:
    lines = [Requirement(line) for line in (ROOT / "requirements.lock").read_text().splitlines() if line.strip()]
    return {canonical(r.name): r for r in lines}


def test_lock_pins_every_dependency_within_its_range():
    pins = lock()
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]]
    for requirement in map(Requirement, wanted):
        pin = pins[canonical(requirement.name)]
        version = next(iter(pin.specifier)).version
        assert requirement.specifier.contains(version), f"{requirement} does not admit the locked {version}"


def test_lock_is_plain_and_marks_what_is_bound_to_a_platform():
    text = (ROOT / "requirements.lock").read_text()
    assert "://" not in text
    assert "@ " not in text
    for name, pin in lock().items():
        assert len(pin.specifier) == 1, name
        assert next(iter(pin.specifier)).operator == "==", name
        if name.startswith(("nvidia-", "cuda-")) or name == "triton":
            assert pin.marker is not None, f"{name} exists for Linux only and needs a marker"


def test_environment_yml_repeats_the_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    assert "-c requirements.lock" in pip
    assert "-e .[test]" in pip
    named = {canonical(r.name): r for r in (Requirement(line) for line in pip if not line.startswith("-"))}
    assert {"torch", "transformers", "timm", "accelerate", "snakemake", "pytest"} <= set(named)
    for name, requirement in named.items():
        assert requirement.specifier == lock()[name].specifier, name


def test_mamba_is_optional_and_marked():
    (mamba,) = map(Requirement, PROJECT["optional-dependencies"]["gpu"])
    assert mamba.name == "mamba-ssm"
    assert mamba.marker is not None
    assert not any("mamba" in line for line in PROJECT["dependencies"])


@pytest.mark.parametrize(
    "module", ["torch", "torchvision", "timm", "transformers", "accelerate", "snakemake", "rouge_score", "sklearn"]
)
def test_libraries_import(module):
    assert importlib.import_module(module)


def test_timm_needs_no_shim():
    import timm

    assert timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1).num_prefix_tokens == 1
