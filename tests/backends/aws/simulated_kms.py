"""A simulation of AWS KMS and STS: a server on loopback with the documented answers.

Written from the API references (AWS KMS: Encrypt, Decrypt, Sign, "Key states", "Common errors";
STS: AssumeRole, AssumeRoleWithWebIdentity, GetCallerIdentity). Keys, ciphertexts and signatures
are real ones of ``cryptography``; request signatures are checked (Signature Version 4); policies
and grants are functions that a test gives. It is no AWS, and what ran on it did not run there.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import hmac
import json
import os
import secrets
import ssl
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs
from xml.sax.saxutils import escape

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, mldsa, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from webserver import Seen, Web, reply, start_web

ACCOUNT = "111122223333"


@functools.cache
def rsa_key(bits: int) -> rsa.RSAPrivateKey:
    """The one key of a size that all simulations of this process have: making one takes long."""
    return rsa.generate_private_key(65537, bits)


_MAKE: dict[str, Callable[[], Any]] = {
    "SYMMETRIC_DEFAULT": lambda: AESGCM(os.urandom(32)),
    **{f"RSA_{bits}": functools.partial(rsa_key, bits) for bits in (2048, 3072, 4096)},
    "ECC_NIST_P256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "ECC_NIST_P384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "ML_DSA_65": mldsa.MLDSA65PrivateKey.generate,
    "ML_DSA_87": mldsa.MLDSA87PrivateKey.generate,
    "HMAC_256": lambda: None,
}
_OAEP = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)


class Refusal(Exception):
    """An error as AWS words it."""

    def __init__(self, code: str, words: str = "", status: int = 400) -> None:
        super().__init__(code)
        self.code, self.words, self.status = code, words, status


@dataclass
class Key:
    """A key, and its older material, which AWS keeps after a rotation."""

    arn: str
    spec: str
    usage: str
    material: list[Any]
    multi_region: bool = False
    state: str = "Enabled"
    deletion: float | None = None
    replicas: list[str] = field(default_factory=list)
    is_replica: bool = False
    created: float = field(default_factory=time.time)

    @property
    def id(self) -> str:
        return self.arn.rpartition("/")[2]


Hook = Callable[[str, dict[str, Any], str], Any]


class Simulated:
    """The service: ``address``, its keys and aliases, and switches for its bad days.

    ``deny`` is the policies: it is given operation, request and who asks, and returns why not.
    ``before`` may answer in the service's place: (status, headers, body), or False to hang up.
    """

    def __init__(self, region: str, tls: ssl.SSLContext | None = None) -> None:
        self.region, self.tls = region, tls
        self.keys: dict[str, Key] = {}
        self.aliases: dict[str, str] = {}
        self.user = ("AKIA" + secrets.token_hex(8).upper(), secrets.token_urlsafe(30))
        self.sessions: dict[str, tuple[str, str, float]] = {}
        self.trust: Callable[[dict[str, str]], bool] = lambda request: True
        self.deny: Hook = lambda operation, request, who: None
        self.before: Hook = lambda operation, request, who: None
        self.seen: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.clock = 0.0
        self.session_seconds = 3600.0
        self.page = 50
        self._webs: list[Web] = []
        self._answering = threading.Event()
        self._answering.set()
        self.port = 0
        self.open()

    # The server.

    def open(self) -> None:
        web, self.server = start_web(self._reply, tls=self.tls, port=self.port)
        self._webs.append(web)
        self.port, self.address = self.server.server_port, web.url

    @property
    def connections(self) -> int:
        return sum(web.connections for web in self._webs)

    def _reply(self, request: Seen, handler: Any) -> bool | None:
        if self.server is not handler.server:
            return False
        self._answering.wait(30)
        answer = self.answer(dict(handler.headers.items()), request.body)
        if answer is False:
            return False
        status, headers, content = answer
        reply(handler, status, content, **headers)
        return None

    def close(self) -> None:
        """Go away: connections that are open get no further answer."""
        server, self.server = self.server, None
        if server is not None:
            server.shutdown()
            server.server_close()
        self._answering.set()

    def reopen(self) -> None:
        self._answering.set()
        if self.server is None:
            self.open()

    def hang(self) -> None:
        self._answering.clear()

    def answer(self, headers: dict[str, str], body: bytes) -> Any:
        target = headers.get("X-Amz-Target", "")
        if target:
            operation, request = target.partition(".")[2], json.loads(body)
        else:
            request = {name: values[0] for name, values in parse_qs(body.decode()).items()}
            operation = request.get("Action", "")
        self.seen.append((operation, request, headers))
        try:
            who = "" if operation == "AssumeRoleWithWebIdentity" else self._who(headers, body)
            mine = self.before(operation, request, who)
            if mine is not None:
                return mine
            if target:
                self._permit(operation, request, who)
            result = getattr(self, f"_{operation}")(request, who)
        except Refusal as refusal:
            return self._refused(target, refusal)
        if target:
            return 200, {"Content-Type": "application/x-amz-json-1.1"}, json.dumps(result).encode()
        inner = "".join(_xml(name, value) for name, value in result.items())
        text = f"<{operation}Result>{inner}</{operation}Result>"
        text = f"<{operation}Response>{text}</{operation}Response>"
        return 200, {"Content-Type": "text/xml"}, text.encode()

    def _permit(self, operation: str, request: dict[str, Any], who: str) -> None:
        if why := self.deny(operation, request, who):
            raise Refusal(
                "AccessDeniedException",
                f"User: {who} is not authorized to perform: kms:{operation} on resource: "
                f"{request.get('KeyId', '*')} because {why}",
            )

    @staticmethod
    def _refused(target: str, refusal: Refusal) -> Any:
        if target:
            content = {"__type": refusal.code, "message": refusal.words}
            kind = "application/x-amz-json-1.1"
            return refusal.status, {"Content-Type": kind}, json.dumps(content).encode()
        text = _xml("Error", {"Code": refusal.code, "Message": refusal.words})
        content = f"<ErrorResponse>{text}</ErrorResponse>".encode()
        return refusal.status, {"Content-Type": "text/xml"}, content

    # Who asks (Signature Version 4).

    def _who(self, headers: dict[str, str], body: bytes) -> str:
        scheme, _, rest = headers.get("Authorization", "").partition(" ")
        if scheme != "AWS4-HMAC-SHA256":
            raise Refusal("MissingAuthenticationTokenException", "Request is missing a token")
        parts = dict(part.split("=", 1) for part in rest.replace(" ", "").split(","))
        name, day, region, service, _ = parts["Credential"].split("/")
        secret, who = self._secret(name, headers.get("X-Amz-Security-Token"))
        if region != self.region:
            raise Refusal(
                "InvalidSignatureException", "Credential should be scoped to a valid region."
            )
        signed = parts["SignedHeaders"].split(";")
        lower = {key.lower(): value.strip() for key, value in headers.items()}
        lines = ["POST", "/", "", *(f"{key}:{lower[key]}" for key in signed), "", ";".join(signed)]
        canonical = "\n".join((*lines, hashlib.sha256(body).hexdigest()))
        scope = f"{day}/{region}/{service}/aws4_request"
        digest = hashlib.sha256(canonical.encode()).hexdigest()
        text = "\n".join(("AWS4-HMAC-SHA256", lower["x-amz-date"], scope, digest))
        key = f"AWS4{secret}".encode()
        for part in scope.split("/"):
            key = hmac.digest(key, part.encode(), "sha256")
        if hmac.digest(key, text.encode(), "sha256").hex() != parts["Signature"]:
            raise Refusal("InvalidSignatureException", "The request signature does not match")
        sent = time.strptime(lower["x-amz-date"], "%Y%m%dT%H%M%SZ")
        if abs(time.mktime(sent) - time.timezone - time.time() - self.clock) > 300:
            raise Refusal(
                "InvalidSignatureException",
                f"Signature expired: {lower['x-amz-date']} is now earlier than ... (... - 5 min.)",
            )
        return who

    def _secret(self, name: str, token: str | None) -> tuple[str, str]:
        if token is None and name == self.user[0]:
            return self.user[1], f"arn:aws:iam::{ACCOUNT}:user/tests"
        found = self.sessions.get(name)
        if found is None or token is None or found[0] != token.partition(" ")[0]:
            raise Refusal(
                "UnrecognizedClientException",
                "The security token included in the request is invalid.",
            )
        if found[2] < time.time():
            raise Refusal(
                "ExpiredTokenException", "The security token included in the request is expired"
            )
        return found[0] + "secret", found[1]

    def session(self, who: str) -> dict[str, Any]:
        """New temporary credentials."""
        name, token = "ASIA" + secrets.token_hex(8).upper(), secrets.token_urlsafe(24)
        ends = time.time() + self.session_seconds
        self.sessions[name] = (token, f"arn:aws:sts::{ACCOUNT}:assumed-role/{who}", ends)
        return {
            "AccessKeyId": name,
            "SecretAccessKey": token + "secret",
            "SessionToken": token,
            "Expiration": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(ends)),
        }

    def called(self, operation: str) -> int:
        """How often an operation was asked for."""
        return sum(one == operation for one, _, _ in self.seen)

    def expire(self) -> None:
        """End every session, as AWS would much later."""
        self.sessions = {n: (t, w, 0.0) for n, (t, w, _) in self.sessions.items()}

    def _GetCallerIdentity(self, request: dict[str, Any], who: str) -> Any:  # noqa: N802
        return {"Arn": who, "Account": ACCOUNT, "UserId": "AIDA"}

    def _AssumeRole(self, request: dict[str, Any], who: str) -> Any:  # noqa: N802
        if not self.trust(request):
            raise Refusal(
                "AccessDenied",
                f"User: {who} is not authorized to perform: sts:AssumeRole on resource: "
                f"{request['RoleArn']}",
                403,
            )
        role = request["RoleArn"].rpartition("/")[2]
        return {"Credentials": self.session(f"{role}/{request['RoleSessionName']}")}

    def _AssumeRoleWithWebIdentity(self, request: dict[str, Any], who: str) -> Any:  # noqa: N802
        if not self.trust(request):
            raise Refusal("InvalidIdentityToken", "The ID Token provided is not a valid JWT.")
        return self._AssumeRole(request, who)

    # AWS KMS.

    def make(
        self, name: str = "", spec: str = "SYMMETRIC_DEFAULT", usage: str = "", **more: Any
    ) -> Key:
        """A key, with the alias ``alias/keymgmt/NAME`` where a name is given."""
        usage = usage or ("SIGN_VERIFY" if spec[:2] in ("EC", "ML") else "ENCRYPT_DECRYPT")
        number = secrets.token_hex(16)
        plain = "-".join(number[a:b] for a, b in ((0, 8), (8, 12), (12, 16), (16, 20), (20, 32)))
        key_id = f"mrk-{number}" if more.get("multi_region") else plain
        arn = f"arn:aws:kms:{self.region}:{ACCOUNT}:key/{key_id}"
        key = self.keys[key_id] = Key(arn, spec, usage, [_MAKE[spec]()], **more)
        if name:
            self.aliases[f"alias/keymgmt/{name}"] = key_id
        return key

    def replicate(self, key: Key, other: Simulated) -> Key:
        """A replica in another region: the same id and material."""
        arn = key.arn.replace(self.region, other.region)
        made = Key(arn, key.spec, key.usage, key.material, multi_region=True, is_replica=True)
        other.keys[made.id] = made
        # Each of them knows all.
        made.replicas = key.replicas
        key.replicas.append(other.region)
        return made

    def _find(self, request: dict[str, Any]) -> Key:
        name = str(request["KeyId"])
        if name.startswith("arn:"):
            if name.split(":")[3] != self.region:
                raise Refusal("NotFoundException", f"Invalid arn {name.split(':')[3]}")
            name = name.split(":", 5)[5].removeprefix("key/")
        if name.startswith("alias/"):
            if name not in self.aliases:
                raise Refusal("NotFoundException", f"Alias {name} is not found.")
            name = self.aliases[name]
        if name not in self.keys:
            raise Refusal("NotFoundException", f"Key '{name}' does not exist")
        return self.keys[name]

    def _usable(self, request: dict[str, Any], usage: str, algorithm: str = "") -> Key:
        key = self._find(request)
        if key.state == "Disabled":
            raise Refusal("DisabledException", f"{key.arn} is disabled.")
        if key.state != "Enabled":
            words = "pending deletion" if key.state == "PendingDeletion" else "pending import"
            raise Refusal("KMSInvalidStateException", f"{key.arn} is {words}.")
        symmetric = key.spec == "SYMMETRIC_DEFAULT"
        if key.usage != usage or symmetric != (algorithm in ("", "SYMMETRIC_DEFAULT")):
            raise Refusal(
                "InvalidKeyUsageException", f"{key.arn} key usage is {key.usage} which is not valid"
            )
        return key

    def _DescribeKey(self, request: dict[str, Any], who: str) -> Any:  # noqa: N802
        key = self._find(request)
        data = {
            "KeyId": key.id,
            "Arn": key.arn,
            "CreationDate": key.created,
            "Enabled": key.state == "Enabled",
            "KeyState": key.state,
            "KeySpec": key.spec,
            "KeyUsage": key.usage,
            "Origin": "AWS_KMS",
            "MultiRegion": key.multi_region,
        }
        if key.multi_region:
            there = [{"Region": region} for region in key.replicas]
            data["MultiRegionConfiguration"] = {
                "MultiRegionKeyType": "REPLICA" if key.is_replica else "PRIMARY",
                "ReplicaKeys": there,
            }
        if key.deletion:
            data["DeletionDate"] = key.deletion
        return {"KeyMetadata": data}

    def _CreateKey(self, request: dict[str, Any], who: str) -> Any:  # noqa: N802
        if request["KeySpec"] not in _MAKE:
            raise Refusal("ValidationException", "1 validation error detected")
        key = self.make(
            "", request["KeySpec"], request["KeyUsage"], multi_region=request["MultiRegion"]
        )
        return self._DescribeKey({"KeyId": key.id}, who)

    def _CreateAlias(self, request: dict[str, Any], who: str) -> Any:  # noqa: N802
        if request["AliasName"] in self.aliases:
            raise Refusal("AlreadyExistsException", "An alias with that name already exists")
        self.aliases[request["AliasName"]] = self._find({"KeyId": request["TargetKeyId"]}).id
        return {}

    def _ListAliases(self, request: dict[str, Any], who: str) -> Any:  # noqa: N802
        names = sorted({**self.aliases, "alias/aws/s3": ""})
        start = int(request.get("Marker", 0))
        page = [{"AliasName": name} for name in names[start : start + self.page]]
        more = start + self.page < len(names)
        return {"Aliases": page, "Truncated": more} | (
            {"NextMarker": str(start + self.page)} if more else {}
        )

    def _RotateKeyOnDemand(self, request: dict[str, Any], who: str) -> Any:  # noqa: N802
        key = self._usable(request, "ENCRYPT_DECRYPT")
        if str(request["KeyId"]).startswith("alias/"):
            raise Refusal("NotFoundException", "Invalid keyId")
        if len(key.material) > 10:
            raise Refusal("LimitExceededException", "too many rotations of this key on demand")
        key.material.append(_MAKE[key.spec]())
        return {"KeyId": key.id}

    def _ScheduleKeyDeletion(self, request: dict[str, Any], who: str) -> Any:  # noqa: N802
        key = self._find(request)
        if str(request["KeyId"]).startswith("alias/"):
            raise Refusal("NotFoundException", "Invalid keyId")
        if key.state == "PendingDeletion":
            raise Refusal("KMSInvalidStateException", f"{key.arn} is pending deletion.")
        key.state = "PendingDeletion"
        key.deletion = time.time() + 86400 * int(request["PendingWindowInDays"])
        return {"KeyId": key.arn, "DeletionDate": key.deletion, "KeyState": key.state}

    @staticmethod
    def _bound(key: Key, request: dict[str, Any]) -> bytes:
        return json.dumps(
            [key.id, sorted((request.get("EncryptionContext") or {}).items())]
        ).encode()

    def _Encrypt(self, request: dict[str, Any], who: str) -> Any:  # noqa: N802
        key = self._usable(request, "ENCRYPT_DECRYPT", request.get("EncryptionAlgorithm", ""))
        plain = base64.b64decode(request["Plaintext"])
        number, nonce = len(key.material) - 1, os.urandom(12)
        sealed = key.material[number].encrypt(nonce, plain, self._bound(key, request))
        blob = b"\1" + struct.pack(">40sI", key.id.encode(), number) + nonce + sealed
        return {"CiphertextBlob": base64.b64encode(blob).decode(), "KeyId": key.arn}

    def _Decrypt(self, request: dict[str, Any], who: str) -> Any:  # noqa: N802
        algorithm = request.get("EncryptionAlgorithm", "")
        key = self._usable(request, "ENCRYPT_DECRYPT", algorithm)
        blob = base64.b64decode(request["CiphertextBlob"])
        if not 1 <= len(blob) <= 6144:
            raise Refusal("ValidationException", "1 validation error detected")
        if algorithm and request.get("EncryptionContext"):
            raise Refusal("ValidationException", "Encryption context is not supported")
        try:
            if algorithm:
                plain = key.material[0].decrypt(blob, _OAEP)
            else:
                name, number = struct.unpack(">40sI", blob[1:45])
                owner = self.keys[name.rstrip(b"\0").decode()] if blob[:1] == b"\1" else None
                self._check_owner(owner, key)
                material = key.material[number]
                plain = material.decrypt(blob[45:57], blob[57:], self._bound(key, request))
        except (LookupError, ValueError, InvalidTag, struct.error):
            raise Refusal("InvalidCiphertextException") from None
        return {"Plaintext": base64.b64encode(plain).decode(), "KeyId": key.arn}

    @staticmethod
    def _check_owner(owner: Key | None, key: Key) -> None:
        if owner is None:
            raise Refusal("InvalidCiphertextException")
        if owner is not key:
            raise Refusal("IncorrectKeyException", "The key ID in the request is of another key")

    def _GetPublicKey(self, request: dict[str, Any], who: str) -> Any:  # noqa: N802
        key = self._find(request)
        if key.spec == "SYMMETRIC_DEFAULT":
            raise Refusal("UnsupportedOperationException", "the key is symmetric")
        der = (
            key.material[0]
            .public_key()
            .public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        )
        return {"KeyId": key.arn, "PublicKey": base64.b64encode(der).decode()}

    def _Sign(self, request: dict[str, Any], who: str) -> Any:  # noqa: N802
        key = self._usable(request, "SIGN_VERIFY", "asymmetric")
        message = base64.b64decode(request["Message"])
        wanted = (request["MessageType"], request["SigningAlgorithm"], len(message))
        private = key.material[0]
        if key.spec.startswith("ML_DSA") and wanted == ("EXTERNAL_MU", "ML_DSA_SHAKE_256", 64):
            signature = private.sign_mu(message)
        elif key.spec.startswith("RSA") and wanted == ("DIGEST", "RSASSA_PSS_SHA_256", 32):
            pss = padding.PSS(padding.MGF1(hashes.SHA256()), 32)
            signature = private.sign(message, pss, Prehashed(hashes.SHA256()))
        elif key.spec == "ECC_NIST_P256" and wanted == ("DIGEST", "ECDSA_SHA_256", 32):
            signature = private.sign(message, ec.ECDSA(Prehashed(hashes.SHA256())))
        elif key.spec == "ECC_NIST_P384" and wanted == ("DIGEST", "ECDSA_SHA_384", 48):
            signature = private.sign(message, ec.ECDSA(Prehashed(hashes.SHA384())))
        else:
            raise Refusal("ValidationException", f"Algorithm {wanted} and key spec do not fit")
        return {"KeyId": key.arn, "Signature": base64.b64encode(signature).decode()}


def _xml(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return f"<{name}>{''.join(_xml(each, one) for each, one in value.items())}</{name}>"
    return f"<{name}>{escape(str(value))}</{name}>"
