"""Asks people, blindly, which pictures they prefer.

ambergrade vote SWEEP                      the best points of a sweep, on its held-out prompts
ambergrade vote RELEASE [--models DIR]     a release against its base
ambergrade vote A B [C …]                  releases, models, or folders of pictures
ambergrade vote --result FILE.json         count what the page saved
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ambergrade.errors import BadInput, BadSetting
from ambergrade.places import default_root
from ambergrade.store import copy_file

if TYPE_CHECKING:
    from ambergrade.chain.vote import Ballot
MOST_BYTES = 1 << 20


def main(arguments: Sequence[str]) -> int:
    """Run the command; 0 when done."""
    given = _parser().parse_args(arguments)
    root = given.root or default_root()
    from ambergrade.chain.vote_command import VoteOptions, ask, bring_back
    from ambergrade.score.vote_page import Answers

    if given.result is not None:
        if given.subjects:
            raise BadSetting("--result brings back what its page asked; it takes no other words.")
        with given.result.open("rb") as file:
            text = file.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise BadInput(f"{given.result} has more than {MOST_BYTES:,} bytes: it is no result of a vote.")
        bring_back(root, Answers.read(text, str(given.result)))
        return 0
    if given.out is not None and given.out.suffix != ".html":
        raise BadSetting(f"{given.out} is no name for a page.\nIt must end in .html.")
    names = VoteOptions.__dataclass_fields__.keys() - {"root", "subjects", "point"}
    options = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    ballot = ask(VoteOptions(root, tuple(given.subjects), point=tuple(given.point), **options))
    if given.serve:
        _serve(root, ballot, given.port)
        return 0
    out = given.out or root / "mlruns" / "votes" / ballot.identity[:12] / "vote.html"
    copy_file(ballot.page, out)
    print(f"\n{len(ballot.pairs)} pairs  {out}\nOpen it in a browser, vote, save, and bring the file back:")
    print("  ambergrade vote --result FILE.json")
    return 0


def _serve(root: Path, ballot: Ballot, port: int) -> None:
    """Show the page, and count what it sends."""
    from ambergrade.chain.vote_command import bring_back
    from ambergrade.door.serving import serve
    from ambergrade.score.vote_page import Answers

    got: list[Answers] = []

    def receive(text: bytes) -> str:
        answers = Answers.read(text, "What the page sent")
        if answers.ballot != ballot.identity or len(answers.answers) > len(ballot.pairs):
            raise BadInput("These are not the answers to this page.")
        got.append(answers)
        return "Thank you. You may close this page."

    print(f"\n{len(ballot.pairs)} pairs; open this address in a browser (Ctrl-C ends without a result):", flush=True)
    serve(ballot.page.read_bytes(), receive, port=port, say=lambda address: print(f"  {address}", flush=True))
    bring_back(root, got[0])


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="ambergrade vote", description=__doc__, formatter_class=raw)
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help="sweep, release, model, or folder of pictures")
    parser.add_argument("--result", type=Path, metavar="FILE.json", help="count what a page saved")
    parser.add_argument("--serve", action="store_true", help="show the page at a local address and wait for the result")
    parser.add_argument("--port", type=int, default=0, help="of --serve; any free one by default")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="where the page is written")
    parser.add_argument("--question", help="what is asked above the pictures")
    parser.add_argument("--pairs", type=int, help="ask at most so many pairs (60)")
    parser.add_argument("--count", type=int, help="the first so many prompts (32)")
    parser.add_argument("--prompts", type=Path, metavar="FILE.jsonl", help="instead of the subject's own prompts")
    parser.add_argument(
        "--point", action="append", default=[], help="a point of the sweep, as its leaderboard names it"
    )
    parser.add_argument("--points", type=int, help="the so many best points of a sweep (3)")
    parser.add_argument("--models", type=Path, metavar="DIR", help="folder that holds a release's base")
    parser.add_argument("--family", help="one of conf/family; a release's own by default")
    parser.add_argument("--sampler", help="one of conf/sampler; a release's own by default")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--seed", type=int, help="of sides and order (0)")
    parser.add_argument("--root", type=Path, metavar="DIR", help="the folder that holds mlruns/")
    return parser
