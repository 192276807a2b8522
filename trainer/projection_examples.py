"""What is forgotten, what is kept and what both are measured on: texts, or pictures in memory or in files."""

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image, ImageOps, UnidentifiedImageError

from memory.advice import flag_of
from trainer.config import composed
from trainer.config_file import read_lines, require_list
from trainer.errors import UsageError
from trainer.projection_config import ForgetConfig
from trainer.shapes import pictures

Split = Literal["train", "test", "synonyms", "empty"]
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# Wordings for training, and others for measuring; of the bundled world those of its templates, the last for measuring.
TEMPLATES = ("a photo of a {}", "a {}", "a picture of a {}", "an image of a {}", "{}")
TEST_TEMPLATES = ("a photo of the {}", "there is a {} here")


@dataclass(frozen=True)
class Example:
    """One text or picture of a class. "train" is learned from; the others are for measuring."""

    name: str
    split: Split
    content: str | Image.Image | Path

    def digest(self) -> bytes:
        """Identifies the content."""
        if isinstance(self.content, str):
            return hashlib.sha256(self.content.encode()).digest()
        if isinstance(self.content, Path):
            try:
                return hashlib.sha256(self.content.read_bytes()).digest()
            except OSError as e:
                raise UsageError(f"{self.content}: not a picture that can be read ({e.strerror}); remove it or copy it again") from e
        return hashlib.sha256(repr(self.content.size).encode() + self.content.tobytes()).digest()


def of_class(examples: Sequence[Example], name: str, *splits: Split) -> list[int]:
    """The positions of a class' examples in these splits."""
    return [i for i, e in enumerate(examples) if e.name == name and e.split in splits]


def open_picture(content: Image.Image | Path) -> Image.Image:
    """The picture, in RGB. Raises UsageError for a file that is none."""
    if isinstance(content, Image.Image):
        return content.convert("RGB")
    try:
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning), Image.open(content) as image:  # it is one's own
            upright = ImageOps.exif_transpose(image)  # cameras say which side is up
            if upright.mode.startswith("I"):  # 16 bits of grey, which convert() would cut off at 255: all white
                upright = upright.point(lambda value: value / 257).convert("L")
            return upright.convert("RGB")
    except Image.DecompressionBombError as e:
        raise UsageError(f"{content}: more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels; make it smaller, or leave it out") from e
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as e:
        raise UsageError(f"{content}: not a picture that can be read ({e}); remove it or copy it again") from e


def classes(config: ForgetConfig) -> tuple[str, tuple[str, ...]]:
    """(the class to forget, the classes to keep). Raises UsageError for one that is not there."""
    if config.encoder == "qwen3-vl" and (config.forget_images or config.preserve_images):
        return _folder_classes(config)
    bundled = config.model == "shapes"
    if not bundled and config.encoder == "qwen3-vl":
        raise UsageError("--forget-images and --preserve-images are missing; only the bundled encoder has pictures of its own")
    forget = composed(config.forget or ("red circle" if bundled else ""))
    if not forget:
        raise UsageError("--forget is missing; name the class to forget")
    kept = [composed(name) for name in config.preserve]
    if not all(kept):
        raise UsageError("--preserve: an empty class names nothing; leave it out")
    if config.preserve_file:
        require_list(config.preserve_file, "--preserve-file", "class")
        kept += read_lines(config.preserve_file, "--preserve-file", "class")
    if bundled:
        for flag, name in (("forget", forget), *(("preserve", name) for name in kept)):
            if name not in pictures.CLASSES:
                raise UsageError(f"--{flag} {name}: the bundled encoder does not know it; it knows {', '.join(pictures.CLASSES)}")
        kept = kept or [name for name in pictures.CLASSES if name != forget]
    if not kept:
        raise UsageError("nothing is preserved; name classes by --preserve or --preserve-file")
    if forget.lower() in map(str.lower, kept):
        raise UsageError(f"--forget {forget}: is among the classes to preserve; leave it out there")
    return forget, tuple(dict.fromkeys(kept))


