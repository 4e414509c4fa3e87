"""``kvservice completion``: a script with which bash and zsh complete commands, flags and file names."""

from __future__ import annotations

from kvservice.config_sources import SETTINGS, flag_name

_COMMANDS = {
    "serve": ("--help", "--config", *map(flag_name, SETTINGS)),
    "config": ("--help", "--json", "--config", *map(flag_name, SETTINGS)),
    "check": ("--help", "--json", "--repair", "--rebuild", "--ssd-file"),
    "remove": ("--help", "--json", "--yes"),
    "arenas": ("--help", "--remove-orphans", "--yes", "--json"),
    "completion": (),
}

_SCRIPT = """\
# For bash; in zsh after: autoload -U bashcompinit && bashcompinit
_kvservice() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} words
    case "$COMP_CWORD:${{COMP_WORDS[1]}}" in
        1:*) words="{commands} --help --version" ;;
{cases}
    esac
    COMPREPLY=($(compgen -W "$words" -- "$word"))
    [[ $word == -* || $COMP_CWORD -eq 1 ]] || COMPREPLY=($(compgen -f -- "$word"))
}}
complete -o filenames -F _kvservice kvservice
"""


def script() -> str:
    cases = "\n".join(f'        *:{name}) words="{" ".join(flags)}" ;;' for name, flags in _COMMANDS.items())
    return _SCRIPT.format(commands=" ".join(_COMMANDS), cases=cases)
