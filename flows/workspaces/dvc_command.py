"""`dvc`, without its error about a stage that Ctrl-C stopped, since the stage itself has said so."""

import logging
import signal
import sys

STOPPED = 128 + signal.SIGINT


class StoppedFilter(logging.Filter):
    """Drops the error of a stage that Ctrl-C stopped, and notes that there was one."""

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is to be printed."""
        error = record.exc_info[1] if record.exc_info else None
        while error:
            if str(error).endswith(f", exited with {STOPPED}"):
                self.found = True
            error = error.__cause__
        return not self.found


def main() -> int:
    """Run the command line's command; returns DVC's exit code, or that of Ctrl-C."""
    from dvc.cli import logger
    from dvc.cli import main as run_dvc

    stopped = StoppedFilter()
    logger.addFilter(stopped)
    code = int(run_dvc(sys.argv[1:]))
    return STOPPED if stopped.found else code


if __name__ == "__main__":
    sys.exit(main())
