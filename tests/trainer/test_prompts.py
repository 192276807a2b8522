"""Prompts from files, words and the world; embeddings computed once."""

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trainer.backbones.text_encoder import TextEncoder
from trainer.config import DataConfig
from trainer.errors import CheckpointError, NonFinite, UsageError
from trainer.prompts import TEMPLATES, Embeddings, PromptSet, collect, embed, require_concept, warn_of_contradiction, word
from trainer.shapes import world


def _file(tmp_path, name: str, content: str | bytes):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_text_file_one_prompt_a_line(tmp_path):
    path = _file(tmp_path, "p.txt", "\ufeff a red circle \n\n\n the red ball\r\n")
    found = collect(DataConfig(concept="red", prompts=path, preserve=("a blue one",)), bundled=False)
    assert found.prompts == ("a red circle", "the red ball") and found.safe == ("", "")
    assert found.preserved == ("a blue one",)


def test_csv_with_a_safe_column(tmp_path):
    path = _file(tmp_path, "p.csv", '\ufeffid,safe,prompt\n1,"a circle, moving","a red circle, moving"\n2,,red box\n3,x,\n')
    found = collect(DataConfig(concept="red", prompts=path), bundled=False)
    assert found.prompts == ("a red circle, moving", "red box") and found.safe == ("a circle, moving", "")


def test_csv_with_a_header_as_people_write_it(tmp_path):
    found = collect(DataConfig(prompts=_file(tmp_path, "p.csv", "Prompt, Safe \na red ball, a ball\n")), bundled=False)
    assert (found.prompts, found.safe) == (("a red ball",), ("a ball",))


def test_a_tsv_has_the_same_columns(tmp_path):
    found = collect(DataConfig(prompts=_file(tmp_path, "p.tsv", "prompt\tsafe\na red ball, big\ta ball, big\n")), bundled=False)
    assert found.prompts == ("a red ball, big",) and found.safe == ("a ball, big",)


def test_a_line_ends_where_editors_end_it(tmp_path):
    found = collect(DataConfig(prompts=_file(tmp_path, "p.txt", "a red\u2028ball\r\na \x0cred cube\n")), bundled=False)
    assert found.prompts == ("a red\u2028ball", "a \x0cred cube")


def test_an_empty_word_is_not_preserved():
    for bundled in (True, False):
        with pytest.raises(UsageError, match="--preserve: an empty word"):
            collect(DataConfig(preserve=("blue", " ")), bundled=bundled)


def test_csv_with_prompts_alone(tmp_path):
    found = collect(DataConfig(prompts=_file(tmp_path, "p.CSV", "prompt\na\nb\n")), bundled=False)
    assert found.prompts == ("a", "b") and found.safe == ("", "")


@pytest.mark.parametrize("name, content, message", [
    ("p.txt", "", "holds no prompt; write one a line"),
    ("p.txt", " \n\n", "holds no prompt"),
    ("p.csv", "prompt,safe\n", "no row has a prompt"),
    ("p.csv", "prompt,safe\n,x\n", "no row has a prompt"),
    ("p.csv", "text\nred\n", "needs a column named prompt, has text"),
    ("p.csv", "prompt,safe,Safe\nred,,\n", "has 2 columns named safe; leave one"),
    ("p.txt", b"\xff\xfe\x00r", "is not UTF-8 .*; save it as UTF-8"),
    ("p.txt", "a red circle".encode("utf-16-le"), "is not UTF-8 .it holds null bytes.; save it as UTF-8"),
    ("p.csv", "prompt;safe\nred;\n", r"needs a column named prompt, has prompt;safe \(commas separate columns\)"),
    ("p.tsv", "prompt,safe\nred,\n", r"needs a column named prompt, has prompt,safe \(tabs separate columns\)"),
    ("p.tsv", "text\tsafe\nred\t\n", "needs a column named prompt, has text, safe"),
    ("p.csv", "prompt\n" + "x" * 200_000 + "\n", "not a CSV file"),
    ("p.csv", "x" * 200_000 + "\n", "not a CSV file"),
    ("p.csv", 'prompt,safe\n"a red ball,a ball\n', "not a CSV file"),
    ("p.jsonl", '{"prompt": "a red ball"}\n', "is JSON; write one prompt a line, or a CSV"),
])
def test_unusable_prompt_files(tmp_path, name, content, message):
    with pytest.raises(UsageError, match=f"--prompts .*{message}"):
        collect(DataConfig(prompts=_file(tmp_path, name, content)), bundled=False)


