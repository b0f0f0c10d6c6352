"""`python -m resilin` is the `resilin` command."""

from resilin.cli.main import main

main()
