"""A settings field whose class is chosen by an import path, so that a method can live in anybody's folder.

    [source]
    use = "my_folder.sources:Shuffled"     # a subclass of the field's base; left out: the field's default class
    path = "data/"                         # that class's own settings, checked like all others

The chosen class is a `Settings` whose `build` method makes the noun: no registry of names stands between.
"""

from __future__ import annotations

import importlib
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from resilin.config.settings import Settings, closest


def use_path(cls: type[Settings]) -> str:
    """The `use` value that names a settings class."""
    return f"{cls.__module__}:{cls.__qualname__}"


def _load_class(use: object, base: type[Settings]) -> type[Settings]:
    module_name, _, class_name = use.partition(":") if isinstance(use, str) else ("", "", "")
    if not all(part.isidentifier() for name in (module_name, class_name) for part in name.split(".")):
        raise PydanticCustomError(
            "use_form",
            "{use} should be an import path of the form 'package.module:Class'",
            {"use": repr(use)},
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise PydanticCustomError(
            "use_module",
            "module {module} cannot be imported ({reason}); run the command in its folder, or put that on PYTHONPATH",
            {"module": repr(module_name), "reason": str(error)},
        ) from None
    except Exception as error:  # the user's own module may raise anything while it is imported
        raise PydanticCustomError(
            "use_module",
            "module {module} fails while it is imported: {reason}",
            {"module": repr(module_name), "reason": f"{type(error).__name__}: {error}"},
        ) from error
    found: object = module
    for name in class_name.split("."):
        found = getattr(found, name, None)
    if not (isinstance(found, type) and issubclass(found, base)):
        offers = [
            name
            for name, value in vars(module).items()
            if isinstance(value, type) and issubclass(value, base) and value is not base
        ]
        near = closest(class_name, offers)
        raise PydanticCustomError(
            "use_class",
            "{use} should name a subclass of {base}; module {module} offers: {offers}{hint}",
            {
                "use": repr(use),
                "base": base.__name__,
                "module": module_name,
                "offers": ", ".join(offers) or "none",
                "hint": f"; did you mean {near!r}?" if near else "",
            },
        )
    return found


class component:  # noqa: N801  # read in annotations, beside lower-case `int` and `str`
    """Marks a settings field whose class is chosen by `use`: `Annotated[SourceSettings, component("package:Class")]`.

    A table of settings, whose optional `use` key picks the class, becomes that class's instance; when written out
    again, `use` is always named.

    Args:
        default: `use` path of the class taken when the settings name none.
    """

    def __init__(self, default: str):
        self.default = default

    def __get_pydantic_core_schema__(self, base: type[Settings], handler: GetCoreSchemaHandler) -> CoreSchema:
        def read(value: object) -> object:
            if isinstance(value, base):
                return value
            if not isinstance(value, dict):
                raise PydanticCustomError("table", "should be a table of settings", {})
            rest = {key: item for key, item in value.items() if key != "use"}
            return _load_class(value.get("use", self.default), base).model_validate(rest)

        def write(value: Settings) -> dict[str, Any]:
            return {"use": use_path(type(value)), **value.model_dump(mode="json")}

        return core_schema.no_info_before_validator_function(
            read,
            core_schema.is_instance_schema(base),
            serialization=core_schema.plain_serializer_function_ser_schema(write),
        )
