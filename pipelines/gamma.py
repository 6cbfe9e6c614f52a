"""The Gamma story from one command: captions -> base7 -> sweep over the merge -> evaluation -> release.

Every finished stage is kept: run the same command again after a kill, and it goes on where it stopped. Where a gate
does not pass, the release is not made champion and the command ends with 1.

Examples:
    python pipelines/gamma.py experiment=gamma_tiny                     the embedded world, on two CPU cores
    python pipelines/gamma.py experiment=gamma_tiny trainer.lr.unet=2e-4
    python pipelines/gamma.py experiment=gamma_rev1 data.database=… data.pictures=…   real SDXL
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ambergrade import config
from ambergrade.release.gate import insist, load_gates
from ambergrade.store import find_file


@config.main("gamma")
def main(cfg: Any) -> None:
    settings = config.plain(cfg)
    paths = {alias: find_file(source) for alias, source in settings["models"].items()}  # before anything slow
    load_gates(settings["gates"])  # likewise
    print("loading …", flush=True)
    import report
    import stages
    from recording import record

    from ambergrade.identity import digest
    from ambergrade.track import ui
    from ambergrade.track.journal import Journal

    stages.use_threads(settings["compute"])
    root, name = Path(settings["root"]), settings["name"]
    what = {key: value for key, value in settings.items() if key not in ("root", "compute", "debug", "insist")}
    journal = Journal.open(root, name)
    release_name = f"{settings['release']['name']} {settings['release']['version']}"
    with journal.run(release_name, key=digest(what), kind="chain", params=stages.parameters(settings)) as parent:
        print(f"{release_name}, {root / 'mlruns'}")
        print(f"  {'stage':<34}{'time':>10}{'':8}record")
        if settings["data"]["draw"]:
            stages.draw_world(settings)
        record(parent, settings)
        chain = stages.Chain(settings, journal, parent)

        captions, validation = stages.dataset(chain)
        parent.datasets({"captions": captions.digest, "held out": validation.digest})
        family = settings["family"]["name"]
        models = {alias: stages.open_checkpoint(path, family) for alias, path in paths.items()}
        models[settings["trained"]] = stages.train(chain, models[settings["base"]], captions, validation)

        merger = stages.Merger(chain, models)
        sheets = stages.sweep(chain, merger, models, stages.read_prompts(chain, "sweep"))
        folder = root / "mlruns" / "reports" / digest(what)[:12]
        verdict = report.judge(chain, merger, sheets, folder)
        final = report.finalists(chain, merger, models, verdict, stages.read_prompts(chain, "heldout"), folder)
        made, said = report.publish(chain, merger, verdict, final, models, captions)
        view, page = report.close(chain, verdict, final, made)

    print(f"\n{verdict.table}")
    print(f"\n{final.text}\n")
    print(f"contact sheet  {final.contact_sheet}")
    print(f"review         {page}")
    print(f"release        {made.path}\n               sha256 {made.digest}")
    print(f"MLflow         {ui.ui_command(root)}\n               {ui.deep_link(journal.experiment_id, view=view)}")
    for trouble in journal.troubles:
        print(f"not journaled: {trouble}")
    if settings["insist"]:
        insist(release_name, said)


if __name__ == "__main__":
    main()