@pytest.mark.parametrize("flag", ["prompts", "preserve_file"])
def test_a_pipe_is_refused(tmp_path, flag):
    """A shell's <(…) would be empty the second time, and a FIFO be waited for without end."""
    os.mkfifo(tmp_path / "p.txt")
    with pytest.raises(UsageError, match=f"--{flag.replace('_', '-')} .*p.txt: is a pipe or a device, and prompts are read more than once"):
        collect(DataConfig(**{flag: tmp_path / "p.txt"}), bundled=True)


def test_missing_files_name_their_flag(tmp_path):
    with pytest.raises(UsageError, match="--prompts .*cannot be read"):
        collect(DataConfig(prompts=tmp_path / "absent.txt"), bundled=False)
    with pytest.raises(UsageError, match="--prompts .*cannot be read"):  # too long to be asked for
        collect(DataConfig(prompts=tmp_path / f"{'a' * 300}.txt"), bundled=False)
    with pytest.raises(UsageError, match="--preserve-file .*cannot be read"):
        collect(DataConfig(preserve_file=tmp_path), bundled=False)


def test_rows_and_values_that_are_left_out_are_counted_and_said_once(tmp_path, caplog):
    path = _file(tmp_path, "p.csv", "prompt,safe\na red ball, rolling,a ball\n,a box\na red box,a box\n")
    for _ in ("before anything is loaded", "for the run"):
        assert collect(DataConfig(prompts=path), bundled=False).prompts == ("a red ball", "a red box")
    assert [r.getMessage().removeprefix(f"--prompts {path}: ") for r in caplog.records if "rows" in r.getMessage()] == [
        "1 of 3 rows have no prompt and are left out",
        "1 of 3 rows have more values than there are columns, which are left out; a prompt with a comma needs quotes around it"]


def test_concept_alone_makes_prompts_by_templates():
    found = collect(DataConfig(concept="nudity", preserve=("person", "a dressed person")), bundled=False)
    assert len(found.prompts) >= 4 and all("nudity" in p for p in found.prompts) and set(found.safe) == {""}
    assert "a dressed person" in found.preserved and "a video of person" in found.preserved
    assert "a video of a dressed person" not in found.preserved  # a sentence stays as it is


def test_synonyms_make_prompts_as_the_concept_does_and_are_found_in_others(tmp_path):
    nudity = DataConfig(concept="nudity", synonyms=("nude", " half naked "), preserve=("statue",))
    assert nudity.synonyms == ("nude", "half naked")
    found = collect(nudity, bundled=False)
    assert found.prompts == tuple(t.format(c) for c in ("nudity", "nude", "half naked") for t in TEMPLATES)
    path = _file(tmp_path, "p.csv", "prompt,safe\na nude woman,\nTwo Half Naked men,two men\nan act of nudity,\nnudes,\n")
    found = collect(replace(nudity, prompts=path, instead="clothed"), bundled=False)
    assert found.safe == ("a clothed woman", "two men", "an act of clothed", "clotheds")
    require_concept(found)
    warn_of_contradiction(found)
    for bundled in (True, False):
        with pytest.raises(UsageError, match="^--concept dress: none of 'dress', 'nude', 'unclad' is a word of the prompt 'Two Half.*number 2 of .*--synonyms"):
            require_concept(collect(DataConfig(concept="dress", synonyms=("nude", "unclad"), prompts=path), bundled=bundled))
    with pytest.raises(UsageError, match="--instead square: the prompt 'Two Half Naked men' does not hold 'dress' or 'nude'; give it a safe prompt"):
        collect(DataConfig(concept="dress", synonyms=("nude",), prompts=_file(tmp_path, "q.txt", "Two Half Naked men"), instead="square"), bundled=False)


