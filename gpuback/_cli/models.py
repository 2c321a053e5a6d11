"""A model's file: the network, and the schema that says what its inputs and outputs are."""

from __future__ import annotations

from typing import NamedTuple

from gpuback import MLP
from gpuback.datasets import Schema
from gpuback.errors import FileFormatError, OptionError


class Model(NamedTuple):
    """A network, and its schema if the file has one."""

    path: str
    net: MLP
    schema: Schema | None

    @property
    def required_schema(self) -> Schema:
        """The schema.

        Raises:
            OptionError: there is none.
        """
        if self.schema is None:
            raise OptionError(f"{self.path}: expected a model with a schema, as gpuback train saves it, found none")
        return self.schema


def load_model(path: str, backend: str = "auto") -> Model:
    """Read a model's file.

    Raises:
        FileFormatError: it is damaged, or network and schema are not of one size.
        OSError: as `open`.
    """
    net = MLP.load(path, backend)
    schema = Schema.load(path)
    if schema is not None:
        outputs = {schema.n_outputs, 1} if len(schema.classes) == 2 else {schema.n_outputs}
        if net.sizes[0] != schema.n_inputs or net.sizes[-1] not in outputs:
            raise FileFormatError(
                f"{path}: expected a network with {schema.n_inputs} inputs and {schema.n_outputs} outputs, as its"
                f" schema has them, found sizes {net.sizes}"
            )
    return Model(path, net, schema)
