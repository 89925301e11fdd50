"""Load what a run's identity names: a testbed, a small real checkpoint, a hub checkpoint, or an architecture alone.

What builds one model and not every model is imported by its name: its sources count for the runs that name it.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from prunelab.common.catalogue import hub, lookup, packaged
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.files import inside
from prunelab.common.models import devices

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Transform = Callable[[Image.Image], Tensor]


def architecture(entry: Mapping[str, Any]) -> nn.Module:
    """The architecture on the meta device, without weights: enough for every cost that shapes decide. Its `dtype`, that
    of the published checkpoint, decides the bytes of a cache."""
    with torch.device("meta"):
        model = _create(entry).eval()
    return model.to(getattr(torch, entry["dtype"])) if "dtype" in entry else model


def initialised(entry: Mapping[str, Any], device: str) -> nn.Module:
    """The architecture on a device, in its `dtype`, with the random weights that its library starts training from."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, entry.get("dtype", "float32")))
    try:
        with torch.device(device):
            return _create(entry).eval()
    finally:
        torch.set_default_dtype(before)


def _create(entry: Mapping[str, Any]) -> nn.Module:
    """A timm model by name, a transformers model by its class with the arguments of its configuration, or one of our
    own: `library: backbones, name: vim:vim_tiny` is `prunelab.common.backbones.vim.vim_tiny()`."""
    arguments = entry.get("arguments", {})
    if entry["library"] == "backbones":
        module, _, function = entry["name"].partition(":")
        return getattr(importlib.import_module(f"prunelab.common.backbones.{module}"), function)(**arguments)
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
    if name in lookup.models():
        return lookup.architecture(name)
    import timm

    if name not in timm.list_models():
        raise PrunelabError(f"'{name}' is neither in configs/models.yaml nor a timm model")
    return {"library": "timm", "name": name}


def _testbeds() -> Any:
    return importlib.import_module("prunelab.common.testbeds")


def named(name: str, weights: Path | None, config: Mapping[str, Any]) -> tuple[nn.Module, Transform]:
    """A model for a user's own image: a testbed, a checkpoint of the assets folder, one of timm that lies in the hub's
    cache (`timm/<name>`) or a folder in that layout, or a timm architecture with the user's safetensors weights."""
    import safetensors.torch
    import timm
    from torchvision import transforms

    testbeds = _testbeds()

    if name in testbeds.testbeds():
        model = testbeds.load(name)[0]
        embedding = getattr(model, "patch_embed", None)
        if embedding is None:
            raise PrunelabError(f"the testbed {name} reads no images of yours; use digits_vit or digits_qa")
        side = embedding.img_size[0]
        steps = [transforms.Grayscale(), transforms.Resize((side, side)), transforms.ToTensor()]
        return model, transforms.Compose(steps)
    if config["assets"] and (Path(config["assets"]) / name / "model.safetensors").exists():
        model, transform = load({"assets": name}, config)
        assert transform is not None
        return model, transform
    at_hand = cached(config)
    if name in at_hand or (Path(name) / "config.json").is_file():
        return _timm(at_hand.get(name, Path(name)))
    if weights is None:
        raise PrunelabError(
            f"there are no weights for '{name}' here; give --weights FILE.safetensors, or use"
            f" {', '.join(['the testbed digits_vit', 'vit_tiny_in1k with --config assets=DIR', *at_hand])}"
        )
    if not weights.exists():
        raise PrunelabError(f"the weights file {weights} does not exist")
    model = timm.create_model(entry(name)["name"], pretrained=False).eval()
    try:
        model.load_state_dict(safetensors.torch.load_file(weights))
    except Exception as error:  # a damaged file or another architecture; both end here
        raise PrunelabError(f"{weights} does not hold the weights of {name}: {str(error).splitlines()[0]}") from None
    return model, timm.data.create_transform(**timm.data.resolve_model_data_config(model))


def cached(config: Mapping[str, Any]) -> dict[str, Path]:
    """Checkpoints of timm, as `timm/<name>`, that lie whole in the hub's cache on this machine."""
    from huggingface_hub import scan_cache_dir

    folder = hub.cache_folder(config)
    revisions = [
        (repository.repo_id, revision)
        for repository in (scan_cache_dir(folder).repos if folder.is_dir() else ())
        if repository.repo_type == "model" and repository.repo_id.startswith("timm/")
        for revision in sorted(repository.revisions, key=lambda r: r.commit_hash)
    ]
    return {
        name: revision.snapshot_path
        for name, revision in sorted(revisions, key=lambda result: result[0])
        if {"model.safetensors", "config.json"} <= {file.file_name for file in revision.files}
    }


