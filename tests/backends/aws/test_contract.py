"""AwsProvider keeps the contract of every provider: on moto, and on the simulation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from bits import flipped
from patience import PatientContract

from keymgmt.backend import UnwrapFailed
from keymgmt.testing import Hook, ProviderFactory

REGION = "eu-central-1"
SecretFile = Callable[[str], dict[str, str]]


def factory(address: str, auth: dict[str, Any], limit: float, **more: Any) -> ProviderFactory:
    from keymgmt_aws import AwsProvider, AwsSettings

    settings = AwsSettings.model_validate(
        {"region": REGION, "endpoint": address, "sts_endpoint": address, "auth": auth}
        | {"timeout": limit, "call_timeout": limit / 2, "context": {"fleet": "press-17"}}
        | more
    )
    return lambda: AwsProvider("cloud", settings)


class TestOnMoto(PatientContract):
    """Symmetric keys, by their ARN; moto has no RSA decryption, no digests and no ML-DSA."""

    @pytest.fixture
    def arns(self, moto) -> list[str]:
        # AWS would say that itself; moto repeats what it was told.
        usual = {"KeyUsage": "ENCRYPT_DECRYPT", "KeySpec": "SYMMETRIC_DEFAULT"}
        made = [moto.client().create_key(**usual) for _ in range(2)]
        return [one["KeyMetadata"]["Arn"] for one in made]

    @pytest.fixture
    def provider_factory(
        self,
        moto,
        arns,
        secret_file,
        monkeypatch,
        time_limit,
    ) -> ProviderFactory:
        from keymgmt_aws import AwsProvider

        monkeypatch.setattr(AwsProvider, "key_kinds", {"symmetric": "wrap"})
        auth = {"method": "static", "access_key_id": secret_file("AKIATESTSTESTS")}
        auth["secret_access_key"] = secret_file("the-secret-of-the-tests")
        keys = dict(zip(("model", "other"), ({"arn": arn} for arn in arns), strict=True))
        return factory(moto.address, auth, time_limit, keys=keys)

    @pytest.fixture
    def other_wrap_key(self) -> str:
        return "other"

    @pytest.fixture
    def recipient_key(self) -> str:
        pytest.skip("moto does not decrypt with RSA keys: see TestSimulated")

    # Moto denies where AWS says IncorrectKey, and decrypts with a key that is pending deletion.
    test_blob_of_another_key = test_deletion = None

    def test_damaged_blob(self, provider, dek):
        """What moto does not take for another key's blob; the rest is for TestSimulated."""
        wrapped = provider.wrap("model", dek, b"c")
        for place in (40, 60, 95):  # the nonce, the tag, the ciphertext
            with pytest.raises(UnwrapFailed):
                provider.unwrap(replace(wrapped, blob=flipped(wrapped.blob, place)), b"c")
        provider.unwrap(wrapped, b"c").wipe()

    @pytest.fixture
    def hang_service(self, moto) -> Hook:
        return moto.stop

    @pytest.fixture
    def heal_service(self, moto) -> Hook:
        return moto.go_on

    @pytest.fixture
    def place_values(self, moto) -> list[str]:
        return [str(moto.port), "127.0.0.1", "123456789012", REGION]


class TestSimulated(PatientContract):
    """All kinds of keys, by alias, with an assumed role whose sessions end."""

    @pytest.fixture
    def auth(self, kms, secret_file) -> dict[str, Any]:
        name, secret = kms.user
        source = {"method": "static", "access_key_id": secret_file(name)}
        source["secret_access_key"] = secret_file(secret)
        return {"method": "role", "role_arn": "arn:aws:iam::111122223333:role/opener"} | {
            "source": source
        }

    @pytest.fixture
    def provider_factory(self, kms, auth, time_limit) -> ProviderFactory:
        kms.make("model")
        return factory(kms.address, auth, time_limit)

    @pytest.fixture
    def recipient_key(self, kms) -> str:
        kms.make("rsa", "RSA_2048")
        return "rsa"

    @pytest.fixture
    def denied_factory(self, kms, auth, secret_file) -> Any:
        wrong = {"secret_access_key": secret_file("not-the-secret-of-this-user")}
        return factory(kms.address, auth["source"] | wrong, 20.0)

    @pytest.fixture
    def break_service(self, kms) -> Hook:
        return kms.close

    @pytest.fixture
    def hang_service(self, kms) -> Hook:
        return kms.hang

    @pytest.fixture
    def heal_service(self, kms) -> Iterator[Hook]:
        return kms.reopen

    @pytest.fixture
    def expire_login(self, kms) -> Hook:
        return kms.expire

    @pytest.fixture
    def secret_values(self, kms, provider_factory) -> list[bytes]:
        return [kms.user[1].encode()]

    @pytest.fixture
    def place_values(self, kms) -> list[str]:
        return [str(kms.port), "127.0.0.1", "111122223333", REGION]
