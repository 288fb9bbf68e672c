"""The entrypoint of a Ray job: `vlcp run` with the same command line, and its exit status is the job's."""

import sys

from vlcp_dist.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "run")
    main()
