"""The result of ``load``: it is used like OpenVINO's own object, and its end wipes the memory."""

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
    """A CompiledModel that remembers its requests, so that an error can name its users."""

    def __init__(self, other: ov.CompiledModel) -> None:
        super().__init__(other)
        self.made: weakref.WeakSet[ov.InferRequest] = weakref.WeakSet()

    def create_infer_request(self) -> ov.InferRequest:
        request = super().create_infer_request()
        self.made.add(request)
        return request


class Owner:
    """An OpenVINO object and the memory that it reads from.

    ``close()``, or leaving the ``with`` block, wipes the memory. If something still uses it, it is
    wiped when the last user is gone. Not for use in a process that was forked after loading:
    OpenVINO's threads do not survive a fork.

    Attributes:
        name: name of the model, verified.
        locked: whether all of its weights are kept from swap.
    """

    def __init__(self, name: str, inner: Any, memories: Sequence[Memory]) -> None:
        """Take over ``memories``, the storage that ``inner`` reads."""
        self.name = name
        self.locked = bool(memories) and all(memory.locked for memory in memories)
        self._inner: Any = inner
        # After compiling, nothing may read a storage any more, as when f16 weights were expanded to
        # f32. It is wiped at once.
        for memory in memories:
            if not memory.in_use():
                release(memory)
        self._memories = tuple(memory for memory in memories if not memory.gone)
        self._process = os.getpid()
        for memory in self._memories:
            # For an owner on which nobody calls close().
            weakref.finalize(self, release, memory).atexit = False

    def _use(self) -> Any:
        """The OpenVINO object; raises if it is closed, or was loaded before a fork."""
        if self._process != os.getpid():
            raise KeymgmtError(
                f"{self.name} was loaded before this process was forked",
                hint="load the model in the process that uses it",
            )
        if self._inner is None:
            raise ValueError(f"{self.name} is closed")
        return self._inner

    def _users(self) -> str:
        """The objects that were made from it and are still alive, in words for a message."""
        return ""

    def close(self, *, strict: bool = False) -> None:
        """End the model and wipe its weights; may be called again.

        A request, an output or a queue that was made from it and is still held stays usable. The
        weights are then wiped when the last of these is gone, which is logged as a warning.

        Args:
            strict: raise in place of the warning.

        Raises:
            ModelInUse: with ``strict``; the weights are wiped all the same when the last user is
                gone.
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
                hint="drop everything that was made from it, then close it; its weights stay in "
                "memory until the last of these is gone, and are wiped then",
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

    # Declared for editors and type checkers; __getattr__ gives the CompiledModel's own.
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
        """Take over ``memories``, the storage of the weights; empty where OpenVINO copied them."""
        inner = _Compiled(compiled)
        self._made, self._alive = inner.made, weakref.ref(inner)
        super().__init__(name, inner, memories)

    @property
    def compiled(self) -> ov.CompiledModel:
        """The CompiledModel inside. Every object made from it delays the wipe until it is gone."""
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
        # By this method C++ code with pybind11 2.13 or newer asks an object for the C++ object
        # behind it; so openvino.AsyncInferQueue accepts a LoadedModel.
        return self.compiled._pybind11_conduit_v1_(*arguments)

    def _users(self) -> str:
        compiled = self._alive()
        own = None if compiled is None else compiled._infer_request
        requests = sum(request is not own for request in self._made)
        users = [f"{requests} inference request{'s' * (requests != 1)}"] if requests else []
        if compiled is not None:
            users.append("the compiled model")
        return " and ".join(users)
