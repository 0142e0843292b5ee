"""What editors of a language model share: the stream of requests, the edited layer, keys and values."""
