"""Verify a merged file: run the recipe in its header again on the inputs, and compare every byte.

Examples:
    python pipelines/verify.py model=gamma.safetensors models=DIR         inputs are found by sha256, under any names
"""

from ambergrade.chain.settings import Invocation, VerifySettings
from ambergrade.door.main import pipeline


@pipeline("verify")
def main(settings: VerifySettings, invocation: Invocation) -> None:
    from ambergrade.chain import merging

    merging.verify(settings)


if __name__ == "__main__":
    main()
