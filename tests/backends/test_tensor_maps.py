"""Tensor maps as arguments of launches on a GPU, and the switch of the kernels that take them."""

import ctypes
from types import SimpleNamespace

import pytest
from support.noting_cupy import MAP, FakeArray, FakeCupy, compile_nothing, use

from gpuback._cuda import tensor_maps
from gpuback._cuda.arguments import require_copyable
from gpuback._cuda.device import CudaLauncher
from gpuback._cuda.hopper import SWITCH, switch_in_words
from gpuback._cuda.launch import DeviceLimits, LaunchPlan, Slot, TensorMap, Variant
from gpuback.errors import BackendError, DeviceError, OptionError

COPY = Variant("copy.cu", "copy", (), tensor_cores=True, wgmma=True)
SOURCE = "KERNEL copy(const __grid_constant__ TensorMap x, int n, const __grid_constant__ TensorMap y, float* out) {}"
TYPES = MAP, ctypes.c_int32, MAP, ctypes.c_void_p
PLAN = LaunchPlan(COPY, 8, 384, cluster=8)
SOUND = TensorMap(None, columns=136, rows=1000, pitch=144, box=(64, 64), dtype="bfloat16")
ZEROS = [0] * 16

pointer, number, choice = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int


class FakeDriver:
    """A libcuda with the two functions of tensor maps, called as C's. Its maps begin with the address.

    Attributes:
        encoded: what came, call by call.
        replaced: how many addresses were replaced.
        code: what both return.
    """

    def __init__(self):
        self.encoded, self.replaced, self.code = [], 0, 0
        kinds = pointer, choice, number, pointer, pointer, pointer, pointer, pointer, *(choice,) * 4
        self.cuTensorMapEncodeTiled = ctypes.CFUNCTYPE(choice, *kinds)(self.encode)
        self.cuTensorMapReplaceAddress = ctypes.CFUNCTYPE(choice, pointer, pointer)(self.replace)

    def encode(self, place, dtype, rank, address, lengths, pitches, box, steps, *choices):
        def read(kind, count, where):
            return list((kind * count).from_address(where))

        lengths, pitches = read(ctypes.c_uint64, rank, lengths), read(ctypes.c_uint64, rank - 1, pitches)
        self.encoded.append((dtype, lengths, pitches, read(number, rank, box), read(number, rank, steps), choices))
        if not self.code:
            MAP.from_address(place)[:] = [address, len(self.encoded), *[7] * 14]
        return self.code

    def replace(self, place, address):
        self.replaced += 1
        MAP.from_address(place)[0] = address
        return self.code


@pytest.fixture(autouse=True)
def no_driver_is_kept():
    tensor_maps.load_driver.cache_clear()
    yield
    tensor_maps.load_driver.cache_clear()


@pytest.fixture
def driver(monkeypatch):
    return use_driver(monkeypatch, FakeDriver())


@pytest.fixture
def compiled(monkeypatch):
    return compile_nothing(monkeypatch, SOURCE, TYPES)


@pytest.fixture
def cupy(monkeypatch, compiled):
    return use(monkeypatch, FakeCupy(TYPES))


def use_driver(monkeypatch, library):
    """`library` is what loading libcuda gives, or raises."""

    def load(name):
        assert name in ("libcuda.so.1", "nvcuda.dll")
        if isinstance(library, Exception):
            raise library
        return library

    monkeypatch.setattr(tensor_maps, "ctypes", SimpleNamespace(**vars(ctypes) | {"CDLL": load}))
    return library


# ---- Maps


def test_a_map_is_encoded_once_and_then_follows_its_array(cupy, driver):
    x, y, out = FakeArray(0x1000), FakeArray(0x20010), FakeArray(0x3000)
    launch = CudaLauncher().bind(
        PLAN,
        out=Slot(), n=Slot(ctypes.c_int32), x=SOUND._replace(array=x),
        y=SOUND._replace(array=Slot(), dtype="float16", box=(32, 256), swizzle=64, columns=64),
    )  # fmt: skip
    assert driver.encoded == [(9, [136, 1000], [288], [64, 64], [1, 1], (0, 3, 3, 0))]
    launch(out, 5, y)
    launch(out, 6, y)
    launch(None, 7, FakeArray(0x40000))
    launch(out, 8, None)
    launch(out, 9, y)
    of_y = (6, [64, 1000], [288], [32, 256], [1, 1], (0, 2, 3, 0))
    assert driver.encoded[1:] == [of_y, of_y]  # after a null map, anew
    assert driver.replaced == 1
    map_x = [0x1000, 1, *[7] * 14]
    assert [call[4] for call in cupy.noted("launch")] == [
        [map_x, 5, [0x20010, 2, *[7] * 14], 0x3000],
        [map_x, 6, [0x20010, 2, *[7] * 14], 0x3000],
        [map_x, 7, [0x40000, 2, *[7] * 14], None],
        [map_x, 8, ZEROS, 0x3000],
        [map_x, 9, [0x20010, 3, *[7] * 14], 0x3000],
    ]
    with pytest.raises(TypeError, match="3 open arguments: got 2"):
        launch(out, 5)


