"""What ``load`` returns: it is used like OpenVINO's own object, and ends with its memory wiped."""

from __future__ import annotations

import os
import sys
import weakref
from typing import TYPE_CHECKING, Any, NoReturn, Self

import openvino as ov

from keymgmt.errors import KeymgmtError, ModelInUse
from keymgmt_openvino._memory import Memory, release

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

__all__ = ["LoadedModel", "Owner"]


class _Compiled(ov.CompiledModel):  # type: ignore[misc]
    """A CompiledModel that remembers its requests, so that an error can name what still lives."""

    def __init__(self, other: ov.CompiledModel) -> None:
        super().__init__(other)
        self.made: weakref.WeakSet[ov.InferRequest] = weakref.WeakSet()

    def create_infer_request(self) -> ov.InferRequest:
        request = super().create_infer_request()
        self.made.add(request)
        return request


class Owner:
    """An OpenVINO object and the memory that it reads from.

    ``close()``, or leaving the ``with`` block, wipes the memory; so does the end of the last thing
    that uses it, if that is later. Not for use in a process forked after loading: OpenVINO's
    threads do not survive a fork.

    Attributes:
        name: name of the model, verified.
        locked: whether all of its weights are kept from swap.
    """

    def __init__(self, name: str, inner: Any, memories: Sequence[Memory]) -> None:
        """Take over ``memories``, the storage that ``inner`` reads."""
        self.name = name
        self.locked = bool(memories) and all(memory.locked for memory in memories)
        self._inner: Any = inner
        # Compiling may leave nobody who reads it: f16 weights were expanded to f32, say.
        for memory in memories:
            if not memory.in_use():
                release(memory)
        self._memories = tuple(memory for memory in memories if not memory.gone)
        self._process = os.getpid()
        for memory in self._memories:
            # Where nobody calls close(); what is still in use then is wiped when it ends.
            weakref.finalize(self, release, memory).atexit = False

    def _use(self) -> Any:
        """The OpenVINO object; raises where it must not be used."""
        if self._process != os.getpid():
            raise KeymgmtError(
                f"{self.name} was loaded before this process was forked",
                hint="load the model in the process that uses it",
            )
        if self._inner is None:
            raise ValueError(f"{self.name} is closed")
        return self._inner

    def _users(self) -> str:
        """What was made from it and may still be alive, for the error that says so."""
        return ""

    def close(self) -> None:
        """End the model and wipe its weights; may be called again.

        Raises:
            ModelInUse: something made from it is still alive, or a call of another thread is
                running. It stays right; the weights are wiped when the last of them is gone.
        """
        users = self._users() if self._inner is not None else ""
        self._inner = None
        for memory in self._memories:
            release(memory)
        if any(memory.in_use() for memory in self._memories):
            raise ModelInUse(
                f"{self.name} is still in use: {users or 'something made from it'}",
                hint="drop all that was made from it, then close it; until then its weights stay "
                "in memory, and they are wiped when the last of it is gone",
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except ModelInUse as in_use:
            # The frames of the error on its way may hold the request; it is the news, not this.
            if error is None:
                raise
            error.add_note(str(in_use))

    def __repr__(self) -> str:
        closed = ", closed" if self._inner is None else ""
        return f"<{type(self).__name__} {self.name!r}{closed}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a loaded model is not pickled: load it in each process")


class LoadedModel(Owner):
    """A sealed model, opened in memory and compiled; call it like an ``openvino.CompiledModel``.

    A request made from it stays right for as long as it is held.
    """

    def __init__(self, name: str, compiled: ov.CompiledModel, memories: Sequence[Memory]) -> None:
        """Take over ``memories``, the storage of the weights; none where OpenVINO copied them."""
        super().__init__(name, _Compiled(compiled), memories)

    @property
    def compiled(self) -> ov.CompiledModel:
        """The CompiledModel inside. Whatever is made from it delays the wipe until it is gone."""
        return self._use()

    @property
    def inputs(self) -> list[ov.ConstOutput]:
        """Inputs of the model, as ``CompiledModel.inputs``."""
        return list(self.compiled.inputs)

    @property
    def outputs(self) -> list[ov.ConstOutput]:
        """Outputs of the model, as ``CompiledModel.outputs``."""
        return list(self.compiled.outputs)

    def create_infer_request(self) -> ov.InferRequest:
        """Make a request; while it is held, ``close()`` raises and the weights stay."""
        return self.compiled.create_infer_request()

    def __call__(
        self,
        inputs: Any = None,
        share_inputs: bool = False,
        share_outputs: bool = False,
        *,
        decode_strings: bool = True,
    ) -> Any:
        """Infer, one call at a time; arguments and results as of ``CompiledModel.__call__``.

        Inputs are copied unless ``share_inputs``: with shared inputs and a dynamic shape, OpenVINO
        2026.4 lets a later request write into the caller's array.
        """
        return self.compiled(inputs, share_inputs, share_outputs, decode_strings=decode_strings)

    def _users(self) -> str:
        own = self._inner._infer_request
        requests = sum(request is not own for request in self._inner.made)
        found = [f"{requests} inference request{'s' * (requests != 1)}"] if requests else []
        # One reference is this object's, one is the argument's.
        if sys.getrefcount(self._inner) > 2:
            found.append("the compiled model")
        return " and ".join(found)
