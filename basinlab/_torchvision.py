"""Let torchvision import beside a CPU build of torch.

transformers, diffusers and lpips import torchvision wherever it is installed. A
torchvision wheel compiled for another build of torch cannot load its C++
operators, and then even its Python half fails with "operator torchvision::nms
does not exist". Nothing here calls those operators, so declaring the two names
that the import asks for is enough. On a matching pair of wheels nothing happens.
"""

import importlib
import importlib.util
import sys

import torch

_DECLARED = torch.library.Library("torchvision", "FRAGMENT")
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def ensure_importable() -> None:
    """Import torchvision if it is installed, declaring its missing operators if need be."""
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for schema in _SCHEMAS:
            _DECLARED.define(schema)
        for name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        importlib.import_module("torchvision")
