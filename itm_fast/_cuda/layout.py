"""A struct of C++ and its twin in Python, compared by the compiler."""

from __future__ import annotations

import ctypes

_FLOATS = (ctypes.c_float, ctypes.c_double)
_INTEGERS = (
    ctypes.c_int8, ctypes.c_uint8, ctypes.c_int16, ctypes.c_uint16, ctypes.c_int32, ctypes.c_uint32, ctypes.c_int64,
    ctypes.c_uint64,
)  # fmt: skip
# NVRTC of CUDA 12 has no __builtin_offsetof, and g++ no __INTADDR__.
_PLACE = (
    "#ifdef __CUDACC_RTC__",
    "#define PLACE_OF(type, field) __INTADDR__(&((type *)0)->field)",
    "#else",
    "#define PLACE_OF(type, field) __builtin_offsetof(type, field)",
    "#endif",
)


def layout_checks(structure: type[ctypes.Structure], name: str) -> str:
    """C++ that does not compile unless a struct has the layout of its twin.

    Args:
        structure: the twin. A field that is a struct in turn is compared too, under its type's name.
        name: the struct's name in C++.

    Returns:
        A function that names as many fields as the twin has, and static_asserts: the struct's size; the place and size
        of each field; of a number, whether it is an integer. To be appended to a source that defines the struct, which
        g++ or NVRTC compiles.

    >>> class Problem(ctypes.Structure):
    ...     _fields_ = [("values", ctypes.c_void_p), ("count", ctypes.c_int)]
    >>> print(layout_checks(Problem, "Problem"))
    #ifdef __CUDACC_RTC__
    #define PLACE_OF(type, field) __INTADDR__(&((type *)0)->field)
    #else
    #define PLACE_OF(type, field) __builtin_offsetof(type, field)
    #endif
    #line 1 "Problem in Python"
    [[maybe_unused]] static __device__ void fields_of(Problem &twin) { [[maybe_unused]] auto &[values, count] = twin; }
    static_assert(sizeof(Problem) == 16, "Problem has another size in Python");
    static_assert(PLACE_OF(Problem, values) == 0, "Problem::values has another place in Python");
    static_assert(sizeof(Problem::values) == 8, "Problem::values has another size in Python");
    static_assert(PLACE_OF(Problem, count) == 8, "Problem::count has another place in Python");
    static_assert(sizeof(Problem::count) == 4, "Problem::count has another size in Python");
    static_assert(decltype(Problem::count)(0.5) == 0, "Problem::count is an integer in Python");
    <BLANKLINE>
    """
    kinds = {field: kind for field, kind, *_ in structure._fields_}
    bound = f"[[maybe_unused]] auto &[{', '.join(kinds)}] = twin;"
    lines = [
        *_PLACE,
        f'#line 1 "{name} in Python"',  # what the compiler says of a difference then begins with this
        # It does not compile where the struct has more or fewer fields.
        f"[[maybe_unused]] static __device__ void fields_of({name} &twin) {{ {bound} }}",
    ]
    checks = [f'sizeof({name}) == {ctypes.sizeof(structure)}, "{name} has another size in Python"']
    for field, kind in kinds.items():
        place, whole = getattr(structure, field), f"{name}::{field}"
        checks.append(f'PLACE_OF({name}, {field}) == {place.offset}, "{whole} has another place in Python"')
        checks.append(f'sizeof({whole}) == {place.size}, "{whole} has another size in Python"')
        if kind in _INTEGERS:
            checks.append(f'decltype({whole})(0.5) == 0, "{whole} is an integer in Python"')
        elif kind in _FLOATS:
            checks.append(f'decltype({whole})(0.5) != 0, "{whole} is a float in Python"')
    lines += [f"static_assert({check});" for check in checks]
    inner = {k.__name__: k for k in kinds.values() if issubclass(k, ctypes.Structure)}
    return "\n".join([*lines, *(layout_checks(kind, of).rstrip() for of, kind in inner.items()), ""])
