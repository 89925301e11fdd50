"""What an entry of configs/models.yaml and configs/datasets.yaml may say, checked when a catalogue is read.

Whatever ends up in a path, an import or an address is checked here, so that a catalogue from elsewhere cannot reach
outside the folders a user gave. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.files import name_fault

# Keys of a data set whose values are prose or text to join by; every other string may end up in a path.
_PROSE = ("licence", "needs", "source", "join", "join_train", "template")


def _inside(name: str) -> str:
    fault = name_fault(name)
    if fault is not None:
        raise ValueError(f"'{name}' {fault}")
    return name


Name = Annotated[str, AfterValidator(_inside)]  # of a file, folder, testbed or module
Dotted = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*(:[A-Za-z_]\w*)?$")]  # what is looked up in a library
Hub = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$"), AfterValidator(_inside)]
Revision = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]  # a commit; branches and tags move


class Strict(BaseModel):
    """No key that is not declared, no value of another type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Architecture(Strict):
    """What costs are counted on."""

    library: Literal["timm", "transformers", "backbones"]
    name: Dotted
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    arguments: dict[str, Any] = Field(default_factory=dict)


class Checkpoint(Strict):
    """The published checkpoint: a repository of the hub, or a `file` of the checkpoints folder, from `source`.

    licence: by its name, or in words. needs: what a reader must have or do besides. gated: the hub asks who downloads
    it. gb: what is downloaded, in GB (1e9 bytes), approximately: the hub's own figures are shown where it answers.
    gpus: how many of 80 GB hold it in 16 bits. one_view: whether a picture is read whole, where the published processor
    cuts it into tiles. layout: the module of common/backbones that reads it, where it is not as transformers has it;
    processor: the catalogue's model whose configuration and processor, or tokenizer, it then takes. pickled: whether
    the repository may hold its tensors as pickles alone, of which nothing else is read. within: the folder of the
    repository that holds this model, where it holds several.
    """

    licence: str = Field(min_length=1)
    hub: Hub | None = None
    revision: Revision | None = None
    file: Name | None = None
    source: str = ""
    gb: float | None = Field(default=None, gt=0)
    gated: bool = False
    gpus: int = Field(default=1, ge=1)
    needs: str = ""
    class_: Annotated[Dotted | None, Field(alias="class")] = None
    parts: Name | None = None
    layout: Name | None = None
    processor: Name | None = None
    transform: dict[str, Any] = Field(default_factory=dict)
    windows: dict[str, Any] = Field(default_factory=dict)
    one_view: bool = False
    pickled: bool = False
    within: Name | None = None

    @model_validator(mode="after")
    def _comes_from_somewhere(self) -> Checkpoint:
        if self.hub is None and not (self.file and self.source):
            raise ValueError("give `hub`, or `file` with its `source`")
        if (self.layout is None) != (self.processor is None):
            raise ValueError("a `layout` of its own needs the `processor` of another model, and nothing else does")
        return self


class Asset(Strict):
    """A checkpoint of one of our own backbones, among those of an entry of the assets."""

    folder: Name
    file: Name
    transform: dict[str, Any] = Field(default_factory=dict)


class Packaged(Strict):
    """A checkpoint that a package of `pip` brings: `file` as it lies beside the package, and what it must be."""

    package: Name
    file: Name
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    licence: str = Field(min_length=1)


class Model(Strict):
    """A model by its scales."""

    adapter: Name | None = None
    weight_adapter: Name | None = None
    architecture: Architecture | None = None
    base: Name | None = None
    paper: Checkpoint | None = None
    testbed: Name | None = None
    real: Packaged | None = None
    assets: Name | Asset | None = None


class Data(BaseModel):
    """A data set at one scale. What its loader takes besides stands here, too; its strings are names of files.

    size: samples that the published evaluation set holds. gb, gated, needs: as those of a checkpoint.
    """

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    loader: Name
    licence: str = ""
    hub: Hub | None = None
    revision: Revision | None = None
    setting: Name | None = None  # of the user's folder that holds it
    folder: Name | None = None  # of the assets
    file: Name | None = None
    gb: float | None = Field(default=None, gt=0)
    gated: bool = False
    needs: str = ""
    settings: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _names_stay_inside(self) -> Data:
        for key, value in (self.model_extra or {}).items():
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str) and key not in _PROSE:
                    _inside(text)
        if self.setting and not self.needs:
            raise ValueError("a folder of the user's needs `needs`, which says what to bring")
        return self


class Dataset(Strict):
    """A data set by its scales."""

    paper: Data | None = None
    testbed: Data | None = None
    real: Data | None = None
    assets: Data | None = None

    @model_validator(mode="after")
    def _published_data_have_a_licence(self) -> Dataset:
        for scale in ("paper", "assets"):
            entry = getattr(self, scale)
            if entry is not None and not entry.licence:
                raise ValueError(f"the {scale} entry names no licence")
        return self


_CATALOGUES: Mapping[str, TypeAdapter[Any]] = {
    "models.yaml": TypeAdapter(dict[Name, Model]),
    "datasets.yaml": TypeAdapter(dict[Name, Dataset]),
}


def check(file: str, content: Any) -> Mapping[str, Any]:
    """The catalogue as it was read, once it is known to be sound. Raises PrunelabError with the first fault."""
    try:
        _CATALOGUES[file].validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise PrunelabError(f"configs/{file}, {where or 'top level'}: {first['msg']}") from None
    results: Mapping[str, Any] = content
    return results
