"""Gives every Python process that has this folder on its path the devices that PRETENDED_CUDA asks for."""

import os
import sys
from pathlib import Path

if os.environ.get("PRETENDED_CUDA"):
    sys.path.append(str(Path(__file__).parents[1]))
    import pretended

    pretended.install()
