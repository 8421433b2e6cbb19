"""May this model open here, and with which key."""
