"""The least policy for each kind of machine, for IAM or as a key policy, in JSON.

A policy names a key by its ARN; a key that the settings name by alias is selected by the condition
``kms:ResourceAliases``. Permissions to wrap and unwrap require keymgmt's pair of the encryption
context, and the pairs of the settings.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from keymgmt.backend import ConfigError
from keymgmt_aws._settings import CONTEXT, SYMMETRIC, key_id
from keymgmt_aws._transport import new_session

if TYPE_CHECKING:
    from keymgmt_aws._settings import AwsSettings

__all__ = ["policy_of"]

_USES: Final = {"open": "kms:Decrypt", "seal": "kms:Encrypt", "publish": "kms:Sign"}
_LOOK: Final = ["kms:DescribeKey", "kms:GetPublicKey"]
_OPERATE: Final = [*_LOOK, "kms:RotateKeyOnDemand"]


def policy_of(role: str, settings: AwsSettings, key: str, principal: str | None) -> str:
    """The policy of a role for one key, in JSON.

    Args:
        role: ``open``, ``seal``, ``publish`` or ``operate``.
        settings: the settings of the provider.
        key: the key name, which has matched its grammar.
        principal: the ARN of a role or user, for statements of the key's own policy; without it the
            result is an IAM policy, in which ``operate`` may also create and list keys.
    """
    native = settings.native(key)
    target: dict[str, Any]
    condition: dict[str, Any] = {}
    if principal is not None:
        target = {"Principal": {"AWS": principal}, "Resource": "*"}
    elif key_id(native) is not None:
        target = {"Resource": native}
    else:
        alias = "alias/" + native.partition("alias/")[2]
        account = native.split(":")[4] if native.startswith("arn:") else "*"
        target = {"Resource": _keys_of(settings, native, account)}
        condition = {"ForAnyValue:StringEquals": {"kms:ResourceAliases": alias}}
    symmetric = SYMMETRIC in settings.allowed(key)
    bound = _bound(settings) if role in ("open", "seal") and symmetric else {}
    statements = []
    # Sealing for an RSA key needs only its public part.
    if role in _USES and (role != "seal" or symmetric):
        statements.append(_statement("Use", [_USES[role]], target, condition | bound))
    if role != "open":
        look = _OPERATE if role == "operate" else _LOOK
        statements.append(_statement("Look", look, target, condition))
    if role == "operate" and principal is None:
        statements += _makes_keys(settings, native)
    return json.dumps({"Version": "2012-10-17", "Statement": statements}, indent=2) + "\n"


def _statement(
    name: str, actions: list[str], target: dict[str, Any], condition: dict[str, Any]
) -> dict[str, Any]:
    statement = {"Sid": f"Keymgmt{name}", "Effect": "Allow", "Action": actions, **target}
    return statement | ({"Condition": condition} if condition else {})


def _bound(settings: AwsSettings) -> dict[str, Any]:
    pairs = {f"kms:EncryptionContext:{name}": value for name, value in settings.context.items()}
    present = {"Null": {f"kms:EncryptionContext:{CONTEXT}": "false"}}
    return present | ({"StringEquals": pairs} if pairs else {})


def _makes_keys(settings: AwsSettings, native: str) -> list[dict[str, Any]]:
    """Creating keys (which have no ARN yet), giving them our prefix, and operating such keys."""
    ours, anything = f"alias/{settings.alias_prefix}*", {"Resource": "*"}
    keys = _keys_of(settings, native, "*")
    named = {"Resource": [keys.removesuffix("key/*") + ours, keys]}
    condition = {"ForAnyValue:StringLike": {"kms:ResourceAliases": ours}}
    return [
        _statement("Make", ["kms:CreateKey", "kms:ListAliases"], anything, {}),
        _statement("Name", ["kms:CreateAlias"], named, {}),
        _statement("Ours", _OPERATE, {"Resource": keys}, condition),
    ]


def _keys_of(settings: AwsSettings, native: str, account: str) -> str:
    """The ARN of all keys of an account in the region, in the partition of ``native``."""
    from botocore.exceptions import UnknownRegionError

    region, parts = settings.region, native.split(":")
    try:
        known = parts[1] if parts[0] == "arn" else None
        partition = known or new_session(settings, print).get_partition_for_region(region)
    except UnknownRegionError as error:
        raise ConfigError(
            f"the AWS partition of the region {region} is not known",
            hint="write the key's ARN in the config, or install a newer botocore",
        ) from error
    return f"arn:{partition}:kms:{region}:{account}:key/*"
