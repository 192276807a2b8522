"""What is erased and what is kept, as prompts; and their embeddings, computed once and cached by content."""

import csv
import hashlib
import logging
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import dropwhile
from pathlib import Path

import torch
from torch import Tensor

from memory.streams import pinning
from trainer.backbones.text_encoder import TextEncoder
from trainer.cache import cache_directory, recall, store
from trainer.config import DataConfig, composed
from trainer.config_file import JSON, SEPARATORS, read_lines, require_list
from trainer.errors import CheckpointError, NonFinite, UsageError

logger = logging.getLogger(__name__)
_warn_once = lru_cache(logger.warning)  # prompts are read several times on the way to a run

TEMPLATES = ("{}", "a video of {}", "a scene with {}", "{} in motion", "a close shot of {}")
UNSEEN = ("footage of {}", "{} from a distance", "there is {} here", "a short clip that shows {}")  # for measuring
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u3400-\u9fff\uac00-\ud7a3\uf900-\ufaff]")
"""Thai, Lao, Burmese, Khmer, Chinese, Japanese and Korean letters: other words, or a word's endings, follow without a space."""
_VOWEL = re.compile("[aeiou]", re.IGNORECASE)
_CONSONANT_Y = re.compile("[^aeiou]y$", re.IGNORECASE)  # of which the plural ends in ies


@dataclass(frozen=True)
class PromptSet:
    """`prompts` show the concept, `safe` say the same without it (or nothing), what is `kept` is related and stays."""

    concept: str
    prompts: tuple[str, ...]
    safe: tuple[str, ...]
    kept: tuple[tuple[str, tuple[str, ...]], ...]
    """Each of the concepts that are preserved, and its prompts."""
    file: Path | None = None
    """Where `prompts` were read, if they were."""
    synonyms: tuple[str, ...] = ()
    """Other words for the concept, as prompts have them."""

    @property
    def words(self) -> re.Pattern[str]:
        """Finds the concept in a prompt, by any of its words."""
        return word(self.concept, *self.synonyms)

    @property
    def preserved(self) -> tuple[str, ...]:
        """The prompts of all that is kept."""
        return tuple(prompt for _, prompts in self.kept for prompt in prompts)

    @property
    def texts(self) -> tuple[str, ...]:
        """All that a step may read; the empty prompt is an anchor."""
        return *self.prompts, *self.safe, *self.preserved, ""

    def named(self, index: int) -> str:
        """A prompt, and where it stands."""
        return f"the prompt {self.prompts[index]!r}" + (f" (number {index + 1} of --prompts {self.file})" if self.file else "")


def collect(data: DataConfig, *, bundled: bool, templates: Sequence[str] = TEMPLATES) -> PromptSet:
    """The prompts that the settings ask for; where they name none, made from the concept by `templates`.

    On the bundled model these are the world's own captions. Raises UsageError for unreadable or empty files.
    """
    concepts = list(data.preserve) + (_kept(data.preserve_file) if data.preserve_file else [])
    if not all(map(str.strip, concepts)):
        raise UsageError("--preserve: an empty word names nothing; leave it out")
    pairs = _pairs(data.prompts) if data.prompts else None
    concept, synonyms = data.concept, data.synonyms
    if bundled:
        concept, pairs, kept = _world(data, pairs, concepts)
    else:
        if same := [c for c in concepts if word(concept, *synonyms).fullmatch(c)]:
            raise UsageError(f"--preserve {same[0]}: that is what is to be erased")
        pairs = _instead(pairs or [(t.format(c), "") for c in (concept, *synonyms) for t in templates], (concept, *synonyms), data.instead)
        kept = [(c, (c,) if " " in c else tuple(t.format(c) for t in templates)) for c in concepts]
    return PromptSet(concept, tuple(p for p, _ in pairs), tuple(s for _, s in pairs), tuple(kept), data.prompts, synonyms)


