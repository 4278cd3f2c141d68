"""What can go wrong with data that a user can put right."""


class DataError(Exception):
    """Text, tokenizer or dataset cannot be used as asked; the message says what to change."""
