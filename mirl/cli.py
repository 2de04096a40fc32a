"""The `mirl` command. A command is a Python function: its signature and docstring are the flags and the help."""

import ast
import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from mirl.errors import UserError, in_words

# name: (where the function is, one line). Named, not imported: `mirl --help` must not wait for PyTorch.
COMMANDS = {
    "pretrain": ("mirl.tasks.pretrain:pretrain", "pre-train an encoder on a folder of images"),
    "finetune": ("mirl.tasks.finetune:finetune", "train a classifier from an encoder"),
    "detect": ("mirl.tasks.detect:detect", "train a detector (boxes and masks) from an encoder, or use one"),
    "segment": ("mirl.tasks.segment:segment", "train a segmenter (a class for each pixel) from an encoder, or use one"),
    "evaluate": ("mirl.tasks.evaluate:evaluate", "judge a classifier, a detector or a segmenter on other images"),
    "probe": ("mirl.tasks.probe:probe", "linear classifier on frozen features"),
    "knn": ("mirl.tasks.knn:knn", "nearest neighbours on frozen features"),
    "embed": ("mirl.tasks.embed:embed", "write features of a folder of images"),
    "shard": ("mirl.tasks.shard:shard", "write images into tar shards, for slow disks and networks"),
    "reconstruct": ("mirl.analysis.reconstruct:reconstruct", "draw what the decoders make of masked images"),
    "diagnose": ("mirl.analysis.degradation:diagnose", "which blocks learned? measures, plots, a verdict in words"),
    "report": ("mirl.reports.page:report", "one page of everything about a run, or about several side by side"),
    "app": ("mirl.analysis.app:app", "mask images by hand in the browser and see each pair's prediction"),
    "convert": ("mirl.tasks.convert:convert", "take weights in and out: timm, Hugging Face, ONNX, official files"),
    "doctor": ("mirl.checkup.doctor:doctor", "look at every image file: what is broken or odd, what to train with"),
    "info": ("mirl.analysis.cost:info", "print a model's parameters and cost"),
    "plan": ("mirl.analysis.planning:plan", "what a pre-training run will take: FLOPs, memory, hours, price"),
    "study": ("mirl.studies.study:study", "run a grid of small experiments that repeats a figure or table"),
}
# Where a command takes `**options`: the dataclass of them, in a module that needs no PyTorch.
OPTIONS = {
    "pretrain": "mirl.tasks.settings.pretraining:Pretraining",
    "finetune": "mirl.tasks.settings.finetuning:Finetuning",
    "detect": "mirl.tasks.settings.detection:Detection",
    "segment": "mirl.tasks.settings.segmentation:Segmentation",
    "evaluate": "mirl.tasks.settings.evaluation:EvaluateOptions",
    "probe": "mirl.tasks.settings.readouts:ProbeOptions",
    "knn": "mirl.tasks.settings.readouts:KNNOptions",
    "embed": "mirl.tasks.settings.features:EmbedOptions",
    "diagnose": "mirl.tasks.settings.diagnosis:DiagnoseOptions",
    "plan": "mirl.tasks.settings.planning:PlanOptions",
}