def test_synonyms_are_to_be_erased_as_the_concept_is(caplog):
    with pytest.raises(UsageError, match="--preserve Nudes: that is what is to be erased"):
        collect(DataConfig(concept="nudity", synonyms=("nude",), preserve=("Nudes",)), bundled=False)
    warn_of_contradiction(collect(DataConfig(concept="nudity", synonyms=("nude", "nude bather"), preserve=("a Nude Bather on a beach",)), bundled=False))
    assert [r.getMessage() for r in caplog.records] == [
        "'a Nude Bather on a beach' is to be kept, or pushed towards, and holds 'Nude Bather', which is to be erased"]


def test_on_the_bundled_model_synonyms_are_those_of_a_file(tmp_path):
    with pytest.raises(UsageError, match="--synonyms: .*bundled model's captions have one word for a concept; .*--prompts FILE"):
        collect(DataConfig(concept="red", synonyms=("scarlet",)), bundled=True)
    path = _file(tmp_path, "p.txt", "a scarlet circle\na red square\n")
    found = collect(DataConfig(concept="red", synonyms=("scarlet",), prompts=path, instead="green", preserve=("square",)), bundled=True)
    assert found.safe == ("a green circle", "a green square") and not any("red" in p.split() or "scarlet" in p for p in found.preserved)
    require_concept(found)


@pytest.mark.parametrize("synonyms, message", [(("nude", " "), "--synonyms: an empty word"), ("nude", "--synonyms: several texts")])
def test_unusable_synonyms(synonyms, message):
    with pytest.raises(UsageError, match=message):
        DataConfig(synonyms=synonyms)


def test_preserved_concepts_from_flags_and_file(tmp_path):
    path = _file(tmp_path, "keep.txt", "a blue square\n")
    found = collect(DataConfig(preserve=("a green ball",), preserve_file=path), bundled=False)
    assert found.preserved == ("a green ball", "a blue square")


@pytest.mark.parametrize("name, what", [("p.csv", "a table"), ("p.TSV", "a table"), ("p.json", "JSON"), ("p.jsonl", "JSON")])
@pytest.mark.parametrize("bundled", [True, False])
def test_what_is_kept_is_a_plain_list(tmp_path, name, what, bundled):
    """Its columns would be kept as one sentence."""
    path = _file(tmp_path, name, "prompt,safe\na blue square,\n")
    with pytest.raises(UsageError, match=f"--preserve-file .*{name}: is {what}; write a text file, with one word or prompt to keep a line"):
        collect(DataConfig(preserve_file=path), bundled=bundled)


def test_bundled_model_takes_the_worlds_captions_and_keeps_the_siblings():
    found = collect(DataConfig(concept="red"), bundled=True)
    assert list(zip(found.prompts, found.safe)) == world.erasure_pairs("red")
    siblings = [p for c in ("green", "blue", "yellow", "purple") for p, _ in world.erasure_pairs(c)]
    assert list(found.preserved) == siblings


def test_the_bundled_models_words_are_known_in_capitals_too():
    capitals = collect(DataConfig(concept="Red", preserve=("Blue",)), bundled=True)
    assert capitals == collect(DataConfig(concept="red", preserve=("blue",)), bundled=True)
    with pytest.raises(UsageError, match="--preserve RED: that is what is to be erased"):
        collect(DataConfig(concept="red", preserve=("RED",)), bundled=True)


