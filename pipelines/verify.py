"""Verify a merged file: run the recipe in its header again on the inputs, and compare every byte.

Examples:
    python pipelines/verify.py model=gamma.safetensors models=DIR         inputs are found by sha256, under any names
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ambergrade import config
from ambergrade.errors import BadSetting
from ambergrade.store import find_file


@config.main("verify")
def main(cfg: Any) -> None:
    settings = config.plain(cfg)
    for name, given in (("model", "model"), ("inputs", "models")):
        if settings[name] is None:
            raise BadSetting(f"No value for {given}.\nWrite: model=FILE.safetensors models=DIR")
    from ambergrade import command

    model, threads = find_file(settings["model"]), settings["compute"]["threads"] or None
    if not command.verify_model(model, Path(settings["inputs"]).expanduser(), threads=threads):
        raise BadSetting(f"{model.name} is not what its header says.")


if __name__ == "__main__":
    main()
