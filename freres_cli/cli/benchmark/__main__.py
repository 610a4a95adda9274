"""``python -m freres_cli.cli.benchmark``."""

from freres_cli.cli.benchmark.command import main

if __name__ == "__main__":  # a process of its own that a part starts imports this again
    main()
