"""A WebAssembly module that counts the instructions that it executes.

Engines translate modules for the CPU that they run on, so machine instructions say little about a
module. What is counted are its own: each straight run of instructions adds its length to a new
64-bit global, exported as `executed`, before it runs. Brackets (`block`, `loop`, `else`, `end`) and
`nop` stand for no work and do not count. Binary format: WebAssembly 2.0 with 128-bit and relaxed
SIMD; memories of 32 bits.
"""

from collections.abc import Iterator

EXPORT = "executed"
_TYPE, _IMPORT, _GLOBAL, _EXPORT_SECTION, _CODE = 1, 2, 6, 7, 10
_BRACKETS = {0x01, 0x02, 0x03, 0x05, 0x0B}  # nop, block, loop, else, end
_BORDERS = {0x00, 0x02, 0x03, 0x04, 0x05, 0x0B, 0x0C, 0x0D, 0x0E, 0x0F}  # where control may turn
_ONE_INDEX = {0x0C, 0x0D, 0x10, *range(0x20, 0x27), 0x3F, 0x40, 0xD2}
_BLOCK_TYPE = {0x02, 0x03, 0x04, 0xD0}
_BULK = {8: 2, 9: 1, 10: 2, 11: 1, 12: 2, 13: 1, 14: 2, 15: 1, 16: 1, 17: 1}  # 0xFC: indices
_LANE = range(21, 35)  # 0xFD: one byte
_LOAD_LANE = range(84, 92)  # 0xFD: address and one byte


class _Reader:
    """Reads a part of a module from front to back."""

    def __init__(self, data: bytes, at: int = 0) -> None:
        self.data = data
        self.at = at

    def skip(self, n: int) -> None:
        self.at += n

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def number(self) -> int:
        """LEB128; only the length matters for signed numbers."""
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    def take(self) -> bytes:
        """Bytes behind their length."""
        n = self.number()
        self.at += n
        return self.data[self.at - n : self.at]


def counting(module: bytes) -> bytes:
    """`module` with the counter.

    Raises:
        ValueError: an instruction that this reader does not know.
    """
    sections = list(_sections(module))
    index = _imported_globals(dict(sections).get(_IMPORT, b"\0"))
    index += _Reader(dict(sections).get(_GLOBAL, b"\0")).number()
    new_global = bytes([0x7E, 1, 0x42, 0, 0x0B])  # i64, mutable, i64.const 0, end
    name = EXPORT.encode()
    new_export = bytes([len(name)]) + name + b"\x03" + _leb(index)
    out = bytearray(module[:8])
    for kind, body in sections:
        if kind == _GLOBAL:
            body = _appended(body, new_global)
        elif kind == _EXPORT_SECTION:
            body = _appended(body, new_export)
        elif kind == _CODE:
            body = _counting_code(body, index)
        out += bytes([kind]) + _leb(len(body)) + body
    return bytes(out)


def _sections(module: bytes) -> Iterator[tuple[int, bytes]]:
    reader = _Reader(module, 8)
    while reader.at < len(module):
        kind = reader.byte()
        yield kind, reader.take()


def _imported_globals(body: bytes) -> int:
    reader, found = _Reader(body), 0
    for _ in range(reader.number()):
        reader.take()
        reader.take()
        kind = reader.byte()
        if kind == 3:
            reader.skip(2)
            found += 1
        elif kind == 0:
            reader.number()
        else:
            raise ValueError(f"an import of kind {kind}")
    return found


def _appended(body: bytes, entry: bytes) -> bytes:
    """A section's vector with one entry more."""
    reader = _Reader(body)
    n = reader.number()
    return _leb(n + 1) + body[reader.at :] + entry


def _counting_code(body: bytes, index: int) -> bytes:
    reader = _Reader(body)
    n = reader.number()
    out = bytearray(_leb(n))
    for _ in range(n):
        function = _counting_function(reader.take(), index)
        out += _leb(len(function)) + function
    return bytes(out)


def _counting_function(code: bytes, index: int) -> bytes:
    reader = _Reader(code)
    for _ in range(reader.number()):  # groups of locals
        reader.number()
        reader.byte()
    out = bytearray(code[: reader.at])
    start, n = reader.at, 0
    while reader.at < len(code):
        opcode = _instruction(reader)
        n += opcode not in _BRACKETS
        if opcode in _BORDERS or reader.at == len(code):
            out += _add(index, n) + code[start : reader.at]
            start, n = reader.at, 0
    return bytes(out)


def _add(index: int, n: int) -> bytes:
    """global.get, i64.const n, i64.add, global.set; nothing for no instructions."""
    if n == 0:
        return b""
    place = _leb(index)
    return b"\x23" + place + b"\x42" + _signed(n) + b"\x7c\x24" + place


def _instruction(reader: _Reader) -> int:
    """Move behind the next instruction; its opcode, or its prefix."""
    opcode = reader.byte()
    if opcode in _BLOCK_TYPE or opcode in _ONE_INDEX or opcode in (0x41, 0x42):
        reader.number()
    elif opcode == 0x0E:
        for _ in range(reader.number() + 1):
            reader.number()
    elif opcode == 0x11 or 0x28 <= opcode <= 0x3E:
        reader.number()
        reader.number()
    elif opcode == 0x1C:
        reader.take()
    elif opcode in (0x43, 0x44):
        reader.skip(4 if opcode == 0x43 else 8)
    elif opcode == 0xFC:
        for _ in range(_BULK.get(reader.number(), 0)):
            reader.number()
    elif opcode == 0xFD:
        _vector_instruction(reader)
    elif opcode not in (0x00, 0x01, 0x05, 0x0B, 0x0F, 0x1A, 0x1B) and not 0x45 <= opcode <= 0xC4:
        raise ValueError(f"opcode {opcode:#x} at byte {reader.at - 1}")
    return opcode


def _vector_instruction(reader: _Reader) -> None:
    opcode = reader.number()
    if opcode <= 11 or 84 <= opcode <= 93:
        reader.number()
        reader.number()
        reader.skip(opcode in _LOAD_LANE)
    elif opcode in (12, 13):
        reader.skip(16)
    else:
        reader.skip(opcode in _LANE)


def _leb(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _signed(value: int) -> bytes:
    """Signed LEB128 of a number that is not negative."""
    out = _leb(value)
    return out if out[-1] < 0x40 else out[:-1] + bytes([out[-1] | 0x80, 0])
