"""Numbers and names of the towers of a dual encoder."""

TOWERS = ("image", "text")
IMAGE, TEXT = 0, 1
