"""`python -m droptune` is the command `droptune`."""

from droptune.cli import main

main()