def test_a_map_of_nothing_needs_no_driver(cupy, monkeypatch):
    use_driver(monkeypatch, OSError("no library"))
    CudaLauncher().bind(PLAN, x=None, n=Slot(ctypes.c_int32), y=SOUND, out=None)(3)
    assert cupy.noted("launch")[0][4] == [ZEROS, 3, ZEROS, None]


def test_a_graph_holds_maps_by_value(cupy, driver):
    launcher = CudaLauncher()
    launch = launcher.bind(PLAN, x=SOUND._replace(array=Slot()), n=Slot(ctypes.c_int32), y=None, out=None)
    replay = launcher.capture(lambda: launch(FakeArray(0x1000), 1))
    launch(FakeArray(0x2000), 2)
    replay()
    assert cupy.noted("graph") == [(0, [[[0x1000, 1, *[7] * 14], 1, ZEROS, None]])]


def test_the_array_of_a_map_stays_alive_and_is_on_the_launchers_device(cupy, driver):
    import gc
    import weakref

    array = FakeArray(0x3000)
    alive = weakref.ref(array)
    given = {"n": Slot(ctypes.c_int32), "y": None, "out": None}
    launch = CudaLauncher().bind(PLAN, x=SOUND._replace(array=array), **given)
    del array
    gc.collect()
    assert alive() is not None
    del launch
    gc.collect()
    assert alive() is None
    with pytest.raises(DeviceError, match="argument 'x': expected an array on CUDA device 0, got one on device 1"):
        CudaLauncher().bind(PLAN, x=SOUND._replace(array=FakeArray(0x3000, device_id=1)), **given)


@pytest.mark.parametrize("wrong", [{"x": FakeArray(0x1000)}, {"out": SOUND}])
def test_maps_and_pointers_are_not_confused(cupy, driver, wrong):
    given = {"x": None, "n": Slot(ctypes.c_int32), "y": None, "out": None} | wrong
    with pytest.raises(TypeError, match=r"copy\.cu copy: expected 4 arguments of 128, 4, 128, 8 bytes, got 4 of"):
        CudaLauncher().bind(PLAN, **given)


@pytest.mark.parametrize(
    ("changes", "address", "message"),
    [
        ({"dtype": "float32"}, 0, "a dtype of bfloat16, float16, got 'float32'"),
        ({"swizzle": 32}, 0, "a swizzle of 64 or 128 bytes, got 32"),
        ({"columns": 0}, 0, r"columns from 1 to 2\^32, got 0"),
        ({"rows": 2**32 + 1}, 0, r"rows from 1 to 2\^32, got 4294967297"),
        ({"box": (0, 64)}, 0, "columns of a box from 1 to 256, got 0"),
        ({"box": (64, 257)}, 0, "rows of a box from 1 to 256, got 257"),
        ({"box": (60, 64)}, 0, "a box's row of 16 bytes times n, at most the swizzle's 128, got 120 bytes"),
        ({"box": (72, 64)}, 0, "a box's row of 16 bytes times n, at most the swizzle's 128, got 144 bytes"),
        (
            {"box": (64, 64), "swizzle": 64},
            0,
            "a box's row of 16 bytes times n, at most the swizzle's 64, got 128 bytes",
        ),
        ({"pitch": 140}, 0, "a pitch of 16 bytes times n, got 280 bytes"),
        ({"pitch": 2**39}, 0, r"a pitch below 2\^40 bytes, got 1099511627776 bytes"),
        ({"pitch": 128}, 0, "a pitch of at least the 136 columns, got 128 elements"),
        ({}, 0x1008, "an address that is a multiple of 16, got 0x1008"),
    ],
)
def test_a_map_that_breaks_a_rule_never_reaches_the_driver(cupy, driver, changes, address, message):
    broken = SOUND._replace(**changes)
    with pytest.raises(BackendError, match=f"^tensor map 'x': expected {message}"):
        require_copyable("x", broken, address)
    given = {"n": Slot(ctypes.c_int32), "y": None, "out": None}
    with pytest.raises(BackendError, match="tensor map 'x'"):
        CudaLauncher().bind(PLAN, x=broken._replace(array=FakeArray(address)), **given)
    with pytest.raises(BackendError, match="tensor map 'x'"):
        CudaLauncher().bind(PLAN, x=broken._replace(array=Slot()), **given)(FakeArray(address), 1)
    assert driver.encoded == [] and cupy.noted("launch") == []


