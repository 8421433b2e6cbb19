"""Seal models for machines you do not control; open them in memory with a key from any service."""

from keymgmt._config import Config, load_config

__all__ = ["Config", "load_config"]
