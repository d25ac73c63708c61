"""Draws the subjects and scenes of the synthetic corpus with Pillow.

An `Identity` is what a reference picture has to carry over: a form, a body colour and a marking in a second
colour. It can be drawn in every domain of the recipe (docs/method.md, "Domain-MoT"): as a human-like figure wearing
its colours, as an object, as a fantasy creature, or as the pattern of a background. Captions never name the
colours, so that only the references can tell them.
"""

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SUPERSAMPLING = 3

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (214, 36, 36),
    "orange": (244, 136, 12),
    "yellow": (240, 216, 24),
    "green": (28, 148, 52),
    "teal": (16, 178, 168),
    "sky": (72, 164, 244),
    "blue": (36, 52, 204),
    "violet": (132, 48, 196),
    "magenta": (236, 56, 168),
}
FORMS = ("ball", "box", "kite", "star", "heart", "gem", "drop", "gear")
MARKINGS = ("belt", "stripes", "half")
SCENES: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "meadow": ((226, 236, 224), (196, 212, 192)),
    "beach": ((224, 234, 242), (234, 226, 204)),
    "street": ((222, 224, 228), (176, 178, 184)),
    "room": ((238, 230, 222), (206, 196, 186)),
}
SKIN = ((244, 214, 190), (214, 172, 138), (160, 118, 90))


@dataclass(frozen=True)
class Identity:
    """A subject: what stays the same in every picture of it."""

    number: int
    native: str  # the domain it comes from: "human", "object" or "background"
    form: str
    colour: str
    marking: str
    marking_colour: str
    skin: int = 0

    @property
    def word(self) -> str:
        """The class word of captions; it never gives the colours away."""
        return {"human": "person", "background": "landscape"}.get(self.native, self.form)


@dataclass(frozen=True)
class Pose:
    """Where and how a subject stands in a picture; lengths in units of the picture's side, angle in radians."""

    x: float = 0.5
    y: float = 0.5
    scale: float = 0.36
    angle: float = 0.0
    light: float = 1.0

    def moved(self, dx: float, dy: float, turn: float = 0.0) -> "Pose":
        return replace(self, x=self.x + dx, y=self.y + dy, angle=self.angle + turn)


_PAIRS = list(itertools.combinations(PALETTE, 2))
_LOOKS = [(form, marking, turned) for form in FORMS for marking in MARKINGS for turned in (False, True)]
MOST_IDENTITIES = len(_PAIRS) * len(_LOOKS)
"""Different ones that can be drawn."""


def identities(count: int, seed: int) -> list[Identity]:
    """`count` identities, all different, in an order that depends on the seed only.

    Colour pairs come in rounds, each pair (of either order) once a round: any 36 identities in a row differ in their
    pair of colours. Natives are interleaved, so that any few in a row have every domain.
    """
    rng = np.random.Generator(np.random.Philox(key=seed))
    pairs, looks = _PAIRS, _LOOKS
    if count > MOST_IDENTITIES:
        raise ValueError(f"identities={count}: at most {MOST_IDENTITIES} different ones can be drawn")
    pair_order = rng.permutation(len(pairs))
    look_orders = [rng.permutation(len(looks)) for _ in pairs]
    natives = ("object", "human", "object", "human", "object", "human", "object", "background")
    found = []
    for number in range(count):
        round_, place = divmod(number, len(pairs))
        pair = int(pair_order[place])
        form, marking, turned = looks[int(look_orders[pair][round_])]
        colour, marking_colour = pairs[pair][::-1] if turned else pairs[pair]
        native = natives[(number + round_) % len(natives)]
        found.append(Identity(number, native, form, colour, marking, marking_colour, skin=number % len(SKIN)))
    return found


