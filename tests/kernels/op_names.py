"""The expert products, as `conftest.make_case` and tests call them."""

OPS = ["split", "merge", "feedforward"]