def test_bundled_model_with_chosen_preserved_concepts_and_synonyms():
    """Circles are kept, red ones excepted: those are to be erased."""
    found = collect(DataConfig(concept="crimson", preserve=("circle", "azure", "a small dog")), bundled=True)
    circles = [p for p, _ in world.erasure_pairs("circle") if "red" not in p.split()]
    assert len(circles) == 4 * 4 * 4
    assert list(found.preserved) == circles + [p for p, _ in world.erasure_pairs("blue")] + ["a small dog"]
    assert found.concept == "red"  # as the prompts have it


def test_what_is_to_be_erased_is_not_preserved(tmp_path, caplog):
    path = _file(tmp_path, "p.txt", "a red circle moving left\n")
    found = collect(DataConfig(concept="red circle", prompts=path, preserve=("circle", "red")), bundled=True)
    assert found.preserved and not [p for p in found.preserved if "red circle" in p]
    with pytest.raises(UsageError, match="--preserve Golf ball: that is what is to be erased"):
        collect(DataConfig(concept="golf ball", preserve=("Golf ball",)), bundled=False)
    warn_of_contradiction(found)
    assert not caplog.records
    warn_of_contradiction(collect(DataConfig(concept="ball", preserve=("football", "a tennis ball")), bundled=False))
    assert [r.getMessage() for r in caplog.records] == ["'a tennis ball' is to be kept, or pushed towards, and holds 'ball', which is to be erased"]


def test_a_prompt_that_is_its_own_safe_prompt_is_said(tmp_path, caplog):
    path = _file(tmp_path, "p.csv", "prompt,safe\na ball,a box\na red ball, a red ball\n")
    warn_of_contradiction(collect(DataConfig(concept="giraffe", prompts=path), bundled=False))
    assert [r.getMessage() for r in caplog.records] == ["1 of 2 prompts are their own safe prompt, and teach nothing, as 'a red ball'"]


@pytest.mark.parametrize("concept", ["crimson", "giraffe", "supercalifragilisticexpialidocious", "circle red"])
def test_unknown_concept_word_names_the_prompt(concept):
    prompts = PromptSet(concept, ("a red circle",), ("",), ())
    with pytest.raises(UsageError, match=f"'{concept}' is not a word of the prompt 'a red circle'; .*--alpha 0"):
        require_concept(prompts)
    with pytest.raises(UsageError, match=f"--concept {concept}: .*'a red circle' .number 1 of --prompts keep.csv.; use a word"):
        require_concept(replace(prompts, file=Path("keep.csv")))


def test_bundled_model_does_not_know_every_word(tmp_path):
    with pytest.raises(UsageError, match="--concept giraffe: the bundled model does not know it; it knows red, .*--prompts FILE"):
        collect(DataConfig(concept="giraffe"), bundled=True)
    with pytest.raises(UsageError, match="--preserve giraffe.*does not know it; .*blue"):
        collect(DataConfig(concept="red", preserve=("giraffe",)), bundled=True)
    path = _file(tmp_path, "p.txt", "a giraffe\n")
    with pytest.raises(UsageError, match="--preserve dog.*name one of .*red"):
        collect(DataConfig(concept="giraffe", prompts=path, preserve=("dog",)), bundled=True)
    found = collect(DataConfig(concept="giraffe", prompts=path), bundled=True)
    assert found.prompts == ("a giraffe",) and found.preserved == ()


def test_safe_prompts_may_name_something_instead(tmp_path):
    found = collect(DataConfig(concept="nudity", instead="clothes"), bundled=False)
    assert found.safe == tuple(p.replace("nudity", "clothes") for p in found.prompts) and "a video of clothes" in found.safe
    path = _file(tmp_path, "p.csv", "prompt,safe\nA Red Circle,\na red circles ring,a ring\nthe red circle's circle,\n")
    found = collect(DataConfig(concept="red circle", instead=r"b\1ue", prompts=path), bundled=False)
    assert found.safe == (r"A b\1ue", "a ring", r"the b\1ue's circle")
    for concept, instead in (("circle", "square"), ("ball", "square"), ("Circle", "SQUARE")):
        found = collect(DataConfig(concept=concept, instead=instead), bundled=True)
        assert found.prompts == tuple(p for p, _ in world.erasure_pairs("circle"))
        assert found.safe == tuple(p.replace("circle", "square") for p in found.prompts)