def _outline(form: str, steps: int = 96) -> np.ndarray:
    """The outline of a form as [n,2] points inside the unit disc."""
    t = np.linspace(0, 2 * math.pi, steps, endpoint=False)
    if form == "ball":
        points = np.stack([np.cos(t), np.sin(t)], -1) * 0.92
    elif form == "box":
        points = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 0.8
    elif form == "kite":
        points = np.array([[0, -1.1], [0.85, -0.15], [0, 1.1], [-0.85, -0.15]])
    elif form == "star":
        a = np.arange(10) * math.pi / 5 - math.pi / 2
        r = np.where(np.arange(10) % 2 == 0, 1.12, 0.58)
        points = np.stack([r * np.cos(a), r * np.sin(a)], -1)
    elif form == "heart":
        x = 16 * np.sin(t) ** 3
        y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
        points = np.stack([x, y], -1) / 16.5
    elif form == "gem":
        points = np.array([[-0.55, -0.85], [0.55, -0.85], [1, -0.2], [0, 1], [-1, -0.2]])
    elif form == "drop":
        a = np.linspace(-0.25 * math.pi, 1.25 * math.pi, steps)
        points = np.concatenate([np.stack([0.78 * np.cos(a), 0.2 + 0.78 * np.sin(a)], -1), [[0.0, -1.1]]])
    elif form == "gear":
        r = 0.9 + 0.14 * np.sign(np.sin(8 * t))
        points = np.stack([r * np.cos(t), r * np.sin(t)], -1)
    else:
        raise ValueError(f"unknown form {form!r}; expected one of {FORMS}")
    return points


def _place(points: np.ndarray, pose: Pose, side: int) -> list[tuple[float, float]]:
    c, s = math.cos(pose.angle), math.sin(pose.angle)
    turned = points @ np.array([[c, s], [-s, c]])
    placed = (turned * pose.scale + (pose.x, pose.y)) * side
    return [(float(x), float(y)) for x, y in placed]


def _lit(colour: tuple[int, int, int], light: float) -> tuple[int, int, int]:
    return tuple(int(min(255, max(0, v * light))) for v in colour)  # type: ignore[return-value]


def _marking_polygons(marking: str) -> list[np.ndarray]:
    def bar(y0: float, y1: float) -> np.ndarray:
        return np.array([[-1.4, y0], [1.4, y0], [1.4, y1], [-1.4, y1]])

    if marking == "belt":
        return [bar(-0.3, 0.34)]
    if marking == "stripes":
        return [bar(y, y + 0.32) for y in (-0.95, -0.32, 0.31, 0.94)]
    if marking == "half":
        return [bar(0.0, 1.6)]
    raise ValueError(f"unknown marking {marking!r}; expected one of {MARKINGS}")


def _paint(layer: Image.Image, outline: np.ndarray, who: Identity, pose: Pose, side: int) -> None:
    """Fills an outline with the identity's colour and marking."""
    mask = Image.new("L", layer.size, 0)
    ImageDraw.Draw(mask).polygon(_place(outline, pose, side), fill=255)
    body = Image.new("RGBA", layer.size, (*_lit(PALETTE[who.colour], pose.light), 255))
    pen = ImageDraw.Draw(body)
    for polygon in _marking_polygons(who.marking):
        pen.polygon(_place(polygon, pose, side), fill=(*_lit(PALETTE[who.marking_colour], pose.light), 255))
    layer.paste(body, (0, 0), mask)


def _eyes(pen: ImageDraw.ImageDraw, centres: list[tuple[float, float]], radius: float, pose: Pose, side: int) -> None:
    for centre in centres:
        white = _outline("ball", 20) * radius + centre
        pupil = _outline("ball", 16) * radius * 0.5 + centre
        pen.polygon(_place(white, pose, side), fill=(255, 255, 255, 255))
        pen.polygon(_place(pupil, pose, side), fill=(30, 30, 34, 255))


