"""Still pictures of the shapes world, one frame each, in classes named by colour and shape: what the bundled encoders know.

Pictures are what an image file holds: RGB, 8 bits a channel, `world.SIZE` pixels square.
"""

import random
from collections.abc import Sequence
from itertools import product

import torch
from PIL import Image

from trainer.seeding import generator
from trainer.shapes import world

CLASSES = tuple(f"{colour} {shape}" for colour, shape in product(world.COLOURS, world.SHAPES))
NOTHING = ""  # the caption of a picture without a shape


def captions(name: str, *, synonyms: bool = True) -> list[str]:
    """Every wording of a class; without synonyms those that use its name alone, one a template."""
    colour, shape = name.split()
    if not synonyms:
        return [world.wording(template, colour, shape, None) for template in world.TEMPLATES]
    return list(dict.fromkeys(world.captions(world.Scene(colour, shape, None))))


def picture(name: str, seed: int, purpose: str, index: int) -> Image.Image:
    """One picture of a class, or of the bare background for NOTHING; a function of its arguments alone."""
    chance = generator(seed, f"picture/{purpose}/{name}", index)
    if name == NOTHING:
        pixels = (0.04 + 0.10 * torch.rand((), generator=chance)).expand(3, world.SIZE, world.SIZE)
    else:
        direction = list(world.DIRECTIONS)[int(torch.randint(len(world.DIRECTIONS), (), generator=chance))]
        frame = int(torch.randint(world.FRAMES, (), generator=chance))
        pixels = world.render(world.Scene(*name.split(), direction), chance)[:, frame]  # (3, H, W)
    return Image.fromarray((pixels * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


def pictures(names: Sequence[str], count: int, seed: int, purpose: str) -> list[tuple[str, Image.Image]]:
    """`count` pictures of each class, with the class' name."""
    return [(name, picture(name, seed, purpose, i)) for name in names for i in range(count)]


def training_caption(name: str, chance: random.Random) -> str:
    """A caption of a class that pretraining may see."""
    return chance.choice([c for c in captions(name) if not world.held_out(c)]) if name != NOTHING else NOTHING