@pytest.mark.parametrize("text, found, others", [
    ("plan", ["plan", "plans", "Plan"], ["planes", "plane", "planned"]), ("cap", ["caps"], ["capes"]), ("bus", ["bus", "buses"], ["busy"]),
    ("church", ["churches"], ["churchyard"]), ("tomato", ["tomatoes", "tomatos"], []), ("city", ["city", "cities"], ["citys", "cit"]),
    ("toy", ["toys"], ["toies"]), ("red circle", ["red circle", "red  circles", "Red\tcircle"], ["redcircle", "red-circle"])])
def test_a_word_is_found_with_its_plural_and_nothing_else(text, found, others):
    assert all(word(text).fullmatch(f) and word(text).search(f"a {f}, seen") for f in found)
    assert not any(word(text).search(f"a {other}, seen") for other in others)


def test_words_are_found_however_they_are_typed(tmp_path):
    found = collect(DataConfig(concept="cafe\u0301", prompts=_file(tmp_path, "p.txt", "a caf\u00e9 at night\na cafe\u0301 by day\n")), bundled=False)
    require_concept(found)
    for text, others in (("woman's dress", ["woman’s dress"]), ("t-shirt", ["t‐shirt", "t‑shirt"])):
        assert all(word(one).search(f"a {other}") for one in (text, *others) for other in (text, *others))
    assert not word("t-shirt").search("a t shirt")


@pytest.mark.parametrize("name, text", [("犬", "これは犬です。"), ("狗", "这是一只狗。"), ("강아지", "강아지는 귀엽다"), ("แมว", "นี่คือแมวตัวหนึ่ง")])
def test_a_word_of_a_script_without_spaces_is_found_among_others(name, text):
    assert word(name).search(text) and not word("dog").search(text)


