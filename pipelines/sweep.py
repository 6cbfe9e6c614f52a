"""Sweep over a merge: each point merged live, scored on the same prompts and seeds; the winner set at the end.

The same command again continues: finished points are kept, failed ones tried anew.

Examples:
    python pipelines/sweep.py --multirun coefficients.a=0.6,0.8,1.0 coefficients.b=0.25,0.5 models.base7=FILE
    python pipelines/sweep.py --multirun search=tpe search.trials=40 'coefficients.a=interval(0,1.6)' models.base7=FILE
    python pipelines/sweep.py --multirun coefficients.a=0.6,0.8,1.0 race=[12,24,40] models.base7=FILE
    python pipelines/sweep.py --multirun coefficients.a=0.6,0.8 dry=true models.base7=FILE     what it would cost
    python pipelines/sweep.py --multirun coefficients.a=0.6,0.8 'why="a 0.8"' models.base7=FILE
    python pipelines/sweep.py --multirun coefficients.a=0.6,0.8 hydra/launcher=joblib hydra.launcher.n_jobs=2
"""

from ambergrade.chain.settings import Invocation, SweepSettings
from ambergrade.door.sweeping import sweeping


@sweeping("sweep")
def main(settings: SweepSettings, invocation: Invocation) -> object:
    from ambergrade.chain import points

    return points.score_alone(settings, invocation)


if __name__ == "__main__":
    main()
