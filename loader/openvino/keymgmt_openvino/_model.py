"""What ``load`` returns: it is used like OpenVINO's own object, and ends with its memory wiped."""

from __future__ import annotations

import logging
import os
import weakref
from typing import TYPE_CHECKING, Any, NoReturn, Self

import openvino as ov

from keymgmt.errors import KeymgmtError, ModelInUse
from keymgmt_openvino._memory import Memory, release

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["LoadedModel", "Owner"]

log = logging.getLogger("keymgmt.openvino")


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
        """What was made from it and is still alive, for the message that says so."""
        return ""

    def close(self, *, strict: bool = False) -> None:
        """End the model and wipe its weights; may be called again.

        Whatever was made from it and is still held, a request, an output, a queue, stays right. The
        weights are wiped when the last of that is gone, and the log says that they wait.

        Args:
            strict: raise instead of saying so.

        Raises:
            ModelInUse: with ``strict``; the weights are wiped all the same when nobody is left.
        """
        self._inner = None
        for memory in self._memories:
            release(memory)
        if not any(memory.in_use() for memory in self._memories):
            return
        users = f"{self.name} is still in use: {self._users() or 'something made from it'}"
        if strict:
            raise ModelInUse(
                users,
                hint="drop all that was made from it, then close it; until then its weights stay "
                "in memory, and they are wiped when the last of it is gone",
            )
        log.warning("%s; its weights are wiped when that is gone", users)

    def __getattr__(self, name: str) -> Any:
        """Everything else is that of the OpenVINO object."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._use(), name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        closed = ", closed" if self._inner is None else ""
        return f"<{type(self).__name__} {self.name!r}{closed}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a loaded model is not pickled: load it in each process")


class LoadedModel(Owner):
    """A sealed model, opened in memory and compiled; it is used like an ``openvino.CompiledModel``.

    All methods are there, and ``openvino.AsyncInferQueue`` takes it. A request made from it stays
    right for as long as it is held.
    """

    # What editors and type checkers know of a CompiledModel; it answers itself, as to all else.
    inputs: list[ov.ConstOutput]
    outputs: list[ov.ConstOutput]
    input: Callable[..., ov.ConstOutput]
    output: Callable[..., ov.ConstOutput]
    create_infer_request: Callable[[], ov.InferRequest]
    infer_new_request: Callable[..., dict[ov.ConstOutput, Any]]
    get_property: Callable[[str], Any]
    set_property: Callable[..., None]
    get_runtime_model: Callable[[], ov.Model]
    query_state: Callable[[], list[Any]]
    reset_state: Callable[[], None]
    release_memory: Callable[[], None]

    def __init__(self, name: str, compiled: ov.CompiledModel, memories: Sequence[Memory]) -> None:
        """Take over ``memories``, the storage of the weights; none where OpenVINO copied them."""
        inner = _Compiled(compiled)
        self._made, self._alive = inner.made, weakref.ref(inner)
        super().__init__(name, inner, memories)

    @property
    def compiled(self) -> ov.CompiledModel:
        """The CompiledModel inside. Whatever is made from it delays the wipe until it is gone."""
        return self._use()

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

    def _pybind11_conduit_v1_(self, *arguments: object) -> object:
        # How C++ made with pybind11 (2.13 on) asks an object for the C++ one that it stands for.
        return self.compiled._pybind11_conduit_v1_(*arguments)

    def _users(self) -> str:
        compiled = self._alive()
        own = None if compiled is None else compiled._infer_request
        requests = sum(request is not own for request in self._made)
        found = [f"{requests} inference request{'s' * (requests != 1)}"] if requests else []
        if compiled is not None:
            found.append("the compiled model")
        return " and ".join(found)
