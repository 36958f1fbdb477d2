"""`python -m advmoe` is `advmoe`."""

import sys

from advmoe.cli import main

if __name__ == "__main__":  # processes that training spawns import this module too
    sys.exit(main())
