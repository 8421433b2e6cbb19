"""The policies of each kind of evidence, as a config writes them."""

from __future__ import annotations

from typing import Annotated, Final, Literal, Self

from keymgmt_tpm2.quote import DevicePolicy
from pydantic import AfterValidator, Field, StringConstraints, model_validator

from keymgmt.backend import Settings

__all__ = ["AnyPolicy", "PlatformPolicy", "SgxPolicy", "TdxPolicy", "TpmPolicy"]


def _hex(digits: int) -> AfterValidator:
    def check(text: str) -> str:
        if len(text) != digits or not set(text) <= set("0123456789abcdef"):
            raise ValueError(f"write {digits} hex digits, in lower case; these are {len(text)}")
        return text

    return AfterValidator(check)


Hash256 = Annotated[str, _hex(64)]
Hash384 = Annotated[str, _hex(96)]
Advisory = Annotated[str, StringConstraints(pattern=r"^INTEL-SA-[0-9]{5}$")]
Word16 = Annotated[int, Field(ge=0, lt=1 << 16)]
State = Literal[
    "UpToDate",
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
]
Flag = Literal["smt", "dynamic_platform", "cached_keys"]
RTMRS: Final = ("rtmr0", "rtmr1", "rtmr2", "rtmr3")


class PlatformPolicy(Settings):
    """Which platforms of Intel's are good enough, whatever runs on them.

    Attributes:
        tcb: which states of the platform's TCB are accepted. A revoked one never is.
        advisories: advisories that the state may have where it is not ``UpToDate``; each of them
            was read and accepted. One that is not listed refuses.
        refuse: what a platform must not have: ``smt`` (hyper-threading), ``dynamic_platform``
            (packages may be added), ``cached_keys`` (its keys are kept by Intel's registration
            service). A platform whose certificate does not say is refused as well.
        evaluation: the least number of Intel's TCB evaluation that the collateral is of.
    """

    tcb: Annotated[tuple[State, ...], Field(min_length=1, strict=False)] = ("UpToDate",)
    advisories: list[Advisory] = Field(default_factory=list)
    refuse: list[Flag] = Field(default_factory=list)
    evaluation: Annotated[int, Field(ge=0, lt=1 << 31)] = 0


class SgxPolicy(PlatformPolicy):
    """Which SGX enclaves are wanted: by their code, or by who signed them. Never a debug enclave.

    Attributes:
        evidence: ``"sgx"``.
        mrenclave: measurements of enclaves, in hex, of which one is wanted.
        mrsigner: the hash of a signer's key, in hex, in place of ``mrenclave``; with ``product``
            and ``minimum_svn``.
        product: the signer's number of the product.
        minimum_svn: the least security version of it.
    """

    evidence: Literal["sgx"]
    mrenclave: list[Hash256] = Field(default_factory=list)
    mrsigner: Hash256 | None = None
    product: Word16 | None = None
    minimum_svn: Word16 | None = None

    @model_validator(mode="after")
    def _says_which(self) -> Self:
        if bool(self.mrenclave) == (self.mrsigner is not None):
            raise ValueError("write which enclaves are wanted: mrenclave, or else mrsigner")
        signed = {value is None for value in (self.mrsigner, self.product, self.minimum_svn)}
        if len(signed) > 1:
            raise ValueError("mrsigner, product and minimum_svn belong together")
        return self


class TdxPolicy(PlatformPolicy):
    """Which TDX guests are wanted. Never one that can be debugged or migrated.

    Attributes:
        evidence: ``"tdx"``.
        mr_td: measurements of the guest's firmware, in hex, of which one is wanted.
        rtmr0: values of RTMR 0, in hex, of which one is wanted: the firmware's configuration.
        rtmr1: the same for RTMR 1: what the firmware started, such as the kernel.
        rtmr2: the same for RTMR 2: the kernel's command line and initial file system.
        rtmr3: the same for RTMR 3: what the guest measures itself.
        firmware_only: ``true``: no RTMR is asked for, so that the firmware is proved, and nothing
            of what it started.
        attributes: the guest's attributes, 8 bytes in hex, of which one is wanted; any without it.
        mr_seam: measurements of TDX modules, in hex, of which one is wanted; without it all that
            the collateral knows.
    """

    evidence: Literal["tdx"]
    mr_td: Annotated[list[Hash384], Field(min_length=1)]
    rtmr0: list[Hash384] = Field(default_factory=list)
    rtmr1: list[Hash384] = Field(default_factory=list)
    rtmr2: list[Hash384] = Field(default_factory=list)
    rtmr3: list[Hash384] = Field(default_factory=list)
    firmware_only: bool = False
    attributes: list[Annotated[str, _hex(16)]] = Field(default_factory=list)
    mr_seam: list[Hash384] = Field(default_factory=list)

    @model_validator(mode="after")
    def _says_which(self) -> Self:
        # What the firmware started can write any value into RTMR 2 and 3.
        if bool(self.rtmr1) == self.firmware_only:
            raise ValueError(
                "write what the guest's firmware started, rtmr1 and rtmr2; or else "
                "firmware_only = true: without rtmr1, any kernel can give the other RTMRs the "
                "values that the policy lists"
            )
        if self.firmware_only and (self.rtmr2 or self.rtmr3):
            raise ValueError(
                "firmware_only = true proves nothing of what the firmware started, which writes "
                "rtmr2 and rtmr3: name rtmr1 too, or take them out"
            )
        return self


class TpmPolicy(DevicePolicy):
    """Which devices with a TPM are wanted, and in which boot state.

    Attributes:
        evidence: ``"tpm2"``.
    """

    evidence: Literal["tpm2"]


AnyPolicy = Annotated[SgxPolicy | TdxPolicy | TpmPolicy, Field(discriminator="evidence")]
"""A policy of any kind of evidence; the member ``evidence`` says which."""
