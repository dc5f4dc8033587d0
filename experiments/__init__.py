"""Commands that run whole experiments: the library below knows nothing of them."""
