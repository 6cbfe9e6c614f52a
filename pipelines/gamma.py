"""The Gamma story from one command: captions -> base7 -> sweep over the merge -> evaluation -> release.

Every finished stage is kept: run the same command again after a kill, and it goes on where it stopped. Where a gate
does not pass, the release is not made champion and the command ends with 1.

Examples:
    python pipelines/gamma.py experiment=gamma_tiny                     the embedded world, on two CPU cores
    python pipelines/gamma.py experiment=gamma_tiny trainer.lr.unet=2e-4
    python pipelines/gamma.py experiment=gamma_rev1 data.database=… data.pictures=…   real SDXL
"""

from ambergrade.chain.settings import GammaSettings, Invocation
from ambergrade.door.main import pipeline


@pipeline("gamma")
def main(settings: GammaSettings, invocation: Invocation) -> None:
    settings.check_files()
    print("loading …", flush=True)
    from ambergrade.chain import gamma

    gamma.run(settings, invocation)


if __name__ == "__main__":
    main()
