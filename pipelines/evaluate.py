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

from ambergrade.chain.settings import EvaluateSettings, Invocation
from ambergrade.door.main import pipeline


@pipeline("evaluate")
def main(settings: EvaluateSettings, invocation: Invocation) -> None:
    print("loading …", flush=True)
    from ambergrade.chain import evaluation

    evaluation.run(settings, invocation)


if __name__ == "__main__":
    main()
