"""Tables, card, page and pictures of a run."""
