"""`t1` where a package of the user's is installed.

argv: the folder that it is installed in, the command and its options.
"""

from __future__ import annotations

import os
import sys

from megatron_t1.cli.main import main

if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    os.environ["PYTHONPATH"] = os.pathsep.join([sys.argv[1], os.environ["PYTHONPATH"]])
    sys.exit(main(sys.argv[2:]))
