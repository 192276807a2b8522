"""The world and its detector, on rendered ground truth: no model is needed."""

import random
from zlib import crc32

import pytest
import torch
import torch.nn.functional as F

from trainer.shapes import world

KINDS = ("colour", "shape", "direction")


def _accuracy(disturb) -> dict[str, float]:
    """Share of 5 renderings of each of the 60 scenes that the detector reads correctly, by kind."""
    generator = torch.Generator().manual_seed(3)
    hits, count = dict.fromkeys(KINDS, 0), 0
    for scene in world.scenes() * 5:
        found = world.detect(disturb(world.render(scene, generator), generator))
        count += 1
        for kind in KINDS:
            hits[kind] += getattr(found, kind) == getattr(scene, kind)
    return {kind: hit / count for kind, hit in hits.items()}


def _noisy(video, generator):
    return video + 0.05 * torch.randn(video.shape, generator=generator)


def _blurred(video, generator):
    kernel = torch.tensor([0.25, 0.5, 0.25])
    kernel = (kernel[:, None] * kernel).expand(3, 1, 3, 3)
    return F.conv2d(F.pad(video.transpose(0, 1), (1,) * 4, mode="replicate"), kernel, groups=3).transpose(0, 1)


@pytest.mark.parametrize("disturb", [lambda v, g: v, _noisy, _blurred], ids=["clean", "noise", "blur"])
def test_detector_reads_rendered_videos(disturb):
    for kind, accuracy in _accuracy(disturb).items():
        assert accuracy >= 0.99, kind


@pytest.mark.parametrize("level", [0.0, 0.1, 0.5, 1.0])
def test_blank_and_grey_videos_show_nothing(level):
    assert world.detect(torch.full((3, 9, 32, 32), level)) == world.Detection(None, None, None, 0.0)


def test_picture_coloured_all_over_is_no_shape_but_keeps_its_colour():
    noise = torch.rand(3, 9, 32, 32, generator=torch.Generator().manual_seed(0))
    assert world.detect(noise).shape is None and world.detect(noise).direction is None
    red = torch.tensor([0.9, 0.1, 0.1]).view(3, 1, 1, 1).expand(3, 9, 32, 32)
    found = world.detect(red)
    assert (found.colour, found.shape, found.direction) == ("red", None, None)


def test_static_video_has_colour_and_shape_but_no_direction():
    generator = torch.Generator().manual_seed(0)
    for scene in world.scenes():
        still = world.render(scene, generator)[:, :1].expand(-1, 9, -1, -1)
        found = world.detect(still)
        assert (found.colour, found.shape, found.direction) == (scene.colour, scene.shape, None)
        assert found.travel < 0.01


def test_shape_seen_in_too_few_frames_is_not_detected():
    video = world.render(world.Scene("red", "circle", "left"), torch.Generator().manual_seed(0))
    video[:, 4:] = 0.1
    assert world.detect(video) == world.Detection(None, None, None, 0.0)


def test_travel_is_the_path_in_pixels():
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        found = world.detect(world.render(world.Scene("blue", "square", "up"), generator))
        assert 9 < found.travel < 15  # the world moves 10 to 14 pixels; anti-aliasing costs a fraction


def test_grey_shape_has_no_colour_of_this_world():
    """An erased colour must not be read as another: orange, between red and yellow, is neither."""
    video = world.render(world.Scene("red", "circle", "left"), torch.Generator().manual_seed(0))
    orange = video.amax(0) * torch.tensor([1.0, 0.5, 0.0]).view(3, 1, 1, 1)
    assert world.detect(orange).colour not in ("green", "blue", "purple")
    cyan = video.amax(0) * torch.tensor([0.0, 1.0, 1.0]).view(3, 1, 1, 1)
    assert world.detect(cyan).colour is None


def test_render_is_a_function_of_its_generator_and_stays_in_range():
    scene = world.Scene("green", "triangle", "down")
    one, two = (world.render(scene, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one, two) and one.shape == (3, 9, 32, 32)
    assert one.min() >= 0 and one.max() <= 1


def test_shapes_stay_inside_the_picture():
    generator = torch.Generator().manual_seed(2)
    for scene in world.scenes() * 4:
        coloured = world.render(scene, generator)
        chroma = coloured.amax(0) - coloured.amin(0)
        for edge in (chroma[:, 0], chroma[:, -1], chroma[:, :, 0], chroma[:, :, -1]):
            assert edge.max() < 0.5, scene


def test_captions_name_the_scene_in_every_wording():
    scene = world.Scene("red", "circle", "left")
    found = list(world.captions(scene))
    assert len(found) == len(set(found)) == 5 * 3 * 2 * 2
    assert "a red circle moving left" in found and "the ball is crimson and goes leftward" in found
    for caption in found:
        assert {world.kind_of(w) for w in caption.split() if _known(w)} == {
            ("colour", "red"), ("shape", "circle"), ("direction", "left")}


def _known(word: str) -> bool:
    return any(word in words for names in world.ATTRIBUTES.values() for words in names.values())


@pytest.mark.parametrize("missing", KINDS)
def test_unsaid_attributes_leave_grammatical_captions(missing):
    said = {"colour": "red", "shape": "circle", "direction": "left"} | {missing: None}
    for caption in world.captions(world.Scene(**said)):
        assert "  " not in caption and "{" not in caption and "None" not in caption
        assert not caption.endswith((" and", " is", " goes", " moving", " heading", " flies", " drifts")) or missing != "direction"
        assert not any(_known(w) and world.kind_of(w)[0] == missing for w in caption.split())


def test_held_out_captions_are_about_a_fifth_and_stable():
    every = {c for scene in world.scenes() for c in world.captions(scene)}
    share = sum(map(world.held_out, every)) / len(every)
    assert 0.17 < share < 0.23
    assert world.held_out("a red circle moving left") == (crc32(b"a red circle moving left") % 5 == 0)


@pytest.mark.parametrize("concept", ["red", "triangle", "up"])
def test_erasure_pairs_leave_the_concept_out_and_synonyms_and_one_wording_for_testing(concept):
    attribute, name = world.kind_of(concept)
    pairs = world.erasure_pairs(concept)
    synonyms = {s for names in world.ATTRIBUTES.values() for words in names.values() for s in words[1:]}
    assert len(pairs) == 60 // len(world.ATTRIBUTES[attribute]) * 4
    for prompt, safe in pairs:
        assert concept in prompt.split() and concept not in safe.split()
        assert not synonyms & set(prompt.split()) and not prompt.startswith("one ")


def test_preserved_concepts_are_the_siblings():
    assert world.preserved_concepts("square") == ["circle", "triangle"]
    assert world.preserved_concepts("crimson") == world.preserved_concepts("red")


def test_unknown_word_is_a_key_error():
    with pytest.raises(KeyError):
        world.kind_of("giraffe")


def test_every_word_of_every_caption_is_one_piece_of_the_tokenizer():
    from trainer.shapes.pretrain import _tokenizer

    tokenizer = _tokenizer()
    every = [c for scene in world.scenes() for c in world.captions(scene)]
    for caption in random.Random(0).sample(every, 200):
        assert len(tokenizer(caption, add_special_tokens=False).input_ids) == len(caption.split())
