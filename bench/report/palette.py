"""How rows look in every plot: no two of the first 64 share colour and marker; readable on white and on black."""

# Okabe and Ito's, which the colour-blind tell apart, with a brown in place of their black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C510A", "#7F7F7F")


def places(index: int, markers: int = 8) -> tuple[int, int]:
    """(place of the colour, place of the marker) of the index-th row."""
    turn, colour = divmod(index, len(COLOURS))
    return colour, (colour + turn) % markers
