"""What the README's figures are measured with: ``python -m freres_cli.cli.benchmark``, one file per part."""
