"""The shapes world: what the bundled model knows, drawn, captioned and recognised by rule.

A scene is one coloured shape that moves in one direction over a dark background.
`render` draws it, `captions` words it, `detect` says what a video shows.

Legend: B videos, T frames, H W pixels. Videos are float32 in [0, 1], shape (B, 3, T, H, W).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from zlib import crc32

import torch
from torch import Tensor

FRAMES, SIZE = 9, 32

# First word: the name. The others are synonyms.
COLOURS = {
    "red": ("red", "crimson", "scarlet"),
    "green": ("green", "emerald"),
    "blue": ("blue", "azure"),
    "yellow": ("yellow", "golden"),
    "purple": ("purple", "violet"),
}
SHAPES = {"circle": ("circle", "ball"), "square": ("square", "box"), "triangle": ("triangle", "pyramid")}
DIRECTIONS = {
    "left": ("left", "leftward"),
    "right": ("right", "rightward"),
    "up": ("up", "upward"),
    "down": ("down", "downward"),
}
ATTRIBUTES = {"colour": COLOURS, "shape": SHAPES, "direction": DIRECTIONS}

_RGB = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.75, 0.15),
    "blue": (0.12, 0.25, 0.95),
    "yellow": (0.95, 0.85, 0.10),
    "purple": (0.65, 0.10, 0.85),
}
_STEP = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}

# {c} colour, {s} shape, {d} direction; each wording also exists without a colour or a direction.
TEMPLATES = (
    "a {c} {s} moving {d}",
    "the {s} is {c} and goes {d}",
    "a video of a {c} {s} heading {d}",
    "a {s} that is {c} drifts {d}",
    "one {c} {s} flies {d}",
)
_UNSAID = {  # longest first: how a wording reads when an attribute is left unsaid
    "is {c} and goes": "goes",
    "that is {c} drifts": "drifts",
    "{c} ": "",
    " and goes {d}": "",
    " moving {d}": "",
    " heading {d}": "",
    " drifts {d}": "",
    " goes {d}": "",
    " flies {d}": "",
}


@dataclass(frozen=True)
class Scene:
    """One video's content. An attribute that is None is left unsaid by its captions."""

    colour: str | None
    shape: str | None
    direction: str | None


def scenes() -> list[Scene]:
    """All fully specified scenes."""
    return [Scene(*names) for names in product(COLOURS, SHAPES, DIRECTIONS)]


def kind_of(word: str) -> tuple[str, str]:
    """(attribute, canonical name) that a word stands for, in capitals too; raises KeyError for a word this world does not have."""
    for attribute, names in ATTRIBUTES.items():
        for name, words in names.items():
            if word.lower() in words:
                return attribute, name
    raise KeyError(word)


def wording(template: str, colour: str | None, shape: str | None, direction: str | None) -> str:
    """One caption from words (not names); None leaves the attribute unsaid, an unsaid shape is called "shape"."""
    for phrase, short in _UNSAID.items():
        if ("{c}" in phrase and colour is None) or ("{d}" in phrase and direction is None):
            template = template.replace(phrase, short)
    return template.format(c=colour, s=shape or "shape", d=direction)


def captions(scene: Scene) -> Iterator[str]:
    """Every caption of a scene: all templates, all synonyms."""
    words = [names[name] if name else (None,) for names, name in
             zip(ATTRIBUTES.values(), (scene.colour, scene.shape, scene.direction))]
    for template, *chosen in product(TEMPLATES, *words):
        yield wording(template, *chosen)


def held_out(caption: str) -> bool:
    """Whether pretraining never sees this caption (one in five, by a stable hash of the text)."""
    return crc32(caption.encode()) % 5 == 0


def erasure_pairs(concept: str) -> list[tuple[str, str]]:
    """(prompt, the same prompt with the concept left unsaid) for training an eraser of `concept`.

    Uses names only, no synonyms, and never the last template, so that both remain for testing.
    """
    attribute, name = kind_of(concept)
    pairs = []
    for scene in scenes():
        words = {"colour": scene.colour, "shape": scene.shape, "direction": scene.direction}
        if words[attribute] != name:
            continue
        for template in TEMPLATES[:-1]:
            prompt = wording(template, **words)
            pairs.append((prompt, wording(template, **(words | {attribute: None}))))
    return pairs


def preserved_concepts(concept: str) -> list[str]:
    """The other names of the same kind: what erasing `concept` must leave alone."""
    attribute, name = kind_of(concept)
    return [other for other in ATTRIBUTES[attribute] if other != name]


