"""`python -m flashlm` is the command line."""

from flashlm.cli import main

if __name__ == "__main__":
    main()
