"""A command that refuses repeated options and empty values."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand

from galore_trainer.cli.outcome import interrupted
from galore_trainer.errors import OptionError


class OptionsOnce(TyperCommand):
    """Refuses ``--rank 4 --rank 5``, of which the parser would take the last, and ``--resume ''``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words of a command line.

        Raises:
            OptionError: an option that is given twice, or an empty value of an option or an argument.
        """
        values, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for parameter in () if ctx.resilient_parsing else order:
            value, option = values.get(parameter.name), parameter.param_type_name == "option"
            name = parameter.opts[-1] if option else parameter.metavar or parameter.name.upper()
            if option and (count := order.count(parameter)) > 1:
                raise OptionError(name, f"given {count} times", "it once", "Remove all but one.")
            for text in value if isinstance(value, list | tuple) else [value]:
                if isinstance(text, str) and not text.strip():
                    raise OptionError(name, text, "a value", f"Write one after {name}, or leave {name} out." * option)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; Ctrl-C ends it in one word under every version of the parser."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(interrupted()) from None
