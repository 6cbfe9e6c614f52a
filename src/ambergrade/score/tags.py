"""What a prompt asks for, as booru tags: every spelling of a tag comes back to its underscored name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ambergrade.nouns import RATINGS
from ambergrade.prompts import read_prompt

_ARTIST = re.compile(r"^artist:\s*", re.IGNORECASE)
_ALIASES = {"blond_hair": "blonde_hair"} | {f"gray_{what}": f"grey_{what}" for what in ("hair", "eyes", "background")}
"""Other spellings of one tag, as Danbooru resolves them."""


def canonical_tags(text: str) -> tuple[str, ...]:
    r"""The tags of a prompt (`ambergrade.prompts`), each once, in lower case, with underscores, less `artist:`.

    >>> canonical_tags(r"1girl, (long hair:1.2), kohaku_\(world\), [[smile]], <lora:x:0.8>, artist:inkmoth BREAK :d")
    ('1girl', 'long_hair', 'kohaku_(world)', 'smile', 'inkmoth', ':d')
    """
    spelled = [re.sub(r"_*\s[\s_]*", "_", _ARTIST.sub("", tag).strip()).lower() for tag in read_prompt(text).tags]
    return tuple(dict.fromkeys(_ALIASES.get(tag, tag) for tag in spelled if tag))


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
