"""Prints the dependencies of a pyproject.toml, one a line, for the image's own layer of them."""

import sys
import tomllib
from pathlib import Path

print(*tomllib.loads(Path(sys.argv[1]).read_text())["project"]["dependencies"], sep="\n")
