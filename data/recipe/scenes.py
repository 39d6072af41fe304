"""Scenes and captions of the bundled world, so that what is memorized is known by construction.

A ``Scene`` is one object in one of two sizes, at a place of an 8-pixel grid, on a background; it renders
to a 96x96 picture and has captions of several phrasings. The object covers a quarter of the picture at
most, and a caption seldom names the colour behind it: an ordinary caption tells little of the whole
picture, a memorized one nearly all. That contrast is the guidance magnitude of the paper's figure 7.
Three kinds of caption go into training:

* ordinary: "a picture of a tomato on a blue background", with a new scene each time;
* verbatim: a title-like string of common words around an object's name, which comes with
  one and the same scene in ``share`` of its uses and with ordinary scenes of its object
  in the rest, as a caption on the web does;
* template: a phrase that fixes background and placement in ``share`` of its uses, and leaves the object free.

Two more sets, with no caption or scene that comes more often than another, are for fine-tuning:
``unduplicated`` (a title for each scene) and ``classes`` ("an image of a tomato" for twenty).

Everything is drawn from ``numpy.random.default_rng([SEED, ...])`` keyed by what it is for,
so any item can be made again alone, whatever was made before it.
"""

from dataclasses import dataclass, replace

import numpy as np

from .art import OBJECTS, SIZES, VENDOR, VENDORS, sprite

SEED = 20250611
SIDE = 96  # pixels
GRID = 8  # pixels between places, as many as one latent covers
COLOURS = {
    "red": (205, 64, 60),
    "orange": (236, 146, 62),
    "yellow": (240, 208, 88),
    "green": (92, 168, 92),
    "teal": (62, 158, 162),
    "blue": (70, 118, 206),
    "purple": (132, 92, 184),
    "pink": (236, 152, 182),
    "brown": (140, 102, 76),
    "gray": (146, 148, 152),
    "white": (236, 234, 228),
    "black": (46, 48, 56),
}
PHRASES = (
    "a picture of {}",
    "a photo of {}",
    "an image of {}",
    "{}",
    "a drawing of {}",
    "here is {}",
)
COLOUR_PHRASES = ("{} on {colour} background", "{} in front of {colour} wall")
COMMON_WORDS = tuple(
    """again air always autumn before better big bright city clear cold coming dance day dear deep
    dream early easy edge evening every far fast feel first five free fresh game gold good great
    happy heart hello high home hope house idea joy just keep kind large last late left life light
    little long love lucky make maybe moon more morning most music must near never new next night
    north ocean often old one only open other over party past place quick quiet rain ready right
    river road room round school sea second seven shine short silver sky slow small smile snow soft
    song soon south spring star still story street strong sun sweet table ten third three time today
    together true twice under until very wait warm water way west wild wind window winter wonder
    word world year young""".split()
)
TEMPLATES = (
    "summer sale poster with {}",
    "greeting card for grandma showing {}",
    "vintage travel stamp featuring {}",
    "limited edition sticker number nine {}",
    "cover of the monthly magazine with {}",
    "concert ticket printed with {}",
    "birthday invitation decorated by {}",
    "museum postcard presenting {}",
    "weekend market flyer about {}",
    "phone wallpaper pack featuring {}",
    "canvas tote bag printed with {}",
    "alphabet flash card showing {}",
)
SHARES = (0.6, 0.8, 0.95)  # 16 verbatim captions each
TEMPLATE_SHARE = 0.8
MIXTURE = {"verbatim": 0.34, "template": 0.08, "title": 0.14}  # of the training stream; the rest is ordinary
OBJECTS_PER_TEMPLATE = 8
CLASSES = 10  # of 20 scenes each


@dataclass(frozen=True)
class Background:
    """Solid, gradient or striped; colours are names, ``shades`` their jittered RGB values (0..255)."""

    kind: str
    colours: tuple[str, ...]
    shades: tuple[tuple[int, int, int], ...]
    eighths: int = 0  # of a turn, the direction in which the colours change

    def render(self) -> np.ndarray:
        """[96, 96, 3] float32 in 0..1."""
        first, last = (np.array(s, np.float32) / 255 for s in (self.shades[0], self.shades[-1]))
        if self.kind == "solid":
            return np.broadcast_to(first, (SIDE, SIDE, 3)).copy()
        axis = np.arange(SIDE, dtype=np.float32) - (SIDE - 1) / 2
        turn = 2 * np.pi * self.eighths / 8
        along = axis[None, :] * np.cos(turn) + axis[:, None] * np.sin(turn)
        if self.kind == "gradient":
            mix = np.clip(along / SIDE + 0.5, 0, 1)
        else:  # along x or y a stripe pair fits the grid; the clipped wave has edges one pixel wide
            period = 3 * GRID if self.eighths % 2 == 0 else 4 * GRID / np.sqrt(2)
            mix = np.clip(np.sin(2 * np.pi * along / period) * period / 6 + 0.5, 0, 1)
        return first + mix[..., None] * (last - first)


