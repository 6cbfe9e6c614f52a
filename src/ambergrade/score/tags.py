"""What a prompt asks for, as booru tags: every spelling of a tag comes back to its underscored name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ambergrade.nouns import RATINGS

_EXTRA = re.compile(r"<[^<>]*:[^<>]*>")
"""`<lora:name:0.8>`: it names a file, not something to be seen."""
_WORDS = re.compile(r"\b(?:BREAK|AND)\b")
_ALIASES = {"blond_hair": "blonde_hair"} | {f"gray_{what}": f"grey_{what}" for what in ("hair", "eyes", "background")}
"""Other spellings of one tag, as Danbooru resolves them."""
_WEIGHT = re.compile(r":[+-]?\d+(?:\.\d+)?$")


def canonical_tags(text: str) -> tuple[str, ...]:
    r"""The tags of a prompt: weights, emphasis brackets, escapes, case, `artist:` and repetitions taken out.

    A bracket or a colon that belongs to a tag stays: `kohaku (world)`, `:d`, `>_<`, `:)`.

    >>> canonical_tags(r"1girl, (long hair:1.2), kohaku_\(world\), [[smile]], <lora:x:0.8>, artist:inkmoth BREAK :d")
    ('1girl', 'long_hair', 'kohaku_(world)', 'smile', 'inkmoth', ':d')
    """
    cleaned = _WORDS.sub(",", _EXTRA.sub(",", text)).replace("\n", ",")
    found = [_canonical(part) for part in cleaned.split(",")]
    found = [_ALIASES.get(tag, tag) for tag in found]
    return tuple(dict.fromkeys(tag for tag in found if tag))


def closed(implied: Mapping[str, Sequence[str]]) -> dict[str, frozenset[str]]:
    """Tag to all that it implies, however far: a booru files a picture under each, and so a tagger learns them.

    >>> sorted(closed({"dragon_tail": ["tail"], "long_dragon_tail": ["dragon_tail"]})["long_dragon_tail"])
    ['dragon_tail', 'tail']
    """
    found = {}
    for tag in implied:
        reached, left = set[str](), list(implied[tag])
        while left:
            one = left.pop()
            if one not in reached:
                reached.add(one)
                left += implied.get(one, ())
        found[tag] = frozenset(reached - {tag})
    return found


def rating_of(tags: Sequence[str], words: Mapping[str, Sequence[str]]) -> str:
    """The rating that a prompt's words ask for, in a model family's vocabulary (`rating` of conf/captions/*.yaml).

    The rating most of whose words are all there wins, then the stricter one; a word that belongs to one rating alone
    is enough for it. None of them is `general`.

    >>> kohaku = {"general": ["safe"], "questionable": ["nsfw"], "explicit": ["explicit", "nsfw"]}
    >>> [rating_of(tags, kohaku) for tags in (["safe"], ["nsfw"], ["nsfw", "explicit"], ["explicit"], ["1girl"])]
    ['general', 'questionable', 'explicit', 'explicit', 'general']
    """
    spelled = {rating: {word.replace(" ", "_") for word in words.get(rating, ())} for rating in RATINGS}
    found = []
    for strictness, rating in enumerate(RATINGS):
        mine = spelled[rating]
        elsewhere = {word for other in RATINGS if other != rating for word in spelled[other]}
        if mine and (mine <= set(tags) or (mine - elsewhere) & set(tags)):
            found.append((len(mine & set(tags)), strictness, rating))
    return max(found)[2] if found else "general"


def _canonical(part: str) -> str:
    tag = part.strip()
    while (inner := _without_emphasis(tag)) != tag:
        tag = inner
    tag = tag.replace("\\(", "(").replace("\\)", ")")
    tag = re.sub(r"^(?:artist:|by )\s*", "", tag, flags=re.IGNORECASE)
    return re.sub(r"[\s_]+", "_", tag.strip()).lower() if re.search(r"\w\s+\w|\w\s*\(", tag) else tag.strip().lower()


def _without_emphasis(tag: str) -> str:
    """One layer of `(tag:1.2)`, `(tag)`, `[tag]` or `{tag}` less; brackets inside a name or a face stay."""
    for opening, closing in ("()", "[]", "{}"):
        # An odd bracket may open several tags: "(red hair, smile:1.2)" was cut at the comma.
        wraps = tag.startswith(opening) and tag.endswith(closing) and not tag.endswith("\\" + closing) and len(tag) > 3
        if wraps and re.search(r"\w", tag):
            return _WEIGHT.sub("", tag[1:-1]).strip()
        if tag.startswith(opening) and closing not in tag and re.match(r"\W\w{2}", tag):
            return tag[1:].strip()
        if tag.endswith(closing) and opening not in tag and re.search(r"\w{2}(?::[\d.]+)?\W$", tag):
            return _WEIGHT.sub("", tag[:-1]).strip()
    return tag
