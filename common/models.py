"""Load what a run's identity names: a testbed, a small real checkpoint, a hub checkpoint, or an architecture alone."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from common import catalogue, registry
from common.adapters import adapter_for
from common.apply import PARTS
from common.errors import PrunelabError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Transform = Callable[[Image.Image], Tensor]


def architecture(entry: Mapping[str, Any]) -> nn.Module:
    """The architecture on the meta device, without weights: enough for every cost that shapes decide."""
    with torch.device("meta"):
        return _create(entry).eval()


def _create(entry: Mapping[str, Any]) -> nn.Module:
    """A timm model by name, a transformers model by its class with the arguments of its configuration, or one of our
    own: `library: backbones, name: vim:vim_tiny` is `common.backbones.vim.vim_tiny()`."""
    arguments = entry.get("arguments", {})
    if entry["library"] == "backbones":
        module, _, function = entry["name"].partition(":")
        return getattr(importlib.import_module(f"common.backbones.{module}"), function)(**arguments)
    if entry["library"] == "transformers":
        import transformers

        model_class = getattr(transformers, entry["name"])
        return model_class(model_class.config_class(**arguments))
    if entry["library"] != "timm":
        raise PrunelabError(
            f"configs/models.yaml: the library {entry['library']} is unknown; use timm, transformers or backbones"
        )
    import timm

    return timm.create_model(entry["name"], pretrained=False, **arguments)


def entry(name: str) -> Mapping[str, Any]:
    """The architecture entry of a catalogue name, or of any timm model."""
    import timm

    try:
        return catalogue.model(name)["architecture"]
    except PrunelabError:
        if name not in timm.list_models():
            raise PrunelabError(f"'{name}' is neither in configs/models.yaml nor a timm model") from None
        return {"library": "timm", "name": name}


def named(name: str, weights: Path | None, config: Mapping[str, Any]) -> tuple[nn.Module, Transform]:
    """A model for a user's own image: a testbed, a checkpoint of the assets folder, or a timm architecture with the
    user's safetensors weights."""
    import safetensors.torch
    import timm
    from torchvision import transforms

    from common import testbeds

    if name in testbeds.testbeds():
        model = testbeds.load(name)[0]
        side = model.patch_embed.img_size[0]  # type: ignore[union-attr,index]
        steps = [transforms.Grayscale(), transforms.Resize((side, side)), transforms.ToTensor()]
        return model, transforms.Compose(steps)
    if config["assets"] and (Path(config["assets"]) / name / "model.safetensors").exists():
        model, transform = load({"assets": name}, config)
        assert transform is not None
        return model, transform
    if weights is None:
        raise PrunelabError(
            f"there are no weights for '{name}'; give --weights FILE.safetensors, or use the testbed digits_vit, or"
            " vit_tiny_in1k with --config assets=DIR"
        )
    if not weights.exists():
        raise PrunelabError(f"the weights file {weights} does not exist")
    model = timm.create_model(entry(name)["name"], pretrained=False).eval()
    try:
        model.load_state_dict(safetensors.torch.load_file(weights))
    except Exception as error:  # a damaged file or another architecture; both end here
        raise PrunelabError(f"{weights} does not hold the weights of {name}: {str(error).splitlines()[0]}") from None
    return model, timm.data.create_transform(**timm.data.resolve_model_data_config(model))


def load(identity: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[nn.Module, Transform | None]:
    """A model in eval mode and the transform its images need (None for testbeds, whose data need none)."""
    if "testbed" in identity:
        from common import testbeds

        return testbeds.load(identity["testbed"])[0], None
    if "assets" in identity:
        return _vit_tiny(Path(config["assets"]) / identity["assets"])
    if "file" in identity:
        return _official(identity, config)
    if "class" in identity:
        return _transformers(identity["class"], identity["hub"], identity["revision"]), None
    if "hub" in identity:
        return _hub(f"{identity['hub']}@{identity['revision']}")
    raise PrunelabError(f"cannot load a model from {dict(identity)}; see configs/models.yaml")


def _vit_tiny(folder: Path) -> tuple[nn.Module, Transform]:
    import safetensors.torch
    import timm

    path = folder / "model.safetensors"
    if not path.exists():
        raise PrunelabError(f"{path} is missing; give --config assets=DIR a folder that holds {folder.name}")
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False).eval()
    model.load_state_dict(safetensors.torch.load_file(path))
    transform = timm.data.create_transform(224, interpolation="bicubic", crop_pct=0.9, mean=(0.5,) * 3, std=(0.5,) * 3)
    return model, transform


