"""Fine-tune a base on a caption set: captions -> latents -> training, resumable at any step.

Examples:
    python pipelines/train.py experiment=base7_tiny                       beta7 to base7 in the embedded world
    python pipelines/train.py experiment=base7_tiny verify=resume         prove that a kill costs nothing
    python pipelines/train.py experiment=base7_tiny verify=gradients processes=2
    python pipelines/train.py experiment=base7_tiny verify=latents        are the stored latents whole, and right
    python pipelines/train.py experiment=base7 plan=true gpu=a100 processes=2    what the card's run takes
    python pipelines/train.py experiment=base7 data.database=… data.pictures=…   run it
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ambergrade import config
from ambergrade.errors import BadSetting, UnknownName
from ambergrade.store import find_file

PROOFS = ("resume", "gradients", "latents")


@config.main("train")
def main(cfg: Any) -> None:
    settings = config.plain(cfg)
    from ambergrade.train.settings import TrainSettings

    trainer = TrainSettings.read(settings["trainer"])
    trainer.accumulation(settings["processes"])
    if settings["plan"]:
        from ambergrade.train.plan import plan

        if settings["family"]["name"] != "sdxl":
            raise BadSetting(f"The plan's tables are SDXL's, not {settings['family']['name']}'s. Try experiment=base7.")
        resolution = settings["family"]["resolution"]
        print(
            plan(
                trainer,
                settings["processes"],
                str(settings["gpu"]),
                resolution=resolution,
                pictures=settings["pictures"],
            )
        )
        return
    if settings["verify"] not in (None, *PROOFS):
        raise UnknownName("verify", settings["verify"], PROOFS)
    if settings["base"] not in settings["models"]:
        raise UnknownName("base", settings["base"], settings["models"], "Aliases are in conf/models.")
    path = find_file(settings["models"][settings["base"]])  # before anything slow
    print("loading …", flush=True)
    import preparing
    import stages
    from recording import record

    from ambergrade.identity import digest
    from ambergrade.store import link_or_copy
    from ambergrade.track.journal import Journal

    stages.use_threads(settings["compute"])
    root = Path(settings["root"])
    about = ("root", "compute", "debug", "out", "processes", "plan", "gpu", "pictures")
    what = {key: value for key, value in settings.items() if key not in about}
    journal = Journal.open(root, settings["name"])
    key, title = digest(what), settings["trained"]
    with journal.run(title, key=key, kind="chain", params={"base": settings["base"], "trained": title}) as parent:
        record(parent, settings)
        if settings["data"]["draw"]:
            stages.draw_world(settings)
        chain = stages.Chain(settings, journal, parent)
        captions, validation = stages.dataset(chain)
        parent.datasets({"captions": captions.digest, "held out": validation.digest})
        base = stages.open_checkpoint(path, settings["family"]["name"])
        if settings["verify"] == "latents":
            preparing.prove_latents(chain, base, captions, validation)
            return
        if settings["verify"]:
            stages.prove(chain, base, captions, validation)
            return
        trained = stages.train(chain, base, captions, validation)
    if settings["out"]:
        link_or_copy(trained.path, Path(settings["out"]))
    print(f"{title}  {settings['out'] or trained.path}\n  weights {trained.digest}")


if __name__ == "__main__":
    main()
