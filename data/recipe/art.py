"""The art: 48 objects, each drawn by two vendors, as 64x64 RGBA pictures under data/art.

Training draws from one vendor only (`VENDOR`); the other one's pictures make near copies that are none.

``python -m recipe.art GOOGLE_DIR TWITTER_DIR`` wrote data/art from the unpacked npm
packages emoji-datasource-google 16.0.0 (Noto Emoji, Apache-2.0) and
emoji-datasource-twitter 16.0.0 (Twemoji, CC-BY 4.0). The pictures are committed, so
nobody needs to run it again; it is here to say exactly which pictures were taken.
"""

import json
import shutil
import sys
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

FOLDER = Path(__file__).resolve().parents[1] / "art"
VENDORS = ("google", "twitter")
VENDOR = "twitter"  # flat art, which a small autoencoder can draw

# Name used in captions -> short name in emoji-datasource where the two differ.
SHORT_NAMES = {
    "soccer ball": "soccer",
    "top hat": "tophat",
    "palm tree": "palm_tree",
    "maple leaf": "maple_leaf",
    "fire engine": "fire_engine",
    "sailboat": "boat",
    "panda": "panda_face",
    "lion": "lion_face",
    "fox": "fox_face",
}
OBJECTS = tuple(
    name.strip()
    for name in """pizza,hamburger,doughnut,broccoli,corn,avocado,carrot,mushroom,tomato,grapes,watermelon,banana,
    pineapple,strawberry,cherries,croissant,cupcake,cactus,sunflower,tulip,palm tree,maple leaf,top hat,crown,guitar,
    saxophone,soccer ball,fire engine,helicopter,rocket,sailboat,taxi,panda,lion,fox,frog,penguin,owl,octopus,
    crab,whale,turtle,snail,ladybug,butterfly,elephant,pig,teapot""".split(",")
)
SIZES = (40, 48)  # widths, in pixels, at which an object appears in a scene


def picture_path(vendor: str, name: str) -> Path:
    """Where the picture of object ``name`` by ``vendor`` lies."""
    return FOLDER / vendor / f"{name.replace(' ', '-')}.png"


@cache
def sprite(vendor: str, name: str, size: int) -> np.ndarray:
    """The picture of ``name`` by ``vendor``, [size, size, 4] float32 in 0..1, alpha premultiplied."""
    picture = Image.open(picture_path(vendor, name)).convert("RGBA").convert("RGBa")
    pixels = np.asarray(picture.resize((size, size), Image.Resampling.LANCZOS), np.float32) / 255
    return np.clip(pixels, 0, 1)


def collect(google: Path, twitter: Path) -> None:
    """Copy the chosen pictures out of the two unpacked npm packages into data/art."""
    entries = {e["short_name"]: e for e in json.loads((google / "emoji.json").read_text())}
    for vendor, package in zip(VENDORS, (google, twitter), strict=True):
        (FOLDER / vendor).mkdir(parents=True, exist_ok=True)
        for name in OBJECTS:
            image = entries[SHORT_NAMES.get(name, name)]["image"]
            shutil.copyfile(package / "img" / vendor / "64" / image, picture_path(vendor, name))


if __name__ == "__main__":
    collect(*map(Path, sys.argv[1:3]))