def texts(config: ForgetConfig, forget: str, kept: Sequence[str]) -> list[Example]:
    """CLIP's texts: every class in wordings to train on and others to measure on, and the empty string."""
    found = [Example("", "empty", "")]
    for name in (forget, *kept):
        if config.model == "shapes":
            plain = pictures.captions(name, synonyms=False)
            found += [Example(name, "train", text) for text in plain[:-1]] + [Example(name, "test", plain[-1])]
        else:
            found += [Example(name, "train", t.format(name)) for t in TEMPLATES]
            found += [Example(name, "test", t.format(name)) for t in TEST_TEMPLATES]
    if config.model == "shapes":
        words = set(forget.split())
        found += [Example(forget, "synonyms", t) for t in pictures.captions(forget) if not words & set(t.split())]
    return found


def images(config: ForgetConfig, forget: str, kept: Sequence[str]) -> list[Example]:
    """Pictures of every class, to train on and to measure on: the bundled world's, or those of the given folders."""
    if config.encoder == "clip":
        return _measured_images(config, forget, kept)
    if config.forget_images:
        found = _split(forget, _files(config.forget_images, "--forget-images"), "--forget-images")
        folders = _class_folders(config.preserve_images, "--preserve-images")
        return found + [e for name in kept for e in _split(name, folders[name], "--preserve-images")]
    return [Example(name, split, image) for split in ("train", "test")
            for name, image in pictures.pictures((forget, *kept), config.num_images, config.seed, split)]


def _measured_images(config: ForgetConfig, forget: str, kept: Sequence[str]) -> list[Example]:
    if config.images is None:
        drawn = pictures.pictures((forget, *kept), config.num_images, config.seed, "test") if config.model == "shapes" else []
        return [Example(name, "test", image) for name, image in drawn]
    folders = _class_folders(config.images, "--images")
    absent = [name for name in (forget, *kept) if name not in folders]
    if absent:
        keeps = "" if forget in absent else "; --preserve NAMES keeps those alone"
        raise UsageError(f"--images {config.images}: has no folder {absent[0]!r}; it has {', '.join(folders)}{keeps}")
    return [Example(name, "test", file) for name in (forget, *kept) for file in folders[name]]


def _folder_classes(config: ForgetConfig) -> tuple[str, tuple[str, ...]]:
    for name in ("forget_images", "preserve_images"):
        if getattr(config, name) is None:
            raise UsageError(f"{flag_of(name)} is missing; both folders are needed")
    _files(config.forget_images, "--forget-images")
    forget = composed(config.forget or config.forget_images.resolve().name)
    kept = tuple(_class_folders(config.preserve_images, "--preserve-images"))
    if forget.lower() in map(str.lower, kept):
        raise UsageError(f"--preserve-images {config.preserve_images}: has a folder {forget!r}, the class to forget; move it away")
    return forget, kept


def _class_folders(folder: Path, flag: str) -> dict[str, list[Path]]:
    """Pictures by class: one folder a class, or pictures right in the folder, which are one class of its name."""
    try:
        inside = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError as e:
        raise UsageError(f"{flag} {folder}: cannot be read ({e.strerror})") from e
    return {composed(p.name): _files(p, flag) for p in inside} or {composed(folder.resolve().name): _files(folder, flag)}


def _files(folder: Path, flag: str) -> list[Path]:
    try:
        found = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))  # a Mac leaves ._1.png
    except OSError as e:
        raise UsageError(f"{flag} {folder}: cannot be read ({e.strerror})") from e
    if not found:
        raise UsageError(f"{flag} {folder}: has no pictures ({', '.join(SUFFIXES)})")
    return found


def _split(name: str, files: Sequence[Path], flag: str) -> list[Example]:
    """Every fourth picture is for measuring, at least one of each class."""
    if len(files) < 2:
        raise UsageError(f"{flag}: the class {name!r} has one picture; at least two are needed, one of them to measure on")
    test = set(range(3, len(files), 4)) or {len(files) - 1}
    return [Example(name, "test" if i in test else "train", file) for i, file in enumerate(files)]
