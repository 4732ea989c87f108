"""`python -m keras_randadapt`; see `command_line`."""

import sys

from keras_randadapt import command_line

if __name__ == "__main__":
    sys.exit(command_line.main())