def require_concept(prompts: PromptSet) -> None:
    """Raises UsageError for a prompt without the concept's words, of which localised training makes its mask."""
    words, named = prompts.words, [repr(text) for text in (prompts.concept, *prompts.synonyms)]
    for i, prompt in enumerate(prompts.prompts):
        if not words.search(prompt):
            missing = f"none of {', '.join(named)} is" if prompts.synonyms else f"{named[0]} is not"
            raise UsageError(f"--concept {prompts.concept}: {missing} a word of {prompts.named(i)}; use a word of the prompt, "
                             "name other words by --synonyms, or train without localisation by --alpha 0")


def warn_of_contradiction(prompts: PromptSet) -> None:
    """Where what is erased is also kept."""
    if same := [prompt for prompt, safe in zip(prompts.prompts, prompts.safe) if prompt == safe]:
        logger.warning("%d of %d prompts are their own safe prompt, and teach nothing, as %r", len(same), len(prompts.prompts), same[0])
    words = prompts.words
    for prompt in (*prompts.safe, *prompts.preserved):
        if found := words.search(prompt):
            logger.warning("%r is to be kept, or pushed towards, and holds %r, which is to be erased", prompt, found[0])
            break


def word(*texts: str) -> re.Pattern[str]:
    """Finds any of `texts` as a word, or words with any space between them, in the plural too, whose endings are the groups."""
    return re.compile("|".join(map(_word, sorted(texts, key=len, reverse=True))), re.IGNORECASE)  # of a red circle, not the red alone


def _word(text: str) -> str:
    words = r"\s+".join(map(re.escape, text.split()))
    words = re.sub(r"\\-|[‐‑]", "[-‐‑]", re.sub("['’]", "['’]", words))  # as typesetters write them, or keyboards do
    if _CONSONANT_Y.search(text):
        words = words[:-1] + "(?:y|(ies))"
    else:
        words += "((?:(?<=[sxzo])|(?<=[cs]h))es|s)?"
    before, after = "" if _UNSPACED.match(text) else r"(?<!\w)", "" if _UNSPACED.match(text[-1:]) else r"(?!\w)"
    return before + words + after


def _plural(text: str) -> str:
    """What ends in an s is taken to be one, as clothes are, but for a bus and a glass."""
    if _CONSONANT_Y.search(text):
        return text[:-1] + "ies"
    return text + ("es" if text.endswith(("x", "z", "ch", "sh", "ss", "us")) else "" if text.endswith("s") else "s")


def _instead(pairs: list[tuple[str, str]], concept: Sequence[str], instead: str) -> list[tuple[str, str]]:
    """The pairs; those without a safe prompt get one that names `instead` in the place of the concept's words, unless that is empty."""
    if not instead:
        return pairs
    words = word(*concept)
    if words.fullmatch(instead):
        raise UsageError(f"--instead {instead}: that is what is to be erased")
    for prompt, safe in pairs:
        if not safe and not words.search(prompt):
            raise UsageError(f"--instead {instead}: the prompt {prompt!r} does not hold {' or '.join(map(repr, concept))}; give it a safe prompt "
                             "of its own, in the column `safe` of a CSV")
    named = re.compile(rf"(?:\b(a)n?(\s+))?(?:{words.pattern})", re.IGNORECASE)
    n = "n" if _VOWEL.match(instead) else ""

    def renamed(match: re.Match[str]) -> str:
        a, space, *endings = match.groups(default="")
        return a + (a and n) + space + (_plural(instead) if any(endings) else instead)

    return [(prompt, safe or named.sub(renamed, prompt)) for prompt, safe in pairs]


