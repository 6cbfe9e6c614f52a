"""Rebuild the embedded world's models: draw pictures, train, write src/ambergrade/world/weights anew.

Examples:
    python pipelines/world.py build=booru booru.folder=/tmp/booru     draw a mini-booru to look at
    python pipelines/world.py build=vae                               one model; `build=` names what
    python pipelines/world.py build=beta7 compute=cuda                on a GPU, in minutes
"""

from ambergrade.chain.settings import Invocation
from ambergrade.chain.world import WorldSettings
from ambergrade.door.main import pipeline


@pipeline("world")
def main(settings: WorldSettings, invocation: Invocation) -> None:
    from ambergrade.chain import world

    world.run(settings)


if __name__ == "__main__":
    main()
