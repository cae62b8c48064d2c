"""`python -m ptxdist` is `ptxdist`."""

from ptxdist.cli import main

if __name__ == "__main__":
    main()
