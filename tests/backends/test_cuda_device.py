"""gpuback._cuda.device: what reaches the driver, seen by a CuPy that only notes it down; and on a real device."""

import ctypes
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from support import noting_cupy
from support.noting_cupy import FakeArray, FakeStream, use

from gpuback._cuda import sources
from gpuback._cuda.device import CudaLauncher
from gpuback._cuda.launch import LaunchPlan, Slot, Variant
from gpuback.errors import BackendError, DeviceError

SCALE = Variant("scale.cu", "scale", ("N=1",))
SOURCE = """
KERNEL __launch_bounds__(256) scale(const float* x, int n,  // how many
                                    float factor, double bias, float* out, void* none) {}
#define KERNELS(name) \\
  KERNEL name(const float* x, int n, float factor, double bias, float* out, void* none) {}
KERNELS(other)
"""
TYPES = (ctypes.c_void_p, ctypes.c_int32, ctypes.c_float, ctypes.c_double, ctypes.c_void_p, ctypes.c_void_p)


def fake_cupy(**properties):
    return noting_cupy.FakeCupy(TYPES, **properties)


@pytest.fixture
def compiled(monkeypatch):
    """What was asked of the compiler."""
    return noting_cupy.compile_nothing(monkeypatch, SOURCE, TYPES)


@pytest.fixture
def cupy(monkeypatch, compiled):
    return use(monkeypatch, fake_cupy())


def arguments(**changes):
    given = {
        "x": FakeArray(0x1000),
        "n": np.int32(-7),
        "factor": np.float32(0.5),
        "bias": np.float64(1e300),
        "out": Slot(),
        "none": None,
    }
    return given | changes


def test_limits_are_the_devices(cupy):
    launcher = CudaLauncher()
    assert launcher.limits.capability == (9, 0)
    assert launcher.limits.arch == "sm_90a"
    assert launcher.limits.shared_bytes == 232448
    assert launcher.limits.multiprocessors == 132


def test_capabilities_of_three_digits(monkeypatch, compiled):
    use(monkeypatch, fake_cupy(capability="120"))
    assert CudaLauncher().limits.capability == (12, 0)


def test_arguments_slots_shape_and_stream_reach_the_launch(cupy):
    launch = CudaLauncher().bind(LaunchPlan(SCALE, 5, 256, 4096), **arguments(n=Slot(np.int32)))
    launch(np.int32(41), FakeArray(0x2000))
    with FakeStream(cupy, 0x77):
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
    launch = CudaLauncher().bind(LaunchPlan(SCALE, 1, 32), **arguments(x=array))
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
        launcher.bind(LaunchPlan(SCALE, grid, 32), **arguments())
    launcher.bind(LaunchPlan(SCALE._replace(entry="other"), 1, 32), **arguments())
    assert compiled == [(SCALE, "sm_90a"), (SCALE._replace(entry="other"), "sm_90a")]
    assert cupy.noted("load") == [("/scale.cubin", 0), ("/other.cubin", 0)]


def test_shared_memory_beyond_48_kb_is_asked_for_and_never_lowered(cupy):
    launcher = CudaLauncher()
    function = sum(map(ord, "/scale.cubinscale"))
    # 1 KB of the 48 are static.
    for shared_bytes in (47 * 1024, 100_000, 50_000, 200_000):
        launcher.bind(LaunchPlan(SCALE, 1, 32, shared_bytes), **arguments())
    assert cupy.noted("set") == [(function, 8, 100_000), (function, 8, 200_000)]


def test_too_little_shared_memory_names_both_numbers(monkeypatch, compiled):
    use(monkeypatch, fake_cupy(shared_bytes=101376))
    with pytest.raises(BackendError, match=r"scale N=1 needs 101377 bytes of shared memory.*device 0 has 101376"):
        CudaLauncher().bind(LaunchPlan(SCALE, 1, 32, 101377), **arguments())
    assert compiled == []


def test_an_old_device_is_refused_tensor_cores_before_anything_is_compiled(monkeypatch, compiled):
    use(monkeypatch, fake_cupy(capability="75"))
    with pytest.raises(BackendError, match=r"needs a GPU of compute capability 8\.0.*has 7\.5.*dtype='float32'"):
        CudaLauncher().bind(LaunchPlan(SCALE._replace(tensor_cores=True), 1, 32), **arguments())
    assert compiled == []
    CudaLauncher().bind(LaunchPlan(SCALE, 1, 32), **arguments())


def test_too_many_threads_name_the_registers(monkeypatch, compiled):
    use(monkeypatch, fake_cupy(threads=512))
    with pytest.raises(BackendError, match=r"needs blocks of 1024 threads.*allows 512 with its 40 registers"):
        CudaLauncher().bind(LaunchPlan(SCALE, 1, 1024), **arguments())


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
        CudaLauncher().bind(LaunchPlan(SCALE, 5, 256, 64_000), **arguments())(None)
    assert "CUDA_ERROR_OF_SOME_KIND" in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [arguments(n=np.int64(1)), arguments(factor=Slot(np.float64))],
)
def test_arguments_that_do_not_fit_the_kernel_are_refused(cupy, wrong):
    with pytest.raises(TypeError, match=r"scale N=1: expected 6 arguments of 8, 4, 4, 8, 8, 8 bytes, got"):
        CudaLauncher().bind(LaunchPlan(SCALE, 1, 32), **wrong)


