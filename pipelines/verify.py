"""Verify a merged file: run the recipe in its header again on the inputs, and compare every byte.

Examples:
    python pipelines/verify.py model=gamma.safetensors models=DIR         inputs are found by sha256, under any names
"""

from ambergrade.chain.settings import Invocation, VerifySettings
from ambergrade.door.main import pipeline
from ambergrade.errors import BadSetting


@pipeline("verify")
def main(settings: VerifySettings, invocation: Invocation) -> None:
    from ambergrade.door.files import verify_model

    if not verify_model(settings.model, settings.models_path, threads=settings.compute.threads):
        raise BadSetting(f"{settings.model.name} is not what its header says.")


if __name__ == "__main__":
    main()
