"""`python -m fp4cast`."""

from fp4cast.cli import main

main()