def test_names_that_the_kernel_does_not_have_are_refused(cupy):
    given = arguments()
    del given["none"]
    with pytest.raises(TypeError, match=r"arguments x, n, factor, bias, out, none; got .*; missing: none; unknown: y"):
        CudaLauncher().bind(LaunchPlan(SCALE, 1, 32), **given, y=None)
    with pytest.raises(TypeError, match="multiple values for keyword argument 'x'"):
        CudaLauncher().bind(LaunchPlan(SCALE, 1, 32), x=None, **given)


def test_slots_take_values_in_the_order_in_which_they_are_given(cupy):
    given = arguments(bias=Slot(np.float64), n=Slot(np.int32))
    launch = CudaLauncher().bind(LaunchPlan(SCALE, 1, 32), **dict(reversed(given.items())))
    launch(FakeArray(0x2000), 0.25, 3)
    assert cupy.noted("launch")[0][4] == [0x1000, 3, 0.5, 0.25, 0x2000, None]


def test_a_kernel_runs_on_its_own_device(monkeypatch, compiled):
    cupy = use(monkeypatch, fake_cupy(devices=2))
    launch = CudaLauncher(1).bind(LaunchPlan(SCALE, 1, 32), **arguments(x=FakeArray(0x1000, device_id=1)))
    launch(None)
    cupy.current = 1
    launch(None)
    assert cupy.noted("load") == [("/scale.cubin", 1)]
    assert [call[-1] for call in cupy.noted("launch")] == [1, 1]
    with pytest.raises(DeviceError, match="argument 'x': expected an array on CUDA device 1, got one on device 0"):
        CudaLauncher(1).bind(LaunchPlan(SCALE, 1, 32), **arguments())


def test_a_record_is_a_graph_captured_on_a_stream_of_its_own(cupy):
    launcher = CudaLauncher()
    launch = launcher.bind(LaunchPlan(SCALE, 1, 32), **arguments(n=Slot(np.int32)))

    def work():
        assert launcher.capturing()
        launch(1, FakeArray(0x2000))
        launch(2, None)

    replay = launcher.capture(work)
    assert not launcher.capturing() and cupy.stream.ptr == 0
    assert cupy.noted("stream") == [(True,)]  # it does not wait for the default stream
    (stream,) = {call[3] for call in cupy.noted("launch")}
    assert cupy.noted("begin capture") == cupy.noted("end capture") == [(stream,)]
    assert stream not in (0, 1) and cupy.noted("graph") == []
    replay()
    with FakeStream(cupy, 0x77):
        replay()
    values = [[0x1000, 1, 0.5, 1e300, 0x2000, None], [0x1000, 2, 0.5, 1e300, None, None]]
    assert cupy.noted("graph") == [(0, values), (0x77, values)]  # on whichever stream is the current one
    assert len(cupy.noted("launch")) == 2


def test_whether_a_stream_is_captured_is_asked_of_streams_that_can_be(cupy):
    launcher = CudaLauncher()
    for pointer in (0, 1):  # the default stream, asked while another is captured, would raise
        with FakeStream(cupy, pointer):
            assert not launcher.capturing()
    assert cupy.noted("is capturing") == []
    with FakeStream(cupy, 0x77) as stream:
        assert not launcher.capturing()
        stream.begin_capture()
        assert launcher.capturing()
        stream.end_capture()
        assert not launcher.capturing()


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt(), MemoryError("no room")])
@pytest.mark.parametrize("ends", [True, False])
def test_whatever_happens_a_capture_is_ended(cupy, error, ends):
    launcher = CudaLauncher()
    if not ends:
        cupy.refuses["end capture"] = "cudaErrorStreamCaptureInvalidated"

    def work():
        raise error

    with pytest.raises(type(error)) as caught:
        launcher.capture(work)
    assert caught.value is error
    assert len(cupy.noted("end capture")) == 1 and cupy.stream.ptr == 0


@pytest.mark.parametrize("what", ["stream", "begin capture", "launch", "end capture"])
def test_a_graph_that_cannot_be_recorded_is_told_with_its_reason(cupy, what):
    launcher = CudaLauncher()
    launch = launcher.bind(LaunchPlan(SCALE, 1, 32), **arguments())
    cupy.refuses[what] = "CUDA_ERROR_OF_SOME_KIND"
    with pytest.raises(BackendError, match=r"CUDA device 0 could not capture a CUDA graph: .*CUDA_ERROR_OF_SOME_KIND"):
        launcher.capture(lambda: launch(None))
    assert cupy.stream.ptr == 0 and len(cupy.noted("end capture")) == (what in ("launch", "end capture"))


