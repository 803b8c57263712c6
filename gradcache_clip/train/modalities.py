"""The towers of a dual encoder, by number and by name."""

TOWERS = ("image", "text")
IMAGE, TEXT = 0, 1
