"""Shell completion of `eekd`: verbs, flags, and the values of flags that take one of a few."""

import argparse
import dataclasses
from typing import get_type_hints

from eekd import evaluate, predict
from eekd.bank import Flags as BankFlags
from eekd.compare import __main__ as compare
from eekd.compare.methods import METHODS
from eekd.export import __main__ as export
from eekd.kernels import options
from eekd.report import __main__ as report
from eekd.train.__main__ import Flags as TrainFlags
from eekd.train.checked import choices, word
from eekd.train.presets import PRESETS

SCRIPT = """\
_eekd() {{
  local verb=${{COMP_WORDS[1]}} word=${{COMP_WORDS[COMP_CWORD]}} i=$((COMP_CWORD - 1)) words=
  if [ "$COMP_CWORD" = 1 ]; then
    COMPREPLY=($(compgen -W "{verbs} --help --version" -- "$word"))
    return
  fi
  while [ $i -gt 2 ] && [[ ${{COMP_WORDS[i]}} != --* ]]; do i=$((i - 1)); done
  if [[ $word == -* ]]; then
    case $verb in
{flags}
    esac
  else
    case "$verb ${{COMP_WORDS[i]}}" in
{values}
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
COMP_WORDBREAKS=${{COMP_WORDBREAKS//:}}  # a preset has a colon
complete -o default -F _eekd eekd"""


def script(shell: str) -> str:
    """What `source <(eekd --print-completion bash)` runs; zsh runs the same, after its own start of bash's way."""
    of_verbs = {
        "train": {**_flags(TrainFlags), "--teacher": (), "--preset": tuple(PRESETS)},
        "bank": _flags(BankFlags),
        "compare": {**_flags(compare.Flags), "--methods": tuple(METHODS), "--preset": tuple(PRESETS)},
        "predict": _of(predict.PARSER),
        "evaluate": _of(evaluate.PARSER),
        "export": _of(export.PARSER),
        "report": _of(report.PARSER),
        "info": {},
        "bench": _of(options.PARSER),
    }
    flags = [
        f'      {verb}) words="{" ".join([*own_flags, "--help", "--version"])}";;'
        for verb, own_flags in of_verbs.items()
    ]
    values = [
        f'      "{verb} {flag}") words="{" ".join(map(word, words))}";;'
        for verb, own_flags in of_verbs.items()
        for flag, words in own_flags.items()
        if words
    ]
    values.append('      "train train") words="teacher student";;')
    drawn = SCRIPT.format(verbs=" ".join(of_verbs), flags="\n".join(flags), values="\n".join(values))
    return "autoload -U +X compinit bashcompinit && compinit && bashcompinit\n" * (shell == "zsh") + drawn


def _flags(kind: type, prefix: str = "") -> dict[str, tuple]:
    """The flags that tyro makes of a dataclass, with the words that each takes, () where it takes any."""
    flags, kinds = {}, get_type_hints(kind)
    for name in (field.name for field in dataclasses.fields(kind)):
        flag = prefix + name.replace("_", "-")
        if dataclasses.is_dataclass(kinds[name]):
            flags |= _flags(kinds[name], "" if name == "settings" else f"{flag}.")
        else:
            flags[f"--{flag}"] = choices(kinds[name])
            if kinds[name] is bool:
                head, dot, tail = flag.rpartition(".")
                flags[f"--{head}{dot}no-{tail}"] = ()
    return flags


def _of(parser: argparse.ArgumentParser) -> dict[str, tuple]:
    return {
        action.option_strings[-1]: tuple(action.choices or ())
        for action in parser._actions
        if action.option_strings and action.dest != "help"
    }