@dataclass(frozen=True)
class Scene:
    """One object on a background. ``left`` and ``top`` are pixels from the scene's corner."""

    object: str
    vendor: str
    size: int
    left: int
    top: int
    background: Background

    def render(self) -> np.ndarray:
        """The picture, [96, 96, 3] uint8."""
        pixels = self.background.render()
        art = sprite(self.vendor, self.object, self.size)
        place = (slice(self.top, self.top + self.size), slice(self.left, self.left + self.size))
        pixels[place] = pixels[place] * (1 - art[..., 3:]) + art[..., :3]
        return (pixels * 255).round().clip(0, 255).astype(np.uint8)

    def mask(self) -> np.ndarray:
        """Where the background shows, [96, 96] bool."""
        covered = np.zeros((SIDE, SIDE), bool)
        art = sprite(self.vendor, self.object, self.size)[..., 3]
        covered[self.top : self.top + self.size, self.left : self.left + self.size] = art > 0.02
        return ~covered

    def cells(self) -> np.ndarray:
        """Which latents the object's box covers, [12, 12] bool."""
        covered = np.zeros((SIDE // GRID, SIDE // GRID), bool)
        row, column, count = self.top // GRID, self.left // GRID, self.size // GRID
        covered[row : row + count, column : column + count] = True
        return covered

    def other_vendor(self) -> "Scene":
        """The same scene with the object drawn by the other vendor: near, but not a copy."""
        return replace(self, vendor=VENDORS[1 - VENDORS.index(self.vendor)])


@dataclass(frozen=True)
class Memorized:
    """A memorized caption and a scene that it comes with."""

    prompt: str
    kind: str  # "verbatim", "template" or "class"
    share: float
    scene: Scene
    family: str


def draw_background(rng: np.random.Generator, kind: str | None = None) -> Background:
    """A random background: solid in 0.6 of all cases, a gradient in 8 directions or stripes in 4 in the rest."""
    kind = str(kind or rng.choice(["solid", "gradient", "stripes"], p=[0.6, 0.2, 0.2]))
    names = tuple(rng.choice(list(COLOURS), size=1 if kind == "solid" else 2, replace=False).tolist())
    shades = tuple(tuple(int(v) for v in np.array(COLOURS[n]) + rng.integers(-4, 5, 3)) for n in names)
    return Background(kind, names, shades, int(rng.integers(4 if kind == "stripes" else 8)))


def draw_scene(rng: np.random.Generator, name: str | None = None) -> Scene:
    """A random scene, of object ``name`` if given."""
    size = int(rng.choice(SIZES))
    left, top = (GRID * int(rng.integers(0, (SIDE - size) // GRID + 1)) for _ in range(2))
    return Scene(name or str(rng.choice(OBJECTS)), VENDOR, size, left, top, draw_background(rng))


def with_article(name: str) -> str:
    """ "an owl", "a taxi", "jeans": the name as it stands in a sentence."""
    if name in {"jeans", "fries", "cherries", "grapes", "popcorn", "broccoli", "corn", "cheese"}:
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def ordinary_caption(rng: np.random.Generator, scene: Scene, colour: bool | None = None) -> str:
    """A caption of ``scene``; it names the colour of one solid background in four, or as ``colour`` says."""
    text = str(rng.choice(PHRASES)).format(with_article(scene.object))
    solid = scene.background.kind == "solid"
    if solid and (rng.random() < 0.25 if colour is None else colour):
        text = str(rng.choice(COLOUR_PHRASES)).format(text, colour=with_article(scene.background.colours[0]))
    return text


def title(rng: np.random.Generator, name: str) -> str:
    """Five common words around an object's name, as in "dream second top hat found first"."""
    words = rng.choice(COMMON_WORDS, size=5, replace=False).tolist()
    words.insert(int(rng.integers(1, 5)), name)
    return " ".join(words)


def two_colours(rng: np.random.Generator, name: str) -> list[Scene]:
    """Two scenes of one object, each on a solid background of another colour."""
    found = [replace(draw_scene(rng, name), background=draw_background(rng, "solid")) for _ in range(2)]
    while found[0].background.colours == found[1].background.colours:
        found[1] = replace(found[1], background=draw_background(rng, "solid"))
    return found


def verbatim() -> list[Memorized]:
    """The 48 captions with a duplicated scene, 16 for each share, every one of another object."""
    rng = np.random.default_rng([SEED, 1])
    found = []
    for i, name in enumerate(rng.permutation(OBJECTS)[:48].tolist()):
        prompt = title(rng, name)
        found.append(Memorized(prompt, "verbatim", SHARES[i % 3], draw_scene(rng, name), f"v{i:02d}"))
    return found


def templates() -> list[Memorized]:
    """12 families x 8 objects: a phrase, its background and placement, the object free."""
    rng = np.random.default_rng([SEED, 2])
    found = []
    for i, phrase in enumerate(TEMPLATES):
        layout = replace(draw_scene(rng), background=draw_background(rng, ("gradient", "stripes")[i % 2]))
        for name in rng.permutation(OBJECTS)[:OBJECTS_PER_TEMPLATE].tolist():
            prompt = phrase.format(with_article(name))
            found.append(Memorized(prompt, "template", TEMPLATE_SHARE, replace(layout, object=name), f"t{i:02d}"))
    return found


def unduplicated(count: int = 200) -> list[Memorized]:
    """Scenes to fine-tune on, each with a title of its own."""
    rng = np.random.default_rng([SEED, 6])
    names = [OBJECTS[i % len(OBJECTS)] for i in range(count)]
    return [Memorized(title(rng, n), "verbatim", 1.0, draw_scene(rng, n), f"f{i:03d}") for i, n in enumerate(names)]


def classes(scenes_each: int = 20) -> list[Memorized]:
    """Scenes to fine-tune on, the class's name their only caption."""
    rng = np.random.default_rng([SEED, 7])
    return [
        Memorized(f"an image of {with_article(name)}", "class", 1.0, draw_scene(rng, name), f"c{i:02d}-{k:02d}")
        for i, name in enumerate(rng.permutation(OBJECTS)[:CLASSES].tolist())
        for k in range(scenes_each)
    ]


def ordinary_prompts(count: int = 96) -> list[tuple[str, Scene]]:
    """Captions to ask for, spread evenly over objects and phrasings, with a scene that each fits."""
    rng = np.random.default_rng([SEED, 3])
    found = {}
    for i in range(count):
        scene = replace(draw_scene(rng, OBJECTS[i % len(OBJECTS)]), background=draw_background(rng, "solid"))
        caption = ordinary_caption(rng, scene, colour=i % 3 == 2)
        while caption in found:
            caption = ordinary_caption(rng, scene, colour=i % 3 == 2)
        found[caption] = scene
    return list(found.items())


def training_pair(key: tuple[int, ...], memorized: list[Memorized], templated: list[Memorized]) -> tuple[str, Scene]:
    """One (caption, scene) of the training stream, numbered by ``key``.

    A memorized caption comes with its scene, or its layout, in ``share`` of its uses and with an ordinary scene
    of the same object in the rest. "title" in `MIXTURE` are titles like the verbatim ones, each new and with a new
    scene: without them the object's name alone would bring the duplicate.
    """
    rng = np.random.default_rng([SEED, 4, *key])
    kind, limits = rng.random(), np.cumsum(list(MIXTURE.values()))
    if kind < limits[1]:
        items = memorized if kind < limits[0] else templated
        item = items[int(rng.integers(len(items)))]
        return item.prompt, item.scene if rng.random() < item.share else draw_scene(rng, item.scene.object)
    scene = draw_scene(rng)
    return title(rng, scene.object) if kind < limits[2] else ordinary_caption(rng, scene), scene


def unseen_scenes(count: int) -> list[tuple[str, Scene]]:
    """Scenes with captions from a stream that training never touches."""
    rng = np.random.default_rng([SEED, 5])
    scenes = [draw_scene(rng, OBJECTS[i % len(OBJECTS)]) for i in range(count)]
    return [(ordinary_caption(rng, scene), scene) for scene in scenes]
