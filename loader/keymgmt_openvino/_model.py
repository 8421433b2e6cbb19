"""A loaded model: calls like a CompiledModel, and ends with its memory wiped."""

from __future__ import annotations

import os
import weakref
from typing import TYPE_CHECKING, Any, NoReturn, Self

import openvino as ov

from keymgmt.errors import KeymgmtError, ModelInUse
from keymgmt_openvino._memory import Memory, release

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["LoadedModel"]


class _Compiled(ov.CompiledModel):  # type: ignore[misc]
    """A CompiledModel that remembers its requests, so that an error can name what still lives."""

    def __init__(self, other: ov.CompiledModel) -> None:
        super().__init__(other)
        self.made: weakref.WeakSet[ov.InferRequest] = weakref.WeakSet()

    def create_infer_request(self) -> ov.InferRequest:
        request = super().create_infer_request()
        self.made.add(request)
        return request


class LoadedModel:
    """A sealed model, opened in memory and compiled.

    Call it like an ``openvino.CompiledModel``. ``close()``, or leaving the ``with`` block, wipes
    the weights; so does the end of the last thing that uses them, if that is later. A request made
    from it stays right for as long as it is held.

    Not for use in a process forked after loading: OpenVINO's threads do not survive a fork.

    Attributes:
        name: name of the model, verified.
        locked: whether all of its weights are kept from swap.
    """

    def __init__(self, name: str, compiled: ov.CompiledModel, memory: Memory | None) -> None:
        """Take over ``memory``, the storage of the weights; None where OpenVINO copied them."""
        self.name = name
        self.locked = memory is not None and memory.locked
        self._compiled: _Compiled | None = _Compiled(compiled)
        self._memory = memory
        self._process = os.getpid()
        if memory is not None:
            # Where nobody calls close(); what is still in use then is wiped when it ends.
            weakref.finalize(self, release, memory).atexit = False

    @property
    def compiled(self) -> ov.CompiledModel:
        """The CompiledModel inside. Whatever is made from it delays the wipe until it is gone."""
        if self._process != os.getpid():
            raise KeymgmtError(
                f"{self.name} was loaded before this process was forked",
                hint="load the model in the process that uses it",
            )
        if self._compiled is None:
            raise ValueError(f"{self.name} is closed")
        return self._compiled

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

    def close(self) -> None:
        """End the model and wipe its weights; may be called again.

        Raises:
            ModelInUse: a request, queue or compiled model made from it is still alive. It stays
                right; the weights are wiped when the last of them is gone, or by the next
                ``close()`` after that.
        """
        made = list(self._compiled.made) if self._compiled is not None else []
        compiled = weakref.ref(self._compiled) if self._compiled is not None else None
        own = self._compiled._infer_request if self._compiled is not None else None
        requests = len([request for request in made if request is not own])
        del made, own
        self._compiled = None
        if self._memory is None:
            return
        release(self._memory)
        if not self._memory.in_use():
            return
        alive = [f"{requests} inference request" + "s" * (requests != 1)] if requests else []
        if compiled is not None and compiled() is not None:
            alive.append("the compiled model")
        raise ModelInUse(
            f"{self.name} is still in use: " + (" and ".join(alive) or "something made from it"),
            hint="drop every request, queue and compiled model made from it, then close it; "
            "until then its weights stay in memory, and they are wiped when the last one is gone",
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
        return f"<LoadedModel {self.name!r}" + (">" if self._compiled else ", closed>")

    def __reduce__(self) -> NoReturn:
        raise TypeError("a loaded model is not pickled: load it in each process")
