"""Puts a release where people find it; without --really it only says what would be sent.

ambergrade publish RELEASE hf://OWNER/NAME [--public] [--really]
ambergrade publish RELEASE DIR_OR_ADDRESS [--really]             a folder, s3://bucket/…, whatever fsspec knows
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ambergrade.errors import AmbergradeError
from ambergrade.track.secrets import Secrets


def main(arguments: Sequence[str]) -> int:
    """Run the command; 0 when done."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="ambergrade publish", description=__doc__, formatter_class=raw)
    parser.add_argument("release", type=Path)
    parser.add_argument("target")
    parser.add_argument("--really", action="store_true", help="send; without it, the plan is printed")
    parser.add_argument("--public", action="store_true", help="let everybody see the repository, once it is whole")
    parser.add_argument("--replace", action="store_true", help="replace other files of the same names")
    parser.add_argument("--endpoint", help="of the hub; by default huggingface_hub's own (HF_ENDPOINT)")
    given = parser.parse_args(arguments)
    from ambergrade.release.publish import plan

    try:
        found = plan(given.release, given.target, public=given.public, endpoint=given.endpoint)
        print(Secrets().text(found.text))
        if not given.really:
            print("Nothing was sent: this is the plan. Send with --really.")
            return 0
        found.run(replace=given.replace)
    except AmbergradeError as error:  # an address may hold a password
        raise AmbergradeError(Secrets().text(str(error))) from None
    told = "All of it was there already; everybody can see it now." if found.place.closed else ""
    print("Sent." if found.sent else told or "All of it is there already.")
    return 0
