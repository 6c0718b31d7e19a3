"""The program: `bench`, and `python -m bench`."""

import signal
import sys


def main() -> None:
    # Asked to terminate, stop as after Ctrl-C: the cell that runs leaves its checkpoint and its record.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        from bench.cli import app  # half a second, in which nothing has begun
    except KeyboardInterrupt:
        sys.exit(130)
    app()


if __name__ == "__main__":
    main()
