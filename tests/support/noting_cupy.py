"""A CuPy that only notes down what reaches the driver, and a compiler that compiles nothing."""

import ctypes
import sys
from pathlib import Path
from types import SimpleNamespace

from gpuback._cuda import device
from gpuback._cuda.compiler import Compiled, Resources

MAP = ctypes.c_uint64 * 16


def value_at(kind, address):
    """A parameter as the driver copies it."""
    if kind is not MAP:
        return kind.from_address(address).value
    assert address % 64 == 0
    return list(MAP.from_address(address))


class FakeArray:
    def __init__(self, address, device_id=0):
        self.data = SimpleNamespace(ptr=address)
        self.device = SimpleNamespace(id=device_id)


class FakeStream:
    """What is launched while it is captured goes into a graph. Refuses what CuPy's streams refuse."""

    def __init__(self, owner, pointer):
        self.owner, self.ptr, self.captured = owner, pointer, None

    def __enter__(self):
        self.before, self.owner.stream = self.owner.stream, self
        return self

    def __exit__(self, *exception):
        self.owner.stream = self.before

    def record(self, event):
        self.owner.note("record", event.number, self.ptr)

    def wait_event(self, event):
        self.owner.note("wait", event.number, self.ptr)

    def begin_capture(self, mode=None):
        self.owner.note("begin capture", self.ptr)
        assert self.ptr not in (0, 1), "cannot capture on the default (legacy) stream"
        self.captured = []

    def is_capturing(self):
        self.owner.note("is capturing", self.ptr)
        return self.captured is not None

    def end_capture(self):
        captured, self.captured = self.captured, None
        assert captured is not None
        self.owner.note("end capture", self.ptr)

        def launch(stream=None):
            stream = self.owner.stream if stream is None else stream
            self.owner.note("graph", stream.ptr, captured)

        return SimpleNamespace(launch=launch)


class FakeCupy:
    """Notes down what it is asked to do. `calls`: (what, …). `types`: of the kernel's parameters."""

    def __init__(self, types, capability="90", shared_bytes=232448, devices=1, threads=1024):
        self.types = types
        self.calls = []
        self.current = 0
        self.stream = FakeStream(self, 0)
        self.refuses = {}
        owner = self

        class Device:
            def __init__(self, device_id):
                self.id = device_id
                self.compute_capability = capability

            def __enter__(self):
                self.before, owner.current = owner.current, self.id

            def __exit__(self, *exception):
                owner.current = self.before

        runtime = SimpleNamespace(
            getDevice=lambda: owner.current,
            getDeviceCount=lambda: devices,
            cudaDevAttrMaxSharedMemoryPerBlockOptin=97,
            cudaDevAttrMultiProcessorCount=16,
            deviceGetAttribute=self.get_attribute,
        )
        driver = SimpleNamespace(
            CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8,
            CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK=0,
            funcSetAttribute=lambda *arguments: self.note("set", *arguments),
            funcGetAttribute=lambda attribute, function: threads,
            launchKernel=self.launch,
        )
        self.attributes = {97: shared_bytes, 16: 132}
        self.cuda = SimpleNamespace(
            Device=Device,
            runtime=runtime,
            driver=driver,
            get_current_stream=lambda: self.stream,
            Stream=self.make_stream,
            Event=self.make_event,
            alloc_pinned_memory=lambda n_bytes: bytearray(n_bytes),
        )

    def make_stream(self, *, non_blocking):
        self.note("stream", non_blocking)
        return FakeStream(self, 0x5000 + len(self.calls))

    def make_event(self, *, block, disable_timing):
        number = len(self.noted("event"))
        self.note("event", block, disable_timing)
        return SimpleNamespace(number=number, synchronize=lambda: self.note("synchronize", number))

    def note(self, what, *details):
        self.calls.append((what, *details))
        if what in self.refuses:
            raise RuntimeError(self.refuses[what])

    def get_attribute(self, attribute, device_id):
        self.note("attribute", attribute, device_id)
        return self.attributes[attribute]

    def RawModule(self, *, path):
        self.note("load", path, self.current)

        def get_function(name):
            return SimpleNamespace(kernel=SimpleNamespace(ptr=sum(map(ord, path + name))))

        return SimpleNamespace(get_function=get_function)

    def launch(self, function, *rest):
        *shape, shared_bytes, stream, pointer, extra = rest
        cells = (ctypes.c_void_p * len(self.types)).from_address(pointer)
        values = [value_at(kind, cell) for kind, cell in zip(self.types, cells, strict=True)]
        self.note("launch", function, shape, shared_bytes, stream, values, extra, self.current)
        if self.stream.captured is not None:
            self.stream.captured.append(values)

    def noted(self, what):
        return [call[1:] for call in self.calls if call[0] == what]


def compile_nothing(monkeypatch, source, types):
    """Every variant is of this source and has parameters of these types. Returns a list of what is compiled."""
    asked = []
    sizes = tuple(ctypes.sizeof(kind) for kind in types)

    def compile_variant(variant, arch, *, folder=None):
        asked.append((variant, arch))
        return Compiled(
            Path(f"/{variant.entry}.cubin"), Resources(registers=40, shared_bytes=1024, parameter_sizes=sizes), ()
        )

    monkeypatch.setattr(device, "compile_variant", compile_variant)
    monkeypatch.setattr(device, "flatten", lambda source_file, folder: source)
    return asked


def use(monkeypatch, fake):
    monkeypatch.setitem(sys.modules, "cupy", fake)
    return fake
