"""Fails by name for whatever is public and has no type.

    KERAS_BACKEND=torch python tools/check_types.py

Public is what `keras_randadapt.__all__` leads to: functions, modules and their
`__all__` or imports, classes with their constructors, methods and properties,
and the classes of the package that annotations name.
"""

import functools
import inspect
import sys
import types
import typing

import keras_randadapt as kra

PACKAGE = kra.__name__
# Which special methods have parameters of their own.
SPECIAL = ("__init__", "__call__", "__getitem__", "__iter__", "__len__")


def main() -> int:
    missing, parameters = [], 0
    for function in public_functions():
        for name, annotated in annotations(function):
            parameters += 1
            if not annotated:
                missing.append(f"{place(function)}: {name} has no type")
    for line in sorted(set(missing)):
        print(line)
    print(f"{parameters - len(missing)} of {parameters} types are given.")
    return bool(missing)


def public_functions() -> list[types.FunctionType]:
    """Every public function and method, once."""
    queue: list[typing.Any] = [kra]
    seen: list[typing.Any] = []
    functions: list[types.FunctionType] = []
    while queue:
        value = queue.pop()
        if any(value is other for other in seen):
            continue
        seen.append(value)
        if inspect.ismodule(value):
            queue += public_values(value)
        elif inspect.isclass(value):
            queue += methods(value)
        elif inspect.isfunction(value):
            functions.append(value)
            queue += named_classes(value)
    return functions


def public_values(module: types.ModuleType) -> list:
    """What users find in a module; a folder's modules are its own affair."""
    names = getattr(module, "__all__", None)
    if names is None:
        names = [name for name in vars(module) if not name.startswith("_")]
    values = [getattr(module, name) for name in names]
    if module is not kra:
        values = [value for value in values if not inspect.ismodule(value)]
    return [value for value in values if is_ours(value)]


def methods(cls: type) -> list[types.FunctionType]:
    """Constructor, methods and properties, inherited ones included."""
    found = []
    for base in cls.__mro__:
        if not is_ours(base):
            continue
        for name, value in vars(base).items():
            if name.startswith("_") and name not in SPECIAL:
                continue
            if isinstance(value, property):
                value = value.fget
            elif isinstance(value, functools.cached_property):
                value = value.func
            elif isinstance(value, (classmethod, staticmethod)):
                value = value.__func__
            value = inspect.unwrap(value) if callable(value) else value
            if inspect.isfunction(value) and is_ours(value):
                found.append(value)
    return found


def named_classes(function: types.FunctionType) -> list[type]:
    """The package's classes in a function's annotations."""
    queue = list(typing.get_type_hints(inspect.unwrap(function)).values())
    found = []
    while queue:
        value = queue.pop()
        queue += typing.get_args(value) if not inspect.isclass(value) else ()
        if inspect.isclass(value) and is_ours(value):
            found.append(value)
    return found


def annotations(
    function: types.FunctionType,
) -> typing.Iterator[tuple[str, bool]]:
    """Names of parameters, and of the return, with whether they have a type.

    Dataclasses write their constructors, from fields that have types.
    """
    function = inspect.unwrap(function)
    signature = inspect.signature(function)
    empty = inspect.Parameter.empty
    for index, parameter in enumerate(signature.parameters.values()):
        if index == 0 and parameter.name in ("self", "cls"):
            continue
        yield f"`{parameter.name}`", parameter.annotation is not empty
    if function.__name__ != "__init__":
        yield "the return", signature.return_annotation is not empty


def is_ours(value: object) -> bool:
    if inspect.ismodule(value):
        return value.__name__.split(".")[0] == PACKAGE
    module = getattr(value, "__module__", None) or ""
    return module.split(".")[0] == PACKAGE


def place(function: types.FunctionType) -> str:
    code = inspect.unwrap(function).__code__
    file = code.co_filename.rpartition(f"{PACKAGE}/")[2]
    return f"{PACKAGE}/{file}:{code.co_firstlineno}: {function.__qualname__}"


if __name__ == "__main__":
    sys.exit(main())