def _hub(name: str) -> tuple[nn.Module, Transform]:
    import timm

    try:
        model = timm.create_model(f"hf_hub:{name}", pretrained=True).eval()
    except Exception as error:  # hub clients raise many kinds; all mean that the checkpoint is not to be had
        raise PrunelabError(
            f"the checkpoint {name} cannot be had ({type(error).__name__}); download it first"
        ) from error
    return model, timm.data.create_transform(**timm.data.resolve_model_data_config(model))


def _transformers(name: str, hub: str, revision: str) -> nn.Module:
    """A model of a class of transformers, such as a detector, whose data set brings its own transform."""
    import transformers

    try:
        model = getattr(transformers, name).from_pretrained(hub, revision=revision, use_safetensors=True)
    except (OSError, ValueError) as error:  # what transformers raises for files that are missing or damaged
        raise PrunelabError(
            f"the checkpoint {hub} cannot be had ({str(error).splitlines()[0]}); download it first"
        ) from error
    loaded: nn.Module = model.eval()
    return loaded


def _official(identity: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[nn.Module, Transform | None]:
    """An official checkpoint of one of our own backbones, whose module reads it with `load_checkpoint(model, path)`."""
    if "hub" in identity:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError

        try:
            path = Path(hf_hub_download(identity["hub"], identity["file"], revision=identity["revision"]))
        except (HfHubHTTPError, OSError) as error:
            raise PrunelabError(
                f"{identity['file']} of {identity['hub']} cannot be had ({type(error).__name__}); download it first"
            ) from error
    else:
        path = Path(config["checkpoints"]) / identity["file"]
    model = _create(identity["architecture"])
    if "parts" in identity:  # a model trained with a method brings the method's learned parts
        model.add_module(PARTS, registry.create(identity["parts"]).build(adapter_for(model).info))
    model = model.eval()
    module = identity["architecture"]["name"].partition(":")[0]
    importlib.import_module(f"common.backbones.{module}").load_checkpoint(model, path)
    if "transform" not in identity:
        return model, None
    import timm

    return model, timm.data.create_transform(**identity["transform"])


def language(identity: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in eval mode with its tokenizer: a testbed, a folder of the assets, or a hub checkpoint
    in the precision it is stored in."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    if "testbed" in identity:
        from tokenizers import Tokenizer

        from common import testbeds
        from common.testbeds.base import read_extra

        model = testbeds.load(identity["testbed"])[0]
        tokenizer = Tokenizer.from_str(read_extra(testbeds.SHIPPED / identity["testbed"], "tokenizer.json"))
        mark = tokenizer.id_to_token(model.config.bos_token_id)  # type: ignore[union-attr,arg-type]
        return model, PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=mark, eos_token=mark)
    if "assets" in identity:
        name, options = Path(config["assets"]) / identity["assets"], {"local_files_only": True}
        if not (name / "config.json").exists():
            raise PrunelabError(f"{name} is missing; give --config assets=DIR a folder that holds {name.name}")
    elif "hub" in identity:
        name, options = identity["hub"], {"revision": identity["revision"]}
    else:
        raise PrunelabError(f"cannot load a language model from {dict(identity)}; see configs/models.yaml")
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", use_safetensors=True, **options)
        return model.eval(), AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError) as error:  # what transformers raises for files that are missing or damaged
        raise PrunelabError(
            f"the language model {name} cannot be had ({str(error).splitlines()[0]}); download it first"
        ) from error