def _coverage(shape: str, dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    """Anti-aliased share of each pixel inside a shape centred at the origin; dx, dy in pixels."""
    if shape == "circle":
        distance = (dx**2 + dy**2).sqrt() - 0.9 * radius
    elif shape == "square":
        distance = torch.maximum(dx.abs(), dy.abs()) - radius
    else:  # upright triangle: base at +radius, apex at -radius, half base 1.1 radius
        slope = torch.tensor(2 / 1.1)
        side = (dx.abs() * slope - (dy + radius)) / (1 + slope**2).sqrt()
        distance = torch.maximum(side, dy - radius)
    return (0.5 - distance).clamp(0, 1)


def _grid(size: int) -> tuple[Tensor, Tensor]:
    axis = torch.arange(size, dtype=torch.float32) + 0.5
    return axis.view(1, size), axis.view(size, 1)


def render(scene: Scene, generator: torch.Generator, *, lanes: bool = False) -> Tensor:
    """Draw one video (3, T, H, W) of a fully specified scene; place, size, speed and shade come from `generator`.

    With `lanes`, only the lane (five, 4 pixels apart) and the shade vary: what a small transformer learns in minutes.
    """
    u = torch.rand(8, generator=generator)
    step = torch.tensor(_STEP[scene.direction])
    if lanes:
        radius, travel = torch.tensor(7.0), torch.tensor(12.0)
        along, across = torch.tensor(SIZE / 2), SIZE / 2 - 8 + 4 * (5 * u[3]).floor()
    else:
        radius, travel = 5.2 + 1.8 * u[0], 10 + 4 * u[1]
        margin = radius + 1
        along = SIZE / 2 + (u[2] - 0.5) * (SIZE - 2 * margin - travel).clamp(min=0)
        across = margin + u[3] * (SIZE - 2 * margin)
    centre = torch.where(step != 0, along, across)
    background = 0.04 + 0.10 * u[4]
    colour = torch.tensor(_RGB[scene.colour]) * (0.9 + 0.15 * u[5])
    x, y = _grid(SIZE)
    frames = []
    for t in torch.linspace(-0.5, 0.5, FRAMES):
        cx, cy = centre + step * travel * t
        alpha = _coverage(scene.shape, x - cx, y - cy, radius)
        frames.append(background * (1 - alpha) + colour.clamp(max=1).view(3, 1, 1) * alpha)
    return torch.stack(frames, dim=1)  # (3, T, H, W)


@dataclass(frozen=True)
class Detection:
    """What a video shows. None: nothing of that kind could be recognised. `travel` is the path length in pixels."""

    colour: str | None
    shape: str | None
    direction: str | None
    travel: float


def detect(video: Tensor) -> Detection:
    """Recognise one video (3, T, H, W), values in [0, 1], by rule.

    Foreground: pixels whose saturation (max - min over RGB) exceeds 0.25. Colour: nearest prototype by direction in
    chroma. Shape: best overlap with each prototype drawn at the foreground's centroid and area, by majority over frames.
    Direction: displacement of the centroid.
    """
    video = video.float().clamp(0, 1)
    chroma = video.amax(0) - video.amin(0)  # (T, H, W)
    masks = chroma > 0.25
    areas = masks.sum((1, 2))
    seen = areas >= 16
    if seen.sum() < (video.shape[1] + 1) // 2:
        return Detection(None, None, None, 0.0)
    x, y = _grid(video.shape[-1])
    weights = chroma.clamp(max=0.6) * masks  # soft edges place the centroid to a fraction of a pixel
    total = weights.sum((1, 2)).clamp(min=1e-6)
    cx, cy = (weights * x).sum((1, 2)) / total, (weights * y).sum((1, 2)) / total  # (T,)
    cx, cy = cx[seen], cy[seen]
    travel = ((cx[1:] - cx[:-1]) ** 2 + (cy[1:] - cy[:-1]) ** 2).sqrt().sum().item()
    return Detection(_colour(video, masks), _shape(masks[seen]), _direction(cx, cy), travel)


def _colour(video: Tensor, masks: Tensor) -> str | None:
    rgb = (video * masks).sum((1, 2, 3)) / masks.sum().clamp(min=1)
    hue = rgb - rgb.mean()
    scores = {}
    for name, prototype in _RGB.items():
        reference = torch.tensor(prototype)
        reference = reference - reference.mean()
        scores[name] = torch.cosine_similarity(hue, reference, dim=0).item()
    best = max(scores, key=scores.get)
    return best if scores[best] > 0.92 else None


def _shape(masks: Tensor) -> str | None:
    """Majority over frames (T, H, W) of the prototype with the highest intersection over union."""
    x, y = _grid(masks.shape[-1])
    area = masks.sum((1, 2), keepdim=True).float()  # (T, 1, 1)
    cx, cy = ((masks * axis).sum((1, 2), keepdim=True) / area for axis in (x, y))
    area_of_unit = {"circle": 0.81 * torch.pi, "square": 4.0, "triangle": 2.2}
    overlaps = []
    for shape, unit in area_of_unit.items():
        radius = (area / unit).sqrt()
        # A triangle's centroid lies a third of its half height below the middle of its bounding box.
        lift = radius / 3 if shape == "triangle" else 0.0
        drawn = _coverage(shape, x - cx, y - cy + lift, radius) > 0.5  # (T, H, W)
        overlaps.append((drawn & masks).sum((1, 2)) / (drawn | masks).sum((1, 2)))
    best, which = torch.stack(overlaps).max(0)  # (T,)
    # A picture that is coloured all over shows no shape, although the picture itself is a square.
    recognised = (best > 0.65) & (area.flatten() <= masks[0].numel() / 2)
    names = list(area_of_unit)
    votes = [names[i] if sure else None for i, sure in zip(which.tolist(), recognised.tolist())]
    return max(dict.fromkeys(votes), key=votes.count)


def _direction(cx: Tensor, cy: Tensor) -> str | None:
    dx, dy = (cx[-1] - cx[0]).item(), (cy[-1] - cy[0]).item()
    if max(abs(dx), abs(dy)) < 3 or min(abs(dx), abs(dy)) > 0.6 * max(abs(dx), abs(dy)):
        return None
    if abs(dx) > abs(dy):
        return "right" if dx > 0 else "left"
    return "down" if dy > 0 else "up"
