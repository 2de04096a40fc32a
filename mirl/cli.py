"""The `mirl` command. A command is a Python function; the dataclass of its options is the flags and the help."""

import importlib
import json
import os
import re
import signal
import sys
from collections.abc import Sequence
from typing import Any, get_args, get_origin

from mirl.errors import UserError, in_words

# name: (where the function is, where its options are, one line). Named, not imported: help must not wait for PyTorch,
# which modules of options do without.
COMMANDS = {
    "pretrain": ("mirl.tasks.pretrain:pretrain", "mirl.tasks.settings.pretraining:Pretraining",
                 "pre-train an encoder on a folder of images"),
    "finetune": ("mirl.tasks.finetune:finetune", "mirl.tasks.settings.finetuning:Finetuning",
                 "train a classifier from an encoder"),
    "detect": ("mirl.tasks.detect:detect", "mirl.tasks.settings.detection:DetectOptions",
               "train a detector (boxes and masks) from an encoder, or use one"),
    "segment": ("mirl.tasks.segment:segment", "mirl.tasks.settings.segmentation:SegmentOptions",
                "train a segmenter (a class for each pixel) from an encoder, or use one"),
    "evaluate": ("mirl.tasks.evaluate:evaluate", "mirl.tasks.settings.evaluation:EvaluateOptions",
                 "judge a classifier, a detector or a segmenter on other images"),
    "probe": ("mirl.tasks.probe:probe", "mirl.tasks.settings.readouts:ProbeOptions",
              "linear classifier on frozen features"),
    "knn": ("mirl.tasks.knn:knn", "mirl.tasks.settings.readouts:KNNOptions",
            "nearest neighbours on frozen features"),
    "embed": ("mirl.tasks.embed:embed", "mirl.tasks.settings.features:EmbedOptions",
              "write features of a folder of images"),
    "shard": ("mirl.tasks.shard:shard", "mirl.tasks.settings.sharding:ShardOptions",
              "write images into tar shards, for slow disks and networks"),
    "reconstruct": ("mirl.analysis.reconstruct:reconstruct", "mirl.tasks.settings.reconstruction:ReconstructOptions",
                    "draw what the decoders make of masked images"),
    "diagnose": ("mirl.analysis.degradation:diagnose", "mirl.tasks.settings.diagnosis:DiagnoseOptions",
                 "which blocks learned? measures, plots, a verdict in words"),
    "report": ("mirl.reports.page:report", "mirl.reports.options:ReportOptions",
               "one page of everything about a run, or about several side by side"),
    "app": ("mirl.analysis.app:app", "mirl.tasks.settings.reconstruction:AppOptions",
            "mask images by hand in the browser and see each pair's prediction"),
    "convert": ("mirl.tasks.convert:convert", "mirl.tasks.settings.converting:ConvertOptions",
                "take weights in and out: timm, Hugging Face, ONNX, official files"),
    "doctor": ("mirl.checkup.doctor:doctor", "mirl.tasks.settings.checkup:DoctorOptions",
               "look at every image file: what is broken or odd, what to train with"),
    "info": ("mirl.analysis.cost:info", "mirl.tasks.settings.planning:InfoOptions",
             "print a model's parameters and cost"),
    "plan": ("mirl.analysis.planning:plan", "mirl.tasks.settings.planning:PlanOptions",
             "what a pre-training run will take: FLOPs, memory, hours, price"),
    "study": ("mirl.studies.study:study", "mirl.tasks.settings.studying:StudyOptions",
              "run a grid of small experiments that repeats a figure or table"),
}  # fmt: skip


def usage() -> str:
    lines = [f"  {name:<12} {line}" for name, (*_, line) in COMMANDS.items()]
    return (
        "usage: mirl COMMAND [options]\n\n" + "\n".join(lines) + "\n\n`mirl COMMAND --help` lists a command's options."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code.

    0, 1 if a process of the run was lost, 2 for a user's mistake, 128 + signal after an interruption that was saved, or
    if nobody reads the output any more, as after `mirl info vit_b_12 | head -1`.
    """
    try:
        try:
            return _main(list(sys.argv[1:] if arguments is None else arguments))
        finally:
            print(end="", flush=True)  # the interpreter's own flush, at its exit, could not be caught
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left in the buffer
        return 128 + signal.SIGPIPE


def _main(given: Sequence[str]) -> int:
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


def build_parser(name: str) -> Any:
    """Return a command's argument parser."""
    from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    _, options, line = COMMANDS[name]
    parser = ArgumentParser(prog=f"mirl {name}", description=line, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file of options; later flags override it")
    parser.add_class_arguments(_found(options), as_group=False, as_positional=True)
    return parser


def _found(place: str) -> Any:
    """Return what `place`, module:name, names."""
    module, name = place.split(":")
    return getattr(importlib.import_module(module), name)


def _run(name: str, arguments: Sequence[str]) -> None:
    from jsonargparse import ArgumentError

    parser = build_parser(name)
    try:
        values = parser.parse_args(_spell_out(parser, arguments), defaults=False).as_dict()
    except (ArgumentError, UnicodeDecodeError) as error:
        raise UserError(f"{_in_one_line(parser, error)}; see mirl {name} --help") from error
    values.pop("config", None)
    _found(COMMANDS[name][0])(**values)


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
