"""``python -m benchmarks.training.report``: see :mod:`benchmarks.training.report.report`."""

import sys

from benchmarks.training.report.report import main

if __name__ == "__main__":
    sys.exit(main())
