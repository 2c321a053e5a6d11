"""gpuback.cuda.device: what reaches the driver, seen by a CuPy that only notes it down; and on a real device."""

import ctypes
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from gpuback.cuda import device, sources
from gpuback.cuda.compiler import Compiled, Resources
from gpuback.cuda.device import CudaLauncher
from gpuback.cuda.launch import LaunchPlan, Slot, Variant
from gpuback.errors import BackendError, DeviceError

SCALE = Variant("scale.cu", "scale", ("N=1",))
TYPES = (ctypes.c_void_p, ctypes.c_int32, ctypes.c_float, ctypes.c_double, ctypes.c_void_p, ctypes.c_void_p)
SIZES = tuple(ctypes.sizeof(kind) for kind in TYPES)


class FakeArray:
    def __init__(self, address, device_id=0):
        self.data = SimpleNamespace(ptr=address)
        self.device = SimpleNamespace(id=device_id)


class FakeCupy:
    """Notes down what it is asked to do. `calls`: (what, …)."""

    def __init__(self, capability="90", shared_bytes=232448, devices=1, threads=1024):
        self.calls = []
        self.current = 0
        self.stream = 0
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
            get_current_stream=lambda: SimpleNamespace(ptr=self.stream),
        )

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
        cells = (ctypes.c_void_p * len(TYPES)).from_address(pointer)
        values = [kind.from_address(cell).value for kind, cell in zip(TYPES, cells, strict=True)]
        self.note("launch", function, shape, shared_bytes, stream, values, extra, self.current)

    def noted(self, what):
        return [call[1:] for call in self.calls if call[0] == what]


@pytest.fixture
def compiled(monkeypatch):
    """What was asked of the compiler."""
    asked = []

    def compile_variant(variant, arch, *, folder=None):
        asked.append((variant, arch))
        resources = Resources(registers=40, shared_bytes=1024, parameter_sizes=SIZES)
        return Compiled(Path(f"/{variant.entry}.cubin"), resources, ())

    monkeypatch.setattr(device, "compile_variant", compile_variant)
    return asked


@pytest.fixture
def cupy(monkeypatch, compiled):
    return use(monkeypatch, FakeCupy())


def use(monkeypatch, fake):
    monkeypatch.setitem(sys.modules, "cupy", fake)
    return fake


def arguments(**changes):
    given = {
        "x": FakeArray(0x1000),
        "n": np.int32(-7),
        "factor": np.float32(0.5),
        "bias": np.float64(1e300),
        "out": Slot(),
        "none": None,
    }
    return list((given | changes).values())


def test_limits_are_the_devices(cupy):
    launcher = CudaLauncher()
    assert launcher.limits.capability == (9, 0)
    assert launcher.limits.arch == "sm_90a"
    assert launcher.limits.shared_bytes == 232448
    assert launcher.limits.multiprocessors == 132


def test_capabilities_of_three_digits(monkeypatch, compiled):
    use(monkeypatch, FakeCupy(capability="120"))
    assert CudaLauncher().limits.capability == (12, 0)


def test_arguments_slots_shape_and_stream_reach_the_launch(cupy):
    launch = CudaLauncher().bind(LaunchPlan(SCALE, 5, 256, 4096), arguments(n=Slot(np.int32)))
    launch(np.int32(41), FakeArray(0x2000))
    cupy.stream = 0x77
    launch(42, None)
    function = sum(map(ord, "/scale.cubinscale"))
    shape = [5, 1, 1, 256, 1, 1]
    assert cupy.noted("launch") == [
        (function, shape, 4096, 0, [0x1000, 41, 0.5, 1e300, 0x2000, None], 0, 0),
        (function, shape, 4096, 0x77, [0x1000, 42, 0.5, 1e300, None, None], 0, 0),
    ]
    with pytest.raises(TypeError, match="2 open arguments: got 1"):
        launch(1)


def test_arguments_stay_alive_with_the_launch_alone(cupy):
    import gc
    import weakref

    array = FakeArray(0x3000)
    alive = weakref.ref(array)
    launch = CudaLauncher().bind(LaunchPlan(SCALE, 1, 32), arguments(x=array))
    del array
    gc.collect()
    launch(None)
    assert cupy.noted("launch")[0][4][0] == 0x3000
    assert alive() is not None
    del launch
    gc.collect()
    assert alive() is None


def test_a_variant_is_compiled_and_loaded_once(cupy, compiled):
    launcher = CudaLauncher()
    for grid in (1, 2):
        launcher.bind(LaunchPlan(SCALE, grid, 32), arguments())
    launcher.bind(LaunchPlan(SCALE._replace(entry="other"), 1, 32), arguments())
    assert compiled == [(SCALE, "sm_90a"), (SCALE._replace(entry="other"), "sm_90a")]
    assert cupy.noted("load") == [("/scale.cubin", 0), ("/other.cubin", 0)]


def test_shared_memory_beyond_48_kb_is_asked_for_and_never_lowered(cupy):
    launcher = CudaLauncher()
    function = sum(map(ord, "/scale.cubinscale"))
    # 1 KB of the 48 are static.
    for shared_bytes in (47 * 1024, 100_000, 50_000, 200_000):
        launcher.bind(LaunchPlan(SCALE, 1, 32, shared_bytes), arguments())
    assert cupy.noted("set") == [(function, 8, 100_000), (function, 8, 200_000)]


def test_too_little_shared_memory_names_both_numbers(monkeypatch, compiled):
    use(monkeypatch, FakeCupy(shared_bytes=101376))
    with pytest.raises(BackendError, match=r"scale N=1 needs 101377 bytes of shared memory.*device 0 has 101376"):
        CudaLauncher().bind(LaunchPlan(SCALE, 1, 32, 101377), arguments())
    assert compiled == []


