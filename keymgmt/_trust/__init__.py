"""Whether a model may be opened here, and with which key."""
