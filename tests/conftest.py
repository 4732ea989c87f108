"""One process tests one backend: `KERAS_BACKEND` picks it."""

import os

# Before TensorFlow is imported by anything.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
