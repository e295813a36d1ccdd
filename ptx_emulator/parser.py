"""PTX text -> kernels: registers, parameters, variables and instructions with resolved names (PTX ISA, "Syntax").

Scopes in braces (inline assembly opens them) hide names and labels of their own. Nothing is executed or checked
against the semantics here: an opcode is kept as its dotted parts, an operand as one of the classes below.

A call of a function that the module defines becomes the function's body, in a scope of its own; the variables that
pass its parameters become local ones. brx.idx becomes a comparison and a branch for every label of its list.
A system call (PTX Writer's Guide to Interoperability, "System Calls") gets a body here that ends in an instruction of
its own, see `instructions.system`.
"""

import bisect
import re
import struct
from dataclasses import dataclass, field

from .errors import PtxSyntaxError

TYPE_BYTES = {
    "pred": 1,
    **{f"{kind}{bits}": bits // 8 for kind in "bus" for bits in (8, 16, 32, 64)},
    "b128": 16,
    "f16": 2,
    "f16x2": 4,
    "bf16": 2,
    "bf16x2": 4,
    "f32": 4,
    "f32x2": 8,
    "f64": 8,
}


@dataclass(frozen=True, slots=True)
class Reg:
    """A register: its place in the warp's register file, bytes a lane (0 for a predicate), `negated` for !%p."""

    index: int
    size: int
    name: str
    negated: bool = False


@dataclass(frozen=True, slots=True)
class Imm:
    """A literal: an integer, or the bits of a floating point number of `float_bytes` bytes."""

    value: int
    float_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Sym:
    """A variable's address plus an offset, or a label."""

    name: str
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Special:
    """A special register such as %tid.x."""

    name: str


@dataclass(frozen=True, slots=True)
class Sink:
    """The destination `_`."""


@dataclass(frozen=True, slots=True)
class Vec:
    """{a, b, ...}"""

    items: tuple["Operand", ...]


@dataclass(frozen=True, slots=True)
class Pair:
    """d|p, two destinations."""

    first: "Operand"
    second: "Operand"


@dataclass(frozen=True, slots=True)
class Address:
    """[base + offset], and what follows the first comma in brackets (coordinates of a tensor)."""

    base: "Operand"
    offset: int
    rest: tuple["Operand", ...] = ()


Operand = Reg | Imm | Sym | Special | Sink | Vec | Pair | Address


@dataclass(slots=True)
class Instruction:
    """One instruction. line: of the PTX text; source: (file, line) of the last .loc, if any; target: of a branch."""

    op: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Reg | None
    line: int
    text: str
    source: tuple[str, int] | None = None
    target: int = -1

    @property
    def name(self) -> str:
        return ".".join(self.op)


@dataclass(frozen=True, slots=True)
class Variable:
    """A variable of a state space ("shared", "global", "const", "local", "param"). size 0: extern, sized at launch."""

    name: str
    space: str
    size: int
    align: int
    data: bytes = b""


@dataclass(slots=True)
class Kernel:
    """An entry function."""

    name: str
    params: list[Variable]
    variables: dict[str, Variable]
    code: list[Instruction] = field(default_factory=list)
    registers: list[Reg] = field(default_factory=list)
    max_threads: int = 0
    max_registers: int = 0
    required_threads: tuple[int, int, int] | None = None
    required_cluster: tuple[int, int, int] | None = None


@dataclass(frozen=True, slots=True)
class _Function:
    """A device function: declarations of its results and parameters, and where its body starts (-1: it has none)."""

    results: list[str]
    params: list[str]
    at: int


@dataclass(slots=True)
class Module:
    """A translation unit."""

    target: str
    version: str
    kernels: dict[str, Kernel]
    variables: dict[str, Variable]

    def only_kernel(self) -> Kernel:
        if len(self.kernels) != 1:
            raise ValueError(f"name one of the kernels {', '.join(self.kernels)}")
        return next(iter(self.kernels.values()))


_SPECIAL = re.compile(
    r"%(?:tid|ntid|ctaid|nctaid|cluster_ctaid|cluster_nctaid|clusterid|nclusterid)\.[xyzw]$"
    r"|%(?:laneid|warpid|nwarpid|smid|nsmid|gridid|cluster_ctarank|cluster_nctarank|clock|clock_hi|clock64|globaltimer"
    r"|globaltimer_lo|globaltimer_hi|lanemask_(?:eq|le|lt|ge|gt)|dynamic_smem_size|total_smem_size|aggr_smem_size"
    r"|is_explicit_cluster|envreg\d+|pm\d+)$"
)
_IDENT = r"[A-Za-z_$%][\w$]*"
_FUNCTION = re.compile(
    rf"\.func\s*(?:\((?P<results>[^)]*)\)\s*)?(?P<name>{_IDENT})\s*(?:\((?P<params>[^)]*)\))?[^{{;]*(?P<end>[{{;])"
)
_CALL = re.compile(rf"(?:\((?P<results>[^)]*)\)\s*,)?\s*(?P<name>{_IDENT})\s*(?:,\s*\((?P<params>[^)]*)\))?\s*$")
_FORMAL = re.compile(rf"\.(reg|param)\b.*\.(\w+)\s+({_IDENT})[^.]*$", re.S)
_TARGETS = re.compile(r"\.branchtargets\s+([^;]*);")
_SYSTEM_CALLS = {
    "vprintf": """
        .func (.param .b32 status) vprintf(.param .b64 format, .param .b64 valist)
        {
        .reg .b32 n; .reg .b64 f; .reg .b64 v;
        ld.param.b64 f, [format]; ld.param.b64 v, [valist]; vprintf n, f, v; st.param.b32 [status], n; ret;
        }""",
    "__assertfail": """
        .func __assertfail(.param .b64 message, .param .b64 file, .param .b32 line, .param .b64 function,
                           .param .b64 width)
        {
        .reg .b64 m; .reg .b64 f; .reg .b32 l; .reg .b64 g;
        ld.param.b64 m, [message]; ld.param.b64 f, [file]; ld.param.b32 l, [line]; ld.param.b64 g, [function];
        assertfail m, f, l, g; ret;
        }""",
}
_MAX_CALLS = 16  # inside of one another; more is recursion
_BLANKS = re.compile(r"\s+")
_BRACKETS_AND_COMMAS = re.compile(r"[\[\](){},]")
_BASE_AND_OFFSET = re.compile(rf"({_IDENT}|-?\w+)\s*(?:\+\s*(-?\w+))?$")
_NAME_AND_OFFSET = re.compile(rf"({_IDENT})\s*\+\s*(\d+)$")
_NAME = re.compile(_IDENT)
_LABEL = re.compile(rf"({_IDENT})\s*:(?!:)")
_GUARD = re.compile(rf"@(!?)({_IDENT})\s+")
_OPCODE = re.compile(rf"(?:@!?{_IDENT}\s+)?([^. ]*)")
_REG = re.compile(r"\.reg\s+(?:\.v[24]\s+)?\.(\w+)\s+(.*)", re.S)
_VARIABLE = re.compile(
    r"(?:\.(?P<link>extern|visible|weak|common)\s+)?\.(?P<space>shared|global|const|local|param)"
    r"(?P<rest>(?:\s+\.(?:align\s+\d+|ptr|attribute\([^)]*\)|managed|shared|global|const|local))*)\s+"
    r"(?:\.(?P<vec>v[24])\s+)?\.(?P<type>\w+)(?P<ptr>(?:\s+\.(?:ptr|align\s+\d+|global|shared|const|local))*)\s+"
    rf"(?P<name>{_IDENT})\s*(?P<dims>(?:\[\s*\d*\s*\]\s*)*)(?:=\s*(?P<init>.*))?$",
    re.S,
)
_LINE_DIRECTIVE = re.compile(r"\.(?:loc|file|version|target|address_size)\b[^\n]*")
_NUMBER = re.compile(
    r"-?(?:0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|0[xX][0-9a-fA-F]+U?|\d+\.\d*(?:[eE][-+]?\d+)?|\d+U?)$"
)


def parse(text: str) -> Module:
    """Raises PtxSyntaxError."""
    return _Parser(text).module()


class _Scope:
    def __init__(self, parent: "_Scope | None"):
        self.parent = parent
        self.names: dict[str, Reg | Variable] = parent.names.copy() if parent else {}
        self.labels: dict[str, int] = {}
        self.targets: dict[str, list[str]] = parent.targets.copy() if parent else {}  # lists of labels
        self.branches: list[Instruction] = []


class _Parser:
    def __init__(self, text: str):
        # comments become blanks so that lines keep their numbers
        blank = lambda m: re.sub(r"[^\n]", " ", m[0])  # noqa: E731
        self.text = re.sub(r"//[^\n]*|/\*.*?\*/", blank, text, flags=re.S)
        self.starts = [0, *(m.end() for m in re.finditer("\n", self.text))]
        self.at = 0
        self.files: dict[int, str] = {}
        self.calls: list[str] = []  # functions that the parser is inside of
        self.functions: dict[str, _Function] = {}
        self.find_functions(0)
        self.end = len(self.text)
        self.text += "".join(
            body for name, body in _SYSTEM_CALLS.items() if name in self.functions and self.functions[name].at < 0
        )
        self.find_functions(self.end)
        self.call_line = 0  # of the call whose function the parser is inside of
        self.source: tuple[str, int] | None = None

    def find_functions(self, start: int) -> None:
        for m in _FUNCTION.finditer(self.text, start):
            if m["end"] == "{" or m["name"] not in self.functions:
                at = m.start("end") if m["end"] == "{" else -1
                self.functions[m["name"]] = _Function(_items(m["results"]), _items(m["params"]), at)

    def line(self, at: int) -> int:
        return bisect.bisect_right(self.starts, at)

    def error(self, message: str) -> PtxSyntaxError:
        return PtxSyntaxError(f"PTX line {self.line(self.at)}: {message}")

    def skip_blanks(self) -> None:
        if m := _BLANKS.match(self.text, self.at):
            self.at = m.end()

    def match(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        m = pattern.match(self.text, self.at)
        if m:
            self.at = m.end()
        return m

    def until(self, stop: str) -> str:
        end = self.text.find(stop, self.at)
        if end < 0:
            raise self.error(f"no {stop!r} after {self.text[self.at : self.at + 40]!r}")
        piece, self.at = self.text[self.at : end], end + 1
        return piece.strip()

    def braces(self) -> str:
        """What stands between this brace and its partner."""
        depth, start = 0, self.at
        for at in range(self.at, len(self.text)):
            depth += {"{": 1, "}": -1}.get(self.text[at], 0)
            if depth == 0:
                self.at = at + 1
                return self.text[start + 1 : at]
        raise self.error("a brace is never closed")

    def module(self) -> Module:
        module = Module(target="", version="", kernels={}, variables={})
        entry = re.compile(rf"(?:\.(?:visible|weak|extern)\s+)?\.entry\s+({_IDENT})\s*")
        function = re.compile(r"(?:\.(?:visible|weak|extern|noreturn)\s+)*\.func\b")
        while True:
            self.skip_blanks()
            if self.at >= len(self.text):
                break
            if m := self.match(entry):
                kernel = self.kernel(m[1], module)
                module.kernels[kernel.name] = kernel
            elif self.match(function):
                # read where it is called
                brace, semicolon = self.text.find("{", self.at), self.text.find(";", self.at)
                if 0 <= semicolon < brace or brace < 0:
                    self.at = semicolon + 1
                else:
                    self.at = brace
                    self.braces()
            elif self.text.startswith(".section", self.at):
                self.at = self.text.index("{", self.at)
                self.braces()
            elif m := self.match(_LINE_DIRECTIVE):
                words = m[0].split()
                if words[0] == ".target":
                    module.target = words[1].rstrip(",")
                elif words[0] == ".version":
                    module.version = words[1]
                else:
                    self.line_directive(words)
            elif self.text.startswith(".", self.at):
                variable = self.variable(self.until(";"))
                if variable:
                    module.variables[variable.name] = variable
            else:
                raise self.error(f"cannot read {self.text[self.at : self.at + 40]!r}")
        return module

    def line_directive(self, words: list[str]) -> None:
        if words[0] == ".file":
            self.files[int(words[1])] = words[2].strip('",')
        elif words[0] == ".loc":
            self.source = (self.files.get(int(words[1]), "?"), int(words[2]))

    def variable(self, text: str) -> Variable | None:
        if text.startswith((".pragma", ".branchtargets", ".callprototype", ".alias")):
            return None
        m = _VARIABLE.match(text)
        if not m:
            raise self.error(f"cannot read {text[:60]!r}")
        if m["type"] not in TYPE_BYTES:
            raise self.error(f"type .{m['type']} of {m['name']} is not known")
        element = TYPE_BYTES[m["type"]] * int((m["vec"] or "v1")[1:])
        count = 1
        for dim in re.findall(r"\[\s*(\d*)\s*\]", m["dims"]):
            count *= int(dim or 0)
        align = re.search(r"align\s+(\d+)", m["rest"])
        data = self.initial(m["init"], element) if m["init"] else b""
        size = max(element * count, len(data))
        return Variable(m["name"], m["space"], size, int(align[1]) if align else max(element, 1), data)

    def initial(self, text: str, element: int) -> bytes:
        out = bytearray()
        for word in re.findall(r"[^\s{},]+", text):
            value = _number(word)
            if value is None:
                raise self.error(f"initial value {word!r} is not a number")
            if value.float_bytes and value.float_bytes != element:
                (number,) = struct.unpack("<d", struct.pack("<Q", value.value))
                value = Imm(int.from_bytes(struct.pack("<f", number), "little"))
            out += (value.value % (1 << 8 * element)).to_bytes(element, "little")
        return bytes(out)

    def kernel(self, name: str, module: Module) -> Kernel:
        self.skip_blanks()
        params: list[Variable] = []
        if self.text.startswith("(", self.at):
            self.at += 1
            # no parameter's declaration holds a parenthesis
            for text in filter(None, (p.strip() for p in self.until(")").split(","))):
                variable = self.variable(text)
                assert variable is not None
                params.append(variable)
        kernel = Kernel(name, params, dict(module.variables))
        while True:
            self.skip_blanks()
            if self.text.startswith("{", self.at):
                break
            m = self.match(re.compile(r"\.(\w+)\s*([\d, \t]*)"))
            if not m:
                raise self.error(f"cannot read {self.text[self.at : self.at + 40]!r}")
            numbers = [int(x) for x in re.findall(r"\d+", m[2])]
            x, y, z = (*numbers, 1, 1, 1)[:3]
            triple = (x, y, z)
            if m[1] == "reqntid":
                kernel.required_threads = triple
            elif m[1] == "maxnreg":
                kernel.max_registers = x
            elif m[1] == "maxntid":
                kernel.max_threads = triple[0] * triple[1] * triple[2]
            elif m[1] == "reqnctapercluster":
                kernel.required_cluster = triple
        self.body(kernel)
        return kernel

    def body(self, kernel: Kernel) -> None:
        scope = _Scope(None)
        scope.names |= kernel.variables
        self.outside = dict(kernel.variables)
        for variable in kernel.params:
            scope.names[variable.name] = kernel.variables[variable.name] = variable
        self.statements(scope, kernel)

    def statements(self, scope: _Scope, kernel: Kernel) -> None:
        """From an opening brace to its partner."""
        self.at += 1
        scopes, label = [scope], ""
        while scopes:
            self.skip_blanks()
            scope = scopes[-1]
            if self.at >= len(self.text):
                raise self.error(f"kernel {kernel.name} is never closed")
            if self.text[self.at] == "{":
                self.at += 1
                scopes.append(_Scope(scope))
            elif self.text[self.at] == "}":
                self.at += 1
                self.close(scopes.pop(), len(kernel.code))
            elif self.text[self.at] == ";":
                self.at += 1
            elif m := self.match(_LABEL):
                label = m[1]
                scope.labels[label] = len(kernel.code)
            elif m := self.match(_TARGETS):
                scope.targets[label] = _items(m[1])
            elif m := self.match(_LINE_DIRECTIVE):
                self.line_directive(m[0].split())
            elif self.text[self.at] == ".":
                self.declare(self.until(";"), scope, kernel)
            else:
                line = self.line(self.at) if self.at < self.end else self.call_line
                text = " ".join(self.until(";").split())
                m = _OPCODE.match(text)
                opcode = m[1] if m else ""
                if opcode == "call":
                    self.call(text, scope, kernel, line)
                elif opcode == "brx":
                    self.indexed_branch(text, scope, kernel, line)
                else:
                    self.emit(text, scope, kernel, line)

    def emit(self, text: str, scope: _Scope, kernel: Kernel, line: int) -> Instruction:
        instruction = self.instruction(text, scope, line)
        if instruction.op[0] == "bra" and instruction.operands:
            scope.branches.append(instruction)
        kernel.code.append(instruction)
        return instruction

    def skip(self, guard: Reg | None, kernel: Kernel, line: int, text: str) -> list[Instruction]:
        """A branch over what a guard keeps from happening; its target is set later."""
        if guard is None:
            return []
        turned = Reg(guard.index, guard.size, guard.name, not guard.negated)
        kernel.code.append(Instruction(("bra",), (), turned, line, text, self.source))
        return kernel.code[-1:]

    def call(self, text: str, scope: _Scope, kernel: Kernel, line: int) -> None:
        """PTX ISA, "call". A function that is not known becomes a call that stops when it is reached."""
        guard, opcode, rest = self.split(text, scope, line)
        found = _CALL.match(rest)
        function = self.functions.get(found["name"]) if found else None
        if found is None or function is None or function.at < 0 or len(self.calls) == _MAX_CALLS:
            name = Sym(found["name"] if found else rest)
            kernel.code.append(Instruction(opcode, (name,), guard, line, text, self.source))
            return
        results, params = _items(found["results"]), _items(found["params"])
        if len(results) != len(function.results) or len(params) != len(function.params):
            raise PtxSyntaxError(f"PTX line {line}: {found['name']} has other operands than {text!r}")
        skip = self.skip(guard, kernel, line, text)
        inside, bridge = _Scope(None), _Scope(scope)
        inside.names |= self.outside
        before = self.at, self.source, self.call_line
        self.at, self.call_line = function.at, line
        self.calls.append(found["name"])
        pairs = [*zip(function.results, results, strict=True), *zip(function.params, params, strict=True)]
        copies = [self.bind(n, *pair, bridge, inside, kernel) for n, pair in enumerate(pairs)]
        for store, _ in copies[len(results) :]:
            if store:
                self.emit(store, bridge, kernel, line)
        start = len(kernel.code)
        self.statements(inside, kernel)
        for i in kernel.code[start:]:
            if i.op[0] == "ret":
                i.op, i.operands, i.target = ("bra",), (), len(kernel.code)
        for _, load in copies[: len(results)]:
            if load:
                self.emit(load, bridge, kernel, line)
        for i in skip:
            i.target = len(kernel.code)
        self.calls.pop()
        self.at, self.source, self.call_line = before

    def bind(self, n: int, formal: str, actual: str, bridge: _Scope, inside: _Scope, kernel: Kernel) -> tuple[str, str]:
        """Make a formal parameter known to the callee; the instructions that copy to and from another actual one."""
        m = _FORMAL.match(formal)
        if not m:
            raise self.error(f"cannot read {formal!r}")
        space, kind, name = m.groups()
        known = bridge.names.get(actual)
        if space == "param" and isinstance(known, Variable):
            inside.names[name] = known
            return "", ""
        self.declare(formal, inside, kernel)
        bridge.names[f"$formal{n}"] = inside.names[name]
        if space == "reg":
            return f"mov.{kind} $formal{n}, {actual}", f"mov.{kind} {actual}, $formal{n}"
        return f"st.param.{kind} [$formal{n}], {actual}", f"ld.param.{kind} {actual}, [$formal{n}]"

    def indexed_branch(self, text: str, scope: _Scope, kernel: Kernel, line: int) -> None:
        """PTX ISA, "brx.idx"; an index past the list ends in a trap."""
        guard, _, rest = self.split(text, scope, line)
        index, targets = _items(rest)
        if targets not in scope.targets:
            raise PtxSyntaxError(f"PTX line {line}: no .branchtargets {targets!r}")
        skip = self.skip(guard, kernel, line, text)
        equal = Reg(len(kernel.registers), 0, "$equal")
        kernel.registers.append(equal)
        scope.names[equal.name] = equal
        for n, label in enumerate(scope.targets[targets]):
            self.emit(f"setp.eq.u32 $equal, {index}, {n}", scope, kernel, line).text = text
            self.emit(f"@$equal bra {label}", scope, kernel, line).text = text
        self.emit("trap", scope, kernel, line).text = text
        for i in skip:
            i.target = len(kernel.code)

    def close(self, scope: _Scope, end: int) -> None:
        for branch in scope.branches:
            (label, *_) = [x.name for x in branch.operands if isinstance(x, Sym)] or [""]
            if label in scope.labels:
                branch.target = scope.labels[label]
            elif scope.parent:
                scope.parent.branches.append(branch)
            else:
                raise PtxSyntaxError(f"PTX line {branch.line}: no label {label!r}")

    def declare(self, text: str, scope: _Scope, kernel: Kernel) -> None:
        m = _REG.match(text)
        if not m:
            variable = self.variable(text)
            if variable:
                scope.names[variable.name] = self.placed(variable, kernel)
            return
        if m[1] not in TYPE_BYTES:
            raise self.error(f"register type .{m[1]} is not known")
        size = 0 if m[1] == "pred" else TYPE_BYTES[m[1]]
        for item in m[2].split(","):
            ranged = re.match(rf"\s*({_IDENT})\s*(?:<(\d+)>)?\s*$", item)
            if not ranged:
                raise self.error(f"cannot read {text[:60]!r}")
            names = [f"{ranged[1]}{i}" for i in range(int(ranged[2]))] if ranged[2] else [ranged[1]]
            for name in names:
                reg = Reg(len(kernel.registers), size, name)
                kernel.registers.append(reg)
                scope.names[name] = reg

    def placed(self, variable: Variable, kernel: Kernel) -> Variable:
        """A variable of a body, under a name of its own: one for every scope, if it is the thread's."""
        name, space = variable.name, variable.space
        if space in ("param", "local"):
            if name in kernel.variables:
                name = f"{name}${len(kernel.variables)}"
            space = "local"
        elif self.calls:
            name = f"{self.calls[-1]}${name}"
        made = Variable(name, space, variable.size, variable.align, variable.data)
        return kernel.variables.setdefault(name, made)

    def split(self, text: str, scope: _Scope, line: int) -> tuple[Reg | None, tuple[str, ...], str]:
        """Guard, parts of the opcode, text of the operands."""
        guard = None
        if m := _GUARD.match(text):
            reg = scope.names.get(m[2])
            if not isinstance(reg, Reg):
                raise PtxSyntaxError(f"PTX line {line}: no predicate {m[2]!r}")
            guard = Reg(reg.index, reg.size, reg.name, m[1] == "!")
            text = text[m.end() :]
        opcode, _, rest = text.partition(" ")
        return guard, tuple(opcode.replace("::", ":").split(".")), rest

    def instruction(self, text: str, scope: _Scope, line: int) -> Instruction:
        guard, op, rest = self.split(text, scope, line)
        try:
            operands = tuple(self.operand(x, scope) for x in _split(rest))
        except PtxSyntaxError as e:
            raise PtxSyntaxError(f"PTX line {line}: {e} in {text!r}") from None
        return Instruction(op, operands, guard, line, text, self.source)

    def operand(self, text: str, scope: _Scope) -> Operand:
        text = text.strip()
        name = scope.names.get(text)
        if isinstance(name, Reg) and text != "_":  # as most are
            return name
        if text.startswith("{"):
            return Vec(tuple(self.operand(x, scope) for x in _split(text[1:-1])))
        if text.startswith("["):
            first, *rest = _split(text[1:-1])
            m = _BASE_AND_OFFSET.match(first)
            if not m:
                raise PtxSyntaxError(f"address {text!r}")
            return Address(
                self.operand(m[1], scope), int(m[2], 0) if m[2] else 0, tuple(self.operand(x, scope) for x in rest)
            )
        if "|" in text:
            first, second = text.split("|")
            return Pair(self.operand(first, scope), self.operand(second, scope))
        if text == "_":
            return Sink()
        if text.startswith("!"):
            reg = self.operand(text[1:], scope)
            assert isinstance(reg, Reg)
            return Reg(reg.index, reg.size, reg.name, True)
        if (number := _number(text)) is not None:
            return number
        if text == "WARP_SZ":
            return Imm(32)
        if m := _NAME_AND_OFFSET.match(text):
            base = scope.names.get(m[1])
            return Sym(base.name if base else m[1], int(m[2]))
        if name is not None:
            return Sym(name.name)
        if _SPECIAL.match(text):
            return Special(text)
        if _NAME.fullmatch(text):
            if text.startswith("%"):
                raise PtxSyntaxError(f"no register {text!r}")
            return Sym(text)
        raise PtxSyntaxError(f"operand {text!r}")


def _number(text: str) -> Imm | None:
    if not _NUMBER.match(text):
        return None
    negative, digits = text.startswith("-"), text.lstrip("-")
    if digits[:2] in ("0f", "0F"):
        return Imm(int(digits[2:], 16) ^ (negative << 31), 4)
    if digits[:2] in ("0d", "0D"):
        return Imm(int(digits[2:], 16) ^ (negative << 63), 8)
    if "." in digits:
        return Imm(int.from_bytes(struct.pack("<d", float(text)), "little"), 8)
    value = int(digits.rstrip("U"), 0 if digits[:2] in ("0x", "0X") else 10)
    return Imm(-value if negative else value)


def _items(text: str | None) -> list[str]:
    return [x.strip() for x in (text or "").split(",") if x.strip()]


def _split(text: str) -> list[str]:
    """At the commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for m in _BRACKETS_AND_COMMAS.finditer(text):
        char = m[0]
        if char == ",":
            if depth == 0:
                parts.append(text[start : m.start()])
                start = m.end()
        else:
            depth += 1 if char in "[{(" else -1
    parts.append(text[start:])
    return [p for p in map(str.strip, parts) if p]
