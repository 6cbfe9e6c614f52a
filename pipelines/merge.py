"""Merge model files by a formula: planned from headers, streamed, the same bytes everywhere.

Examples:
    python pipelines/merge.py recipe=recipe.yaml                          a file anywhere; its paths are relative to it
    python pipelines/merge.py recipe=recipe.yaml coefficients.a=0.9 out=gamma.safetensors
    python pipelines/merge.py recipe=RELEASE/recipe.yaml models=DIR       its inputs are found by sha256
    python pipelines/merge.py merge=gamma_rev1 models.base7=FILE out=gamma.safetensors
    python pipelines/merge.py recipe=recipe.yaml dry_run=true             plan, costs and audit, from headers only
"""

from ambergrade.chain.settings import Invocation, MergePipelineSettings
from ambergrade.door.main import pipeline


@pipeline("merge")
def main(settings: MergePipelineSettings, invocation: Invocation) -> None:
    from ambergrade.chain.merging import written_recipe
    from ambergrade.door.files import run_recipe

    given = settings.out, settings.dry_run, settings.compute.threads, settings.compute.device, settings.models_path
    run_recipe(written_recipe(settings), *given, overwrite=settings.overwrite)


if __name__ == "__main__":
    main()
