"""``keymgmt completion``: let the shell complete commands, options, providers and keys."""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated, Final, Literal, NoReturn

import typer
from typer import _completion_classes
from typer import _completion_shared as scripts

from keymgmt.cli._options import Json
from keymgmt.console import print_json, say
from keymgmt.errors import KeymgmtError

__all__ = ["complete", "completion"]

# In bash a colon or = ends a word and an @ begins one, so typer's own script takes `local:models`
# for three words. This script takes the text as it was typed, and removes the words before.
_BASH: Final = """
%(complete_func)s() {
    local IFS=$' \\t\\n' line="${COMP_LINE:0:COMP_POINT}" word="" prefix=""
    local -a words
    read -ra words <<< "$line"
    local count=${#words[@]}
    [[ $line == *[[:space:]] ]] || { word="${words[count-1]}"; count=$((count - 1)); }
    local value="${word#--*=}" rest="${word#--*=}"
    [[ $COMP_WORDBREAKS == *:* ]] && rest="${rest##*:}"
    [[ $COMP_WORDBREAKS == *@* && $rest == *@* ]] && rest="@${rest##*@}"
    prefix="${value%%"$rest"}"
    IFS=$'\\n'
    COMPREPLY=( $( env COMP_WORDS="$line" COMP_CWORD="$count" \\
                   %(autocomplete_var)s=complete_bash "$1" ) )
    COMPREPLY=( "${COMPREPLY[@]#"$prefix"}" )
    [[ ${COMPREPLY[0]} == *[:/] ]] && compopt -o nospace
    return 0
}

complete -o default -F %(complete_func)s %(prog_name)s
"""
# typer's own script for zsh drops apostrophes, and offers nothing after an equals sign or at the
# first Tab of a session.
_ZSH: Final = r"""
#compdef %(prog_name)s

%(complete_func)s() {
    local -a found rows
    local each
    found=("${(@f)$(env _TYPER_COMPLETE_ARGS="${words[1,$CURRENT]}" \
        _TYPER_COMPLETE_FISH_ACTION=get-args %(autocomplete_var)s=complete_fish %(prog_name)s)}")
    compset -P '--*='
    if [[ -z $found[1] ]]; then
        _files
        return
    fi
    for each in $found; do
        rows+=("${${each%%%%$'\t'*}//:/\\:}${${(M)each%%$'\t'*}/$'\t'/:}")
    done
    _describe '' rows
}

compdef %(complete_func)s %(prog_name)s
[[ $funcstack[1] != _%(prog_name)s ]] || %(complete_func)s
"""
# In fish a candidate begins with the whole word, `--to=` included; typer's own script offers
# nothing after an equals sign, and starts this program twice.
_FISH: Final = r"""
function %(complete_func)s
    set --local word (commandline --current-token --cut-at-cursor | string collect)
    set --local option (string match --regex -- '^--[^=]+=' $word; or echo)
    set --local found (env _TYPER_COMPLETE_ARGS=(commandline --cut-at-cursor --current-process \
        | string collect) _TYPER_COMPLETE_FISH_ACTION=get-args \
        %(autocomplete_var)s=complete_fish %(prog_name)s | string match --regex -- '.+')
    if not count $found >/dev/null
        set found (__fish_complete_path (string replace -- "$option" '' $word))
    end
    string replace --regex -- '^' "$option" $found
end

complete --command %(prog_name)s --no-files --arguments '(%(complete_func)s)'
"""
scripts._completion_scripts |= {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


def complete(app: typer.Typer) -> NoReturn:
    """Answer a shell that asks, in the environment, what the next word may be; and exit."""
    # This makes typer understand the request of each shell, and answer in plain text.
    _completion_classes.completion_init()
    setattr(_completion_classes, "_sanitize_help_text", str)  # noqa: B010 - or it imports rich
    # The command reports errors when it runs; they must not appear in the line that is typed.
    with contextlib.suppress(KeymgmtError):
        app([], prog_name="keymgmt")
    sys.exit()


def completion(
    shell: Annotated[
        Literal["bash", "zsh", "fish"], typer.Argument(metavar="bash|zsh|fish", help="The shell.")
    ],
    install: Annotated[
        bool, typer.Option("--install", help="Install it in this user's home directory.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Print the script with which a shell completes commands, options, providers and keys.

    Examples:
        keymgmt completion bash --install
        keymgmt completion zsh
    """
    names = {"prog_name": "keymgmt", "complete_var": "_KEYMGMT_COMPLETE", "shell": str(shell)}
    script_file = str(scripts.install(**names)[1]) if install else None
    script = scripts.get_completion_script(**names)
    if as_json:
        print_json({"format": "keymgmt-completion/1", "script": script, "file": script_file})
    elif script_file is None:
        typer.echo(script)
    else:
        say(f"installed {script_file}; a new shell uses it")
