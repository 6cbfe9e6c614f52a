"""Weighted sums compiled by LLVM for the processor at hand: every input read once, the result rounded once.

Sixteen elements at a time are widened to float64, multiplied, added, divided and rounded. To round to D stored digits,
a power of two is added whose last digit is the result's: what float64's own rounding (to nearest, ties to even) leaves
in the last digits is the result's significand. So no bit depends on the width of the processor's registers; nor on
whether it flushes subnormal numbers to zero, since float64 holds those of the narrower dtypes as normal ones: where it
would flush them as they are widened, that is done by whole numbers.
"""

from __future__ import annotations

import ctypes
import functools
import math
import platform
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir

from ambergrade.family.dtypes import DTYPES

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
Value: TypeAlias = Any
"""Stands for what an LLVM instruction makes."""
LANES = 16
_ONE, _DIGITS, _SIGN = 1023, 52, 1 << 63
"""The layout of float64: the exponent's bits of 1.0, the stored digits, and the sign."""
_LOCK = threading.Lock()


@dataclass(frozen=True)
class Format:
    """A floating-point dtype of at most 32 bits."""

    bits: int
    digits: int
    """Stored digits of the significand."""
    least: int
    """The exponent of the smallest normal number."""

    @property
    def sign(self) -> int:
        return 1 << (self.bits - 1)

    @property
    def infinity(self) -> int:
        """Its bits."""
        return self.sign - (1 << self.digits)

    @property
    def beyond(self) -> float:
        """The power of two that follows the largest number."""
        return 2.0 ** (2 - self.least)


FORMATS = {
    word: Format(8 * DTYPES[word].size, DTYPES[word].digits, DTYPES[word].least) for word in ("F16", "BF16", "F32")
}
"""By safetensors' words."""


@dataclass(frozen=True)
class Outcome:
    """What a pass saw."""

    finite: bool
    """All results."""
    largest: int
    """The bits of the largest magnitude among the operands; of a careful pass 0."""
    doubts: bool
    """Whether a careful pass put any flag up."""


class Kernel:
    """The sum of so many inputs of these dtypes. Threads share it; it runs without the interpreter's lock."""

    def __init__(
        self, inputs: Sequence[str], out: str, *, careful: bool, gradual: bool = True, features: str = ""
    ) -> None:
        """A plain kernel takes fp16 alone; a `careful` one flags the elements whose rounding its error leaves open.

        `gradual`: the processor does not flush subnormal fp32 numbers to zero.
        `features` are LLVM's, such as "-avx512f", added to the processor's own; they change no bit.
        """
        assert careful or {*inputs, out} == {"F16"}, (inputs, out)
        self._count, self._format, self._careful = len(inputs), FORMATS[out], careful
        module = ir.Module()
        for name, lanes in (("many", LANES), ("one", 1)):
            halves = _widens_halves(features)
            _Loop(module, name, lanes, inputs, out, careful=careful, gradual=gradual, halves=halves).build()
        # ctypes is how llvmlite's own user guide calls what it compiled: its engine gives an address and nothing more
        pointer, real, whole = ctypes.c_void_p, ctypes.c_double, ctypes.c_int64
        kind = ctypes.CFUNCTYPE(ctypes.c_uint64, pointer, pointer, real, real, real, pointer, pointer, *(whole,) * 3)
        with _LOCK:
            self._engine = _compiled(str(module), features)
        self._many, self._one = (kind(self._engine.get_function_address(name)) for name in ("many", "one"))

    def combine(
        self,
        factors: Sequence[float],
        divisor: float,
        xs: Sequence[Array],
        out: Array,
        *,
        signed: bool = False,
        flags: Array | None = None,
        error: float = 0.0,
        exact: float = 0.0,
    ) -> Outcome:
        """`out` becomes sum(factors[i] * xs[i]) / divisor; all are flat arrays that hold the bits of their dtypes.

        Where the result is zero it is -0.0 if `signed` and the first operand is, else it has the sum's sign.
        A careful pass raises `flags` (bool) where the quotient lies within `error` * sum(|factors[i] * xs[i]|) of a
        midpoint or of zero, unless that sum is below `exact` * the smallest operand other than zero: so the caller says
        that it was exact. It lowers them elsewhere.
        """
        n = len(out)
        assert len(xs) == len(factors) == self._count
        assert (flags is not None) == self._careful
        assert all(len(x) == n and x.flags.c_contiguous for x in (*xs, out)), "flat arrays of one length"
        where = (ctypes.c_void_p * self._count)(*(x.ctypes.data for x in xs))
        scales = (ctypes.c_double * self._count)(*factors)
        doubts = None if flags is None else flags.ctypes.data
        rest = n // LANES * LANES
        said = [
            run(where, scales, divisor, error, exact, out.ctypes.data, doubts, -int(signed), start, end)
            for run, start, end in ((self._many, 0, rest), (self._one, rest, n))
        ]
        seen, largest = max(word >> 32 for word in said), max(word & 0xFFFFFFFF for word in said)
        return Outcome(largest < self._format.infinity, 0 if self._careful else seen, self._careful and seen > 0)


