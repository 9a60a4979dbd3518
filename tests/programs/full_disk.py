"""train.py with a limit on the size of a file: a write fails in the middle, as on a full disk.

python tests/programs/full_disk.py BYTES [arguments of train.py]
"""

import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train  # noqa: E402
from engine.errors import run_as_program  # noqa: E402

limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
run_as_program(train.main)
