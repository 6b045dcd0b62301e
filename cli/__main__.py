"""``python -m galore_trainer.cli`` and ``torchrun -m galore_trainer.cli``: the command ``galore-ft``."""

import sys

from galore_trainer.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