def kernel(inputs: tuple[str, ...], out: str, *, careful: bool) -> Kernel:
    """The one for these dtypes. Compiling takes some hundredths of a second, once in a process."""
    return _kernel(inputs, out, careful, {*inputs} == {"F16"} or _is_gradual())


@functools.cache
def _kernel(inputs: tuple[str, ...], out: str, careful: bool, gradual: bool) -> Kernel:
    return Kernel(inputs, out, careful=careful, gradual=gradual)


def _is_gradual() -> bool:
    """Whether this thread's processor keeps subnormal fp32 numbers; libraries may have it flush them to zero."""
    return bool(np.full(1, 2.0**-140, np.float32) * np.float32(2.0**100))


def _widens_halves(features: str) -> bool:
    """Whether the processor widens fp16 by an instruction; else LLVM would call a function that may be missing."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return bool(llvm.get_host_cpu_features().get("f16c")) and "-f16c" not in features
    return platform.machine().lower() in ("aarch64", "arm64")


def _compiled(source: str, features: str) -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=f"{llvm.get_host_cpu_features().flatten()},{features}".strip(","), opt=3
    )
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(source), machine)
    engine.finalize_object()
    return engine


class _Loop:
    """The function `name(xs, factors, divisor, error, exact, out, flags, signed, start, end)`, some lanes at a time.

    It returns what it saw, in the upper half of a word, and the bits of the largest magnitude among the results.
    """

    def __init__(
        self,
        module: ir.Module,
        name: str,
        lanes: int,
        inputs: Sequence[str],
        out: str,
        *,
        careful: bool,
        gradual: bool,
        halves: bool,
    ) -> None:
        """`gradual` and `halves`: whether subnormal fp32 numbers, and fp16, are widened by an instruction."""
        pointer, real, long = ir.PointerType(), ir.DoubleType(), ir.IntType(64)
        kind = ir.FunctionType(long, [pointer, pointer, real, real, real, pointer, pointer, long, long, long])
        self.module, self.function = module, ir.Function(module, kind, name)
        self.lanes, self.inputs, self.out = lanes, inputs, FORMATS[out]
        self.careful, self.gradual, self.halves = careful, gradual, halves
        self.real, self.long = self.of(real), self.of(long)
        self.result = self.of(ir.IntType(self.out.bits))
        self.seen = self.of(ir.IntType(8 if careful else 16))
        self.at = ir.IRBuilder(self.function.append_basic_block("entry"))

    def of(self, kind: ir.Type) -> ir.Type:
        return ir.VectorType(kind, self.lanes)

    def all(self, kind: ir.Type, value: float) -> Value:
        """A constant in every lane."""
        return ir.Constant(kind, [value] * self.lanes)

    def spread(self, scalar: Value) -> Value:
        """A scalar in every lane."""
        kind, places = self.of(scalar.type), ir.VectorType(ir.IntType(32), self.lanes)
        first = self.at.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
        return self.at.shuffle_vector(first, ir.Constant(kind, ir.Undefined), ir.Constant(places, [0] * self.lanes))

    def call(self, name: str, *values: Value, reduces: bool = False) -> Value:
        """One of LLVM's own functions."""
        kind = values[0].type
        short = str(kind.element).replace("double", "f64")
        full = f"llvm.{name}.v{self.lanes}{short}"
        if full not in self.module.globals:
            made = kind.element if reduces else kind
            ir.Function(self.module, ir.FunctionType(made, [value.type for value in values]), full)
        return self.at.call(self.module.globals[full], values)

    def build(self) -> None:
        sources, factors, divisor, error, exact, out, flags, signed, start, end = self.function.args
        at, pointer, real, long = self.at, ir.PointerType(), ir.DoubleType(), ir.IntType(64)
        places = [ir.Constant(long, number) for number in range(len(self.inputs))]
        self.sources = [at.load(at.gep(sources, [place], source_etype=pointer), typ=pointer) for place in places]
        scalars = [at.load(at.gep(factors, [place], source_etype=real), typ=real) for place in places]
        self.factors = [self.spread(scalar) for scalar in scalars]
        self.divisor, self.error, self.exact = map(self.spread, (divisor, error, exact))
        self.signed, self.target, self.flags = self.spread(signed), out, flags
        entry = at.block
        loop, none, done = (self.function.append_basic_block(name) for name in ("loop", "none", "done"))
        at.cbranch(at.icmp_unsigned("<", start, end), loop, none)
        at.position_at_end(none)
        at.ret(ir.Constant(long, 0))
        at.position_at_end(loop)
        place, seen, most = (at.phi(kind) for kind in (long, self.seen, self.result))
        place.add_incoming(start, entry)
        seen.add_incoming(ir.Constant(self.seen, None), entry)
        most.add_incoming(ir.Constant(self.result, None), entry)
        seen_now, most_now = self.step(place, seen, most)
        following = at.add(place, ir.Constant(long, self.lanes))
        place.add_incoming(following, loop)
        seen.add_incoming(seen_now, loop)
        most.add_incoming(most_now, loop)
        at.cbranch(at.icmp_unsigned("<", following, end), loop, done)
        at.position_at_end(done)
        upper, lower = (
            at.zext(self.call("vector.reduce.umax", value, reduces=True), long) for value in (seen_now, most_now)
        )
        at.ret(at.or_(at.shl(upper, ir.Constant(long, 32)), lower))

    def step(self, place: Value, seen: Value, most: Value) -> tuple[Value, Value]:
        """The next lanes: what was seen till now, and the largest result."""
        at, total, size, least, values = self.at, None, None, None, []
        for source, factor, kind in zip(self.sources, self.factors, self.inputs, strict=True):
            bits, value = self.loaded(source, place, kind)
            values.append(value)
            total = at.fmul(value, factor) if total is None else self.call("fmuladd", value, factor, total)
            if not self.careful:
                seen = self.call("umax", seen, at.and_(bits, self.all(bits.type, 0x7FFF)))
                continue
            magnitude, weight = self.call("fabs", value), self.call("fabs", factor)
            size = at.fmul(magnitude, weight) if size is None else self.call("fmuladd", magnitude, weight, size)
            none = at.fcmp_ordered("==", magnitude, self.all(self.real, 0.0))
            magnitude = at.select(none, self.all(self.real, math.inf), magnitude)
            least = magnitude if least is None else self.smaller(magnitude, least)
        total = at.fadd(total, self.all(self.real, 0.0))  # nothing but zeros is +0.0
        quotient = at.fdiv(total, self.divisor)
        bits, moved, half = self.rounded(quotient)
        magnitude = at.and_(bits, self.all(self.result, self.out.sign - 1))
        none = at.icmp_unsigned("==", magnitude, self.all(self.result, 0))
        first = at.and_(at.bitcast(values[0], self.long), self.signed)
        none = at.and_(none, at.icmp_unsigned("==", first, self.all(self.long, _SIGN)))
        bits = at.select(none, self.all(self.result, self.out.sign), bits)
        at.store(bits, at.gep(self.target, [place], source_etype=self.result.element), align=1)
        if self.careful:
            away = self.smaller(self.call("fabs", at.fsub(moved, half)), self.call("fabs", quotient))
            near = at.fcmp_unordered("<=", away, at.fmul(size, self.error))
            unsure = at.fcmp_ordered(">=", size, at.fmul(least, self.exact))
            flags = at.zext(at.and_(near, unsure), self.seen)
            at.store(flags, at.gep(self.flags, [place], source_etype=self.seen.element), align=1)
            seen = at.or_(seen, flags)
        return seen, self.call("umax", most, magnitude)

    def loaded(self, source: Value, place: Value, kind: str) -> tuple[Value, Value]:
        """The bits of some operands, and their values in float64."""
        at, word = self.at, ir.IntType(FORMATS[kind].bits)
        bits = at.load(at.gep(source, [place], source_etype=word), typ=self.of(word), align=1)
        if not (self.halves if kind == "F16" else self.gradual):
            return bits, self.widened(bits, FORMATS[kind])
        if kind == "F16":
            return bits, at.fpext(at.bitcast(bits, self.of(ir.HalfType())), self.real)
        wide = self.of(ir.IntType(32))
        upper = bits if kind == "F32" else at.shl(at.zext(bits, wide), self.all(wide, 16))
        return bits, at.fpext(at.bitcast(upper, self.of(ir.FloatType())), self.real)

    def widened(self, bits: Value, form: Format) -> Value:
        """To float64 by whole numbers: the significand times a power of two."""
        at, long = self.at, self.long
        size = at.zext(at.and_(bits, self.all(bits.type, form.sign - 1)), long)
        exponent = at.lshr(size, self.all(long, form.digits))
        implied = self.all(long, 1 << form.digits)
        digits = at.and_(size, self.all(long, (1 << form.digits) - 1))
        subnormal = at.icmp_unsigned("==", exponent, self.all(long, 0))
        digits = at.select(subnormal, digits, at.or_(digits, implied))
        power = at.select(subnormal, self.all(long, 1), exponent)
        power = at.add(power, self.all(long, _ONE + form.least - form.digits - 1))
        endless = at.icmp_unsigned(">=", size, self.all(long, form.infinity))
        power = at.select(endless, self.all(long, 2046), power)  # times 2**1023 infinity and NaN are infinity
        power = at.bitcast(at.shl(power, self.all(long, _DIGITS)), self.real)
        value = at.bitcast(at.fmul(at.uitofp(digits, self.real), power), long)
        sign = at.and_(at.sext(bits, long), self.all(long, _SIGN))
        return at.bitcast(at.or_(value, sign), self.real)

    def rounded(self, quotient: Value) -> tuple[Value, Value, Value]:
        """The result's bits; how far its magnitude was moved, and how far from it a midpoint would be."""
        at, out, long = self.at, self.out, self.long
        size = self.smaller(self.call("fabs", quotient), self.all(self.real, out.beyond))  # NaN becomes infinity
        least = self.all(self.real, 2.0**out.least)
        normal = at.select(at.fcmp_ordered(">", size, least), size, least)
        exponent = at.and_(at.bitcast(normal, long), self.all(long, 0x7FF << _DIGITS))
        steps = _DIGITS - out.digits
        power = at.bitcast(at.add(exponent, self.all(long, steps << _DIGITS)), self.real)
        sum_ = at.fadd(size, power)
        word = at.add(at.lshr(exponent, self.all(long, steps)), at.bitcast(sum_, long))
        sign = at.lshr(at.bitcast(quotient, long), self.all(long, 64 - out.bits))
        word = at.add(word, at.and_(sign, self.all(long, out.sign)))
        bias = ((_ONE + out.least) << out.digits) % (1 << out.bits)
        bits = at.sub(at.trunc(word, self.result), self.all(self.result, bias))
        moved = self.call("fabs", at.fsub(size, at.fsub(sum_, power)))
        return bits, moved, at.fmul(power, self.all(self.real, 2.0 ** (-_DIGITS - 1)))

    def smaller(self, a: Value, b: Value) -> Value:
        """b where a is NaN."""
        return self.at.select(self.at.fcmp_ordered("<", a, b), a, b)
