"""Numbers about pictures: perceptual distance, alignment, colour.

Every metric takes tensors and returns tensors; pictures are [B, 3, height, width] float in
0..1. A distance D (paper, Definition 2) is an object with ``features(pictures)``, [B, F] of
unit length, and ``pairs(a, b)``, [A, B]; the bundled one is a copy-detection descriptor.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer, ResNetForImageClassification

from .models import data_folder


def _model_folder(name: str, wants: str) -> Path:
    """A bundled or given model folder; says what is missing otherwise."""
    for folder in (Path(name), data_folder() / name):
        if (folder / "config.json").exists():
            return folder
    raise ValueError(f"no {wants} in {name!r} or {data_folder() / name}: restore it with `git checkout -- data`")


def _load(kind, folder: Path):
    """A model in float32 for judging, or an error that names the damaged folder."""
    try:
        return kind.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()
    except (SafetensorError, OSError) as error:
        raise OSError(
            f"the weights in {folder} are missing, truncated or corrupt ({error}); "
            "restore that folder, for a bundled one with `git checkout -- data`"
        ) from error


class CopyDistance:
    """1 - cosine similarity of copy-detection descriptors (SSCD's recipe; Pizzi et al. 2022): 0 for a copy.

    Args:
        name: folder of the descriptor (default the bundled one).
        device: where it runs.
    """

    def __init__(self, name: str = "descriptor", device: str | torch.device = "cpu"):
        folder = _model_folder(name, "copy-detection descriptor")
        self.network = _load(ResNetForImageClassification, folder).to(device)

    def features(self, pictures: Tensor, batch_size: int = 256) -> Tensor:
        """Unit descriptors [B, F]."""
        with torch.inference_mode():
            parts = [self.network(p.to(self.network.device) * 2 - 1).logits for p in pictures.split(batch_size)]
        return F.normalize(torch.cat(parts), dim=1).cpu()

    def pairs(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance of every picture of ``a`` to every one of ``b``, [A, B]."""
        return 1 - self.features(a) @ self.features(b).T

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance of each picture of ``a`` to the one of ``b`` in its place, [B]."""
        return 1 - (self.features(a) * self.features(b)).sum(dim=1)


class Alignment:
    """How well pictures fit words, by a CLIP (the bundled one, or any local CLIPModel folder)."""

    def __init__(self, name: str = "clip", device: str | torch.device = "cpu"):
        folder = _model_folder(name, "CLIP")
        self.model = _load(CLIPModel, folder).to(device)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder)
        self.processor = CLIPImageProcessor.from_pretrained(folder)

    def picture_features(self, pictures: Tensor, batch_size: int = 256) -> Tensor:
        """Unit image embeddings [B, F]."""
        side = self.model.config.vision_config.image_size
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (self.processor.image_mean, self.processor.image_std))
        parts = []
        with torch.inference_mode():
            for part in pictures.split(batch_size):
                if part.shape[-1] != side:
                    part = F.interpolate(part, (side, side), mode="bicubic", antialias=True)
                pixels = ((part - mean) / std).to(self.model.device)
                parts.append(self.model.visual_projection(self.model.vision_model(pixels).pooler_output))
        return F.normalize(torch.cat(parts), dim=1).cpu()

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Unit text embeddings [B, F]."""
        tokens = self.tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt")
        with torch.inference_mode():
            states = self.model.text_model(**tokens.to(self.model.device)).pooler_output
            return F.normalize(self.model.text_projection(states), dim=1).cpu()

    def score(self, pictures: Tensor, texts: Sequence[str]) -> Tensor:
        """CLIP score: cosine of each picture with the text in its place, [B]."""
        return (self.picture_features(pictures) * self.text_features(texts)).sum(dim=1)

    def classify(self, pictures: Tensor, names: Sequence[str], phrase: str = "a picture of a {}") -> Tensor:
        """Index into ``names`` of the name that fits best, [B] (zero-shot, top 1)."""
        texts = self.text_features([phrase.format(name) for name in names])
        return (self.picture_features(pictures) @ texts.T).argmax(dim=1)


def object_right(alignment: Alignment, pictures: Tensor, wanted: Sequence[str], names: Sequence[str]) -> Tensor:
    """Whether the object named ``wanted`` is, of all ``names``, the one that CLIP sees, [B] bool."""
    found = alignment.classify(pictures, names).tolist()
    return torch.tensor([names[i] == name for i, name in zip(found, wanted, strict=True)])


def psnr(pictures: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, [B] (torchmetrics)."""
    return peak_signal_noise_ratio(pictures, references, data_range=1.0, reduction="none", dim=(1, 2, 3))


def saturated_share(pictures: Tensor, beyond: float = 0.98) -> Tensor:
    """Share of RGB values beyond ``beyond`` of the range -1..1 on either side, [B]."""
    return ((pictures * 2 - 1).abs() > beyond).float().flatten(1).mean(dim=1)


@dataclass(frozen=True)
class Box:
    """Where an object stands in a picture, in pixels."""

    left: int
    top: int
    size: int


def layout_similarity(pictures: Tensor, references: Tensor, boxes: Sequence[Box]) -> Tensor:
    """Masked similarity: centred correlation with the reference outside the object's box, [B] in -1..1.

    High when background and placement came back, whatever object stands in the box.
    """
    results = []
    for picture, reference, box in zip(pictures, references, boxes, strict=True):
        outside = torch.ones(picture.shape[-2:], dtype=torch.bool)
        outside[box.top : box.top + box.size, box.left : box.left + box.size] = False
        a, b = (x[:, outside].flatten() - x[:, outside].mean() for x in (picture, reference))
        results.append(torch.dot(a, b) / (a.norm() * b.norm()).clamp_min(1e-8))
    return torch.stack(results)


def background_colour(pictures: Tensor, border: int = 2) -> Tensor:
    """Median colour of the outermost ``border`` pixels, [B, 3]."""
    edge = torch.ones(pictures.shape[-2:], dtype=torch.bool)
    edge[border:-border, border:-border] = False
    return pictures[:, :, edge].median(dim=2).values


def mean_pairwise_distance(states: Tensor) -> Tensor:
    """Mean Euclidean distance between the B states at each step, [S], for ``states`` [B, S, ...].

    Divided by the square root of the state's length: 1.41 for unit Gaussian noise.
    """
    flat = states.flatten(2).transpose(0, 1).float()
    count = flat.shape[1]
    # the default of cdist, by way of a dot product, is a third off where the states have become one
    distances = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.sum(dim=(1, 2)) / (count * (count - 1)) / flat.shape[2] ** 0.5