def usage() -> str:
    lines = [f"  {name:<12} {line}" for name, (_, line) in COMMANDS.items()]
    return (
        "usage: mirl COMMAND [options]\n\n" + "\n".join(lines) + "\n\n`mirl COMMAND --help` lists a command's options."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code.

    0, 1 if a process of the run was lost, 2 for a user's mistake, 128 + signal after an interruption that was saved.
    """
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
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        return 128 + getattr(interrupt, "signal_number", 2)
    return 0


def build_parser(name: str) -> tuple[Any, Callable[..., Any]]:
    """Return a command's argument parser and its function, which may be imported only when it is called."""
    from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    place = COMMANDS[name][0]
    function = _signature(place)
    description = (function.__doc__ or "").split("\n")[0]
    parser = ArgumentParser(prog=f"mirl {name}", description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file of options; later flags override it")
    parser.add_function_arguments(function, as_group=False, as_positional=True)
    if name in OPTIONS:
        parser.add_class_arguments(_found(OPTIONS[name]), as_group=False)
    return parser, lambda **options: _found(place)(**options)


def _found(place: str) -> Any:
    """Return what `place`, module:name, names."""
    module, name = place.split(":")
    return getattr(importlib.import_module(module), name)


def _signature(place: str) -> Callable[..., None]:
    """Return a function that has a command's docstring and parameters, but its `**options`, and does nothing.

    It is made from the source, because importing the command's module would load PyTorch. Of that module it takes the
    imports and assignments that the types of parameters need, and no others.
    """
    module, name = place.split(":")
    spec = importlib.util.find_spec(module)
    assert spec and spec.origin, module
    statements = ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body
    (function,) = (node for node in statements if isinstance(node, ast.FunctionDef) and node.name == name)
    function.body, function.returns, function.args.kwarg = function.body[:1], None, None
    needed: list[ast.stmt] = [function]
    for statement in reversed(statements[: statements.index(function)]):
        if _bound(statement) & {node.id for part in needed for node in ast.walk(part) if isinstance(node, ast.Name)}:
            needed.insert(0, statement)
    namespace: dict[str, Any] = {"__name__": name}  # not the module's, which jsonargparse would import
    exec(compile(ast.Module(needed, []), spec.origin, "exec"), namespace)
    return namespace[name]


def _bound(statement: ast.stmt) -> set[str]:
    """Return the names that an import or an assignment binds."""
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name for alias in statement.names}
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _run(name: str, arguments: Sequence[str]) -> None:
    from jsonargparse import ArgumentError

    parser, function = build_parser(name)
    try:
        values = parser.parse_args(_spell_out(parser, arguments), defaults=False).as_dict()
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
    return f"--{key} {value} is not allowed; give {in_words(hint)}"


def _spell_out(parser: Any, arguments: Sequence[str]) -> list[str]:
    """Write arguments as the parser wants them: `--resume` as `--resume=true`, `--images a b` as a JSON list."""
    hints = {(action.option_strings or [action.dest])[0]: getattr(action, "_typehint", None)
             for action in parser._actions}  # fmt: skip
    many = next((hint for name, hint in hints.items() if not name.startswith("-") and _is_list(hint)), None)
    result: list[str] = []
    loose: list[str] = []  # values without a flag, of one parameter: a list, or a run that a command can do without
    optional_run = "--run" in hints and not any(not name.startswith("-") for name in hints)
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        name, equals, value = argument.partition("=")
        if not argument.startswith("-"):
            (loose if many or optional_run else result).append(argument)
        elif _is_list(hints.get(name)):
            values = [value] if equals else []
            while not equals and waiting and not waiting[0].startswith("--"):
                values.append(waiting.pop(0))
            result.append(f"{name}={_as_list(values, hints[name])}" if values else name)
        elif equals or bool in (hints.get(name), *get_args(hints.get(name))):
            bare = not equals and (not waiting or waiting[0].lower() not in ("true", "false"))
            result.append(f"{argument}=true" if bare else argument if equals else f"{argument}={waiting.pop(0)}")
        else:
            result += [argument, *waiting[:1]]
            waiting = waiting[1:]
    if optional_run and len(loose) > 1:
        raise UserError(
            f"one run can be given, but {len(loose)} arguments have no flag: {loose[0]}, {loose[1]}"
            f"{', ...' if loose[2:] else ''}; for several files, give their folder or quote the pattern"
        )
    if optional_run:  # no positional parameter, but given like one
        return [*result, *(f"--run={run}" for run in loose)]
    return [_as_list(loose, many), *result] if loose else result


def _is_list(hint: Any) -> bool:
    return get_origin(hint) is list or any(_is_list(part) for part in get_args(hint))


def _as_list(values: Sequence[str], hint: Any) -> str:
    """Write values as JSON; one that is a list already, or that need not be one, stays as it is."""
    alone_will_do = get_origin(hint) is not list and {int, str} & set(get_args(hint))
    if len(values) == 1 and (values[0].startswith("[") or values[0] == "null" or alone_will_do):
        return values[0]
    return json.dumps(list(values)) if list[str] in (hint, *get_args(hint)) else f"[{','.join(values)}]"


if __name__ == "__main__":
    sys.exit(main())
