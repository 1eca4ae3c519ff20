"""Which schemes are likely to train at a depth, told before training, and how well that could be told so far."""
