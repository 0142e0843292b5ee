"""`python -m clbench` is `clbench`."""

from clbench.cli.main import main

if __name__ == "__main__":
    main()
