"""The program of one tokenising process: chunks in on stdin, ids out on stdout, until stdin ends."""

from __future__ import annotations

import os
import pickle
import sys
from contextlib import suppress

import numpy as np

from moeut_compose.data.encoding import encode_texts
from moeut_compose.data.tokenizer import Tokenizer


def main() -> None:
    """Answer until the parent closes the pipe or is gone."""
    requests = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a library that prints must not end up among the answers
    model, dtype = pickle.load(requests)
    tokenizer = Tokenizer(model)
    while True:
        texts = pickle.load(requests)
        answer = encode_texts(texts, tokenizer, np.dtype(dtype))
        pickle.dump(tuple(answer), answers, protocol=pickle.HIGHEST_PROTOCOL)
        answers.flush()


if __name__ == "__main__":
    with suppress(EOFError, BrokenPipeError, pickle.UnpicklingError):
        main()
    os._exit(0)  # nothing is to be flushed into a broken pipe
