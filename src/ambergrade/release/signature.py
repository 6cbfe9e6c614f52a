"""Checks a release's signature, in the form of OpenSSF's model signing: one file beside the folder."""

from __future__ import annotations

from pathlib import Path

from ambergrade.errors import BadInput, BadSetting, MissingObject

INSTALL = "python -m pip install 'model-signing>=1.1'"


def check_signature(folder: Path, signature: Path, key: Path) -> None:
    """Check that whoever holds the private half of `key` has signed every file of `folder`.

    key: a public key on an elliptic curve (PEM), as `model_signing sign key` takes its private half. Raises BadInput
    for a signature by another key or of other files, BadSetting where the package that checks it is not installed.
    """
    for file in (signature, key):
        if not file.is_file():
            raise MissingObject(f"No file at {file}.")
    try:
        from model_signing.verifying import Config
    except ImportError:
        raise BadSetting(f"A signature is checked by OpenSSF's model-signing, which is not here.\n{INSTALL}") from None
    try:
        Config().use_elliptic_key_verifier(public_key=key).verify(folder, signature)
    except Exception as error:  # it names no errors of its own
        told = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise BadInput(f"{signature.name} is no signature of this folder by {key.name}: {told}") from None
