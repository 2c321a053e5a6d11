"""The structs of launch.h, field by field."""

import ctypes


class Parameter(ctypes.Structure):
    _fields_ = (
        ("is_pointer", ctypes.c_bool),
        ("is_const", ctypes.c_bool),
        ("kind", ctypes.c_char),
        ("size", ctypes.c_int),
    )


class Entry(ctypes.Structure):
    _fields_ = (
        ("call", ctypes.c_void_p),
        ("parameter_count", ctypes.c_int),
        ("parameters", ctypes.POINTER(Parameter)),
        ("parameter_names", ctypes.c_char_p),
        ("cluster", ctypes.c_int),
        ("library_begin", ctypes.c_void_p),
        ("library_end", ctypes.c_void_p),
    )


class Counters(ctypes.Structure):
    _fields_ = (
        ("barriers", ctypes.c_int64),
        ("matrix_products", ctypes.c_int64),
        ("matrix_loads", ctypes.c_int64),
        ("asynchronous_copies", ctypes.c_int64),
        ("warpgroup_products", ctypes.c_int64),
        ("bulk_loads", ctypes.c_int64),
        ("bulk_stores", ctypes.c_int64),
        ("extra_wavefronts_read", ctypes.c_int64),
        ("extra_wavefronts_written", ctypes.c_int64),
    )


class Settings(ctypes.Structure):
    _fields_ = (
        ("order", ctypes.c_int),
        ("landing", ctypes.c_int),
        ("resident_blocks", ctypes.c_int),
        ("checked", ctypes.c_bool),
        ("truncate", ctypes.c_bool),
        ("random_state", ctypes.c_uint64),
        ("counters", Counters),
    )


class ConflictSite(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_void_p),
        ("extra_wavefronts_read", ctypes.c_int64),
        ("extra_wavefronts_written", ctypes.c_int64),
    )


class Array(ctypes.Structure):
    _fields_ = (
        ("begin", ctypes.c_void_p),
        ("end", ctypes.c_void_p),
        ("writable", ctypes.c_bool),
        ("bytes_read", ctypes.c_int64),
        ("bytes_written", ctypes.c_int64),
        ("atomics", ctypes.c_int64),
    )


class Launch(ctypes.Structure):
    _fields_ = (
        ("entry", ctypes.POINTER(Entry)),
        ("grid", ctypes.c_int),
        ("block", ctypes.c_int),
        ("cluster", ctypes.c_int),
        ("shared_bytes", ctypes.c_int64),
        ("arguments", ctypes.c_void_p),
        ("arrays", ctypes.POINTER(Array)),
        ("array_count", ctypes.c_int),
        ("settings", ctypes.POINTER(Settings)),
    )


class Failure(ctypes.Structure):
    _fields_ = (
        ("message", ctypes.c_char * 1000),
        ("block", ctypes.c_int),
        ("thread", ctypes.c_int),
        ("address", ctypes.c_void_p),
        ("code", ctypes.c_void_p),
    )