def load(identity: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[nn.Module, Transform | None]:
    """A model in eval mode and the transform its images need (None for testbeds, whose data need none)."""
    if "testbed" in identity:
        return _testbeds().load(identity["testbed"])[0], None
    if "assets" in identity:
        folder = inside(Path(config["assets"]), identity["assets"])
        return _built(identity, inside(folder, identity["file"])) if "file" in identity else _vit_tiny(folder)
    if "file" in identity:
        return _official(identity, config)
    if "class" in identity:
        return _transformers(identity["class"], hub.folder(identity, "model", config)), None
    if "hub" in identity:
        return _timm(hub.folder(identity, "model", config))
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


def _timm(folder: Path) -> tuple[nn.Module, Transform]:
    """A checkpoint of timm in its hub layout; of safetensors alone, as timm would read pickles as well."""
    import timm

    if not (folder / "model.safetensors").is_file():
        raise PrunelabError(f"{folder} holds no model.safetensors; pickled weights are not read, convert them first")
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except Exception as error:  # a damaged file, an unknown architecture, other shapes: each its own kind of error
        raise PrunelabError(f"{folder} cannot be loaded ({_first_line(error)}); download it again") from None
    return model, timm.data.create_transform(**timm.data.resolve_model_data_config(model))


def _transformers(name: str, folder: Path) -> nn.Module:
    """A model of a class of transformers, such as a detector, whose data set brings its own transform."""
    import transformers

    model: nn.Module = pretrained(getattr(transformers, name), folder, use_safetensors=True)
    return model.eval()


def pretrained(cls: Any, folder: Path, **options: Any) -> Any:
    """`cls.from_pretrained(folder)` that reads local files alone and runs no code that comes with them.

    Raises PrunelabError where files are missing or damaged, weights are pickled, or code of the folder is asked for.
    """
    try:
        return cls.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # OSError, ValueError, SafetensorError and others, by what is wrong with the files
        if "trust_remote_code" in str(error):
            raise PrunelabError(
                f"the model {folder} asks to run code that comes with it, which is never done; use a model of a class"
                " that transformers has"
            ) from None
        mend = "give a folder of such a model" if (Path(folder) / "config.json").exists() else "download it first"
        raise PrunelabError(f"{folder} cannot be had ({_first_line(error)}); {mend}") from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _official(identity: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[nn.Module, Transform | None]:
    """An official checkpoint of one of our own backbones, whose module reads it with `load_checkpoint(model, path)`."""
    path = (
        hub.file(identity, "model", config)
        if "hub" in identity
        else inside(Path(config["checkpoints"]), identity["file"])
    )
    return _built(identity, path)


def _built(identity: Mapping[str, Any], path: Path) -> tuple[nn.Module, Transform | None]:
    """One of our own backbones with the weights of a file."""
    model = _create(identity["architecture"])
    if "parts" in identity:  # a model trained with a method brings the method's learned parts
        importlib.import_module("prunelab.common.tokens.parts").add(model, identity["parts"])
    model = model.eval()
    module = identity["architecture"]["name"].partition(":")[0]
    importlib.import_module(f"prunelab.common.backbones.{module}").load_checkpoint(model, path)
    if "transform" not in identity:
        return model, None
    import timm

    return model, timm.data.create_transform(**identity["transform"])


def language(
    identity: Mapping[str, Any], config: Mapping[str, Any], like: Mapping[str, Any] | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in eval mode with its tokenizer: a testbed, a folder of the assets, or a hub checkpoint
    in the precision it is stored in, of tensors that were pickled where its entry says so.

    like: what names the model of whose tokenizer the one of a checkpoint in a `layout` of its own is made.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    importlib.import_module("prunelab.common.backbones.baichuan")  # makes its class known

    if "testbed" in identity:
        from tokenizers import Tokenizer

        testbeds = _testbeds()
        model = testbeds.load(identity["testbed"])[0]
        tokenizer = Tokenizer.from_str(testbeds.read_extra(testbeds.SHIPPED / identity["testbed"], "tokenizer.json"))
        mark = tokenizer.id_to_token(model.config.bos_token_id)
        return model, PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=mark, eos_token=mark)
    if "package" in identity:
        return _unpacked(packaged.file(identity))
    if "assets" in identity:
        folder = inside(Path(config["assets"]), identity["assets"])
        if not (folder / "config.json").exists():
            raise PrunelabError(f"{folder} is missing; give --config assets=DIR a folder that holds {folder.name}")
    elif "folder" in identity:
        folder = Path(identity["folder"])
    elif "hub" in identity:
        folder = hub.folder(identity, "model", config)
    else:
        raise PrunelabError(f"cannot load a language model from {dict(identity)}; see configs/models.yaml")
    packed = sorted(folder.glob("*.gguf"))
    if len(packed) == 1 and not (folder / "config.json").exists():
        return _unpacked(packed[0])
    stored: dict[str, Any] = {
        "use_safetensors": not identity.get("pickled") or any(folder.glob("*.safetensors")),
        "weights_only": True,
    }
    stored |= {"dtype": "auto", "output_loading_info": True, **devices.spread()}
    model, told = pretrained(AutoModelForCausalLM, folder, **stored)
    lacking = sorted(told["missing_keys"])
    if lacking:  # an encoder of texts, to which transformers gave a head drawn at random
        raise PrunelabError(
            f"{folder} lacks {lacking[0]} and is no whole {type(model).__name__}; give a folder of a language model"
        )
    if "layout" not in identity:
        return model.eval(), pretrained(AutoTokenizer, folder)
    if like is None:
        raise PrunelabError(f"{folder} has a tokenizer of its own making, which only tasks of questions read")
    source = hub.folder(like, "model", config) if "hub" in like else Path(like["folder"])
    layout = importlib.import_module(f"prunelab.common.backbones.{identity['layout']}")
    return model.eval(), layout.tokenizer(pretrained(AutoTokenizer, source))


def classifier(identity: Mapping[str, Any], config: Mapping[str, Any], classes: int, seed: int) -> Any:
    """A checkpoint of an encoder with a new head for as many classes, drawn with the seed."""
    from transformers import AutoModelForSequenceClassification

    folder = hub.folder(identity, "model", config)
    stored = {"use_safetensors": not identity.get("pickled") or any(folder.glob("*.safetensors")), "weights_only": True}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return pretrained(AutoModelForSequenceClassification, folder, num_labels=classes, dtype=torch.float32, **stored)


def _unpacked(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The language model of a GGUF file, whose codes transformers unpacks to float32, with its tokenizer. A copy: to
    read the file takes the library half a minute, whatever its size, and runs of one job share it."""
    model, tokenizer = _read_packed(path, path.stat().st_mtime_ns)
    return copy.deepcopy(model), tokenizer


@lru_cache(maxsize=1)
def _read_packed(path: Path, changed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    given = {"gguf_file": path.name}
    model = pretrained(AutoModelForCausalLM, path.parent, **given)
    model.hf_quantizer.remove_quantization_config(model)  # unpacked: what takes it for packed saves none of it
    return model.eval(), pretrained(AutoTokenizer, path.parent, **given)


def vision_language(
    identity: Mapping[str, Any], config: Mapping[str, Any], like: Mapping[str, Any] | None = None
) -> tuple[Any, Any]:
    """An image or video language model in eval mode and its processor: a testbed (whose samples come as the model reads
    them, so that there is none), a folder in hub layout, one of the assets, or a hub checkpoint. Where the identity
    says `one_view`, LLaVA-NeXT reads a picture whole, as LLaVA-1.5 does, whose class its weights fit.

    like: what names the model whose configuration and processor a checkpoint in another `layout` takes.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    for own in ("llava_video", "longva", "moe_llava", "openvla", "pllava", "stllm"):  # makes their classes known
        importlib.import_module(f"prunelab.common.backbones.{own}")

    if "testbed" in identity:
        return _testbeds().load(identity["testbed"])[0], None
    if "folder" in identity:
        folder = Path(identity["folder"])
    elif "assets" in identity:
        folder = inside(Path(config["assets"]), identity["assets"])
    elif "hub" in identity:
        folder = hub.folder(identity, "model", config) / identity.get("within", "")
    else:
        raise PrunelabError(f"cannot load an image or video model from {dict(identity)}; see configs/models.yaml")
    if not (folder / "config.json").exists():
        raise PrunelabError(f"{folder} holds no config.json; give a folder in the hub's layout")
    if identity.get("one_view"):
        return _one_view(folder)
    if "layout" in identity:
        return _of_layout(identity, folder, like, config)
    model = pretrained(AutoModelForImageTextToText, folder, dtype="auto", use_safetensors=True, **devices.spread())
    return model.eval(), pretrained(AutoProcessor, folder)


def _of_layout(
    identity: Mapping[str, Any], folder: Path, like: Mapping[str, Any] | None, config: Mapping[str, Any]
) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    if like is None:
        raise PrunelabError(f"{folder} is in a layout of its own; name the `processor` model that it is like")
    source = hub.folder(like, "model", config) if "hub" in like else Path(like["folder"])
    layout = importlib.import_module(f"prunelab.common.backbones.{identity['layout']}")
    given = pretrained(AutoConfig, source)
    made = layout.like(given) if hasattr(layout, "like") else given  # a class of its own has settings of its own
    model = AutoModelForImageTextToText.from_config(made, dtype=given.dtype)
    layout.load_checkpoint(model, folder)
    if hasattr(layout, "processor"):  # with a tokenizer of its own
        processor = layout.processor(folder, source)
        for mark in ("image_token_id", "video_token_id"):
            if hasattr(processor, mark):
                setattr(model.config, mark, getattr(processor, mark))
        return model.eval(), processor
    return model.eval(), pretrained(getattr(layout, "PROCESSOR", AutoProcessor), source)


def _one_view(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoProcessor, CLIPImageProcessor, LlavaForConditionalGeneration
    from transformers import LlavaProcessor as WholePictures

    kind = pretrained(AutoConfig, folder).model_type
    if kind != "llava_next":
        raise PrunelabError(f"{folder} holds a {kind}; LLaVA-NeXT alone has tiles to leave out")
    model = pretrained(LlavaForConditionalGeneration, folder, dtype="auto", use_safetensors=True, **devices.spread())
    tiled = pretrained(AutoProcessor, folder)
    whole = WholePictures(
        pretrained(CLIPImageProcessor, folder), tiled.tokenizer, patch_size=tiled.patch_size,
        vision_feature_select_strategy=tiled.vision_feature_select_strategy, chat_template=tiled.chat_template,
        num_additional_image_tokens=tiled.num_additional_image_tokens,
    )  # fmt: skip
    return model.eval(), whole


def text_to_image(identity: Mapping[str, Any], config: Mapping[str, Any], half: bool = False) -> Any:
    """A text-to-image pipeline from a hub checkpoint or a folder in its layout, perhaps in half precision."""
    try:
        from diffusers import DiffusionPipeline
    except ImportError:
        raise PrunelabError('this model is a pipeline of diffusers; pip install -e ".[generation]"') from None
    folder = Path(identity["folder"]) if "folder" in identity else hub.folder(identity, "model", config)
    options = {"use_safetensors": True, "torch_dtype": torch.float16 if half else torch.float32}
    return pretrained(DiffusionPipeline, folder, **options)


def siglip(identity: Mapping[str, Any], config: Mapping[str, Any]) -> Any:
    """The encoder of images of a SigLIP of transformers, in eval mode."""
    from transformers import SiglipVisionModel

    folder = Path(identity["folder"]) if "folder" in identity else hub.folder(identity, "model", config)
    return pretrained(SiglipVisionModel, folder, use_safetensors=True).eval()


def clip(identity: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[Any, Any]:
    """A CLIP model of transformers in eval mode and its processor."""
    from transformers import CLIPModel, CLIPProcessor

    folder = Path(identity["folder"]) if "folder" in identity else hub.folder(identity, "model", config)
    return pretrained(CLIPModel, folder, use_safetensors=True).eval(), pretrained(CLIPProcessor, folder)


def image_text(
    identity: Mapping[str, Any], config: Mapping[str, Any], reader: Mapping[str, Any] | None = None
) -> tuple[Any, Any]:
    """A model of images and texts that is tuned for one task, BLIP's or CLIP, in eval mode, and the processor of its
    own repository or of that which `reader` names: one of transformers by the `class` of its identity, or of our own.
    """
    import transformers

    def place(of: Mapping[str, Any]) -> Path:
        return Path(of["folder"]) if "folder" in of else hub.folder(of, "model", config)

    if "file" in identity:
        if reader is None:
            raise PrunelabError(
                "this checkpoint brings no tokenizer; name a model that does under the setting 'reader'"
            )
        model = load(identity, config)[0]
    else:
        folder = place(identity)
        stored = {
            "use_safetensors": not identity.get("pickled") or any(folder.glob("*.safetensors")),
            "weights_only": True,
        }
        cls = getattr(transformers, identity["class"])
        model = pretrained(cls, folder, dtype=torch.float32, **stored).eval()
    processor = transformers.CLIPProcessor if isinstance(model, transformers.CLIPModel) else transformers.BlipProcessor
    return model, pretrained(processor, place(reader or identity))