def test_words_are_the_concept_whatever_space_is_between_them(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("red circle and red  circle\n")
    assert collect(DataConfig(concept="red circle", prompts=path, instead="blue square"), bundled=False).safe == ("blue square and blue square",)


@pytest.mark.parametrize("instead, several", [("football", "footballs"), ("box", "boxes"), ("clothes", "clothes"), ("bus", "buses"),
                                              ("glass", "glasses"), ("lorry", "lorries"), ("toy", "toys")])
def test_the_plural_is_the_concept_too(tmp_path, instead, several, caplog):
    path = tmp_path / "prompts.txt"
    path.write_text("a golf ball beside golf balls\n")
    found = collect(DataConfig(concept="golf ball", instead=instead, prompts=path, preserve=("two golf balls",)), bundled=False)
    assert found.safe == (f"a {instead} beside {several}",)
    warn_of_contradiction(found)
    assert "'two golf balls' is to be kept" in caplog.text
    with pytest.raises(UsageError, match="--preserve Golf balls: that is what is to be erased"):
        collect(DataConfig(concept="golf ball", preserve=("Golf balls",)), bundled=False)


@pytest.mark.parametrize("bundled", [True, False])
def test_what_stands_in_the_concepts_place_is_not_the_concept(tmp_path, bundled):
    path = _file(tmp_path, "p.txt", "a golf ball\n")
    for instead in ("golf ball", "Golf balls"):
        with pytest.raises(UsageError, match=f"--instead {instead}: that is what is to be erased"):
            collect(DataConfig(concept="golf ball", instead=instead, prompts=path), bundled=bundled)
    assert collect(DataConfig(concept="golf ball", instead="red golf ball", prompts=path), bundled=bundled).safe == ("a red golf ball",)


def test_spaces_around_words_do_not_matter():
    data = DataConfig(concept=" red", instead="blue ", preserve=(" green ",))
    assert collect(data, bundled=True) == collect(DataConfig(concept="red", instead="blue", preserve=("green",)), bundled=True)


@pytest.mark.parametrize("concept, instead, prompt, safe", [
    ("orange", "pear", "An  orange on an open box, oranges and an old orange", "A  pear on an open box, pears and an old pear"),
    ("ball", "apple", "a ball, a red ball and a\nball", "an apple, a red apple and an\napple"),
    ("ball", "box", "a ball for an hour", "a box for an hour"),
    ("unicorn", "owl", "a unicorn, banana unicorn", "an owl, banana owl"), ("umbrella", "apple", "an umbrella", "an apple")])
def test_the_article_before_what_is_named_instead_is_its_own(tmp_path, concept, instead, prompt, safe):
    path = tmp_path / "prompts.csv"
    path.write_text(f'prompt\n"{prompt}"\n')
    assert collect(DataConfig(concept=concept, instead=instead, prompts=path), bundled=False).safe == (safe,)


def test_what_cannot_be_named_instead(tmp_path):
    path = _file(tmp_path, "p.txt", "a red circle\na round shape\n")
    with pytest.raises(UsageError, match="--instead square: the prompt 'a round shape' does not hold 'circle'.*`safe`"):
        collect(DataConfig(concept="circle", instead="square", prompts=path), bundled=False)
    for instead in ("hexagon", "circle", "red"):
        with pytest.raises(UsageError, match=f"--instead {instead}: what circle can be .* is square, triangle"):
            collect(DataConfig(concept="circle", instead=instead), bundled=True)


class _Counting:
    """A text encoder that counts how many prompts it encodes."""

    length, width = 5, 3

    def __init__(self, fingerprint="weights"):
        self.encoded, self.fingerprint = [], lambda: fingerprint

    def encode(self, prompts, *, dtype, device, out):
        self.encoded += prompts
        return out.copy_(torch.tensor([len(p) for p in prompts])[:, None, None])


def _embed(encoder, prompts, cache, dtype=torch.float32) -> Embeddings:
    return embed(encoder, prompts, dtype=dtype, device="cpu", cache=cache)


def test_embeddings_are_looked_up_by_prompt_and_computed_once(tmp_path):
    encoder = _Counting()
    found = _embed(encoder, ["b", "", "aaa", "b"], tmp_path)
    assert sorted(encoder.encoded) == ["", "aaa", "b"]
    assert found(["aaa", "b", "aaa"])[:, 0, 0].tolist() == [3, 1, 3] and found.table.shape == (3, 5, 3)
    again = _Counting()
    assert _embed(again, ["b", "cc"], tmp_path)(["b", "cc"])[:, 0, 0].tolist() == [1, 2]
    assert again.encoded == ["cc"]


def test_cache_is_keyed_by_encoder_and_dtype(tmp_path):
    _embed(_Counting(), ["a"], tmp_path)
    for encoder, dtype in ((_Counting("other weights"), torch.float32), (_Counting(), torch.bfloat16)):
        assert _embed(encoder, ["a"], tmp_path, dtype).table.dtype == dtype
        assert encoder.encoded == ["a"]


def test_random_weights_are_not_cached(tmp_path):
    _embed(_Counting(None), ["a"], tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", [lambda f: f.write_bytes(b""), lambda f: f.write_bytes(f.read_bytes()[:-4]),
                                    lambda f: f.write_bytes(b"\0" * 100)])
def test_damaged_cache_files_are_written_anew(tmp_path, damage):
    _embed(_Counting(), ["a"], tmp_path)
    [file] = tmp_path.iterdir()
    damage(file)
    encoder = _Counting()
    assert _embed(encoder, ["a"], tmp_path)(["a"]).sum() == 15 and encoder.encoded == ["a"]
    again = _Counting()
    _embed(again, ["a"], tmp_path)
    assert again.encoded == []


