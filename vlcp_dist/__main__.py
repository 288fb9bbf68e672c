"""`python -m vlcp_dist` is `vlcp`."""

from vlcp_dist.cli import main

if __name__ == "__main__":
    main()
