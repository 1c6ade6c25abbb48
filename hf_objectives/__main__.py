"""`python -m hf_objectives` is the command line, `hf-objectives`."""

from hf_objectives.cli import main

if __name__ == "__main__":
    main()
