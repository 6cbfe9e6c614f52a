"""A booru tag list as the plain text that training captions are made of."""

from __future__ import annotations


def plain_text(prompt: str) -> str:
    r"""`prompt` with booru spelling taken out: underscores to spaces, `\(` to `(`, one comma and space between tags.

    Names of three characters or fewer keep their underscores, as in the captions (HakuBooru's rule): they are faces.

    >>> plain_text(r"1girl, long_hair,kohaku_\(world\), ^_^, ")
    '1girl, long hair, kohaku (world), ^_^'
    """
    tags = [tag.strip().replace(r"\(", "(").replace(r"\)", ")") for tag in prompt.split(",")]
    return ", ".join(tag.replace("_", " ") if len(tag) > 3 else tag for tag in tags if tag)
