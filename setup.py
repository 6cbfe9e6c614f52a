"""Puts conf/ and pipelines/, which stay at the top level of the repository, into the package of a wheel."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithFolders(build_py):
    """Copies the folders beside the modules; an editable installation reads them where they are."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for folder in ("conf", "pipelines"):
                skip = shutil.ignore_patterns("__pycache__")
                shutil.copytree(folder, Path(self.build_lib) / "ambergrade" / folder, dirs_exist_ok=True, ignore=skip)


setup(cmdclass={"build_py": BuildWithFolders})
