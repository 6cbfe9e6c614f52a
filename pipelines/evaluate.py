"""Score a model or a folder of pictures, with intervals, a parquet sheet and a self-contained HTML report.

Examples:
    python pipelines/evaluate.py model=builtin://beta7.safetensors                    the embedded world, quick suite
    python pipelines/evaluate.py model=models:/kohaku-xl-gamma-tiny@candidate baseline=SHEET.parquet
    python pipelines/evaluate.py pictures=DIR prompts=prompts.jsonl                   pictures from anywhere
    python pipelines/evaluate.py model=PATH suite=full reference=real.txt reference_pictures=DIR
    python pipelines/evaluate.py model=PATH family=sdxl sampler=euler_a prompts=FILE compute=cuda
    python pipelines/evaluate.py action=compare sheet=A.parquet baseline=B.parquet
    python pipelines/evaluate.py action=compare sheet=[A.parquet,B.parquet] baseline=C.parquet +margins.clip_score=0.3
    python pipelines/evaluate.py pictures=DIR suite=mosaic                            lossy files' grid, no prompts
    python pipelines/evaluate.py action=reference reference=real.txt reference_pictures=DIR name=real suite=full
    python pipelines/evaluate.py action=calibrate pictures=DIR prompts=tags.jsonl tagger=FOLDER name=my_tagger
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ambergrade import config
from ambergrade.errors import BadSetting, UnknownName
from ambergrade.store import find_file

NEEDED = {"compare": ("sheet", "baseline"), "reference": ("reference",), "calibrate": ("pictures", "tagger")}
FILES = ("sheet", "baseline", "pictures", "prompts", "post", "reference", "reference_pictures")


@config.main("evaluate")
def main(cfg: Any) -> None:
    settings = config.plain(cfg)
    check(settings)
    print("loading …", flush=True)
    import evaluation

    {
        "score": evaluation.score_pictures,
        "compare": evaluation.compare,
        "reference": evaluation.build_references,
        "calibrate": evaluation.calibrate,
    }[settings["action"]](settings)


def check(settings: dict[str, Any]) -> None:
    """Everything that can be wrong before anything slow. Raises AmbergradeError."""
    action = settings["action"]
    if action not in ("score", *NEEDED):
        raise UnknownName("action", action, ("score", *NEEDED))
    missing = [name for name in NEEDED.get(action, ()) if settings[name] is None]
    if action == "score" and (settings["model"] is None) == (settings["pictures"] is None):
        raise BadSetting("Give either model=… (pictures are drawn) or pictures=DIR (they are there), and not both.")
    if action == "score" and "fid" in settings["suite"]["metrics"] and settings["reference"] is None:
        missing.append("reference")
    if missing:
        given = " ".join(f"{name}=…" for name in missing)
        raise BadSetting(f"No value for: {', '.join(missing)}.\nGive it on the command line: {given}")
    for name in FILES:
        given = settings[name] if isinstance(settings[name], list) else [settings[name]]
        for file in given:
            if file is not None:
                find_file(file)
    model = settings["model"]
    if model is not None and not model.startswith("models:/"):
        find_file(model)
    if settings["precision"] not in ("fp32", "bf16"):
        raise UnknownName("precision", settings["precision"], ("fp32", "bf16"))
    for name in ("count", "seeds", "noise_batch", "noise_count"):
        if settings[name] is not None and settings[name] < 1:
            raise BadSetting(f"{name} is {settings[name]}, at least 1 is needed.")
    if settings["pictures"] is not None and not Path(settings["pictures"]).is_dir():
        raise BadSetting(f"pictures={settings['pictures']} is no folder.")


if __name__ == "__main__":
    main()
