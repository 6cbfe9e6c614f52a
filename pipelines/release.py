"""Release the best or a named point of a finished sweep, or a model file: scored, described, sealed, registered.

Examples:
    python pipelines/release.py sweep=mlruns/sweeps/KEY release.name=gamma release.version=rev1
    python pipelines/release.py sweep=mlruns/sweeps/KEY 'point={a: 0.8, b: 0.5}' release.name=gamma release.version=rev2
    python pipelines/release.py model=FILE release.name=found release.version=1 release.license=openrail++
    python pipelines/release.py model=FILE inputs=DIR release.parents=true release.name=gamma release.version=rev1
"""

from ambergrade.chain.release_settings import ReleasePipelineSettings
from ambergrade.chain.settings import Invocation
from ambergrade.door.main import pipeline


@pipeline("release")
def main(settings: ReleasePipelineSettings, invocation: Invocation) -> None:
    print("loading …", flush=True)
    from ambergrade.chain import releasing

    releasing.run(settings, invocation)


if __name__ == "__main__":
    main()
