"""Let torchvision import beside a torch of another build: declare the two operators that its import asks for.

Nothing here calls them. On a matching pair of wheels nothing happens.
"""

import importlib
import sys

import torch

_DECLARED = torch.library.Library("torchvision", "FRAGMENT")


def ensure_importable() -> None:
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in ("nms", "qnms"):
            _DECLARED.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for name in [module for module in sys.modules if module.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        importlib.import_module("torchvision")
