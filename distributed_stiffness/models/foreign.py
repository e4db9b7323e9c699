"""Networks that other packages define: torchvision's, timm's, and Hugging Face folders'.

Only their code is used: weights come from the checkpoints, and nothing is downloaded.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from distributed_stiffness.errors import ModelError
from distributed_stiffness.paths import local

HUGGING_FACE = "hf:"
_KINDS = ("ForSequenceClassification", "ForImageClassification")


def builder(name: str) -> Callable[..., nn.Module] | None:
    """Return the builder of a network of another package; None: the name is of no such kind."""
    kind, _, which = name.partition(":")
    return partial(_KIND[kind], which) if kind in _KIND else None


def _torchvision(name: str, /, n_classes: int, **options: Any) -> nn.Module:
    from torchvision import models

    if name not in models.list_models():
        raise ModelError(
            f"torchvision has no model {name!r}{_near(name, models.list_models())}: expected a name"
            " that torchvision.models.list_models() knows"
        )
    network: nn.Module = models.get_model(name, **{"num_classes": n_classes} | options)
    return network


def _timm(name: str, /, n_classes: int, **options: Any) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise ModelError(f"timm:{name} needs the package timm: pip install timm") from error
    if not timm.is_model(name.partition(".")[0]):
        raise ModelError(
            f"timm has no model {name!r}{_near(name, timm.list_models())}: expected a name that"
            " timm.list_models() knows"
        )
    network: nn.Module = timm.create_model(
        name, pretrained=False, **{"num_classes": n_classes} | options
    )
    return network


def _hugging_face(folder: str, /, **options: Any) -> nn.Module:
    try:
        import transformers
    except ImportError as error:
        raise ModelError(
            f"hf:{folder} needs the package transformers: pip install 'distributed_stiffness[hf]'"
        ) from error
    path = local(folder, "the model folder", ModelError)
    if not (path / "config.json").is_file():
        raise ModelError(
            f"there is no {path / 'config.json'}: expected hf:FOLDER of a folder that"
            " save_pretrained wrote"
        )
    config = transformers.AutoConfig.from_pretrained(str(path), local_files_only=True, **options)
    architecture = (config.architectures or ["none"])[0]
    for kind in _KINDS:
        if architecture.endswith(kind):
            network: nn.Module = getattr(transformers, f"AutoModel{kind}").from_config(config)
            return network
    raise ModelError(
        f"{path} is of a {architecture}: expected a model whose name ends in"
        f" {' or '.join(_KINDS)}; for any other, write package.module:factory"
    )


def _near(name: str, known: Sequence[str]) -> str:
    found = difflib.get_close_matches(name, known)
    return f" (but {', '.join(found)})" if found else ""


_KIND: Mapping[str, Callable[..., nn.Module]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "hf": _hugging_face,
}