def test_cache_file_of_another_content_is_written_anew(tmp_path):
    from safetensors.torch import save_file

    _embed(_Counting(), ["a"], tmp_path)
    [file] = tmp_path.iterdir()
    save_file({"other": torch.ones(1)}, file)
    assert _embed(_Counting(), ["a"], tmp_path)(["a"]).sum() == 15


def test_cache_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    """A read-only home must not cost the run: the embeddings are there, only not for the next one."""
    (tmp_path / "file").write_text("")
    found = _embed(_Counting(), ["a", "bb"], tmp_path / "file" / "cache")
    assert found(["bb"]).sum() == 30
    assert len(caplog.records) == 1 and "XDG_CACHE_HOME" in caplog.text


def test_a_full_disk_leaves_nothing_half_written_in_the_cache(tmp_path, monkeypatch):
    def full(tensors, file):
        file.write_bytes(b"\0" * 10)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trainer.cache.save_file", full)
    _embed(_Counting(), ["a"], tmp_path)
    assert not os.listdir(tmp_path)


def test_what_a_killed_process_left_in_the_cache_is_removed_a_day_later(tmp_path):
    left, written = tmp_path / ".a.safetensors.part.17", tmp_path / ".b.safetensors.part.18"  # the latter by another, now
    for part in (left, written):
        part.touch()
    os.utime(left, times=2 * (time.time() - 25 * 3600,))
    _embed(_Counting(), ["a"], tmp_path)
    assert not left.exists() and written.exists()


@pytest.mark.parametrize("fill, error, why", [
    (float("nan"), NonFinite, "the text encoder gives NaN or infinity for 2 of 2 prompts, as 'a'.*copy the model again"),
    (0.0, CheckpointError, "the text encoder gives the same for every prompt: its weights were wiped")])
def test_a_damaged_text_encoder_is_named_and_nothing_of_it_is_cached(sincos, tmp_path, monkeypatch, fill, error, why):
    load = TextEncoder.load

    def damaged(encoder, **how):
        model = load(encoder, **how)
        for parameter in model.parameters():
            parameter.data.fill_(fill)
        return model

    monkeypatch.setattr(TextEncoder, "load", damaged)
    with pytest.raises(error, match=why):
        embed(sincos.text_encoder, ["a", "b"], dtype=torch.float32, device="cpu", cache=tmp_path)
    assert not os.listdir(tmp_path)


def test_real_embeddings_from_the_cache_equal_fresh_ones_bitwise(sincos, tmp_path):
    prompts = ["a red circle", "", "the ball is crimson"]
    fresh = embed(sincos.text_encoder, prompts, dtype=torch.float32, device="cpu", cache=tmp_path)
    cached = embed(sincos.text_encoder, prompts, dtype=torch.float32, device="cpu", cache=tmp_path)
    assert torch.equal(fresh(prompts), cached(prompts)) and len(os.listdir(tmp_path)) == 3
    more = embed(sincos.text_encoder, [*prompts, "a video", "the end"], dtype=torch.float32, device="cpu", cache=tmp_path)
    assert torch.equal(more(prompts), fresh(prompts))
    assert torch.equal(more(["the end"])[0], sincos.text_encoder.encode(["the end"], dtype=torch.float32)[0])


def test_the_signature_of_embeddings_is_that_of_the_encoder():
    texts = [f"prompt {i}" for i in range(40)]
    table = torch.randn(40, 6, 100, generator=torch.Generator().manual_seed(0))
    one = Embeddings(table, texts)
    other_order = Embeddings(table.flip(0).half(), texts[::-1])
    assert len(one.signature(texts)) == 25 and one.signature(texts[:1]) == pytest.approx(table[0, :, ::4].mean(0).tolist(), rel=1e-3)
    assert one.signature(texts) == pytest.approx(other_order.signature(texts[::-1]), abs=1e-3)
    assert one.signature(texts) != pytest.approx(Embeddings(table.roll(1, 2), texts).signature(texts), abs=1e-2)
