"""`python -m multimax.generate`."""

from multimax.generate import main

main()