def _world(data: DataConfig, pairs: list[tuple[str, str]] | None, concepts: list[str]
           ) -> tuple[str, list[tuple[str, str]], list[tuple[str, tuple[str, ...]]]]:
    """The word that prompts have for a concept, the shapes world's captions of it, and of what shares its kind."""
    from trainer.shapes import world

    concept, names = data.concept, ", ".join(name for kind in world.ATTRIBUTES.values() for name in kind)
    try:
        others, erased = world.preserved_concepts(concept), world.kind_of(concept)[1]
    except KeyError:
        if pairs is None:
            raise UsageError(f"--concept {concept}: the bundled model does not know it; it knows {names}. "
                             "Another concept needs --prompts FILE") from None
        others, erased = [], concept
    if data.synonyms and pairs is None:
        raise UsageError("--synonyms: the bundled model's captions have one word for a concept; give prompts with others by --prompts FILE")
    instead = data.instead.lower() if others else data.instead  # the model's own word
    if instead and others and instead not in others:
        raise UsageError(f"--instead {data.instead}: what {concept} can be on the bundled model is {', '.join(others)}")
    if pairs is not None:
        pairs = _instead(pairs, (concept, *data.synonyms), instead)
    else:
        pairs = world.erasure_pairs(concept)
        if instead:
            pairs = _instead([(prompt, "") for prompt, _ in pairs], [erased], instead)
    kept = []
    for name in concepts or others:
        if " " in name:
            kept.append((name, (name,)))
            continue
        try:
            # A circle may be red: what shows the concept itself is not to be kept.
            own = tuple(prompt for prompt, _ in world.erasure_pairs(name) if not word(erased, *data.synonyms).search(prompt))
        except KeyError:
            raise UsageError(f"--preserve {name}: the bundled model does not know it; name one of {names}") from None
        if not own:
            raise UsageError(f"--preserve {name}: that is what is to be erased")
        kept.append((world.kind_of(name)[1], own))
    return concept if data.prompts else erased, pairs, kept


def _lines(path: Path, flag: str) -> list[str]:
    # Why a directory cannot be read, or what os.path finds absent for its name or its place, is said where it is read.
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise UsageError(f"{flag} {path}: is a pipe or a device, and prompts are read more than once; write them to a file")
    return read_lines(path, flag, "prompt")


def _kept(path: Path) -> list[str]:
    """What a text file lists."""
    require_list(path, "--preserve-file", "word or prompt to keep")
    return _lines(path, "--preserve-file")


def _pairs(path: Path) -> list[tuple[str, str]]:
    """(prompt, safe prompt) from a text file, a CSV or a TSV."""
    lines = _lines(path, "--prompts")
    if path.suffix.lower() in JSON:
        raise UsageError(f"--prompts {path}: is JSON; write one prompt a line, or a CSV with a column prompt and, if you can, a column safe")
    separator, between = SEPARATORS.get(path.suffix.lower(), (None, None))
    if separator is None:
        return [(line, "") for line in lines]
    with path.open(newline="", encoding="utf-8-sig") as f:
        reader = csv.DictReader(dropwhile(str.isspace, f), delimiter=separator, strict=True)
        try:
            reader.fieldnames = columns = [(name or "").strip().lower() for name in reader.fieldnames or ()]
            records = list(reader)
        except csv.Error as e:
            raise UsageError(f"--prompts {path}: not a CSV file ({e})") from e
    for name in ("prompt", "safe"):
        if columns.count(name) > 1:
            raise UsageError(f"--prompts {path}: has {columns.count(name)} columns named {name}; leave one")
    if "prompt" not in columns:
        raise UsageError(f"--prompts {path}: needs a column named prompt, has {', '.join(columns)} ({between} separate columns)")
    rows = [(composed(record["prompt"] or ""), composed(record.get("safe") or "")) for record in records]
    kept = [row for row in rows if row[0]]
    if not kept:
        raise UsageError(f"--prompts {path}: no row has a prompt")
    for count, what in ((len(rows) - len(kept), "have no prompt and are left out"),
                        (sum(None in record for record in records), "have more values than there are columns, which are left out; "
                                                                    "a prompt with a comma needs quotes around it")):
        if count:
            _warn_once("--prompts %s: %d of %d rows %s", path, count, len(rows), what)
    return kept


