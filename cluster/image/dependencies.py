"""Prints the dependencies of a pyproject.toml and of extras, one a line: a layer of the image without the package."""

import sys
import tomllib
from pathlib import Path


def dependencies(pyproject: Path, extras: list[str]) -> list[str]:
    """As pip's requirements. Raises KeyError for an extra that there is not."""
    project = tomllib.loads(pyproject.read_text())["project"]
    return [*project["dependencies"], *(one for extra in extras for one in project["optional-dependencies"][extra])]


if __name__ == "__main__":
    sys.stdout.write("\n".join(dependencies(Path(sys.argv[1]), sys.argv[2:])) + "\n")
