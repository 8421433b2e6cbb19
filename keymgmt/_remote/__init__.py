"""Sealed models that are not on this machine: on a web server, in a bucket, in a registry."""
