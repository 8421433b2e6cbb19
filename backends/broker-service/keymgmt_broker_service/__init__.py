"""The key broker: a service that gives keys to machines which prove what runs on them."""
