"""The help texts and the completion scripts of etcdlite-ctl, made from its table of commands."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import indent

from etcdlite import __version__
from etcdlite.cli.failures import PROGRAM
from etcdlite.cli.flags import ENVIRONMENT_PREFIXES, FORMATS, GLOBAL_FLAGS, HELP_FLAG, Command, Flag
from etcdlite.cli.table import COMMANDS, GROUPS, in_group
from etcdlite.notation import format_duration

FIRST_AID = f"""
  {PROGRAM} endpoint status --cluster -w table   members, leader, size of the data
  {PROGRAM} endpoint health --cluster            which members can serve
  {PROGRAM} alarm list                           NOSPACE: compact, defrag, disarm
  {PROGRAM} top                                  what is going on
  {PROGRAM} doctor                               what is wrong, and what to do
  {PROGRAM} snapshot save backup.db              before anything else is tried
"""


def _rows(rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(left) for left, _ in rows)
    return "".join(f"  {left.ljust(width)}  {right}\n" for left, right in rows)


def shown_flag(flag: Flag) -> str:
    """The names of a flag, with its default."""
    names = f"-{flag.short}, --{flag.name}" if flag.short else f"    --{flag.name}"
    default = flag.default
    if flag.kind == "duration":
        default = format_duration(int(default * 1e9))
    elif flag.kind == "list":
        default = ",".join(default)
    is_shown = default is not None and (flag.kind != "bool" or default)
    shown = f"={str(default).lower()}" if is_shown else ""
    return names + (f'="{default}"' if flag.kind == "string" else shown)


def _flag_rows(flags: Sequence[Flag]) -> str:
    return _rows([(shown_flag(flag), flag.help) for flag in flags])


def command_help(command: Command) -> str:
    parts = [
        f"NAME:\n  {command.name} - {command.help}\n",
        f"USAGE:\n  {PROGRAM} {command.usage}\n",
    ]
    if command.description:
        parts.append(f"DESCRIPTION:\n{indent(command.description, '  ')}\n")
    if command.examples:
        examples = "\n".join(f"{PROGRAM} {example}" for example in command.examples)
        parts.append(f"EXAMPLES:\n{indent(examples, '  ')}\n")
    parts.append("OPTIONS:\n" + _flag_rows((*command.flags, HELP_FLAG)))
    own = [flag.name for flag in command.flags]
    others = [flag for flag in GLOBAL_FLAGS if flag.name not in own]
    parts.append("GLOBAL OPTIONS:\n" + _flag_rows(others))
    return "\n".join(parts)


def group_help(group: str) -> str:
    rows = [(command.name.split()[1], command.help) for command in in_group(group)]
    return (
        f"NAME:\n  {group} - {GROUPS[group]}\n\nUSAGE:\n  {PROGRAM} {group} <subcommand>\n\n"
        f"COMMANDS:\n{_rows(rows)}\nMore: {PROGRAM} {group} <subcommand> --help\n"
    )


def program_help() -> str:
    rows = sorted((command.name, command.help) for command in COMMANDS)
    own, etcdctls = (f"{prefix}ENDPOINTS" for prefix in ENVIRONMENT_PREFIXES)
    return (
        f"NAME:\n  {PROGRAM} - the command line client of etcdlite\n\n"
        f"USAGE:\n  {PROGRAM} [global options] <command> [options] [arguments]\n\n"
        f"VERSION:\n  {__version__}\n\nCOMMANDS:\n{_rows(rows)}\n"
        "A unique prefix of a command's name is enough: 'mem list', 'endpoint stat'.\n\n"
        f"GLOBAL OPTIONS:\n{_flag_rows((*GLOBAL_FLAGS, HELP_FLAG))}\n"
        f"Global options can be set in the environment: {own} (or {etcdctls})\n"
        f"and so on.\n\nFIRST AID:{FIRST_AID}\nMore about a command: {PROGRAM} <command> --help\n"
    )


_COMPLETION = """{head}
_etcdlite_ctl() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" names="" flag="" is_value="" prefix="" i part
    for ((i = 1; i < COMP_CWORD; i++)); do
        part="${{COMP_WORDS[i]}}"
        if [[ "$part" == [=:]* ]]; then  # bash cuts words there
            is_value=1
        elif [[ $is_value ]]; then
            is_value=""
        elif [[ "$part" == -* ]]; then
            flag="$part"
            [[ " {valued} " == *" $part "* ]] && is_value=1
        else
            names+="${{names:+ }}$part"
        fi
    done
    [[ "$word" == [=:]* ]] && is_value=1 word=""{split}
    local choices=""
    case "$names" in
{cases}    esac
    if [[ $is_value ]]; then
        choices=""
        case "${{flag/#-w/--write-out}}" in
{values}        esac
    elif [[ "$word" == -* ]]; then
        choices+=" {global_flags}"
    elif [[ "$choices" != *" words"* ]]; then
        choices=""
    fi
    COMPREPLY=($(compgen -P "$prefix" -W "${{choices/ words/}}" -- "$word"))
}}
complete -o default -F _etcdlite_ctl etcdlite-ctl
"""

_ZSH_HEAD = "#compdef etcdlite-ctl\nautoload -U +X bashcompinit && bashcompinit"
_ZSH_SPLIT = """
    if [[ "$word" == --*=* ]]; then
        flag="${word%%=*}" prefix="${word%%=*}=" word="${word#*=}" is_value=1
    fi"""
_ZSH_FOOT = """if [[ "${funcstack[1]}" == _etcdlite-ctl ]]; then  # the first Tab reads the file
    _bash_complete -o default -F _etcdlite_ctl