def draw_subject(layer: Image.Image, who: Identity, domain: str, pose: Pose) -> None:
    """Draws a subject, in a domain, onto an RGBA picture (in place)."""
    side = layer.size[0]
    pen = ImageDraw.Draw(layer)
    if domain == "background":
        _draw_pattern(layer, who, pose)
    elif domain == "human":
        head = _outline("ball", 40) * 0.36 + (0.0, -0.72)
        limb = np.array([[-0.11, 0.0], [0.11, 0.0], [0.11, 0.5], [-0.11, 0.5]])
        dark = (*_lit((62, 64, 76), pose.light), 255)
        skin = (*_lit(SKIN[who.skin], pose.light), 255)
        for x in (-0.24, 0.24):
            pen.polygon(_place(limb + (x, 0.6), pose, side), fill=dark)
        for x in (-0.72, 0.72):
            pen.polygon(_place(limb * (1, 1.1) + (x, -0.28), pose, side), fill=skin)
        shirt = np.array([[-0.8, -0.4], [0.8, -0.4], [0.82, -0.05], [0.56, -0.02], [0.56, 0.72], [-0.56, 0.72],
                          [-0.56, -0.02], [-0.82, -0.05]])  # fmt: skip
        _paint(layer, shirt, who, pose, side)
        pen.polygon(_place(head, pose, side), fill=skin)
        _eyes(pen, [(-0.13, -0.74), (0.13, -0.74)], 0.07, pose, side)
    elif domain == "fantasy":
        glow = Image.new("RGBA", layer.size, (255, 255, 255, 0))
        ImageDraw.Draw(glow).polygon(_place(_outline(who.form) * 1.28, pose, side), fill=(255, 255, 255, 225))
        layer.alpha_composite(glow.filter(ImageFilter.GaussianBlur(side * 0.016)))
        for sign in (-1, 1):
            wing = np.array([[0.6, -0.1], [1.45, -0.75], [1.3, 0.0], [1.5, 0.45], [0.6, 0.3]]) * (sign, 1)
            pen.polygon(_place(wing, pose, side), fill=(250, 250, 255, 255), outline=(150, 150, 170, 255))
        _paint(layer, _outline(who.form), who, pose, side)
        _eyes(pen, [(-0.32, -0.18), (0.32, -0.18)], 0.24, pose, side)
    else:
        _paint(layer, _outline(who.form), who, pose, side)


def _draw_pattern(layer: Image.Image, who: Identity, pose: Pose) -> None:
    """The identity as scenery: rolling hills in its two colours that fill the lower part of the picture."""
    side = layer.size[0]
    pen = ImageDraw.Draw(layer)
    x = np.linspace(-0.1, 1.1, 60)
    for level, colour in ((0.5, who.colour), (0.68, who.marking_colour), (0.86, who.colour)):
        y = level + 0.05 * np.sin(7 * (x + pose.x * 2 + level * 5))
        ridge = np.concatenate([np.stack([x, y], -1), [[1.1, 1.2], [-0.1, 1.2]]]) * side
        pen.polygon([(float(a), float(b)) for a, b in ridge], fill=(*_lit(PALETTE[colour], pose.light), 255))


def draw_scene(
    scene: str | None, subjects: list[tuple[Identity, str, Pose]], side: int, shift: float = 0.0
) -> Image.Image:
    """A finished RGB picture, `side` x `side`: a scene (or white when None) with subjects drawn in order.

    Each subject is (identity, domain, pose); a subject of the domain "background" covers the scene and belongs
    first. `shift` moves the horizon, so that pictures of one scene differ.
    """
    big = side * SUPERSAMPLING
    if scene is None:
        layer = Image.new("RGBA", (big, big), (255, 255, 255, 255))
    else:
        sky, ground = SCENES[scene]
        layer = Image.new("RGBA", (big, big), (*sky, 255))
        ImageDraw.Draw(layer).rectangle((0, int(big * (0.62 + shift)), big, big), fill=(*ground, 255))
    for who, domain, pose in subjects:
        draw_subject(layer, who, domain, pose)
    return layer.convert("RGB").resize((side, side), Image.Resampling.BOX)
