"""Sealed models that lie elsewhere: on a web server, in a bucket, in a registry."""
