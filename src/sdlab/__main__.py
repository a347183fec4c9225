"""``python -m sdlab``: the same program, for ``accelerate launch -m sdlab``."""

from sdlab.cli import main

if __name__ == "__main__":
    main()