def test_a_graph_that_cannot_be_launched_is_told_with_its_reason(cupy):
    replay = CudaLauncher().capture(lambda: None)
    cupy.refuses["graph"] = "CUDA_ERROR_OF_SOME_KIND"
    with pytest.raises(BackendError, match=r"a CUDA graph could not be launched on CUDA device 0: CUDA_ERROR"):
        replay()


def test_copies_are_queued(cupy):
    copied = []
    source, target = FakeArray(0x1000), FakeArray(0x2000)
    source.nbytes = target.nbytes = 48
    target.data.copy_from_device_async = lambda *given: copied.append(given)
    CudaLauncher().copy(source, target)
    assert copied == [(source.data, 48)]


def test_copies_are_ordered_by_events_on_a_stream_of_their_own(cupy):
    launcher = CudaLauncher()
    copies = launcher.copy_stream(2)
    assert cupy.noted("stream") == [(True,)]  # it does not wait for the default stream
    (own,) = {stream.ptr for stream in (copies._stream, launcher.copy_stream(2)._stream)}
    copied, done, queued = (
        [event.number for event in events] for events in (copies._copied, copies._done, [copies._queued])
    )
    assert len({*copied, *done, *queued}) == 5 and set(cupy.noted("event")) == {(True, True)}

    buffer = copies.host_buffer(24)
    buffer.view(np.float32)[...] = 7
    target = SimpleNamespace(set=lambda source, stream: cupy.note("set array", source.tolist(), stream.ptr))
    cupy.calls.clear()
    with FakeStream(cupy, 0x77):
        copies.follow()
    with copies.scope():
        assert cupy.stream.ptr == own
        copies.wait_for_step(1)
        copies.copy(buffer.view(np.float32), target)
        copies.record(1)
    with FakeStream(cupy, 0x77):
        copies.acquire(1)
        copies.release(1)
    assert cupy.stream.ptr == 0
    assert cupy.calls == [
        ("record", queued[0], 0x77),
        ("wait", queued[0], own),
        ("synchronize", done[1]),
        ("set array", [7.0] * 6, own),
        ("record", copied[1], own),
        ("wait", copied[1], 0x77),
        ("record", done[1], 0x77),
    ]


def test_copies_go_to_their_own_device(monkeypatch, compiled):
    cupy = use(monkeypatch, fake_cupy(devices=2))
    copies = CudaLauncher(1).copy_stream(1)
    current = cupy.cuda.get_current_stream
    cupy.cuda.get_current_stream = lambda: cupy.note("current stream of", cupy.current) or current()
    copies.follow()
    copies.acquire(0)
    copies.release(0)
    assert set(cupy.noted("current stream of")) == {(1,)} and cupy.current == 0
    with copies.scope():
        assert cupy.current == 1


def test_no_cupy_and_no_device_are_named(monkeypatch, compiled):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(BackendError, match=r"needs CuPy.*\.\[cuda13\]"):
        CudaLauncher()
    cupy = use(monkeypatch, fake_cupy())
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
#define KERNEL extern "C" __global__ void
KERNEL affine(const float* x, float* y, int n, float factor, double bias) {
  extern __shared__ float kept[];
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  kept[LAST - threadIdx.x] = i < n ? x[i] : 0;
  __syncthreads();
  if (i < n) y[i] = kept[LAST - threadIdx.x] * factor + (float)bias;
}
"""
    (tmp_path / "affine.cu").write_text(source)
    monkeypatch.setattr(sources, "kernels_folder", lambda: tmp_path)
    monkeypatch.setenv("GPUBACK_CACHE_DIR", str(tmp_path / "kept"))
    launcher = CudaLauncher()
    shared_bytes = launcher.limits.shared_bytes
    plan = LaunchPlan(Variant("affine.cu", "affine", (f"LAST={shared_bytes // 4 - 1}",)), 4, 256, shared_bytes)
    host = np.arange(1000, dtype=np.float32)
    x, y, z = cupy.asarray(host), cupy.empty(1000, np.float32), cupy.empty(1000, np.float32)
    launch = launcher.bind(plan, x=x, y=Slot(), n=np.int32(1000), factor=Slot(np.float32), bias=np.float64(0.5))
    with cupy.cuda.Stream(non_blocking=True) as stream:
        launch(y, 2.0)
        stream.synchronize()
    launch(z, -1.0)
    np.testing.assert_array_equal(cupy.asnumpy(y), host * 2 + np.float32(0.5))
    np.testing.assert_array_equal(cupy.asnumpy(z), np.float32(0.5) - host)
    with pytest.raises(BackendError, match="shared memory"):
        ints = {"n": np.int32(1), "factor": np.float32(1), "bias": np.float64(0)}
        launcher.bind(plan._replace(shared_bytes=shared_bytes + 1), x=x, y=y, **ints)
    with pytest.raises(TypeError, match="missing: factor, bias"):
        launcher.bind(plan, x=x, y=y, n=np.int32(1))
