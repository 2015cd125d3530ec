"""`python -m multimax.evaluate`."""

from multimax.evaluate import main

main()
