"""``python -m pfvol.cli``: the ``pfvol`` program without its script."""

from pfvol.cli.app import main

main()
