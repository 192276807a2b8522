"""Videos as files: mp4 by PyAV, contact sheets as PNG.

Legend: B videos, T frames, H W pixels; values in [0, 1].
"""

import functools
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.errors import InputOutputError
from trainer.run_files import part_of

if TYPE_CHECKING:
    from PIL import Image, ImageFont

_CAPTION = 14  # pixels above each row of a sheet
_NUM_SHOWN = 5  # frames a row
_SIDE = 96  # of a frame in pixels, about
# With letters that Pillow's own font, which has those of English, lacks; as files are called on Linux, macOS and Windows.
_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "msyh.ttc")


def write_mp4(path: Path, video: Tensor, *, fps: int = 8) -> None:
    """Write one video (3, T, H, W) as H.264, enlarged by whole factors to at least 256 pixels; sides become even."""
    import av

    factor = max(1, -(-256 // min(video.shape[-2:])))
    height, width = (side * factor // 2 * 2 for side in video.shape[-2:])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # By its whole path: a name with a colon alone, such as 12:30.mp4, FFmpeg would take for a protocol's.
        with part_of(path, ".mp4") as part, av.open(str(part.absolute()), "w") as container:
            stream = container.add_stream("libx264", rate=fps)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.options = {"crf": "18"}
            for frame in video.unbind(1):
                pixels = _bytes(frame).permute(1, 2, 0).repeat_interleave(factor, 0).repeat_interleave(factor, 1)  # (H, W, 3)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels[:height, :width].contiguous().numpy(), format="rgb24")))
            container.mux(stream.encode())
    except (OSError, av.error.FFmpegError) as e:
        raise InputOutputError(f"{path} cannot be written ({e.strerror or e}); choose another --out") from e


def contact_sheet(path: Path, rows: list[tuple[str, Tensor]], *, advice: str = "choose another --out") -> None:
    """Write a PNG with one captioned row a video (3, T, H, W), a few frames evenly spread in time. InputOutputError, with `advice`, if it cannot."""
    from PIL import Image, ImageDraw

    shown = rows[0][1]
    height, width = shown.shape[-2:]
    factor = max(1, round(_SIDE / min(height, width)))
    cell = width * factor + 4, height * factor + 4 + _CAPTION
    sheet = Image.new("RGB", (cell[0] * _NUM_SHOWN + 4, cell[1] * len(rows) + 4), "white")
    draw = ImageDraw.Draw(sheet)
    for r, (caption, video) in enumerate(rows):
        caption = " ".join(caption.split())
        draw.text((4, r * cell[1] + 2), caption, fill="black", font=_font(caption))
        for c, picture in enumerate(stills(video, _NUM_SHOWN)):
            picture = picture.resize((width * factor, height * factor), Image.Resampling.NEAREST)
            sheet.paste(picture, (4 + c * cell[0], r * cell[1] + _CAPTION + 2))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part_of(path) as part:
            sheet.save(part, format="PNG")
    except OSError as e:
        raise InputOutputError(f"{path} cannot be written ({e.strerror or e}); {advice}") from e


def _font(caption: str) -> "ImageFont.FreeTypeFont":
    """Pillow's own font, or of those in this system the first that lacks the fewest of the caption's letters."""
    def num_missing(font: "ImageFont.FreeTypeFont") -> int:
        box = bytes(font.getmask("\uffff"))  # no letter: what is drawn for all that the font lacks
        return sum(bytes(font.getmask(letter)) == box for letter in caption if not letter.isspace())

    return min(_fonts(), key=num_missing)


@functools.cache
def _fonts() -> "list[ImageFont.FreeTypeFont]":
    from PIL import ImageFont

    found = [ImageFont.load_default()]
    for name in _FONTS:
        with suppress(OSError):  # it is not there
            found.append(ImageFont.truetype(name, found[0].size))
    return found


def spread(video: Tensor, count: int = _NUM_SHOWN) -> Tensor:
    """`count` frames (3, count, H, W) of a video (3, T, H, W), evenly spread in time; by default those that a contact sheet shows, which is
    all that has to be kept for one: whole videos, in float32, are a gigabyte each where they are large."""
    return video[:, torch.linspace(0, video.shape[1] - 1, count).round().long()]


def stills(video: Tensor, count: int) -> "list[Image.Image]":
    """`spread`, as pictures."""
    from PIL import Image

    return [Image.fromarray(_bytes(frame).permute(1, 2, 0).numpy()) for frame in spread(video, count).unbind(1)]


def _bytes(video: Tensor) -> Tensor:
    return (video * 255).round().clamp(0, 255).to(torch.uint8)
