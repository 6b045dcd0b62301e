"""The command ``galore-ft``: runs one command line and turns every error into a message and an exit code.

Little is imported at the top, so that Ctrl-C while libraries are imported ends in one word, too.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from galore_trainer.cli.outcome import FAILED, interrupted, report_error


def main(args: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; ``sys.argv`` where ``args`` is None."""
    args = list(sys.argv[1:] if args is None else args)
    try:
        from galore_trainer.cli.quiet import hush

        hush()
        if args[:1] != ["doctor"]:  # which reports them
            from galore_trainer.versions import check_versions

            check_versions()
        from galore_trainer.cli.app import app

        code = app(args, prog_name="galore-ft", standalone_mode=False, obj=args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return interrupted()
    except BrokenPipeError:  # the reader of a pipe, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return FAILED
    except SystemExit:
        raise
    except BaseException as error:  # Rust libraries panic with errors that are no Exception
        return report_error(error, debug="--debug" in args)
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    sys.exit(main())
