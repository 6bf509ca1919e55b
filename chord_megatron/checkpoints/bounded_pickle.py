"""Pickles of others, read in time and memory that their length bounds, and what `torch.save` wraps around them.

Short pickles can take for ever: a tuple of twice the same tuple of twice the same one ..., as the key of a dictionary,
is hashed in 2^n steps, without a look at signals. Others have an opcode or a function that takes memory by a number.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections.abc import Callable
from functools import partial
from typing import IO, Any, ClassVar, TypeAlias

import torch

_Unpickler = pickle._Unpickler  # noqa: SLF001 - the one in Python: that in C lets nobody look at what it builds
_Step: TypeAlias = Callable[[Any], None]
# What pickles of plain values and objects consist of, in the protocols 2 to 5. No sets, which hash; no arrays.
_OPCODES = (
    *("PROTO", "FRAME", "MARK", "STOP", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1"),
    *("BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE", "SHORT_BINBYTES", "BINBYTES", "EMPTY_TUPLE", "TUPLE", "TUPLE1"),
    *("TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS", "MEMOIZE", "BINPUT"),
    *("LONG_BINPUT", "BINGET", "LONG_BINGET", "GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID"),
)
_MOST_ELEMENTS = 10_000  # of a tuple, those of tuples in it included: random states have 625
# What torch.save writes of tensors and plain values.
_NAMES = re.compile(
    r"torch\.(Size|device|\w+Storage)|torch\.storage\.UntypedStorage|torch\._utils\._rebuild_(tensor_v[23]|parameter)"
    r"|collections\.OrderedDict|_codecs\.encode"
)


def _load_tuple(step: _Step, unpickler: BoundedUnpickler) -> None:
    step(unpickler)
    unpickler.check_tuple(unpickler.stack[-1])


def _load_item(step: _Step, unpickler: BoundedUnpickler) -> None:
    unpickler.check_key(unpickler.stack[-2])
    step(unpickler)


def _load_items(step: _Step, unpickler: BoundedUnpickler) -> None:
    for key in unpickler.stack[::2]:  # since the last mark
        unpickler.check_key(key)
    step(unpickler)


def _load_attributes(step: _Step, unpickler: BoundedUnpickler) -> None:
    step(unpickler)
    unpickler.check_built(unpickler.stack[-1])


_CHECKED = {
    **dict.fromkeys(("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"), _load_tuple),
    "SETITEM": _load_item,
    "SETITEMS": _load_items,
    "BUILD": _load_attributes,
}


class BoundedUnpickler(_Unpickler):
    """`pickle.Unpickler` for the bytes of one pickle. Raises whatever there is for what it does not read."""

    stack: list[Any]  # of pickle._Unpickler

    def __init__(self, content: bytes) -> None:
        if not content.endswith(pickle.STOP):
            raise pickle.UnpicklingError("it is cut off")
        super().__init__(io.BytesIO(content))  # which allocates nothing for lengths that it has not
        self._nested: dict[int, tuple[tuple[Any, ...], int]] = {}  # tuples of tuples, and their sizes unfolded

    def check_tuple(self, value: tuple[Any, ...]) -> None:
        """Called for each that is built, arguments of calls among them."""
        if any(isinstance(element, tuple) for element in value):
            size = sum(self._size(element) for element in value)
            if size > _MOST_ELEMENTS:
                raise pickle.UnpicklingError("tuples are nested without end")
            self._nested[id(value)] = value, size  # kept, so that no other gets its id

    def _size(self, element: Any) -> int:
        if not isinstance(element, tuple):
            return 1
        return self._nested[id(element)][1] if id(element) in self._nested else 1 + len(element)

    def check_key(self, key: Any) -> None:
        """Called for each key of a dictionary, before it is hashed."""

    def check_built(self, value: Any) -> None:
        """Called for each object that has got its attributes."""

    dispatch: ClassVar[dict[int, _Step]] = {
        code[0]: partial(_CHECKED[name], _Unpickler.dispatch[code[0]])
        if name in _CHECKED
        else _Unpickler.dispatch[code[0]]
        for name, code in ((name, getattr(pickle, name)) for name in _OPCODES)
    }


class Inert:
    """Stands for an object of any class: keeps its attributes, does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


class InertUnpickler(BoundedUnpickler):
    """Builds plain values; of whatever `names` a class or function nothing is imported or called."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.names: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        self.names.add(f"{module}.{name}")
        return Inert

    def persistent_load(self, reference: Any) -> Any:  # a tensor's storage
        return None


def torch_pickle(file: IO[bytes]) -> bytes:
    """The pickle in a file of `torch.save`, which has every byte of what it holds once, and as it is.

    Raises ValueError or zipfile.BadZipFile where it would become more in memory.
    """
    length = file.seek(0, io.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        is_plain = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        if not is_plain or sum(entry.file_size for entry in entries) > length:
            raise ValueError("it is compressed, or holds bytes twice; torch.save writes no such file")
        (entry,) = (entry for entry in entries if entry.filename.endswith("/data.pkl"))
        del entry.CRC  # torch neither looks at it nor always writes it
        with archive.open(entry) as content:
            return content.read()


def check_tensors(file: IO[bytes]) -> None:
    """Raise ValueError or another unless `torch.load(weights_only=True)` of the file takes no more than its length.

    It refuses code, and takes a `bytearray` or a `torch.Tensor` of a size.
    """
    unpickler = InertUnpickler(torch_pickle(file))
    unpickler.load()
    file.seek(0)
    if foreign := sorted(name for name in unpickler.names if not _is_of_tensors(name)):
        raise ValueError(f"it names {foreign[0]}")


def _is_of_tensors(name: str) -> bool:
    return _NAMES.fullmatch(name) is not None or isinstance(getattr(torch, name.removeprefix("torch."), 0), torch.dtype)
