"""Merge model files by a formula: planned from headers, streamed, the same bytes everywhere.

Examples:
    python pipelines/merge.py recipe=recipe.yaml                          a file anywhere; its paths are relative to it
    python pipelines/merge.py recipe=recipe.yaml coefficients.a=0.9 out=gamma.safetensors
    python pipelines/merge.py merge=gamma_rev1 models.base7=FILE out=gamma.safetensors
    python pipelines/merge.py recipe=recipe.yaml dry_run=true             plan, costs and audit, from headers only
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ambergrade import config
from ambergrade.errors import BadSetting


@config.main("merge")
def main(cfg: Any) -> None:
    settings = config.plain(cfg)
    out = Path(settings["out"]) if settings["out"] else None
    from ambergrade import command
    from ambergrade.merge.files import from_values, read_recipe

    if settings["recipe"]:
        written = read_recipe(Path(settings["recipe"]).expanduser(), settings["coefficients"])
    else:
        missing = [alias for alias, source in settings["models"].items() if not source]
        named = {alias: source for alias, source in settings["models"].items() if source}
        if missing and any(alias in settings["merge"]["formula"] for alias in missing):
            raise BadSetting(
                f"The formula needs {', '.join(missing)}.\n"
                f"Name the file: models.{missing[0]}=PATH, or give recipe=FILE.yaml."
            )
        written = from_values({**settings["merge"], "models": named}, Path(), settings["coefficients"])
    command.run_written(
        written,
        out=out,
        dry_run=settings["dry_run"],
        threads=settings["compute"]["threads"] or None,
        device="cuda" if settings["compute"]["device"] == "cuda" else "cpu",
    )


if __name__ == "__main__":
    main()
