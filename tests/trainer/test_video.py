"""Videos as files."""

from pathlib import Path

import av
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from trainer import video as video_module
from trainer.errors import InputOutputError
from trainer.shapes import world
from trainer.video import _font, contact_sheet, spread, write_mp4


@pytest.fixture
def video():
    return world.render(world.Scene("red", "circle", "left"), torch.Generator().manual_seed(0))


def _read(path) -> torch.Tensor:
    with av.open(str(path)) as container:
        return torch.stack([torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)])


def test_mp4_holds_every_frame_enlarged_by_a_whole_factor(video, tmp_path):
    write_mp4(tmp_path / "deep" / "x.mp4", video, fps=5)
    frames = _read(tmp_path / "deep" / "x.mp4")
    assert frames.shape == (9, 256, 256, 3)
    small = frames.view(9, 32, 8, 32, 8, 3).float().mean((2, 4)).permute(3, 0, 1, 2) / 255
    found = world.detect(small)
    assert (found.colour, found.shape, found.direction) == ("red", "circle", "left")
    assert (small - video).abs().mean() < 0.02
    with av.open(str(tmp_path / "deep" / "x.mp4")) as container:
        assert container.streams.video[0].average_rate == 5
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["x.mp4"]


def test_a_name_with_a_colon_is_a_file_in_this_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_mp4(Path("12:30.mp4"), torch.rand(3, 2, 32, 32))
    assert _read(tmp_path / "12:30.mp4").shape == (2, 256, 256, 3)


class Largest(TorchDispatchMode):
    num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.num_bytes = max(self.num_bytes, out.nbytes)
        return out


def test_frames_are_encoded_one_by_one(tmp_path):
    video = torch.rand(3, 16, 256, 256)
    with Largest() as largest:
        write_mp4(tmp_path / "x.mp4", video)
    assert 0 < largest.num_bytes <= video[:, 0].nbytes


def test_odd_sides_become_even(tmp_path):
    write_mp4(tmp_path / "x.mp4", torch.rand(3, 2, 301, 401))
    assert _read(tmp_path / "x.mp4").shape == (2, 300, 400, 3)


def test_values_out_of_range_are_clamped(tmp_path):
    write_mp4(tmp_path / "x.mp4", torch.full((3, 2, 32, 32), 7.0))
    assert _read(tmp_path / "x.mp4").min() > 250


def test_contact_sheet_has_a_captioned_row_a_video(video, tmp_path):
    contact_sheet(tmp_path / "deep" / "x.png", [("a red circle", video), ("nothing", torch.zeros_like(video))])
    with Image.open(tmp_path / "deep" / "x.png") as sheet:
        assert sheet.size == (5 * 100 + 4, 2 * 114 + 4)
        pixels = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8).view(sheet.height, sheet.width, 3)
    first = pixels[16:16 + 96, 4:100].float() / 255  # the first frame of the first row, each pixel 3 x 3
    torch.testing.assert_close(first[1::3, 1::3].permute(2, 0, 1), video[:, 0], rtol=0, atol=1 / 255)
    assert (pixels[2:14, 4:100] < 128).any()  # the caption is there
    assert pixels[132:200, 6:90].max() == 0
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["x.png"]


def test_the_frames_that_a_sheet_shows_are_all_that_it_needs(video, tmp_path):
    for name, kept in (("whole", video), ("shown", spread(video))):
        contact_sheet(tmp_path / name, [("a red circle", kept)])
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "shown").read_bytes()
    assert spread(video).untyped_storage().nbytes() == 5 * video[:, 0].nbytes  # the others are let go


def test_a_caption_of_several_lines_stays_above_its_row(video, tmp_path):
    """A field of a CSV may have them."""
    for name, caption in (("one", "a red circle moving left"), ("two", "a red circle\nmoving\n left")):
        contact_sheet(tmp_path / name, [(caption, video)])
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


class _Letters(str):
    """A font that has these letters and draws a box for others."""

    def getmask(self, letter):
        return letter.encode() if letter in self else b"box"


def test_a_caption_is_drawn_by_the_font_that_lacks_the_least(monkeypatch):
    own, wider, another = _Letters("ab"), _Letters("abé"), _Letters("é猫")
    monkeypatch.setattr(video_module, "_fonts", lambda: [own, wider, another])
    assert [_font(caption) for caption in ("a b", "bé", "é猫", "ж")] == [own, wider, another, own]


def test_where_no_font_of_the_system_is_known_pillows_own_draws(video, tmp_path, monkeypatch):
    monkeypatch.setattr(video_module, "_FONTS", ("absent.ttf",))
    monkeypatch.setattr(video_module, "_fonts", video_module._fonts.__wrapped__)
    contact_sheet(tmp_path / "x.png", [("a réd 猫", video)])
    assert len(video_module._fonts()) == 1


def test_single_frame_and_large_videos(tmp_path):
    contact_sheet(tmp_path / "one.png", [("", torch.rand(3, 1, 8, 8))])
    contact_sheet(tmp_path / "large.png", [("", torch.rand(3, 5, 480, 720))])
    with Image.open(tmp_path / "large.png") as sheet:
        assert sheet.size[0] > 5 * 720


@pytest.mark.parametrize("write", [lambda p, v: write_mp4(p.with_suffix(".mp4"), v),
                                   lambda p, v: contact_sheet(p.with_suffix(".png"), [("x", v)])], ids=["mp4", "png"])
class TestUnwritable:
    def test_below_a_file(self, write, video, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(InputOutputError, match="file/x.* cannot be written.*choose another --out"):
            write(tmp_path / "file" / "x", video)

    def test_where_a_directory_is(self, write, video, tmp_path):
        (tmp_path / "x.mp4").mkdir()
        (tmp_path / "x.png").mkdir()
        with pytest.raises(InputOutputError, match="cannot be written"):
            write(tmp_path / "x", video)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["x.mp4", "x.png"]  # nothing half-written

    def test_on_a_full_disk(self, write, video, tmp_path, full_disk):
        with full_disk(), pytest.raises(InputOutputError, match=f"^{tmp_path}/x.... cannot be written .File too large.; choose another --out"):
            write(tmp_path / "x", video)
        assert not list(tmp_path.iterdir())
