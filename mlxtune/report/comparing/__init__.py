"""Several runs beside each other: what they are called, in which settings they differ, what came of them."""