fi
"""

_VALUES = {
    "write-out": " ".join(FORMATS),
    "order": "ASCEND DESCEND",
    "sort-by": "CREATE KEY MODIFY VALUE VERSION",
    "consistency": "l s",
    "load": "s m l xl",
    "format": "etcdlite etcd",
}
"""The words of each flag that accepts only a few."""

SHELLS = ("bash", "fish", "zsh")
"""Those for which there is a completion script."""


def completion_script(shell: str) -> str:
    """The script for one of `SHELLS`. zsh runs the script of bash, after its bashcompinit."""
    if shell == "fish":
        return _fish_script()
    inner: dict[str, list[str]] = {}
    cases = []
    for command in COMMANDS:
        first, _, second = command.name.partition(" ")
        inner.setdefault(first, []).extend([second] if second else [])
        if command.name == "completion":
            cases.append(f'        "completion") choices="{" ".join(SHELLS)} words" ;;\n')
        elif command.flags:
            name = command.name
            cases.append(f'        "{name}"|"{name} "*) choices="{_words(command.flags)}" ;;\n')
    seconds = [
        f'        "{first}") choices="{" ".join(names)} words" ;;\n'
        for first, names in (("", sorted(inner)), *inner.items())
        if names
    ]
    flags = [*GLOBAL_FLAGS, *(flag for command in COMMANDS for flag in command.flags)]
    switches = {flag.name for flag in flags if flag.kind == "bool"}
    valued = [flag for flag in flags if flag.name not in switches]
    spelled = [f"-{f.short}" for f in valued if f.short] + [f"--{f.name}" for f in valued]
    is_zsh = shell == "zsh"
    script = _COMPLETION.format(
        head=_ZSH_HEAD if is_zsh else "# etcdlite-ctl completion for bash",
        split=_ZSH_SPLIT if is_zsh else "",
        cases="".join(seconds + cases),
        valued=" ".join(dict.fromkeys(spelled)),
        values="".join(
            f'            --{name}) choices="{words}" ;;\n' for name, words in _VALUES.items()
        ),
        global_flags=_words((*GLOBAL_FLAGS, HELP_FLAG)),
    )
    return script + (_ZSH_FOOT if is_zsh else "")


def _words(flags: Sequence[Flag]) -> str:
    return " ".join(f"--{flag.name}" for flag in flags)


def _fish(condition: str, *switches: str, **options: str) -> str:
    line = " ".join((f'complete -c etcdlite-ctl -n "{condition}"', *switches))
    for name, value in options.items():
        quoted = value.replace("\\", "\\\\").replace("'", "\\'")
        line += f" -{name} '{quoted}'" if value else ""
    return line


def _fish_flag(condition: str, flag: Flag) -> str:
    values = _VALUES.get(flag.name, "")
    switches = () if flag.kind == "bool" else ("-x",) if values else ("-r",)
    return _fish(condition, *switches, l=flag.name, d=flag.help, s=flag.short, a=values)


def _fish_script() -> str:
    out = ["# etcdlite-ctl completion for fish", "complete -c etcdlite-ctl -f"]
    for command in COMMANDS:
        first, _, second = command.name.partition(" ")
        seen = f"__fish_seen_subcommand_from {first}"
        if second:
            others = [other.name.split()[1] for other in in_group(first)]
            lacks = f"{seen}; and not __fish_seen_subcommand_from {' '.join(others)}"
            out.append(_fish(lacks, a=second, d=command.help))
            seen += f"; and __fish_seen_subcommand_from {second}"
        else:
            out.append(_fish("__fish_use_subcommand", a=first, d=command.help))
        if "file" in command.usage:
            out.append(_fish(seen, "-F"))
        out += [_fish_flag(seen, flag) for flag in command.flags]
    out += [_fish("__fish_use_subcommand", a=first, d=text) for first, text in GROUPS.items()]
    out += [_fish_flag("true", flag) for flag in (*GLOBAL_FLAGS, HELP_FLAG)]
    out.append(_fish("__fish_seen_subcommand_from completion", a=" ".join(SHELLS)))
    return "\n".join(out) + "\n"
