"""Commands in forked children of a process that has imported everything: each starts in milliseconds."""

import os
import sys
import traceback
from collections.abc import Callable


def in_a_child(work: Callable[[], int | None]) -> int:
    """The exit code of `work` in a forked process, as `subprocess` gives it; whatever it raises is told on stderr."""
    pid = os.fork()
    if pid == 0:
        status: int | None = 1
        try:
            status = work()
        except SystemExit as leaving:
            status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        finally:
            if sys.exc_info()[0] is not None:
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(status or 0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
