"""keymgmt backend ``aws``: keys in AWS Key Management Service."""

from keymgmt_aws._provider import AwsProvider
from keymgmt_aws._settings import AwsSettings

__all__ = ["AwsProvider", "AwsSettings"]