def test_a_map_at_the_limits_of_every_rule_is_sound():
    require_copyable("x", SOUND._replace(columns=1, rows=2**32, pitch=2**39 - 8, box=(8, 256)), 16)
    require_copyable("x", SOUND._replace(columns=136, pitch=136, box=(32, 1), swizzle=64), 0)


def test_what_the_driver_refuses_is_told_with_all_that_it_was_given(cupy, driver):
    given = {"n": Slot(ctypes.c_int32), "y": None, "out": None}
    launch = CudaLauncher().bind(PLAN, x=SOUND._replace(array=Slot()), **given)
    driver.code = 1
    described = r"cuTensorMapEncodeTiled returned error 1 for a matrix at 0x1000, .*columns=136.*box=\(64, 64\)"
    with pytest.raises(BackendError, match=described):
        launch(FakeArray(0x1000), 1)
    driver.code = 0
    launch(FakeArray(0x1000), 1)
    driver.code = 201
    with pytest.raises(BackendError, match="cuTensorMapReplaceAddress returned error 201 for a matrix at 0x2000"):
        launch(FakeArray(0x2000), 1)
    assert len(cupy.noted("launch")) == 1


# ---- Clusters


def test_a_grid_has_whole_clusters(cupy, compiled):
    with pytest.raises(BackendError, match="copy has clusters of 8 blocks: .*a multiple of 8, got 12 blocks"):
        CudaLauncher().bind(PLAN._replace(grid=12), x=None, n=Slot(ctypes.c_int32), y=None, out=None)
    assert compiled == []


# ---- The switch


@pytest.mark.parametrize(("value", "on"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_the_switch_lets_plans_use_kernels_for_hopper(cupy, driver, monkeypatch, value, on):
    if value is None:
        monkeypatch.delenv(SWITCH, raising=False)
    else:
        monkeypatch.setenv(SWITCH, value)
    assert CudaLauncher().limits == DeviceLimits((9, 0), 232448, 132, wgmma=on)


@pytest.mark.parametrize("capability", ["80", "89", "100", "120"])
def test_the_switch_on_another_device_names_what_it_is(monkeypatch, compiled, driver, capability):
    use(monkeypatch, FakeCupy(TYPES, capability=capability))
    shown = f"{capability[:-1]}\\.{capability[-1]}"
    bind = {"x": None, "n": Slot(ctypes.c_int32), "y": None, "out": None}
    with pytest.raises(BackendError, match=rf"copy needs a GPU of compute capability 9\.0 .*device 0 has {shown};"):
        CudaLauncher().bind(PLAN, **bind)
    assert compiled == []
    monkeypatch.setenv(SWITCH, "1")
    with pytest.raises(
        BackendError, match=rf"^GPUBACK_HOPPER=1 needs .* capability 9\.0 .* has {shown}; unset GPUBACK_HOPPER"
    ):
        CudaLauncher()


@pytest.mark.parametrize(
    ("library", "message"),
    [
        (
            SimpleNamespace(),
            r"need the driver of CUDA 12\.0 or later \(525\.60 on Linux\); this one has no tensor maps",
        ),
        (OSError("libcuda.so.1: not there"), r"CUDA 12\.0 or later.*cannot be loaded: libcuda\.so\.1: not there"),
    ],
)
def test_a_driver_without_tensor_maps_is_told_which_is_needed(cupy, monkeypatch, library, message):
    use_driver(monkeypatch, library)
    CudaLauncher()
    monkeypatch.setenv(SWITCH, "1")
    with pytest.raises(BackendError, match=message):
        CudaLauncher()


@pytest.mark.parametrize("value", ["2", "yes", " 1"])
def test_another_value_of_the_switch_is_refused(cupy, monkeypatch, value):
    monkeypatch.setenv(SWITCH, value)
    with pytest.raises(OptionError, match=f"environment variable GPUBACK_HOPPER: expected 0 or 1, got '{value}'"):
        CudaLauncher()


def test_the_switch_in_words():
    on, off, other = DeviceLimits((9, 0), 1, 1, wgmma=True), DeviceLimits((9, 0), 1, 1), DeviceLimits((8, 0), 1, 1)
    assert switch_in_words(on) == "kernels for Hopper are on (GPUBACK_HOPPER=1)"
    assert switch_in_words(off) == "kernels for Hopper are off (GPUBACK_HOPPER=1 turns them on)"
    assert switch_in_words(other) == ""
