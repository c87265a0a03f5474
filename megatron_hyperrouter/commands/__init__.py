"""One file a command; `mhr NAME` and `tools/*.py` start them."""
