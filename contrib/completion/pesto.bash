# bash completion for pesto; made by contrib/make-docs
_pesto()
{
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]}
    if [[ $cur == '=' ]]; then cur=; elif [[ $prev == '=' ]]; then prev=${COMP_WORDS[COMP_CWORD-2]}; fi
    case $prev in
    -C|--clear) COMPREPLY=($(compgen -W "HOST SPLICE" -- "$cur")); return ;;
    -t|--tcp-ports) COMPREPLY=($(compgen -W "none auto all" -- "$cur")); return ;;
    -u|--udp-ports) COMPREPLY=($(compgen -W "none auto all" -- "$cur")); return ;;
    -T|--tcp-ns) COMPREPLY=($(compgen -W "none auto all" -- "$cur")); return ;;
    -U|--udp-ns) COMPREPLY=($(compgen -W "none auto all" -- "$cur")); return ;;
    esac
    if [[ $cur == -* ]]; then
        COMPREPLY=($(compgen -W "-A --add -D --delete -C --clear -t --tcp-ports -u --udp-ports -T --tcp-ns -U --udp-ns -s --show -d --debug -h --help --version" -- "$cur"))
    else
        compopt -o filenames 2>/dev/null; mapfile -t COMPREPLY < <(compgen -f -- "$cur")
    fi
}
complete -F _pesto pesto