def test_an_old_device_is_refused_tensor_cores_before_anything_is_compiled(monkeypatch, compiled):
    monkeypatch.setattr(device, "_tensor_core_variants", lambda: frozenset([SCALE]))
    use(monkeypatch, FakeCupy(capability="75"))
    with pytest.raises(BackendError, match=r"needs a GPU of compute capability 8\.0.*has 7\.5.*dtype='float32'"):
        CudaLauncher().bind(LaunchPlan(SCALE, 1, 32), arguments())
    assert compiled == []
    CudaLauncher().bind(LaunchPlan(SCALE._replace(entry="plain"), 1, 32), arguments())


def test_too_many_threads_name_the_registers(monkeypatch, compiled):
    use(monkeypatch, FakeCupy(threads=512))
    with pytest.raises(BackendError, match=r"needs blocks of 1024 threads.*allows 512 with its 40 registers"):
        CudaLauncher().bind(LaunchPlan(SCALE, 1, 1024), arguments())


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("load", r"scale\.cu scale N=1, compiled for sm_90a, cannot be loaded on CUDA device 0: .*update the driver"),
        ("set", r"could not be prepared on CUDA device 0.*64000 bytes of shared memory of 232448"),
        ("launch", r"could not be launched on CUDA device 0 \(sm_90a\).*5 blocks of 256 threads with 40 registers"),
    ],
)
def test_what_the_driver_refuses_is_told_with_its_reason(cupy, what, message):
    cupy.refuses[what] = "CUDA_ERROR_OF_SOME_KIND"
    with pytest.raises(BackendError, match=message) as caught:
        CudaLauncher().bind(LaunchPlan(SCALE, 5, 256, 64_000), arguments())(None)
    assert "CUDA_ERROR_OF_SOME_KIND" in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [arguments()[:-1], [*arguments(), np.int32(1)], arguments(n=np.int64(1)), arguments(factor=Slot(np.float64))],
)
def test_arguments_that_do_not_fit_the_kernel_are_refused(cupy, wrong):
    with pytest.raises(TypeError, match=r"scale N=1: expected 6 arguments of 8, 4, 4, 8, 8, 8 bytes, got"):
        CudaLauncher().bind(LaunchPlan(SCALE, 1, 32), wrong)


def test_a_kernel_runs_on_its_own_device(monkeypatch, compiled):
    cupy = use(monkeypatch, FakeCupy(devices=2))
    launch = CudaLauncher(1).bind(LaunchPlan(SCALE, 1, 32), arguments(x=FakeArray(0x1000, device_id=1)))
    launch(None)
    cupy.current = 1
    launch(None)
    assert cupy.noted("load") == [("/scale.cubin", 1)]
    assert [call[-1] for call in cupy.noted("launch")] == [1, 1]
    with pytest.raises(DeviceError, match="argument 0: expected an array on CUDA device 1, got one on device 0"):
        CudaLauncher(1).bind(LaunchPlan(SCALE, 1, 32), arguments())


def test_no_cupy_and_no_device_are_named(monkeypatch, compiled):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(BackendError, match=r"needs CuPy.*gpuback\[cuda13\]"):
        CudaLauncher()
    cupy = use(monkeypatch, FakeCupy())
    cupy.refuses["attribute"] = "cudaErrorInvalidDevice"
    with pytest.raises(BackendError, match="CUDA device 3 cannot be used: cudaErrorInvalidDevice"):
        CudaLauncher(3)


@pytest.mark.gpu
def test_on_a_real_device(monkeypatch, tmp_path):
    cupy = pytest.importorskip("cupy")
    try:
        cupy.empty(1)
    except RuntimeError as error:
        pytest.skip(f"no CUDA device: {error}")
    source = """
extern "C" __global__ void affine(const float* x, float* y, int n, float factor, double bias) {
  extern __shared__ float kept[];
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  kept[LAST - threadIdx.x] = i < n ? x[i] : 0;
  __syncthreads();
  if (i < n) y[i] = kept[LAST - threadIdx.x] * factor + (float)bias;
}
"""
    (tmp_path / "affine.cu").write_text(source)
    (tmp_path / "ptx.cuh").touch()
    monkeypatch.setattr(sources, "kernels_folder", lambda: tmp_path)
    monkeypatch.setenv("GPUBACK_CACHE_DIR", str(tmp_path / "kept"))
    launcher = CudaLauncher()
    shared_bytes = launcher.limits.shared_bytes
    plan = LaunchPlan(Variant("affine.cu", "affine", (f"LAST={shared_bytes // 4 - 1}",)), 4, 256, shared_bytes)
    host = np.arange(1000, dtype=np.float32)
    x, y, z = cupy.asarray(host), cupy.empty(1000, np.float32), cupy.empty(1000, np.float32)
    launch = launcher.bind(plan, [x, Slot(), np.int32(1000), Slot(np.float32), np.float64(0.5)])
    with cupy.cuda.Stream(non_blocking=True) as stream:
        launch(y, 2.0)
        stream.synchronize()
    launch(z, -1.0)
    np.testing.assert_array_equal(cupy.asnumpy(y), host * 2 + np.float32(0.5))
    np.testing.assert_array_equal(cupy.asnumpy(z), np.float32(0.5) - host)
    with pytest.raises(BackendError, match="shared memory"):
        launcher.bind(plan._replace(shared_bytes=shared_bytes + 1), [x, y, np.int32(1), np.float32(1), np.float64(0)])
    with pytest.raises(TypeError, match="expected 5 arguments"):
        launcher.bind(plan, [x, y, np.int32(1)])
