"""`python -m fp4cast`."""

from fp4cast.cli.app import main

main()
