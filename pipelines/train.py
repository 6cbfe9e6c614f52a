"""Fine-tune a base on a caption set: captions -> latents -> training, resumable at any step.

Examples:
    python pipelines/train.py experiment=base7_tiny                       beta7 to base7 in the embedded world
    python pipelines/train.py experiment=base7_tiny verify=resume         prove that a kill costs nothing
    python pipelines/train.py experiment=base7_tiny verify=latents        or gradients: are they whole, and right
    python pipelines/train.py experiment=base7 plan=true gpu=a100 processes=2    what the card's run takes
    python pipelines/train.py experiment=base7 data.database=… data.pictures=…   run it
"""

from ambergrade.chain.settings import Invocation, TrainPipelineSettings
from ambergrade.door.main import pipeline


@pipeline("train")
def main(settings: TrainPipelineSettings, invocation: Invocation) -> None:
    if settings.plan:
        from ambergrade.chain.plan import print_plan

        print_plan(settings)
        return
    settings.check_files()
    print("loading …", flush=True)
    from ambergrade.chain import fine_tune

    fine_tune.run(settings, invocation)


if __name__ == "__main__":
    main()