class Embeddings:
    """Text embeddings of a fixed set of prompts: one table (n, L, D) in host memory, of which rows are sent to `device` by prompt."""

    def __init__(self, table: Tensor, prompts: Sequence[str], device: torch.device | str = "cpu"):
        self.table, self.device, self._row = table, torch.device(device), {p: i for i, p in enumerate(prompts)}

    def row(self, prompt: str) -> Tensor:
        """(L, D) of a prompt, on the host."""
        return self.table[self._row[prompt]]

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """(B, L, D) of these prompts. The host does not wait."""
        found = torch.empty((len(prompts), *self.table.shape[1:]), dtype=self.table.dtype, device=self.device)
        for row, prompt in zip(found, prompts):
            row.copy_(self.row(prompt), non_blocking=True)
        return found

    def signature(self, prompts: Sequence[str]) -> list[float]:
        """A few figures by which another encoder's embeddings of these prompts are told from this one's, whatever dtype and device either was
        in: means over tokens and up to 16 prompts of up to 32 features."""
        some = sorted(set(prompts))
        some = some[::math.ceil(len(some) / 16)]
        mean = torch.stack([self.row(prompt).float().mean(0) for prompt in some]).mean(0)  # (D,)
        return [float(f"{value:.4g}") for value in mean[::math.ceil(len(mean) / 32)].tolist()]

    def to(self, device: torch.device | str) -> "Embeddings":
        """The same for another device: hundreds of prompts would fill gigabytes of a card."""
        table = self.table
        if torch.device(device).type == "cuda":
            with pinning():
                table = table.pin_memory()
        return Embeddings(table, list(self._row), device)


_EMBEDDING = 2  # what is cached: another number for another way to encode


def embed(encoder: TextEncoder, prompts: Sequence[str], *, dtype: torch.dtype, device: torch.device | str,
          cache: Path | None = None) -> Embeddings:
    """Embeddings of the distinct prompts; those that any earlier run computed come from the cache. No row is held twice.

    Keyed by the text encoder's weights, the dtype, the length and the prompt's text. Random weights are not cached.
    Raises NonFinite, and CheckpointError for an encoder that tells no prompts apart.
    """
    prompts = sorted(set(prompts))
    cache = cache or cache_directory("embeddings")
    fingerprint = encoder.fingerprint()
    files = {} if fingerprint is None else {p: cache / f"{_key(fingerprint, encoder.length, dtype, p)}.safetensors" for p in prompts}
    with pinning():
        table = torch.empty(len(prompts), encoder.length, encoder.width, dtype=dtype,
                            pin_memory=torch.device(device).type == "cuda")  # (n, L, D)
    missing, known = [], []
    for prompt in prompts:
        found = recall(files[prompt], "embedding") if files else None
        if found is None:
            missing.append(prompt)
        else:
            known.append(prompt)
            table[-len(known)] = found["embedding"]  # the missing ones come first
    if missing:
        rows = encoder.encode(missing, dtype=dtype, device=device, out=table[:len(missing)])
        _require_sense(missing, table)
        if files:
            store({files[prompt]: {"embedding": row} for prompt, row in zip(missing, rows)}, "text embeddings")
    return Embeddings(table, [*missing, *reversed(known)])


def _require_sense(prompts: Sequence[str], table: Tensor) -> None:
    """Raises NonFinite or CheckpointError where what was just encoded, the first rows of the table, tells of a damaged encoder."""
    if bad := [prompt for prompt, row in zip(prompts, table) if not torch.isfinite(row).all()]:
        raise NonFinite(f"the text encoder gives NaN or infinity for {len(bad)} of {len(prompts)} prompts, as {bad[0]!r}: its weights are damaged, "
                        f"or it leaves the range of {str(table.dtype).removeprefix('torch.')}; copy the model again, or take another --dtype")
    if len(table) > 1 and all(torch.equal(row, table[0]) for row in table):
        raise CheckpointError("the text encoder gives the same for every prompt: its weights were wiped, or never loaded; copy the model again")


def _key(fingerprint: str, length: int, dtype: torch.dtype, prompt: str) -> str:
    return hashlib.sha256(f"{_EMBEDDING}\0{fingerprint}\0{length}\0{dtype}\0{prompt}".encode()).hexdigest()[:32]
