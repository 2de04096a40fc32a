"""The `mirl` command. A command is a Python function: its signature and docstring are the flags and the help."""

import importlib
import re
import sys
from collections.abc import Callable, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from mirl.errors import UserError

# name: (where the function is, one line). Named, not imported: `mirl --help` must not wait for PyTorch.
COMMANDS = {
    "pretrain": ("mirl.tasks.pretrain:pretrain", "pre-train an encoder on a folder of images"),
    "finetune": ("mirl.tasks.finetune:finetune", "train a classifier from an encoder"),
    "evaluate": ("mirl.tasks.evaluate:evaluate", "judge a fine-tuned run on other images"),
    "probe": ("mirl.tasks.probe:probe", "linear classifier on frozen features"),
    "knn": ("mirl.tasks.knn:knn", "nearest neighbours on frozen features"),
    "embed": ("mirl.tasks.embed:embed", "write features of a folder of images"),
    "convert": ("mirl.tasks.convert:convert", "take weights in and out: timm, Hugging Face, ONNX, official files"),
    "info": ("mirl.analysis.cost:info", "print a model's parameters and cost"),
}


def usage() -> str:
    lines = [f"  {name:<10} {line}" for name, (_, line) in COMMANDS.items()]
    return (
        "usage: mirl COMMAND [options]\n\n" + "\n".join(lines) + "\n\n`mirl COMMAND --help` lists a command's options."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 0, 2 for a user's mistake, 128 + signal after an interruption that was saved."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if given[0] == "--version":
        print(importlib.import_module("mirl").__version__)
        return 0
    if given[0] not in COMMANDS:
        print(f"mirl: unknown command '{given[0]}'; choose one of: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    name, *rest = given
    try:
        _run(name, rest)
    except UserError as error:
        print(f"mirl {name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        return 128 + getattr(interrupt, "signal_number", 2)
    return 0


def _run(name: str, arguments: Sequence[str]) -> None:
    from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    module, function_name = COMMANDS[name][0].split(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), function_name)
    description = (function.__doc__ or "").split("\n")[0]
    parser = ArgumentParser(prog=f"mirl {name}", description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file of options; later flags override it")
    parser.add_function_arguments(function, as_group=False, as_positional=True)
    try:
        values = parser.parse_args(_spell_out_switches(parser, arguments)).as_dict()
    except (ArgumentError, UnicodeDecodeError) as error:
        raise UserError(f"{_in_one_line(parser, error)}; see mirl {name} --help") from error
    values.pop("config", None)
    function(**values)


def _in_one_line(parser: Any, error: Exception) -> str:
    """Say what the parser says, without its paragraphs and its names of types."""
    text = " ".join(str(error).split())
    wrong = re.match(r'Parser key "(\w+)": .*(?:Given|Got) value: (.*)', text)
    if not wrong:
        return text.removeprefix('Parser key "config": ')
    key, value = wrong.groups()
    hint = next(action._typehint for action in parser._actions if action.dest == key)
    return f"--{key} {value} is not allowed; give {_in_words(hint)}"


def _in_words(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_in_words(part) for part in get_args(hint) if part is not NoneType)
    words: dict[Any, str] = {
        int: "a whole number", float: "a number", str: "text", bool: "true or false",
        list[int]: "a list such as [4,12]", tuple[int, int]: "[height,width]",
    }  # fmt: skip
    return words.get(hint, str(hint))


def _spell_out_switches(parser: Any, arguments: Sequence[str]) -> list[str]:
    """Let `--resume` stand for `--resume true`: the parser wants a value for every bool."""
    switches = {f"--{action.dest}" for action in parser._actions if getattr(action, "_typehint", None) is bool}
    result = []
    for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
        bare = argument in switches and following.lower() not in ("true", "false")
        result.append(f"{argument}=true" if bare else argument)
    return result


if __name__ == "__main__":
    sys.exit(main())
